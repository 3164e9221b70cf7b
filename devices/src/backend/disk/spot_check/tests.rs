use std::{fs, os::unix::fs::FileExt};

use vmm_sys_util::tempdir::TempDir;

use super::*;
use crate::{
    backend::disk::{
        Disk, Op, OpenOptions, Outcome,
        tests::{run, storage},
    },
    virtio::chain::Segment,
};

const WRITE: Op = Op::Write { durable: false };
const PAGE: [Segment; 1] = [Segment { addr: vm_memory::GuestAddress(0x10_0000), len: 4096 }];
const SIZE: u64 = 64 << 20;

/// An image in place of a block device; the spot check treats both alike.
fn image(dir: &TempDir) -> std::path::PathBuf {
    let path = dir.as_path().join("device");
    fs::write(&path, []).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_len(SIZE).unwrap();
    path
}

fn ordered(disk: &Disk, id: u128) -> SpotCheck {
    let check = SpotCheck::new(&disk.file, disk.size(), id, disk.waker());
    disk.observe(check.observer());
    check
}

#[test]
fn both_ends_and_blocks_that_the_id_chooses_are_looked_at() {
    for size in [0, 512, 4096, 4096 + 512, ENDS, 2 * ENDS - 512, 2 * ENDS + 512, SIZE, 1 << 45] {
        let all = ranges(size, 7);
        for pair in all.windows(2) {
            assert!(pair[0].end <= pair[1].start, "{size}: {pair:?}");
        }
        assert!(all.iter().all(|r| r.start < r.end && r.end - r.start <= PIECE), "{size}");
        assert!(all.iter().all(|r| r.start % BLOCK == 0), "{size}: O_DIRECT takes no other");
        let has = |at: u64| all.iter().any(|r| r.contains(&at));
        assert_eq!(all.last().map_or(0, |last| last.end), size);
        for at in [0, 511, ENDS - 1] {
            assert!(has(at.min(size.saturating_sub(1))) || size == 0, "{size}: {at}");
            assert!(size == 0 || has(size - 1 - at.min(size - 1)), "{size}: {at} from its end");
        }
    }
    let middle = |id| {
        let all = ranges(SIZE, id).into_iter();
        let all = all.filter(|r| r.start >= ENDS && r.end <= SIZE - ENDS);
        all.map(|r| r.start).collect::<Vec<_>>()
    };
    assert!((50..=64).contains(&middle(7).len()), "{:?}", middle(7));
    assert_eq!(middle(7), middle(7));
    assert_ne!(middle(7), middle(8), "another save checks other blocks");
}

#[test]
fn a_change_of_what_was_looked_at_is_found() {
    let dir = TempDir::new().unwrap();
    let path = image(&dir);
    let disk = Disk::open(&path, &OpenOptions::default()).unwrap();
    let seen = ordered(&disk, 7).take().unwrap();
    drop(disk);
    let verify = || SpotCheck::verify(&path, SIZE, 7, &seen);
    verify().unwrap();
    let file = fs::File::options().write(true).open(&path).unwrap();
    for range in ranges(SIZE, 7) {
        for at in [range.start, range.end - 1] {
            file.write_all_at(&[1], at).unwrap();
            let said = verify().unwrap_err().to_string();
            for part in [path.to_str().unwrap(), "spot check", "--force", "force=on", "-drive id="]
            {
                assert!(said.contains(part), "{said}");
            }
            file.write_all_at(&[0], at).unwrap();
        }
    }
    verify().unwrap();
    assert!(SpotCheck::verify(&path, SIZE, 8, &seen).is_err(), "another save's");
    assert!(SpotCheck::verify(&path, SIZE - 4096, 7, &seen).is_err());
    let gone = SpotCheck::verify(&dir.as_path().join("gone"), SIZE, 7, &seen).unwrap_err();
    assert!(gone.to_string().contains("for a spot check"), "{gone}");
}

/// The guest keeps running while the blocks are read: what it writes meanwhile must not be in the
/// hash, and what it writes elsewhere must not wait.
#[test]
fn a_change_waits_until_what_it_touches_has_been_read() {
    let dir = TempDir::new().unwrap();
    let path = image(&dir);
    let before = {
        let disk = Disk::open(&path, &OpenOptions::default()).unwrap();
        ordered(&disk, 7).take().unwrap()
    };
    let disk = Arc::new(Disk::open(&path, &OpenOptions::default()).unwrap());
    let (memory, mut storage) = storage(&disk);
    vm_memory::Bytes::write_slice(&memory, &[9; 4096], PAGE[0].addr).unwrap();
    // The first write gives the image a generation, which is not tested here.
    let elsewhere = (0..SIZE / BLOCK)
        .map(|block| block * BLOCK)
        .find(|at| !ranges(SIZE, 7).iter().any(|r| r.contains(at)))
        .unwrap();
    run(&mut storage, WRITE, elsewhere, &[(0x10_0000, 4096)]).unwrap();

    let check = ordered(&disk, 7);
    let looked_at: Vec<u64> = ranges(SIZE, 7).iter().map(|r| r.start).collect();
    for at in &looked_at {
        assert!(matches!(storage.start(WRITE, *at, &PAGE, 1), Outcome::Delayed), "{at}");
    }
    run(&mut storage, WRITE, elsewhere, &[(0x10_0000, 4096)]).unwrap();
    assert!(!disk.observers.wait(std::time::Duration::ZERO).unwrap(), "woken without need");
    let seen = std::thread::scope(|scope| {
        let seen = scope.spawn(|| check.take().unwrap());
        for at in &looked_at {
            run(&mut storage, WRITE, *at, &[(0x10_0000, 4096)]).unwrap();
        }
        seen.join().unwrap()
    });
    assert_eq!(seen, before, "a write that came later is in it");
    assert!(!disk.observers.any(), "the next ones cost nothing");
    assert!(SpotCheck::verify(&path, SIZE, 7, &seen).is_err());
}

#[test]
fn what_is_given_up_or_closed_holds_nothing_up_and_is_no_proof() {
    let dir = TempDir::new().unwrap();
    let path = image(&dir);
    let disk = Arc::new(Disk::open(&path, &OpenOptions::default()).unwrap());
    let (_, mut storage) = storage(&disk);
    let check = ordered(&disk, 7);
    assert!(matches!(storage.start(WRITE, 0, &PAGE, 1), Outcome::Delayed));
    drop(check);
    run(&mut storage, WRITE, 0, &[(0x10_0000, 4096)]).unwrap();

    // Removed from the machine: from here on other programs may write to it.
    let check = ordered(&disk, 7);
    drop((storage, disk));
    assert!(check.take().unwrap_err().to_string().contains("closed"));
}

#[test]
fn an_image_and_what_is_only_read_are_not_looked_at() {
    let dir = TempDir::new().unwrap();
    let path = image(&dir);
    assert!(Disk::open(&path, &OpenOptions::default()).unwrap().spot_check(7).is_none());
    let readonly = OpenOptions { readonly: true, ..OpenOptions::default() };
    assert!(Disk::open(&path, &readonly).unwrap().spot_check(7).is_none());
}
