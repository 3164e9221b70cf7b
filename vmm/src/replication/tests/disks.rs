//! Disks: their images are compared at the end, whatever the guest has written meanwhile.
use std::{fs, os::unix::fs::FileExt};

use lineage::{Images, Mark};
use machine::disk::{Aio, Disk, Op, OpenOptions, Outcome, Segment, Storage};

use super::*;

const SIZE: u64 = 4 << 20;
/// Bytes of the journal, unless it is to be full.
const JOURNAL: u64 = 64 << 20;
/// Where the guest has what it writes.
const DATA: u64 = 1 << 20;

/// Two disks on each side.
struct Sides {
    directory: tempfile::TempDir,
    near: Vec<PathBuf>,
    far: Vec<PathBuf>,
}

impl Sides {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let image = |side: &str, n| directory.path().join(format!("{side}{n}.img"));
        let near: Vec<_> = (0..2).map(|n| image("near", n)).collect();
        for path in &near {
            let file = fs::File::create(path).unwrap();
            file.set_len(SIZE).unwrap();
            // Not all of it: an image has holes.
            for at in (0..SIZE).step_by(3 << 20) {
                file.write_all_at(&[at as u8 | 1; 70_000], at).unwrap();
            }
        }
        let far = (0..2).map(|n| image("far", n)).collect();
        Self { near, far, directory }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    fn wanted(&self) -> Vec<Wanted> {
        let wanted = self.far.iter().zip(0..).map(|(path, n): (_, u32)| Wanted {
            id: format!("disk{n}"),
            path: path.clone(),
            size: SIZE,
        });
        wanted.collect()
    }

    fn open(&self, direct: bool, aio: Aio) -> Arc<Disks> {
        let options = OpenOptions { direct, aio, discard: true, ..OpenOptions::default() };
        let disks = self.near.iter().zip(0..).map(|(path, n): (_, u32)| {
            (format!("disk{n}"), Arc::new(Disk::open(path, &options).unwrap()))
        });
        Arc::new(Disks::new(disks.collect()))
    }

    fn are_equal(&self) {
        for (near, far) in self.near.iter().zip(&self.far) {
            assert!(fs::read(near).unwrap() == fs::read(far).unwrap(), "the images differ");
        }
    }

    fn words(paths: &[PathBuf]) -> Mark {
        Images::read(paths.iter().map(PathBuf::as_path)).unwrap().entry().unwrap().mark
    }
}

/// The guest's end of its disks.
struct Guest {
    storages: Vec<Storage<()>>,
    host: Arc<Host>,
    random: fastrand::Rng,
}

impl Guest {
    fn of(protected: &Protected, seed: u64) -> Self {
        let host = protected.host.clone();
        let disks = host.disks.as_ref().unwrap().all().iter();
        let memory = &host.memory;
        let storages = disks.map(|(_, disk)| Storage::new(disk.clone(), memory.clone(), 8));
        let storages = storages.collect();
        Self { storages, host, random: fastrand::Rng::with_seed(seed) }
    }

    /// Change something, which the guest hears of in the same step.
    fn changes(&mut self) {
        let sectors = self.random.u64(1..400);
        let at = self.random.u64(..SIZE / 512 - sectors) * 512;
        let len = sectors * 512;
        let op = match self.random.u8(..8) {
            0 => Op::Discard { len },
            1 => Op::WriteZeroes { len, unmap: false, durable: false },
            2 => Op::Flush,
            _ => Op::Write { durable: false },
        };
        let segments = [Segment { addr: vm_memory::GuestAddress(DATA), len: len as u32 }];
        let segments = if matches!(op, Op::Write { .. }) { &segments[..] } else { &[] };
        let at = if op == Op::Flush { 0 } else { at };
        let storage = self.random.usize(..2);
        let data: Vec<u8> = (0..len).map(|_| self.random.u8(..)).collect();
        let end = Instant::now() + LONG;
        loop {
            assert!(Instant::now() < end, "a change is delayed without end");
            // As one step, so that no checkpoint is in between.
            let _still = self.host.dirty.lock();
            image::write(&self.host.memory, DATA, &data).unwrap();
            let storage = &mut self.storages[storage];
            match storage.start(op, at, segments, ()) {
                Outcome::Done(result) => return result.unwrap(),
                Outcome::Pending => {
                    storage.submit();
                    while storage.finished().is_none() {
                        assert!(storage.wait(Some(LONG)));
                    }
                    return;
                }
                Outcome::Delayed => {}
            }
            drop(_still);
            thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn images_are_equal_whatever_the_guest_writes_and_when() {
    for (direct, aio) in
        [(false, Aio::Off), (true, Aio::Off), (false, Aio::Auto), (true, Aio::Auto)]
    {
        let (sides, record) = (Sides::new(), Witness::default());
        let backup =
            Backup::keeping(&sides.socket(), witness(), record.clone(), (sides.wanted(), JOURNAL));
        let disks = Some(sides.open(direct, aio));
        let special = Special { disks, ..Special::default() };
        let protected =
            Protected::with(&sides.socket(), &witness(), OnLoss::Claim, record, special);
        let mut guest = Guest::of(&protected, 7);
        // During the first copy, between its end and the first checkpoint, and later.
        let end = Instant::now() + LONG;
        while protected.state() != ReplicationStatus::Protected {
            assert!(Instant::now() < end, "in vain for protection");
            guest.changes();
        }
        (0..100).for_each(|_| guest.changes());
        protected.settles();
        let bonds = [Sides::words(&sides.near), Sides::words(&sides.far)];
        assert!(bonds.iter().all(|word| matches!(word, Mark::Protected(_))), "{bonds:?}");
        // It continues the guest: everything is in the images by then.
        (*protected.host.alone.lock()) = true;
        protected.orders.give(Order::Failed("as the test wants it".into()));
        drop(guest);
        backup.orders.send(ToStandby::Command(Input::Command(Command::Failover))).unwrap();
        backup.wake.wake();
        let promotion = backup.thread.join().unwrap().unwrap();
        assert_eq!(promotion.term, Term(2));
        sides.are_equal();
        assert!(matches!(Sides::words(&sides.far), Mark::Running { term: Term(2), .. }));
    }
}

/// A protected guest with disks, and its backup with a journal of so many bytes.
fn protected(sides: &Sides, journal: u64, ack_limit: Duration) -> (Protected, Backup) {
    let record = Witness::default();
    let disks = (sides.wanted(), journal);
    let backup = Backup::keeping(&sides.socket(), witness(), record.clone(), disks);
    let disks = Some(sides.open(false, Aio::Auto));
    let protected = Protected::with(
        &sides.socket(),
        &witness(),
        OnLoss::Claim,
        record,
        Special { disks, ack_limit, ..Special::default() },
    );
    protected.is_protected();
    (protected, backup)
}

#[test]
fn storage_that_stands_still_at_the_backup_is_no_reason_for_a_suspicion() {
    let sides = Sides::new();
    let (protected, backup) = protected(&sides, JOURNAL, LONG);
    let mut guest = Guest::of(&protected, 3);
    // Longer than the time-out, and less than what output may be held for.
    backup.storage.send(Work::Hang(3 * TIMEOUT)).unwrap();
    (0..100).for_each(|_| guest.changes());
    protected.settles();
    let info = protected.status.lock().clone();
    assert_eq!((info.state, info.stalls), (ReplicationStatus::Protected, 0));
    drop(guest);
    assert!(backup.end().is_err());
}

#[test]
fn a_backup_whose_journal_is_too_small_is_left_and_the_guest_writes_on() {
    let sides = Sides::new();
    let (protected, backup) = protected(&sides, 64 << 10, TIMEOUT);
    let mut guest = Guest::of(&protected, 4);
    wait_for("the term's end", || {
        guest.changes();
        protected.host.told.lock().contains(&ReplicationStatus::Degraded)
    });
    assert_eq!(protected.host.record.lock().unwrap().word, Word::Solo);
    (0..50).for_each(|_| guest.changes());
    let word = || Sides::words(&sides.near);
    wait_for("the word", || matches!(word(), Mark::Running { term: Term(2), promoted: None }));
    drop(guest);
    let _ = backup.end();
}

#[test]
fn images_of_another_guest_or_size_are_not_taken() {
    let sides = Sides::new();
    let (keeper, keep) = Keeper::with_room(Wake::new().unwrap(), JOURNAL);
    let thread = thread::spawn(keep);
    assert_eq!(keeper.open(sides.wanted()).unwrap(), None);
    assert_eq!(fs::metadata(&sides.far[0]).unwrap().len(), SIZE, "it is made");
    // Another machine has it.
    let (other, keep) = Keeper::with_room(Wake::new().unwrap(), JOURNAL);
    let second = thread::spawn(keep);
    let refused = other.open(sides.wanted()).unwrap_err();
    assert!(refused.contains("-drive id=disk0,file=PATH"), "{refused}");
    fs::File::options().write(true).open(&sides.far[1]).unwrap().set_len(512).unwrap();
    let refused = keeper.open(sides.wanted()).unwrap_err();
    assert!(refused.contains("512 bytes"), "{refused}");
    drop((keeper, other));
    thread.join().unwrap();
    second.join().unwrap();
}
