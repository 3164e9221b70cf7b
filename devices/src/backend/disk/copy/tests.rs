use std::{fs, path::PathBuf, sync::mpsc::channel, thread};

use vmm_sys_util::tempdir::TempDir;

use super::*;
use crate::backend::disk::{
    Aio, ChangeKind, Op, OpenOptions, Outcome, Storage,
    tests::{run, storage},
};

const IMAGE: usize = 8 << 20;
const WRITE: Op = Op::Write { durable: false };
const PAGE: &[(u64, u32)] = &[(0x10_0000, 4096)];

/// A disk with data, holes, and a partial last sector; and a file to copy it to.
fn prepared(aio: Aio) -> (TempDir, Arc<Disk>, Storage<u32>, PathBuf, File) {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("image");
    let image = File::create(&path).unwrap();
    image.set_len(IMAGE as u64 + 100).unwrap();
    for (n, at) in (0..IMAGE).step_by(4096).enumerate() {
        // Two of eight MiB are holes.
        if !matches!(at >> 20, 2 | 5) {
            image.write_all_at(&[1 + (n % 200) as u8; 4096], at as u64).unwrap();
        }
    }
    let options = OpenOptions { discard: true, aio, ..OpenOptions::default() };
    let disk = Arc::new(Disk::open(&path, &options).unwrap());
    let (_, storage) = storage(&disk);
    let to = dir.as_path().join("copy");
    let file = File::options().read(true).write(true).create_new(true).open(&to).unwrap();
    (dir, disk, storage, to, file)
}

/// Pseudo-random numbers below `below` (a linear congruential generator).
fn prng(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed;
    move |below| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    }
}

#[test]
fn a_copy_is_of_its_moment_whatever_the_guest_does_meanwhile() {
    for (aio, seed) in [(Aio::Auto, 1), (Aio::Off, 2), (Aio::Auto, 3)] {
        let (_dir, disk, mut storage, to, file) = prepared(aio);
        run(&mut storage, WRITE, 0, PAGE).unwrap();
        let then = fs::read(disk.path()).unwrap();
        let copy = DiskCopy::new(disk.clone());
        copy.begin();
        let (step, steps) = channel();
        let maker = copy.clone();
        let made = thread::spawn(move || {
            maker.make(&file, |Step { done, .. }| {
                step.send(done).unwrap();
                Ok(())
            })
        });
        let mut roll = prng(seed);
        let mut changes = 0;
        while !made.is_finished() || changes < 200 {
            let (at, len) = (roll(IMAGE as u64 / 4096) * 4096, 4096 * (1 + roll(40)));
            let len = len.min(IMAGE as u64 - at);
            let op = match roll(4) {
                0 => Op::Discard { len },
                1 => Op::WriteZeroes { len, unmap: true, durable: false },
                _ => WRITE,
            };
            run(&mut storage, op, at, if op == WRITE { PAGE } else { &[] }).unwrap();
            changes += 1;
        }
        assert_eq!(made.join().unwrap().unwrap(), CopyMethod::Copied, "no reflink where tests run");
        assert!(fs::read(&to).unwrap() == then, "seed {seed}");
        assert!(fs::read(disk.path()).unwrap() != then, "the guest has changed it since");
        assert_eq!(steps.iter().sum::<u64>(), IMAGE as u64 + 100);
        assert_eq!(copy.stalled(), None);
    }
}

#[test]
fn holes_stay_holes_and_zeros_become_some() {
    use std::os::unix::fs::MetadataExt;
    let (_dir, disk, _storage, to, file) = prepared(Aio::Auto);
    let image = File::options().write(true).open(disk.path()).unwrap();
    image.write_all_at(&vec![0; 1 << 20], 3 << 20).unwrap();
    let copy = DiskCopy::new(disk.clone());
    copy.begin();
    copy.make(&file, |_| Ok(())).unwrap();
    let room = to.metadata().unwrap().blocks() * 512;
    assert!(room <= 5 * (1 << 20) + (64 << 10), "{room} bytes for 5 MiB of data");
    assert_eq!(fs::read(&to).unwrap(), fs::read(disk.path()).unwrap());
}

#[test]
fn changes_wait_until_what_they_replace_is_copied_and_no_longer() {
    let (_dir, disk, mut storage, _, file) = prepared(Aio::Auto);
    let copy = DiskCopy::new(disk.clone());
    let change = |at: u64| Change { kind: ChangeKind::Write, range: at..at + 4096 };
    assert_eq!(copy.before(&change(0)).unwrap(), Verdict::Retire, "nothing has begun");
    copy.begin();
    let last = IMAGE as u64 - 4096;
    assert_eq!(copy.before(&change(last)).unwrap(), Verdict::Wait);
    assert!(copy.stalled().is_some());
    let parts =
        [crate::virtio::chain::Segment { addr: vm_memory::GuestAddress(0x10_0000), len: 4096 }];
    assert!(matches!(storage.start(WRITE, last, &parts, 7), Outcome::Delayed));
    let mut seen = Vec::new();
    copy.make(&file, |step| {
        seen.push((step.done, copy.before(&change(last))?, copy.before(&change(1 << 20))?));
        Ok(())
    })
    .unwrap();
    // Requested out of turn after the first piece was read; the next piece is the requested one.
    let wanted = seen.iter().position(|(_, last, _)| *last == Verdict::Start).unwrap();
    assert!(wanted <= 2, "copied as step {wanted}");
    assert_eq!(copy.before(&change(last)).unwrap(), Verdict::Retire);
    run(&mut storage, WRITE, last, PAGE).unwrap();
}

#[test]
fn a_copy_that_is_given_up_or_fails_holds_nothing() {
    let (_dir, disk, mut storage, _, file) = prepared(Aio::Auto);
    let copy = DiskCopy::new(disk.clone());
    copy.begin();
    copy.abandon();
    run(&mut storage, WRITE, 0, PAGE).unwrap();
    let why = copy.make(&file, |_| Ok(())).unwrap_err();
    assert_eq!(why.kind(), io::ErrorKind::Interrupted);
    copy.begin();
    run(&mut storage, WRITE, 0, PAGE).unwrap();

    let copy = DiskCopy::new(disk.clone());
    copy.begin();
    let full = || io::Error::from(io::ErrorKind::StorageFull);
    let why = copy.make(&file, |_| Err(full())).unwrap_err();
    assert_eq!(why.kind(), io::ErrorKind::StorageFull);
    run(&mut storage, WRITE, 0, PAGE).unwrap();
    assert!(!disk.observers.any(), "it is detached");
}

#[test]
fn a_copy_has_the_generation_of_its_moment() {
    let (_dir, disk, mut storage, to, file) = prepared(Aio::Auto);
    run(&mut storage, WRITE, 0, PAGE).unwrap();
    let saved = disk.mark().unwrap();
    let copy = DiskCopy::new(disk.clone());
    copy.begin();
    copy.make(&file, |_| Ok(())).unwrap();
    run(&mut storage, WRITE, 4096, PAGE).unwrap();
    let mark = copy.seal(&file).unwrap();
    assert_eq!((mark.generation, mark.size), (saved.generation, saved.size));
    assert_eq!(mark, DiskMark::of(&File::open(&to).unwrap()).unwrap());
    drop((storage, copy, disk));
    let child = Disk::open(&to, &OpenOptions::default()).unwrap();
    child.check_mark(&saved, true).unwrap();
}

#[test]
fn what_is_missing_is_found_a_word_at_a_time() {
    let mut clusters = Clusters::new(200 * CLUSTER - 1, false).unwrap();
    assert_eq!(clusters.missing(&(0..200)), Some(0));
    clusters.copied(&(0..64 * CLUSTER));
    assert_eq!(clusters.missing(&(0..200)), Some(64));
    assert_eq!(clusters.missing(&(3..64)), None);
    clusters.copied(&(65 * CLUSTER..190 * CLUSTER));
    assert_eq!(clusters.missing(&(65..200)), Some(190));
    assert!(clusters.want(&(64 * CLUSTER..400 * CLUSTER)) && clusters.want(&(0..65 * CLUSTER)));
    assert_eq!(
        clusters.wanted,
        std::slice::from_ref(&(64..200)),
        "the second is part of the first"
    );
    assert_eq!(clusters.copied(&(64 * CLUSTER..65 * CLUSTER)), (CLUSTER, false));
    assert_eq!(clusters.copied(&(0..65 * CLUSTER)), (0, false), "again");
    assert_eq!(clusters.wanted, std::slice::from_ref(&(190..200)));
    assert_eq!(clusters.copied(&(190 * CLUSTER..200 * CLUSTER)), (10 * CLUSTER - 1, true));
    assert!(!clusters.want(&(0..u64::MAX)), "what lies beyond is not copied");
}
