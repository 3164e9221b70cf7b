use std::{
    fs,
    os::unix::{fs::symlink, net::UnixListener},
    sync::Arc,
};

use rustix::fs::{CWD, Mode, mkfifoat};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::tempdir::TempDir;

use super::*;
use crate::{testing::memory, virtio::chain::Segment};

const RW: OpenOptions =
    OpenOptions { readonly: false, direct: false, discard: true, aio: Aio::Auto, probe: false };
const RO: OpenOptions = OpenOptions { readonly: true, ..RW };

fn file(dir: &TempDir, bytes: usize) -> PathBuf {
    let path = dir.as_path().join("image");
    fs::write(&path, vec![7; bytes]).unwrap();
    path
}

fn refusal(path: &Path, options: &OpenOptions) -> String {
    Disk::open(path, options).unwrap_err().to_string()
}

#[test]
fn only_files_and_block_devices_are_disks() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.as_path().join(name);
    // Not by a command: its process would hold descriptors that other tests expect to be closed.
    mkfifoat(CWD, at("fifo"), Mode::RWXU).unwrap();
    let _listener = UnixListener::bind(at("socket")).unwrap();
    symlink(at("fifo"), at("link")).unwrap();
    for options in [RW, RO] {
        for (path, kind) in [
            (at("fifo"), "a FIFO"),
            (at("link"), "a FIFO"),
            (at("socket"), "a socket"),
            (dir.as_path().to_owned(), "a directory"),
            ("/dev/zero".into(), "a character device"),
            ("/proc/self/mem".into(), "a file of procfs"),
        ] {
            let said = refusal(&path, &options);
            let expected =
                format!("{} is {kind}; a disk is a regular file or a block device", path.display());
            assert_eq!(said, expected);
        }
    }
}

#[test]
fn a_missing_image_is_named_with_the_command_that_makes_it() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("absent");
    let said = refusal(&path, &RW);
    assert_eq!(
        said,
        format!("{0} does not exist; make an empty image with: truncate -s 1G {0}", path.display())
    );
    let through_a_file = file(&dir, 512).join("more");
    assert!(refusal(&through_a_file, &RW).contains("readonly=on"));
}

#[test]
fn one_writer_or_many_readers() {
    let dir = TempDir::new().unwrap();
    let path = file(&dir, 4096);
    let writer = Disk::open(&path, &RW).unwrap();
    for options in [RW, RO] {
        assert!(matches!(Disk::open(&path, &options), Err(DiskError::InUse { .. })));
    }
    let said = refusal(&path, &RW);
    assert!(said.contains("image is in use by another machine") && said.contains("readonly=on"));
    drop(writer);
    let reader = Disk::open(&path, &RO).unwrap();
    let _second = Disk::open(&path, &RO).unwrap();
    assert!(matches!(Disk::open(&path, &RW), Err(DiskError::InUse { .. })));
    drop((reader, _second));
    Disk::open(&path, &RW).unwrap();
}

#[test]
fn sizes_are_rounded_down_to_blocks() {
    let dir = TempDir::new().unwrap();
    for (bytes, size) in [(0, 0), (511, 0), (512, 512), (513, 512), (1_000_000, 999_936)] {
        let disk = Disk::open(&file(&dir, bytes), &RW).unwrap();
        assert_eq!(disk.size(), size, "{bytes}");
    }
}

#[test]
fn an_image_of_another_format_is_refused_by_name_unless_it_is_said_to_be_raw() {
    let dir = TempDir::new().unwrap();
    let path = file(&dir, 4096);
    let probing = OpenOptions { probe: true, ..RW };
    Disk::open(&path, &probing).unwrap();
    let at_the_end = 4096 - 512;
    for (at, magic, format, qemu_name) in [
        (0, &b"QFI\xfb"[..], "qcow2", "qcow2"),
        (0, b"conectix", "VHD", "vpc"),
        (at_the_end, b"conectix", "VHD", "vpc"),
        (0, b"vhdxfile", "VHDX", "vhdx"),
        (0, b"KDMV", "VMDK", "vmdk"),
        (0, b"COWD", "VMDK", "vmdk"),
        (0, b"# Disk DescriptorFile", "VMDK", "vmdk"),
    ] {
        let mut image = vec![7; 4096];
        image[at..at + magic.len()].copy_from_slice(magic);
        fs::write(&path, image).unwrap();
        let said = refusal(&path, &probing);
        let cure = format!("qemu-img convert -f {qemu_name} -O raw {0} {0}.raw", path.display());
        assert!(said.contains(&format!("is a {format} image")) && said.contains(&cure), "{said}");
        assert!(said.contains("format=raw"), "{said}");
        assert!(Disk::open(&path, &OpenOptions { probe: true, ..RO }).is_err());
        Disk::open(&path, &RW).unwrap();
    }
    for short in [&b""[..], b"Q", b"QFI", b"conecti"] {
        fs::write(&path, short).unwrap();
        Disk::open(&path, &probing).unwrap();
    }
}

#[test]
fn a_header_in_the_first_sector_changes_nothing() {
    let dir = TempDir::new().unwrap();
    let path = file(&dir, 1 << 20);
    let mut header = vec![0; 1 << 20];
    header[..4].copy_from_slice(b"QFI\xfb");
    fs::write(&path, &header).unwrap();
    let disk = Arc::new(Disk::open(&path, &RO).unwrap());
    assert_eq!(disk.size(), 1 << 20);
    let (memory, mut storage) = storage(&disk);
    run(&mut storage, Op::Read, 0, &[(0x1000, 512)]).unwrap();
    let mut first = [0; 4];
    memory.read_slice(&mut first, GuestAddress(0x1000)).unwrap();
    assert_eq!(&first, b"QFI\xfb");
}

pub(super) fn storage(disk: &Arc<Disk>) -> (crate::Memory, Storage<u32>) {
    let memory = memory();
    let storage = Storage::new(disk.clone(), memory.clone(), 8);
    (memory, storage)
}

/// Carry a request out, however long an observer delays it.
pub(super) fn run(
    storage: &mut Storage<u32>,
    op: Op,
    at: u64,
    parts: &[(u64, u32)],
) -> io::Result<()> {
    let parts: Vec<_> =
        parts.iter().map(|(addr, len)| Segment { addr: GuestAddress(*addr), len: *len }).collect();
    loop {
        match storage.start(op, at, &parts, 7) {
            Outcome::Done(result) => return result,
            Outcome::Pending => break,
            Outcome::Delayed => {
                let observers = &storage.disk().observers;
                assert!(observers.wait(Duration::from_secs(60)).unwrap(), "delayed forever");
            }
        }
    }
    storage.submit();
    loop {
        if let Some((tag, result)) = storage.finished() {
            assert_eq!(tag, 7);
            return result;
        }
        assert!(storage.wait(None));
    }
}

#[test]
fn direct_disks_take_buffers_and_sectors_of_any_alignment() {
    let dir = TempDir::new().unwrap();
    for aio in [Aio::Auto, Aio::Off] {
        let path = file(&dir, 1 << 20);
        let disk = Arc::new(Disk::open(&path, &OpenOptions { direct: true, aio, ..RW }).unwrap());
        let (memory, mut storage) = storage(&disk);
        let mut expected = vec![7; 1 << 20];
        // Aligned, address off by one, sector in the middle of a page, odd pieces.
        let cases: [(u64, &[(u64, u32)]); 4] = [
            (4096, &[(0x4000, 4096)]),
            (8192, &[(0x4001, 4096)]),
            (512, &[(0x4000, 512)]),
            (65536, &[(0x4003, 1), (0x5000, 510), (0x6000, 1), (0x8000, 8192)]),
        ];
        for (n, (at, parts)) in cases.into_iter().enumerate() {
            let mut offset = at as usize;
            for (addr, len) in parts {
                memory.write_slice(&vec![n as u8; *len as usize], GuestAddress(*addr)).unwrap();
                expected[offset..offset + *len as usize].fill(n as u8);
                offset += *len as usize;
            }
            run(&mut storage, Op::Write { durable: n % 2 == 0 }, at, parts).unwrap();
            for (addr, len) in parts {
                memory.write_slice(&vec![0xee; *len as usize], GuestAddress(*addr)).unwrap();
            }
            run(&mut storage, Op::Read, at, parts).unwrap();
            for (addr, len) in parts {
                let mut back = vec![0; *len as usize];
                memory.read_slice(&mut back, GuestAddress(*addr)).unwrap();
                assert!(back.iter().all(|b| *b == n as u8), "{aio:?} {n}");
            }
        }
        run(&mut storage, Op::Flush, 0, &[]).unwrap();
        assert!(fs::read(&path).unwrap() == expected);
    }
}

#[test]
fn pages_that_are_not_cached_are_read_all_the_same() {
    let dir = TempDir::new().unwrap();
    for aio in [Aio::Auto, Aio::Off] {
        let path = file(&dir, 1 << 20);
        let disk = Arc::new(Disk::open(&path, &OpenOptions { aio, ..RW }).unwrap());
        disk.file.sync_all().unwrap();
        // Drop every other page from the cache: a read finds the first, then has to wait.
        for at in (4096..1 << 20).step_by(8192) {
            // UNSAFETY: the page cache has no other handle.
            #[expect(unsafe_code)]
            // SAFETY: takes no pointer.
            let _ = unsafe {
                libc::posix_fadvise(
                    std::os::fd::AsRawFd::as_raw_fd(&disk.file),
                    at,
                    4096,
                    libc::POSIX_FADV_DONTNEED,
                )
            };
        }
        let (memory, mut storage) = storage(&disk);
        run(&mut storage, Op::Read, 0, &[(0x10_0000, 1 << 20)]).unwrap();
        let mut back = vec![0; 1 << 20];
        memory.read_slice(&mut back, GuestAddress(0x10_0000)).unwrap();
        assert!(back.iter().all(|b| *b == 7));
    }
}

#[test]
fn a_read_beyond_the_file_is_an_error_not_an_endless_loop() {
    let dir = TempDir::new().unwrap();
    for direct in [false, true] {
        for aio in [Aio::Auto, Aio::Off] {
            let path = file(&dir, 4096);
            let disk = Arc::new(Disk::open(&path, &OpenOptions { direct, aio, ..RW }).unwrap());
            let (_memory, mut storage) = storage(&disk);
            let result = run(&mut storage, Op::Read, 0, &[(0x4000, 8192)]);
            assert_eq!(result.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        }
    }
}

#[test]
fn more_requests_than_the_ring_holds_are_all_carried_out() {
    let dir = TempDir::new().unwrap();
    let path = file(&dir, 1 << 20);
    let disk = Arc::new(Disk::open(&path, &OpenOptions { direct: true, ..RW }).unwrap());
    let (_memory, mut storage) = storage(&disk);
    let segment = [Segment { addr: GuestAddress(0x4000), len: 4096 }];
    let (mut started, mut ended) = (0, 0);
    while ended < 200 {
        while started < 200 && storage.has_room() {
            let outcome = storage.start(Op::Read, 4096 * (started % 256), &segment, 0);
            ended += u64::from(matches!(outcome, Outcome::Done(Ok(()))));
            started += 1;
        }
        storage.submit();
        while let Some((_, result)) = storage.finished() {
            result.unwrap();
            ended += 1;
        }
        if ended < started {
            assert!(storage.wait(None));
        }
    }
    assert_eq!(storage.in_flight(), 0);
}

#[test]
fn dropping_it_waits_for_what_is_in_flight() {
    let dir = TempDir::new().unwrap();
    let path = file(&dir, 1 << 20);
    let disk = Arc::new(Disk::open(&path, &OpenOptions { direct: true, ..RW }).unwrap());
    let (memory, mut storage) = storage(&disk);
    memory.write_slice(&[9; 4096], GuestAddress(0x4000)).unwrap();
    // Before the first change, the image gets another generation.
    disk.resize(1 << 20).unwrap();
    let segment = [Segment { addr: GuestAddress(0x4000), len: 4096 }];
    let _ = storage.start(Op::Write { durable: true }, 0, &segment, 0);
    drop(storage);
    assert_eq!(fs::read(&path).unwrap()[..4096], [9; 4096]);
}
