use std::{fs, time::Duration};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::tempdir::TempDir;

use super::*;
use crate::{
    backend::disk::{Aio, OpenOptions, Outcome, Storage, tests::run},
    testing::memory,
};

const IMAGE: usize = 1 << 20;
const DATA: u64 = 1 << 20;
const WRITE: Op = Op::Write { durable: false };

struct Rig {
    dir: TempDir,
    memory: Memory,
    log: Arc<WriteLog>,
    storages: Vec<Storage<u32>>,
}

impl Rig {
    /// Two disks full of sevens whose changes are logged.
    fn new(options: OpenOptions, limit: u64) -> Self {
        let (dir, memory, log) = (TempDir::new().unwrap(), memory(), WriteLog::new(limit));
        let storages = (0..2).map(|number| {
            let path = dir.as_path().join(number.to_string());
            fs::write(&path, vec![7; IMAGE]).unwrap();
            let disk = Disk::open(&path, &options).unwrap();
            disk.resize(IMAGE as u64).unwrap();
            disk.log_writes(&log, number);
            Storage::new(Arc::new(disk), memory.clone(), 8)
        });
        let storages = storages.collect();
        log.record();
        Self { dir, memory, log, storages }
    }

    fn image(&self, disk: usize) -> Vec<u8> {
        fs::read(self.dir.as_path().join(disk.to_string())).unwrap()
    }

    fn fill(&self, value: u8) {
        self.memory.write_slice(&[value; 64 << 10], GuestAddress(DATA)).unwrap();
    }
}

fn every_way() -> impl Iterator<Item = OpenOptions> {
    let aio = [Aio::Auto, Aio::Off].into_iter();
    let discard = true;
    aio.flat_map(move |aio| {
        [false, true].map(|direct| OpenOptions { aio, direct, discard, ..OpenOptions::default() })
    })
}

/// Make the changes in other images.
fn replay(images: &mut [Vec<u8>], changes: &[Logged]) {
    for Logged { disk, offset, contents } in changes {
        let image = &mut images[usize::from(*disk)];
        let at = *offset as usize;
        match contents {
            Contents::Bytes(copied) => {
                image[at..at + copied.bytes().len()].copy_from_slice(copied.bytes());
            }
            Contents::Zeroes(len) => image[at..at + *len as usize].fill(0),
        }
    }
}

#[test]
fn replaying_the_epochs_gives_the_same_images() {
    for way in every_way() {
        let mut r = Rig::new(way, 1 << 20);
        let mut rng = fastrand::Rng::with_seed(5);
        let mut copies = vec![vec![7; IMAGE]; 2];
        for epoch in 1..=20 {
            for _ in 0..rng.usize(0..12) {
                r.fill(rng.u8(..));
                let disk = rng.usize(0..2);
                let sectors = rng.u64(1..64);
                let at = 512 * rng.u64(0..IMAGE as u64 / 512 - sectors);
                let len = 512 * sectors;
                let op = match rng.u8(..8) {
                    0 => Op::Discard { len },
                    1 => Op::WriteZeroes { len, unmap: rng.bool(), durable: rng.bool() },
                    2 => Op::Read,
                    3 => Op::Flush,
                    n => Op::Write { durable: n == 4 },
                };
                let parts: &[(u64, u32)] = match op {
                    // In two parts, of which one is not aligned.
                    Op::Read | Op::Write { .. } => {
                        &[(DATA + 8, 100), (DATA + 4096, len as u32 - 100)]
                    }
                    _ => &[],
                };
                run(&mut r.storages[disk], op, at, parts).unwrap();
            }
            r.log.mark(epoch);
            if rng.bool() {
                replay(&mut copies, &r.log.take(epoch));
                assert_eq!(r.log.used(), 0);
                assert!(copies == [r.image(0), r.image(1)], "{way:?}");
            }
        }
    }
}

#[test]
fn an_epoch_has_what_was_complete_at_its_end() {
    let mut r = Rig::new(OpenOptions::default(), 1 << 20);
    let offsets = |log: &Arc<WriteLog>, epoch| -> Vec<u64> {
        log.take(epoch).iter().map(|logged| logged.offset).collect()
    };
    let mut write = |at| run(&mut r.storages[0], WRITE, at, &[(DATA, 512)]).unwrap();
    write(0);
    write(512);
    r.log.mark(1);
    r.log.mark(2);
    write(1024);
    r.log.mark(3);
    write(2048);
    assert_eq!(offsets(&r.log, 0), [0; 0]);
    assert_eq!(offsets(&r.log, 2), [0, 512]);
    assert_eq!(offsets(&r.log, 9), [1024], "the last one has no epoch yet");
    r.log.mark(4);
    assert_eq!(offsets(&r.log, 4), [2048]);
}

#[test]
fn the_disk_gets_what_the_guest_had_there_when_it_was_taken() {
    let options = OpenOptions { direct: true, ..OpenOptions::default() };
    let mut r = Rig::new(options, 1 << 20);
    r.fill(1);
    let parts = [Segment { addr: GuestAddress(DATA), len: 4096 }];
    let started = r.storages[0].start(WRITE, 0, &parts, 7);
    // Without io_uring it is complete already; then there is nothing to test.
    if matches!(started, Outcome::Pending) {
        r.fill(2);
        r.log.mark(1);
        assert!(r.log.take(1).is_empty(), "not complete");
        r.storages[0].submit();
        while r.storages[0].finished().is_none() {
            assert!(r.storages[0].wait(Some(Duration::from_secs(60))));
        }
    }
    assert_eq!(r.image(0)[..4097], [&[1; 4096][..], &[7]].concat());
    r.log.mark(2);
    let mut copies = vec![vec![7; IMAGE]; 2];
    replay(&mut copies, &r.log.take(2));
    assert_eq!(copies[0], r.image(0));
}

#[test]
fn a_full_log_delays_changes_and_nothing_else() {
    for way in every_way() {
        let mut r = Rig::new(way, 10_000);
        r.fill(3);
        let page = [Segment { addr: GuestAddress(DATA), len: 4096 }];
        for at in [0, 4096] {
            run(&mut r.storages[0], WRITE, at, &[(DATA, 4096)]).unwrap();
        }
        r.storages.iter().for_each(Storage::woken);
        for disk in 0..2 {
            assert!(matches!(r.storages[disk].start(WRITE, 8192, &page, 7), Outcome::Delayed));
            run(&mut r.storages[disk], Op::Read, 0, &[(DATA + 4096, 4096)]).unwrap();
            run(&mut r.storages[disk], Op::Flush, 0, &[]).unwrap();
        }
        assert_eq!(r.image(1), vec![7; IMAGE]);
        let woken =
            |r: &Rig, disk: usize| r.storages[disk].disk().observers.wait(Duration::ZERO).unwrap();
        assert!(!woken(&r, 0) && !woken(&r, 1));
        r.log.mark(1);
        assert_eq!(r.log.take(1).len(), 2);
        assert!(woken(&r, 0) && woken(&r, 1), "{way:?}");
        // More than the limit, but alone.
        run(&mut r.storages[1], WRITE, 0, &[(DATA, 64 << 10)]).unwrap();
        assert!(r.log.used() > 64 << 10);
        assert!(matches!(r.storages[0].start(WRITE, 0, &page, 7), Outcome::Delayed));
        // Without a log it needs no room.
        assert!(!woken(&r, 0));
        r.storages[0].disk().stop_logging();
        assert!(woken(&r, 0));
        run(&mut r.storages[0], WRITE, 0, &[(DATA, 4096)]).unwrap();
        r.log.mark(2);
        assert_eq!(r.log.take(2).len(), 1);
    }
}

#[test]
fn a_change_that_fails_leaves_no_entry() {
    for way in every_way() {
        let mut r = Rig::new(way, 1 << 20);
        let path = r.dir.as_path().join("0");
        run(&mut r.storages[0], WRITE, 0, &[(DATA, 512)]).unwrap();
        // A hole where no change can be made: the image has ended there.
        let nowhere = i64::MAX as u64 - 511;
        assert!(run(&mut r.storages[0], WRITE, nowhere, &[(DATA, 512)]).is_err(), "{way:?}");
        r.log.mark(1);
        assert_eq!(r.log.take(1).len(), 1);
        assert_eq!(r.log.used(), 0);
        assert_eq!(fs::metadata(path).unwrap().len(), IMAGE as u64);
    }
}

#[test]
fn what_was_taken_counts_until_it_is_dropped() {
    let mut r = Rig::new(OpenOptions::default(), 1 << 20);
    run(&mut r.storages[0], WRITE, 0, &[(DATA, 4096)]).unwrap();
    r.log.mark(1);
    let taken = r.log.take(1);
    assert_eq!(taken.len(), 1);
    assert!(r.log.used() > 4096);
    drop(taken);
    assert_eq!(r.log.used(), 0);
}

#[test]
fn a_log_that_is_attached_to_a_disk_in_use_misses_nothing_that_ends_after_it_records() {
    let options = OpenOptions { direct: true, ..OpenOptions::default() };
    let mut r = Rig::new(options, 1 << 20);
    r.storages[0].disk().stop_logging();
    let page = [Segment { addr: GuestAddress(DATA), len: 4096 }];
    let end = |r: &mut Rig| {
        r.storages[0].submit();
        while r.storages[0].finished().is_none() {
            assert!(r.storages[0].wait(Some(Duration::from_secs(60))));
        }
    };
    // Without io_uring it is complete already; then there is nothing to test.
    if !matches!(r.storages[0].start(WRITE, 0, &page, 1), Outcome::Pending) {
        return;
    }
    let log = WriteLog::new(1 << 20);
    r.storages[0].disk().log_writes(&log, 0);
    assert!(r.storages[0].disk().has_unlogged());
    end(&mut r);
    assert!(!r.storages[0].disk().has_unlogged());
    // The first of these is complete before anything is recorded, the second only afterwards.
    run(&mut r.storages[0], WRITE, 4096, &[(DATA, 4096)]).unwrap();
    assert_eq!(log.used(), 0);
    assert!(matches!(r.storages[0].start(WRITE, 8192, &page, 1), Outcome::Pending));
    log.record();
    log.mark(1);
    end(&mut r);
    log.mark(2);
    assert!(log.take(1).is_empty());
    let offsets: Vec<u64> = log.take(2).iter().map(|logged| logged.offset).collect();
    assert_eq!(offsets, [8192]);
}
