use std::{cell::RefCell, rc::Rc};

use replication::Rule;
use tempfile::TempDir;

use super::*;

mod killed;
mod power_cut;

const GUEST: Lineage = Lineage(5);
const START: Place = Place { term: Term(3), epoch: Epoch(10) };

/// A medium in memory that forgets what was not synced when its power is cut.
#[derive(Debug, Clone, Default)]
struct Volatile(Rc<RefCell<Contents>>);

#[derive(Debug, Default)]
struct Contents {
    /// As it is read.
    seen: Vec<u8>,
    /// As it is on the medium.
    durable: Vec<u8>,
    /// Writes since the last sync, in order.
    written: Vec<(usize, Vec<u8>)>,
    /// The next operation fails.
    fails: bool,
}

impl Volatile {
    fn new(size: u64) -> Self {
        let bytes = vec![0; size as usize];
        let contents = Contents { seen: bytes.clone(), durable: bytes, ..Contents::default() };
        Self(Rc::new(RefCell::new(contents)))
    }

    fn seen(&self) -> Vec<u8> {
        self.0.borrow().seen.clone()
    }

    fn failing(&self) -> io::Result<()> {
        let fails = std::mem::take(&mut self.0.borrow_mut().fails);
        if fails { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    /// The medium after a power cut: of what was written since the last sync, any sectors in any
    /// order.
    fn cut(&self, rng: &mut fastrand::Rng) -> Self {
        let contents = self.0.borrow();
        let mut bytes = contents.durable.clone();
        // Often all or nothing, which random sectors alone would rarely be.
        let chance = rng.u8(0..5);
        for (at, data) in &contents.written {
            let mut at = *at;
            let mut data = &data[..];
            while !data.is_empty() {
                let (sector, rest) = data.split_at(data.len().min(512 - at % 512));
                if rng.u8(0..4) < chance {
                    bytes[at..at + sector.len()].copy_from_slice(sector);
                }
                at += sector.len();
                data = rest;
            }
        }
        let contents = Contents { seen: bytes.clone(), durable: bytes, ..Contents::default() };
        Self(Rc::new(RefCell::new(contents)))
    }
}

impl Medium for Volatile {
    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let contents = self.0.borrow();
        let from = contents.seen.get(offset as usize..).ok_or(io::ErrorKind::UnexpectedEof)?;
        let from = from.get(..bytes.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        bytes.copy_from_slice(from);
        Ok(())
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.failing()?;
        let mut contents = self.0.borrow_mut();
        let at = offset as usize;
        contents.seen[at..at + bytes.len()].copy_from_slice(bytes);
        contents.written.push((at, bytes.to_vec()));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.failing()?;
        let contents = &mut *self.0.borrow_mut();
        contents.durable.clone_from(&contents.seen);
        contents.written.clear();
        Ok(())
    }
}

impl Image for Volatile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.0.borrow().seen.len() as u64)
    }

    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        self.write_at(offset, &vec![0; length as usize])
    }
}

fn journal(capacity: u64) -> (Volatile, JournalFile<Volatile>) {
    let medium = Volatile::new(HEADER + capacity);
    let journal = JournalFile::format(medium.clone(), GUEST, START, capacity, Rules::ALL).unwrap();
    (medium, journal)
}

fn write(offset: u64, data: &[u8]) -> Change<'_> {
    Change::Write { disk: 0, offset, data }
}

#[test]
fn epochs_reach_the_images_in_order_and_once_durable() {
    let (_, mut journal) = journal(8 << 20);
    let images = [Volatile::new(4 << 20), Volatile::new(4096)];
    // More than one frame holds, and the end of one image.
    let long: Vec<u8> = (0..3 * LONGEST_DATA as u64 + 1000).map(|n| (n / 7) as u8).collect();
    let changes = [write(5, &long), Change::Write { disk: 1, offset: 0, data: &[1; 4096] }];
    journal.append(Epoch(11), changes).unwrap();
    let changes = [write(6, &[9]), Change::Zero { disk: 1, offset: 1000, length: 3096 }];
    journal.append(Epoch(12), changes).unwrap();
    assert_eq!(journal.order().durable(), Epoch(10));
    assert_eq!(journal.apply(&images).unwrap(), None, "not durable yet");
    journal.sync().unwrap();
    assert_eq!(journal.order().durable(), Epoch(12), "both may be acknowledged");
    assert_eq!(journal.apply(&images).unwrap(), Some(Epoch(11)));
    assert_eq!(&images[0].seen()[5..5 + long.len()], &long);
    assert_eq!(images[1].seen(), [1; 4096]);
    assert_eq!(journal.apply(&images).unwrap(), Some(Epoch(12)));
    assert_eq!(images[0].seen()[5..8], [long[0], 9, long[2]]);
    assert_eq!(images[1].seen(), [[1; 1000].as_slice(), &[0; 3096]].concat());
    assert_eq!(journal.apply(&images).unwrap(), None);
    journal.trim().unwrap();
    assert!(journal.used() > 0, "the images are not synced");
    assert!(!journal.order().may_run());
    assert_eq!(journal.settle(&images).unwrap(), Place { epoch: Epoch(12), ..START });
    assert_eq!(journal.used(), 0);
    assert!(journal.order().may_run());
}

#[test]
fn epochs_without_changes_cost_nothing_and_are_found_again_between_others() {
    let (medium, mut journal) = journal(10_000);
    let images = [Volatile::new(4096)];
    journal.append_nothing(Epoch(11)).unwrap();
    assert_eq!(journal.order().durable(), Epoch(11), "as durable as the one before");
    journal.append(Epoch(12), [write(0, &[1])]).unwrap();
    journal.append_nothing(Epoch(13)).unwrap();
    assert_eq!(journal.order().durable(), Epoch(11));
    assert!(journal.append_nothing(Epoch(13)).is_err());
    journal.append(Epoch(14), [write(1, &[2])]).unwrap();
    journal.sync().unwrap();
    let mut found = JournalFile::recover(medium, GUEST, START.term, Rules::ALL).unwrap();
    assert_eq!(found.settle(&images).unwrap().epoch, Epoch(14));
    assert_eq!(images[0].seen()[..3], [1, 2, 0]);
    while journal.order().last_applied() < Epoch(14) {
        journal.apply(&images).unwrap();
    }
    journal.settle(&images).unwrap();
    journal.append_nothing(Epoch(15)).unwrap();
    journal.apply(&images).unwrap();
    assert!(!journal.trim_due(Instant::now() + TRIM_AFTER), "there is nothing to be trimmed");
}

#[test]
fn epochs_that_were_not_taken_are_dropped_and_come_again() {
    let (medium, mut journal) = journal(10_000);
    let images = [Volatile::new(4096)];
    for epoch in 11..=13 {
        journal.append(Epoch(epoch), [write(epoch, &[epoch as u8])]).unwrap();
    }
    journal.sync().unwrap();
    journal.apply(&images).unwrap();
    journal.drop_after(Epoch(10)).unwrap();
    assert_eq!(journal.order().last(), Epoch(11), "what was applied stays");
    journal.append(Epoch(12), [write(12, &[12])]).unwrap();
    assert_eq!(journal.order().durable(), Epoch(11));
    journal.sync().unwrap();
    journal.append_nothing(Epoch(13)).unwrap();
    journal.drop_after(Epoch(12)).unwrap();
    assert_eq!(journal.settle(&images).unwrap().epoch, Epoch(12));
    assert_eq!(images[0].seen()[11..14], [11, 12, 0]);
    let found = JournalFile::recover(medium, GUEST, START.term, Rules::ALL).unwrap();
    assert_eq!((found.order().last(), found.used()), (Epoch(12), 0));
}

#[test]
fn it_is_trimmed_by_bytes_and_by_time() {
    let (_, mut journal) = journal(40 << 20);
    let images = [Volatile::new(2 << 20)];
    let now = Instant::now();
    assert!(!journal.trim_due(now + TRIM_AFTER));
    let piece = vec![3; 1 << 20];
    journal.append(Epoch(11), [write(0, &piece)]).unwrap();
    journal.sync().unwrap();
    journal.apply(&images).unwrap();
    assert!(!journal.trim_due(now));
    assert!(journal.trim_due(Instant::now() + TRIM_AFTER));
    journal.append(Epoch(12), (0..31).map(|_| write(0, &piece))).unwrap();
    journal.sync().unwrap();
    journal.apply(&images).unwrap();
    assert!(journal.trim_due(now), "32 MiB");
    journal.sync_images(&images).unwrap();
    journal.trim().unwrap();
    assert!(!journal.trim_due(Instant::now() + TRIM_AFTER));
}

#[test]
fn a_full_journal_takes_an_epoch_once_there_is_room() {
    let (medium, mut journal) = journal(10_000);
    let images = [Volatile::new(8192)];
    let mut rng = fastrand::Rng::with_seed(3);
    let mut epoch = START.epoch;
    for round in 0..300 {
        let data = vec![round as u8; rng.usize(1..4000)];
        match journal.append(epoch.next(), [write(rng.u64(..4096), &data)]) {
            Ok(()) => epoch = epoch.next(),
            Err(JournalError::Full { used, capacity }) => {
                assert!(used + data.len() as u64 + 2 * FRAME as u64 > capacity);
                journal.settle(&images).unwrap();
            }
            Err(e) => panic!("{e}"),
        }
    }
    assert!(journal.head > 20 * 10_000, "it has gone around");
    assert!(matches!(
        journal.append(epoch.next(), [write(0, &[0; 10_000])]),
        Err(JournalError::Full { .. })
    ));
    journal.settle(&images).unwrap();
    // A lap later, nothing of an earlier one is found.
    let found = JournalFile::recover(medium, GUEST, START.term, Rules::ALL).unwrap();
    assert_eq!((found.order().last(), found.used()), (epoch, 0));
}

#[test]
fn what_does_not_fit_is_refused() {
    let (medium, mut journal) = journal(10_000);
    let images = [Volatile::new(4096)];
    for wrong in [9, 10, 12] {
        let refused = journal.append(Epoch(wrong), []);
        assert!(matches!(refused, Err(JournalError::Order { expected: 11, .. })), "{wrong}");
    }
    for (disk, offset, length) in [(1, 0, 1), (0, 4096, 1), (0, 0, 4097), (0, u64::MAX, 2)] {
        let mut journal =
            JournalFile::format(Volatile::new(20_000), GUEST, START, 10_000, Rules::ALL).unwrap();
        journal.append(Epoch(11), [Change::Zero { disk, offset, length }]).unwrap();
        journal.sync().unwrap();
        let refused = journal.apply(&images);
        assert!(matches!(refused, Err(JournalError::Outside { .. })), "{disk} {offset} {length}");
        assert_eq!(images[0].seen(), [0; 4096]);
    }
    journal.append(Epoch(11), []).unwrap();
    assert!(matches!(journal.begin(START), Err(JournalError::NotEmpty(3))));
    let other = JournalFile::recover(medium, Lineage(6), Term(0), Rules::ALL);
    assert!(matches!(other, Err(JournalError::OtherGuest(5))));
    let empty = JournalFile::recover(Volatile::new(20_000), GUEST, Term(0), Rules::ALL);
    assert!(matches!(empty, Err(JournalError::Damaged)));
}

#[test]
fn after_a_failed_write_or_sync_it_promises_nothing_more() {
    for step in 0..4 {
        let (medium, mut journal) = journal(10_000);
        let images = [Volatile::new(4096)];
        journal.append(Epoch(11), [write(0, &[1])]).unwrap();
        if step > 1 {
            journal.sync().unwrap();
            journal.apply(&images).unwrap();
        }
        let target = if step == 2 { &images[0] } else { &medium };
        target.0.borrow_mut().fails = true;
        let failed = match step {
            0 => journal.append(Epoch(12), [write(0, &[1])]).is_err(),
            1 => journal.sync().is_err(),
            2 => journal.sync_images(&images).is_err(),
            _ => {
                target.0.borrow_mut().fails = false;
                journal.sync_images(&images).unwrap();
                target.0.borrow_mut().fails = true;
                journal.trim().is_err()
            }
        };
        assert!(failed, "step {step}");
        assert!(matches!(journal.sync(), Err(JournalError::Failed)), "step {step}");
        assert!(matches!(journal.apply(&images), Err(JournalError::Failed)));
        assert!(matches!(journal.settle(&images), Err(JournalError::Failed)));
        assert!(!journal.order().may_run());
    }
}

#[test]
fn an_image_that_fails_once_gets_the_same_epoch_again() {
    let (_, mut journal) = journal(10_000);
    let images = [Volatile::new(4096)];
    journal.append(Epoch(11), [write(0, &[1]), write(1, &[2])]).unwrap();
    journal.sync().unwrap();
    images[0].0.borrow_mut().fails = true;
    let failed = journal.apply(&images);
    assert!(matches!(failed, Err(JournalError::Image { disk: 0, .. })));
    assert_eq!(journal.apply(&images).unwrap(), Some(Epoch(11)));
    assert_eq!(images[0].seen()[..2], [1, 2]);
}

#[test]
fn an_epoch_is_whole_only_with_exactly_its_own_frames() {
    // An attempt that found no room, then a shorter one of the same epoch, of which one frame never
    // reached the medium: the frame of the first attempt in its place must not be taken for it.
    let (medium, mut journal) = journal(1000);
    let full =
        journal.append(Epoch(11), [write(0, &[1; 50]), write(50, &[2; 50]), write(0, &[0; 900])]);
    assert!(matches!(full, Err(JournalError::Full { .. })));
    // Nothing is written before a batch is full, so write the abandoned frame by hand.
    let position = (FRAME + 50) as u64;
    let (kind, disk, term, epoch) = (Kind::Write, 0, START.term, Epoch(11));
    let stale = Frame { kind, disk, position, term, epoch, offset: 50, length: 50 };
    let mut bytes = Vec::new();
    stale.encode(&[2; 50], &mut bytes);
    journal.append(Epoch(11), [write(0, &[3; 50]), write(50, &[4; 50])]).unwrap();
    medium.write_at(HEADER + position, &bytes).unwrap();
    let found = JournalFile::recover(medium, GUEST, START.term, Rules::ALL).unwrap();
    assert_eq!(found.order().last(), START.epoch);
}

#[test]
fn epochs_of_a_void_term_are_not_applied() {
    for (void, expected) in [(START.term, 7), (START.term.next(), 0)] {
        let (medium, mut journal) = journal(10_000);
        journal.append(Epoch(11), [write(0, &[7])]).unwrap();
        journal.sync().unwrap();
        let images = [Volatile::new(512)];
        let mut found = JournalFile::recover(medium.clone(), GUEST, void, Rules::ALL).unwrap();
        found.settle(&images).unwrap();
        assert_eq!(images[0].seen()[0], expected);
        // The next term begins in the same file.
        let next = Place { term: Term(9), epoch: Epoch(0) };
        found.begin(next).unwrap();
        found.append(Epoch(1), [write(1, &[8])]).unwrap();
        let mut again = JournalFile::recover(medium, GUEST, next.term, Rules::ALL).unwrap();
        assert_eq!(again.settle(&images).unwrap(), Place { epoch: Epoch(1), ..next });
        assert_eq!(images[0].seen()[..2], [expected, 8]);
    }
}

#[test]
fn every_damaged_byte_is_noticed() {
    let (medium, mut journal) = journal(2000);
    journal.append(Epoch(11), [write(3, &[7; 100])]).unwrap();
    journal.append(Epoch(12), [Change::Zero { disk: 0, offset: 5, length: 9 }]).unwrap();
    journal.sync().unwrap();
    let good = medium.seen();
    let first = FRAME + 100 + FRAME;
    for at in 0..first + 2 * FRAME {
        let medium = Volatile::new(0);
        let mut bytes = good.clone();
        bytes[HEADER as usize + at] ^= 0x10;
        medium.0.borrow_mut().seen = bytes;
        let found = JournalFile::recover(medium, GUEST, START.term, Rules::ALL).unwrap();
        let expected = if at < first { Epoch(10) } else { Epoch(11) };
        assert_eq!(found.order().last(), expected, "byte {at}");
    }
}

#[test]
fn a_file_keeps_it() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("journal");
    let image = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(dir.path().join("image"))
        .unwrap();
    image.set_len(1 << 20).unwrap();
    image.write_at(0, &[1; 8192]).unwrap();
    let mut journal = JournalFile::create(&path, GUEST, START, 1 << 20).unwrap();
    assert!(fs::metadata(&path).unwrap().len() >= 1 << 20, "the room is reserved");
    let changes = [write(100, b"hello"), Change::Zero { disk: 0, offset: 4096, length: 4096 }];
    journal.append(Epoch(11), changes).unwrap();
    journal.sync().unwrap();
    drop(journal);
    let mut journal = JournalFile::open(&path, GUEST, START.term).unwrap();
    assert_eq!(journal.settle(&[image.try_clone().unwrap()]).unwrap().epoch, Epoch(11));
    let mut bytes = vec![0; 8192];
    image.read_at(0, &mut bytes).unwrap();
    let expected = [&[1; 100][..], b"hello", &[1; 4096 - 105], &[0; 4096]].concat();
    assert_eq!(bytes, expected);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
}
