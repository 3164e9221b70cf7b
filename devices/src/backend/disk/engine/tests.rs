use std::{fs, path::Path};

use vm_memory::GuestAddress;
use vmm_sys_util::tempdir::TempDir;

use super::*;
use crate::{
    backend::disk::{Aio, OpenOptions},
    testing::memory,
};

/// Always goes through the ring, and costs the host nothing.
const PUNCH_64_MIB: Op = Op::WriteZeroes { len: 64 << 20, unmap: true, durable: false };

fn engine(dir: &TempDir) -> Engine<u32> {
    engine_on(&dir.as_path().join("image"))
}

fn engine_on(path: &Path) -> Engine<u32> {
    fs::write(path, vec![7; 1 << 20]).unwrap();
    let options = OpenOptions { discard: true, aio: Aio::IoUring, ..OpenOptions::default() };
    let disk = Disk::open(path, &options).unwrap();
    Engine::new(Arc::new(disk), memory(), 8)
}

fn one(engine: &mut Engine<u32>) -> u32 {
    loop {
        if let Some((tag, result)) = engine.finished() {
            result.unwrap();
            return tag;
        }
        assert!(engine.wait(None));
    }
}

#[test]
fn a_few_large_requests_fill_an_engine_as_many_small_ones_do() {
    let dir = TempDir::new().unwrap();
    let mut engine = engine(&dir);
    assert!(engine.start(PUNCH_64_MIB, 0, &[], 1).is_none());
    assert!(!engine.has_room(), "a pause or reset waits for requests in flight");
    assert_eq!(one(&mut engine), 1);
    assert!(engine.has_room());
}

#[test]
fn ranges_and_large_requests_are_left_to_the_ring() {
    const LEN: u64 = 512 << 10;
    let dir = TempDir::new().unwrap();
    // On tmpfs zeroes have to be written.
    let in_memory = TempDir::new_in(Path::new("/dev/shm")).unwrap();
    for dir in [&dir, &in_memory] {
        let path = dir.as_path().join("image");
        let mut engine = engine_on(&path);
        for (unmap, durable) in [(false, false), (false, true), (true, false), (true, true)] {
            fs::write(&path, vec![7; 1 << 20]).unwrap();
            let op = Op::WriteZeroes { len: LEN, unmap, durable };
            assert!(engine.start(op, 4096, &[], 3).is_none(), "nothing of it is done at once");
            assert_eq!(one(&mut engine), 3);
            let image = fs::read(&path).unwrap();
            let (begin, rest) = image.split_at(4096);
            let (zeroes, end) = rest.split_at(LEN as usize);
            assert!(begin.iter().chain(end).all(|b| *b == 7), "{op:?}");
            assert!(zeroes.iter().all(|b| *b == 0), "{op:?}");
        }
        assert!(engine.start(Op::Discard { len: LEN }, 0, &[], 4).is_none());
        assert_eq!(one(&mut engine), 4);
        let segment = Segment { addr: GuestAddress(0), len: LARGE as u32 + 512 };
        fs::write(&path, vec![7; 8 << 20]).unwrap();
        for op in [Op::Read, Op::Write { durable: false }] {
            assert!(engine.start(op, 0, &[segment], 5).is_none(), "{op:?}");
            assert_eq!(one(&mut engine), 5);
        }
    }
}

#[test]
fn a_request_that_the_kernel_refuses_does_not_hold_up_those_behind_it() {
    let dir = TempDir::new().unwrap();
    let mut engine = engine(&dir);
    let bad = opcode::Fsync::new(types::Fd(0)).flags(types::FsyncFlags::from_bits_retain(1 << 7));
    let bad = bad.build().user_data(u64::MAX);
    // SAFETY: refused for its flags, and refers to no memory.
    unsafe { engine.ring.as_mut().unwrap().submission().push(&bad) }.unwrap();
    assert!(engine.start(PUNCH_64_MIB, 0, &[], 2).is_none());
    engine.submit();
    assert!(engine.ring.as_mut().unwrap().submission().is_empty(), "the kernel has them all");
    assert_eq!(one(&mut engine), 2);
}

#[test]
fn what_the_host_could_not_do_just_now_is_tried_again() {
    let mut transfer = Transfer { op: Op::Read, left: 512, ..Transfer::default() };
    for busy in [libc::EINTR, libc::EAGAIN] {
        assert!(transfer.completed(-busy).is_none(), "{busy}");
    }
    let failed = transfer.completed(-libc::EIO).unwrap().unwrap_err();
    assert_eq!(failed.raw_os_error(), Some(libc::EIO));
}
