use std::{
    fs,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::Command,
};

use vmm_sys_util::tempdir::TempDir;

use super::*;
use crate::backend::disk::{
    Aio, Disk, Op, OpenOptions, Outcome, Storage,
    tests::{run, storage},
};

const WRITE: Op = Op::Write { durable: false };
const PAGE: &[(u64, u32)] = &[(0x10_0000, 4096)];

fn rw() -> OpenOptions {
    OpenOptions { discard: true, ..OpenOptions::default() }
}

fn image(dir: &TempDir, name: &str) -> PathBuf {
    let path = dir.as_path().join(name);
    fs::write(&path, vec![7; 1 << 20]).unwrap();
    path
}

fn open(path: &Path, options: &OpenOptions) -> (Arc<Disk>, Storage<u32>) {
    let disk = Arc::new(Disk::open(path, options).unwrap());
    let (_, storage) = storage(&disk);
    (disk, storage)
}

fn on_image(path: &Path) -> Option<u128> {
    read(&File::open(path).unwrap()).unwrap()
}

fn cp(arguments: &[&str], from: &Path, to: &Path) {
    assert!(Command::new("cp").args(arguments).args([from, to]).status().unwrap().success());
}

/// How the image at `path` differs from `mark`.
fn differs(path: &Path, mark: &DiskMark, copy: bool) -> Option<String> {
    let disk = Disk::open(path, &rw()).unwrap();
    disk.check_mark(mark, copy).err().map(|e| e.to_string())
}

#[test]
fn the_first_change_after_opening_and_after_each_save_gives_another_generation() {
    for aio in [Aio::Auto, Aio::Off] {
        let dir = TempDir::new().unwrap();
        let path = image(&dir, "image");
        assert_eq!(on_image(&path), None);
        let (disk, mut storage) = open(&path, &OpenOptions { aio, ..rw() });
        let mut seen = vec![on_image(&path).unwrap()];
        for op in [WRITE, Op::Discard { len: 4096 }, WRITE] {
            run(&mut storage, op, 0, PAGE).unwrap();
            let now = on_image(&path).unwrap();
            assert!(!seen.contains(&now), "{aio:?}");
            assert!(!disk.observers.any(), "the next ones cost nothing");
            run(&mut storage, WRITE, 4096, PAGE).unwrap();
            run(&mut storage, Op::Flush, 0, &[]).unwrap();
            assert_eq!(on_image(&path), Some(now));
            assert_eq!(disk.mark().unwrap().generation, Some(now));
            assert_eq!(disk.mark().unwrap().generation, Some(now), "nothing has changed");
            run(&mut storage, Op::Read, 0, PAGE).unwrap();
            assert_eq!(on_image(&path), Some(now), "nor by reading");
            seen.push(now);
        }
        disk.resize(4096).unwrap();
        assert!(!seen.contains(&on_image(&path).unwrap()), "resizing is a change");
    }
}

#[test]
fn no_change_is_made_before_the_new_generation_is_on_the_image() {
    let dir = TempDir::new().unwrap();
    let path = image(&dir, "image");
    let (disk, mut storage) = open(&path, &OpenOptions { aio: Aio::IoUring, ..rw() });
    let before = on_image(&path);
    let page =
        [crate::virtio::chain::Segment { addr: vm_memory::GuestAddress(0x10_0000), len: 4096 }];
    assert!(matches!(storage.start(WRITE, 0, &page, 1), Outcome::Delayed));
    assert!(fs::read(&path).unwrap() == vec![7; 1 << 20]);
    // Just saved: the generation being written is the saved one, and the write that waits for it
    // needs another.
    let saved = disk.mark().unwrap();
    assert_eq!(differs_now(&disk, &saved), None, "once it is there");
    run(&mut storage, WRITE, 0, PAGE).unwrap();
    let after = on_image(&path);
    assert!(after != before && after != saved.generation);
    assert!(disk.check_mark(&saved, false).is_err());
}

/// The same, once the pending write of the generation has ended; the disk is not changed.
fn differs_now(disk: &Disk, mark: &DiskMark) -> Option<String> {
    while on_image(disk.path()) != mark.generation {
        std::thread::yield_now();
    }
    disk.check_mark(mark, false).err().map(|e| e.to_string())
}

#[test]
fn an_image_that_was_changed_after_it_was_saved_is_recognised() {
    let dir = TempDir::new().unwrap();
    let path = image(&dir, "image");
    let saved = || {
        let (disk, mut storage) = open(&path, &rw());
        run(&mut storage, WRITE, 0, PAGE).unwrap();
        let mark = disk.mark().unwrap();
        assert!(disk.check_mark(&mark, false).is_ok());
        (disk, storage, mark)
    };

    // Written by the machine itself, so soon that the file system's clock has not advanced.
    let (disk, mut storage, mut mark) = saved();
    run(&mut storage, WRITE, 0, PAGE).unwrap();
    mark.mtime_ns = ::state::mark::mtime_ns(&fs::metadata(&path).unwrap());
    let said = disk.check_mark(&mark, false).unwrap_err().to_string();
    assert!(said.contains("has been changed since"), "{said}");
    for cure in ["-drive id=", "cp --preserve=xattr", "--force"] {
        assert!(said.contains(cure), "{said}");
    }
    drop((disk, storage));

    // Written by another program, which knows nothing of marks.
    for direct in [0, libc::O_DIRECT] {
        let (disk, storage, mark) = saved();
        drop((disk, storage));
        let mut options = fs::OpenOptions::new();
        let file = options.write(true).custom_flags(direct).open(&path).unwrap();
        #[repr(align(4096))]
        struct Page([u8; 4096]);
        file.write_all_at(&Page([1; 4096]).0, 8192).unwrap();
        let said = differs(&path, &mark, false).unwrap();
        assert!(said.contains("has been written since"), "{said}");
    }

    let (disk, storage, mark) = saved();
    drop((disk, storage));
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(4096).unwrap();
    let said = differs(&path, &mark, false).unwrap();
    assert!(said.contains("it has 4096 bytes instead of 1048576"), "{said}");
}

#[test]
fn a_copy_is_known_by_its_mark() {
    let dir = TempDir::new().unwrap();
    let path = image(&dir, "image");
    let (disk, mut storage) = open(&path, &rw());
    run(&mut storage, WRITE, 0, PAGE).unwrap();
    let mark = disk.mark().unwrap();
    drop((disk, storage));
    let at = |name: &str| dir.as_path().join(name);

    cp(&["--preserve=xattr"], &path, &at("copy"));
    assert_eq!(differs(&at("copy"), &mark, true), None);
    let said = differs(&at("copy"), &mark, false).unwrap();
    assert!(said.contains("has been written since"), "{said}");
    cp(&[], &path, &at("plain"));
    let said = differs(&at("plain"), &mark, true).unwrap();
    assert!(said.contains("another image"), "{said}");
    // Only checked, so it gets no mark of its own.
    cp(&[], &path, &at("only read"));
    let read_only = OpenOptions { readonly: true, ..rw() };
    let said = Disk::open(&at("only read"), &read_only).unwrap().check_mark(&mark, true);
    let said = said.unwrap_err().to_string();
    assert!(said.contains("it has no mark"), "{said}");
    cp(&["--preserve=xattr"], &path, &at("short"));
    fs::OpenOptions::new().write(true).open(at("short")).unwrap().set_len(512).unwrap();
    assert!(differs(&at("short"), &mark, true).unwrap().contains("512 bytes"));
    let unmarked = DiskMark { generation: None, ..mark };
    let said = differs(&at("copy"), &unmarked, true).unwrap();
    assert!(said.contains("could not be marked"), "{said}");

    fs::rename(&path, at("moved")).unwrap();
    for copy in [false, true] {
        assert_eq!(differs(&at("moved"), &mark, copy), None);
    }
    assert_eq!(differs(&at("moved"), &unmarked, false), None, "size and time are all there is");
}

#[test]
fn what_cannot_change_has_no_mark_and_what_lies_in_memory_has() {
    let dir = TempDir::new().unwrap();
    let path = image(&dir, "image");
    let (disk, _) = open(&path, &OpenOptions { readonly: true, ..rw() });
    assert_eq!((disk.mark(), on_image(&path)), (None, None));

    let dir = TempDir::new_in(Path::new("/dev/shm")).unwrap();
    let path = image(&dir, "image");
    let (disk, mut storage) = open(&path, &rw());
    let mark = disk.mark().unwrap();
    assert!(disk.check_mark(&mark, false).is_ok());
    run(&mut storage, WRITE, 0, PAGE).unwrap();
    assert!(disk.check_mark(&mark, false).is_err());
}
