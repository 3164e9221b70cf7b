use std::{
    fs,
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use parking_lot::Mutex;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::tempdir::TempDir;

use super::*;
use crate::{
    backend::disk::{Aio, DiskError, Observer, OpenOptions, Verdict, Waker, tests::run},
    testing::memory,
};

const IMAGE: usize = 4 << 20;
const DATA: u64 = 0x10_0000;

/// Records its calls, and the image's contents at each.
struct Recorder {
    image: PathBuf,
    says: Mutex<io::Result<Verdict>>,
    heard: Mutex<Vec<Heard>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Heard {
    Before(Change, Vec<u8>),
    After(Change, Vec<u8>, Result<(), io::ErrorKind>),
}

impl Recorder {
    fn on(disk: &Disk) -> Arc<Self> {
        let image = disk.path().to_owned();
        let recorder =
            Self { image, says: Mutex::new(Ok(Verdict::Start)), heard: Mutex::default() };
        let recorder = Arc::new(recorder);
        disk.observe(recorder.clone());
        recorder
    }

    fn say(&self, what: io::Result<Verdict>) {
        *self.says.lock() = what;
    }

    fn heard(&self) -> Vec<Heard> {
        std::mem::take(&mut *self.heard.lock())
    }

    fn content(&self, change: &Change) -> Vec<u8> {
        let image = fs::read(&self.image).unwrap();
        let at = |n: u64| usize::try_from(n).unwrap().min(image.len());
        image[at(change.range.start)..at(change.range.end)].to_vec()
    }
}

impl Observer for Recorder {
    fn before(&self, change: &Change) -> io::Result<Verdict> {
        let mut says = self.says.lock();
        let again = says.as_ref().map(|v| *v).map_err(|e| io::Error::from(e.kind()));
        let said = std::mem::replace(&mut *says, again);
        self.heard.lock().push(Heard::Before(change.clone(), self.content(change)));
        said
    }

    fn after(&self, change: &Change, result: &io::Result<()>) {
        let result = result.as_ref().copied().map_err(io::Error::kind);
        self.heard.lock().push(Heard::After(change.clone(), self.content(change), result));
    }
}

/// A disk full of sevens whose guest has memory full of nines.
fn open(options: OpenOptions) -> (TempDir, Arc<Disk>, Storage<u32>) {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("image");
    fs::write(&path, vec![7; IMAGE]).unwrap();
    let disk = Arc::new(Disk::open(&path, &options).unwrap());
    // A resize to the same size, before which the image gets another generation.
    disk.resize(IMAGE as u64).unwrap();
    let memory = memory();
    memory.write_slice(&vec![9; 1 << 20], GuestAddress(DATA)).unwrap();
    let storage = Storage::new(disk.clone(), memory, 8);
    (dir, disk, storage)
}

fn rw() -> OpenOptions {
    OpenOptions { discard: true, ..OpenOptions::default() }
}

fn every_way() -> impl Iterator<Item = OpenOptions> {
    let aio = [Aio::Auto, Aio::Off].into_iter();
    aio.flat_map(|aio| [false, true].map(|direct| OpenOptions { aio, direct, ..rw() }))
}

const PAGE: &[(u64, u32)] = &[(DATA, 4096)];
const WRITE: Op = Op::Write { durable: false };

fn change(kind: ChangeKind, at: u64, len: u64) -> Change {
    Change { kind, range: at..at + len }
}

#[test]
fn every_change_is_seen_before_it_is_started_and_after_it_is_complete() {
    const LEN: u64 = 4096;
    for way in every_way() {
        let (_dir, disk, mut storage) = open(way);
        let recorder = Recorder::on(&disk);
        let zeroes = |unmap, durable| Op::WriteZeroes { len: LEN, unmap, durable };
        let changes = [
            (Op::Write { durable: false }, ChangeKind::Write, 9),
            (Op::Write { durable: true }, ChangeKind::Write, 9),
            (Op::Discard { len: LEN }, ChangeKind::Discard, 0),
            (zeroes(false, false), ChangeKind::WriteZeroes, 0),
            (zeroes(true, false), ChangeKind::WriteZeroes, 0),
            (zeroes(false, true), ChangeKind::WriteZeroes, 0),
            (zeroes(true, true), ChangeKind::WriteZeroes, 0),
        ];
        for (n, (op, kind, content)) in changes.into_iter().enumerate() {
            let at = 4096 + n as u64 * 8192;
            let data = if kind == ChangeKind::Write { PAGE } else { &[] };
            run(&mut storage, op, at, data).unwrap();
            let seen = change(kind, at, LEN);
            assert_eq!(
                recorder.heard(),
                [
                    Heard::Before(seen.clone(), vec![7; LEN as usize]),
                    Heard::After(seen, vec![content; LEN as usize], Ok(())),
                ],
                "{way:?} {op:?}"
            );
        }
        run(&mut storage, Op::Read, 0, PAGE).unwrap();
        run(&mut storage, Op::Flush, 0, &[]).unwrap();
        assert_eq!(recorder.heard(), [], "these change nothing");
    }
}

#[test]
fn a_change_that_takes_several_calls_is_one_change() {
    // More buffers than one call takes.
    let parts: Vec<_> = (0..1500).map(|n| (DATA + n * 512, 512)).collect();
    for way in every_way() {
        let (_dir, disk, mut storage) = open(way);
        let recorder = Recorder::on(&disk);
        for durable in [false, true] {
            run(&mut storage, Op::Write { durable }, 0, &parts).unwrap();
            let [Heard::Before(before, _), Heard::After(after, content, Ok(()))] =
                &recorder.heard()[..]
            else {
                panic!("{way:?}: not one change")
            };
            assert_eq!(before, after);
            assert_eq!(*after, change(ChangeKind::Write, 0, 1500 * 512));
            assert!(content.iter().all(|b| *b == 9), "{way:?}: complete");
        }
    }
}

#[test]
fn a_change_that_fails_is_reported_with_its_error() {
    // Files cannot be that long.
    let at = (i64::MAX as u64) & !4095;
    for way in every_way() {
        let (_dir, disk, mut storage) = open(way);
        let recorder = Recorder::on(&disk);
        for op in [
            Op::Write { durable: false },
            Op::Write { durable: true },
            Op::WriteZeroes { len: 4096, unmap: false, durable: false },
        ] {
            let error = run(&mut storage, op, at, PAGE).unwrap_err().kind();
            let heard = recorder.heard();
            assert!(
                matches!(&heard[..], [Heard::Before(..), Heard::After(_, _, Err(e))] if *e == error),
                "{way:?} {op:?}: {heard:?}"
            );
        }
    }
}

#[test]
fn an_observer_can_refuse_a_change() {
    for way in every_way() {
        let (_dir, disk, mut storage) = open(way);
        let recorder = Recorder::on(&disk);
        recorder.say(Err(io::ErrorKind::StorageFull.into()));
        for op in [Op::Write { durable: false }, Op::Discard { len: 4096 }] {
            let error = run(&mut storage, op, 0, PAGE).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::StorageFull, "{way:?}");
            assert!(matches!(recorder.heard()[..], [Heard::Before(..)]), "the change was not made");
        }
        assert!(matches!(disk.resize(0), Err(DiskError::Resize { .. })));
        assert!(fs::read(disk.path()).unwrap() == [7; IMAGE]);
        run(&mut storage, Op::Read, 0, PAGE).unwrap();
    }
}

#[test]
fn an_observer_can_let_a_change_wait() {
    for way in every_way() {
        let (_dir, disk, mut storage) = open(way);
        let recorder = Recorder::on(&disk);
        recorder.say(Ok(Verdict::Wait));
        let page = [Segment { addr: GuestAddress(DATA), len: 4096 }];
        for _ in 0..3 {
            let outcome = storage.start(WRITE, 0, &page, 5);
            assert!(matches!(outcome, Outcome::Delayed), "{way:?}");
            assert_eq!(storage.in_flight(), 0, "a pause does not wait for it");
        }
        run(&mut storage, Op::Read, 0, PAGE).unwrap();
        assert!(fs::read(disk.path()).unwrap() == [7; IMAGE]);
        recorder.say(Ok(Verdict::Start));
        let waker = disk.waker();
        thread::spawn(move || waker.wake()).join().unwrap();
        assert!(disk.observers.wait(Duration::ZERO).unwrap(), "the worker sees the call");
        run(&mut storage, WRITE, 0, PAGE).unwrap();
        assert!(matches!(recorder.heard().last(), Some(Heard::After(_, _, Ok(())))));
    }
}

#[test]
fn an_observer_that_retires_hears_no_more() {
    let (_dir, disk, mut storage) = open(rw());
    let (once, always) = (Recorder::on(&disk), Recorder::on(&disk));
    once.say(Ok(Verdict::Retire));
    run(&mut storage, WRITE, 0, PAGE).unwrap();
    assert!(once.heard().iter().all(|heard| matches!(heard, Heard::Before(..))));
    for n in 0..3 {
        run(&mut storage, WRITE, n * 4096, PAGE).unwrap();
    }
    assert_eq!(once.heard(), []);
    let ends = always.heard().into_iter().filter(|heard| matches!(heard, Heard::After(..)));
    assert_eq!(ends.count(), 4);
}

#[test]
fn only_those_that_allowed_a_change_hear_of_its_end() {
    let (_dir, disk, mut storage) = open(OpenOptions { direct: true, aio: Aio::IoUring, ..rw() });
    let early = Recorder::on(&disk);
    let page = [Segment { addr: GuestAddress(DATA), len: 4096 }];
    let outcome = storage.start(Op::Write { durable: true }, 0, &page, 5);
    assert!(matches!(outcome, Outcome::Pending));
    let late = Recorder::on(&disk);
    disk.unobserve(&*early);
    storage.submit();
    // Dropping it waits for what is in flight.
    drop(storage);
    assert!(matches!(early.heard()[..], [Heard::Before(..), Heard::After(_, _, Ok(()))]));
    assert_eq!(late.heard(), []);
}

#[test]
fn resizing_is_a_change() {
    let (_dir, disk, _storage) = open(rw());
    let recorder = Recorder::on(&disk);
    let (small, large) = (IMAGE as u64 - 4096, IMAGE as u64 + 8192);
    disk.resize(small).unwrap();
    let seen = change(ChangeKind::Resize, small, 4096);
    let (before, after) = (vec![7; 4096], vec![]);
    assert_eq!(
        recorder.heard(),
        [Heard::Before(seen.clone(), before), Heard::After(seen, after, Ok(()))]
    );
    disk.resize(large).unwrap();
    let seen = change(ChangeKind::Resize, small, large - small);
    let grown = vec![0; 4096 + 8192];
    assert_eq!(
        recorder.heard(),
        [Heard::Before(seen.clone(), vec![]), Heard::After(seen, grown, Ok(()))]
    );
}

#[test]
fn resizing_waits_for_an_observer_but_not_without_a_limit() {
    let (_dir, disk, _storage) = open(rw());
    let recorder = Recorder::on(&disk);
    recorder.say(Ok(Verdict::Wait));
    let error = disk.resize(8192).unwrap_err();
    assert!(matches!(error, DiskError::Stalled { .. }));
    assert!(error.to_string().contains("has not answered"), "{error}");
    assert_eq!(
        (disk.size(), fs::metadata(disk.path()).unwrap().len()),
        (IMAGE as u64, disk.size())
    );

    /// Lets the first change wait until another thread is done.
    struct Slow(Waker, AtomicBool, Arc<AtomicBool>);
    impl Observer for Slow {
        fn before(&self, _: &Change) -> io::Result<Verdict> {
            if self.2.load(Ordering::SeqCst) {
                return Ok(Verdict::Start);
            }
            if !self.1.swap(true, Ordering::SeqCst) {
                let (waker, done) = (self.0.clone(), self.2.clone());
                thread::spawn(move || {
                    done.store(true, Ordering::SeqCst);
                    waker.wake();
                });
            }
            Ok(Verdict::Wait)
        }
        fn after(&self, _: &Change, _: &io::Result<()>) {}
    }
    disk.unobserve(&*recorder);
    disk.observe(Arc::new(Slow(disk.waker(), AtomicBool::new(false), Arc::default())));
    assert_eq!(disk.resize(8192).unwrap(), 8192);
}
