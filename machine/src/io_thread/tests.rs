use std::{
    io::{Read, Write},
    os::{fd::AsRawFd, unix::net::UnixStream},
    sync::{
        Arc,
        mpsc::{SyncSender, sync_channel},
    },
    time::Instant,
};

use devices::worker::{Lost, WorkerControl, WorkerSlot};

use super::*;

const SOON: Duration = Duration::from_secs(20);

/// Counts the bytes that come.
struct Count {
    from: UnixStream,
    bytes: usize,
    seen: Sender<usize>,
    /// Whether it becomes quiet, evaluated each time.
    rests: Box<dyn FnMut() -> bool + Send>,
}

impl Worker for Count {
    fn sources(&self) -> Vec<RawFd> {
        vec![self.from.as_raw_fd()]
    }
    fn ready(&mut self, _: usize) {
        let mut buf = [0; 16];
        while let Ok(n @ 1..) = self.from.read(&mut buf) {
            self.bytes += n;
            let _ = self.seen.send(self.bytes);
        }
    }
    fn quiesce(&mut self, patience: Option<Duration>) -> bool {
        patience.is_none() || (self.rests)()
    }
}

/// A device with a worker on `thread`, the sender of its bytes, and the count of those it has
/// received.
fn device(
    thread: &Arc<Handle>,
    rests: impl FnMut() -> bool + Send + 'static,
) -> (WorkerSlot<Count>, UnixStream, Receiver<usize>) {
    let (to, from) = UnixStream::pair().unwrap();
    from.set_nonblocking(true).unwrap();
    let (seen, answer) = channel();
    let mut slot = WorkerSlot::Empty;
    slot.start(Count { from, bytes: 0, seen, rests: Box::new(rests) }, thread.clone()).unwrap();
    (slot, to, answer)
}

fn thread() -> Arc<Handle> {
    Arc::new(Handle::spawn("io0", &ThreadStart::default()).unwrap())
}

/// Whether the thread is held soon.
fn holds(thread: &Handle) -> bool {
    thread.hold(Park::Drain, SOON);
    thread.is_held(Instant::now() + SOON).unwrap()
}

#[test]
fn a_worker_is_parked_and_runs_again() {
    let thread = thread();
    let (mut slot, mut to, answer) = device(&thread, || true);
    to.write_all(b"abc").unwrap();
    assert_eq!(answer.recv_timeout(SOON), Ok(3));
    slot.park().unwrap();
    assert_eq!(slot.parked().unwrap().unwrap().bytes, 3);
    to.write_all(b"de").unwrap(); // arrives while parked
    slot.unpark().unwrap();
    assert_eq!(answer.recv_timeout(SOON), Ok(5));
    to.write_all(b"f").unwrap();
    assert_eq!(answer.recv_timeout(SOON), Ok(6), "its descriptors are still watched");
}

#[test]
fn a_held_thread_gives_all_its_workers_away_and_takes_them_back() {
    let thread = thread();
    let mut devices: Vec<_> = (0..3).map(|_| device(&thread, || true)).collect();
    for round in 0..3 {
        assert!(holds(&thread));
        assert!(holds(&thread), "held already");
        for (index, (slot, to, _)) in devices.iter_mut().enumerate() {
            // One of them stays with the thread.
            if index != round {
                slot.park().unwrap();
            }
            to.write_all(b"x").unwrap();
        }
        for (_, _, answer) in &devices {
            assert!(answer.try_recv().is_err(), "a held worker works");
        }
        devices.iter_mut().for_each(|(slot, ..)| slot.unpark().unwrap());
        thread.go();
        for (_, _, answer) in &devices {
            assert_eq!(answer.recv_timeout(SOON), Ok(round + 1));
        }
    }
}

#[test]
fn workers_start_and_end_while_the_thread_is_held() {
    let thread = thread();
    let (mut old, ..) = device(&thread, || true);
    assert!(holds(&thread));
    assert!(old.stop().unwrap().is_some());
    let (mut parked, mut to, answer) = device(&thread, || true);
    parked.park().unwrap();
    // Its source is replaced; the number may be the same, so it must be registered again.
    let change = parked.change(|worker| {
        let (new_to, from) = UnixStream::pair().unwrap();
        from.set_nonblocking(true).unwrap();
        to = new_to;
        worker.from = from;
    });
    change.unwrap().unwrap();
    parked.unpark().unwrap();
    thread.go();
    for bytes in 1..3 {
        to.write_all(b"x").unwrap();
        assert_eq!(answer.recv_timeout(SOON), Ok(bytes));
    }
    assert!(parked.stop().unwrap().is_some());
    assert!(parked.stop().unwrap().is_none());
}

#[test]
fn a_thread_with_a_worker_that_does_not_rest_keeps_them_all() {
    let thread = thread();
    let mut rests = [false, true].into_iter();
    let (_restless, ..) = device(&thread, move || rests.next().unwrap());
    let (mut slot, mut to, answer) = device(&thread, || true);
    assert!(!holds(&thread));
    to.write_all(b"abc").unwrap();
    assert_eq!(answer.recv_timeout(SOON), Ok(3), "it runs on");
    assert!(holds(&thread));
    slot.park().unwrap();
    assert_eq!(slot.parked().unwrap().unwrap().bytes, 3);
}

#[test]
fn a_hold_that_was_taken_back_is_as_if_it_had_never_been() {
    let thread = thread();
    let (rest, may_rest) = channel();
    let (asks, asked) = channel();
    let (_slow, ..) = device(&thread, move || asks.send(()).is_ok() && may_rest.recv().is_ok());
    let (_home, mut to, answer) = device(&thread, || true);
    thread.hold(Park::Drain, SOON);
    assert_eq!(thread.is_held(Instant::now() + Duration::from_millis(10)), Ok(false));
    asked.recv_timeout(SOON).unwrap();
    thread.go();
    rest.send(()).unwrap();
    to.write_all(b"abc").unwrap();
    assert_eq!(answer.recv_timeout(SOON), Ok(3));
    // A new hold, requested while the thread has not noticed that the first was withdrawn.
    thread.hold(Park::Drain, SOON);
    asked.recv_timeout(SOON).unwrap();
    thread.go();
    thread.hold(Park::Drain, SOON);
    rest.send(()).unwrap();
    rest.send(()).unwrap();
    assert_eq!(thread.is_held(Instant::now() + SOON), Ok(true));
}

#[test]
fn a_thread_that_has_ended_holds_up_nothing() {
    let thread = thread();
    let (rest, may_rest) = channel();
    let (asks, asked) = channel();
    let (_slow, ..) = device(&thread, move || asks.send(()).is_ok() && may_rest.recv().is_ok());
    let (mut slot, ..) = device(&thread, || true);
    thread.hold(Park::Drain, SOON);
    asked.recv_timeout(SOON).unwrap();
    thread.go();
    thread.send(Order::Exit);
    thread.hold(Park::Drain, SOON);
    rest.send(()).unwrap();
    assert_eq!(thread.is_held(Instant::now() + SOON), Err(Ended));
    thread.hold(Park::Drain, SOON);
    assert_eq!(thread.is_held(Instant::now() + SOON), Err(Ended), "it is not asked any more");
    assert_eq!(slot.park(), Err(Lost), "its workers went with it");
    assert!(matches!(slot.parked(), Err(Lost)));
}

#[test]
fn a_hold_that_keeps_requests_in_flight_waits_for_none() {
    /// Its requests never end.
    struct Hangs(UnixStream, Arc<AtomicUsize>);
    impl Worker for Hangs {
        fn sources(&self) -> Vec<RawFd> {
            vec![self.0.as_raw_fd()]
        }
        fn ready(&mut self, _: usize) {
            self.1.fetch_add(1, Ordering::SeqCst);
        }
        fn quiesce(&mut self, limit: Option<Duration>) -> bool {
            limit.is_none()
        }
        fn park(&mut self, park: Park, limit: Option<Duration>) -> bool {
            park == Park::Keep || self.quiesce(limit)
        }
    }
    let thread = thread();
    let turns = Arc::new(AtomicUsize::new(0));
    let (_to, from) = UnixStream::pair().unwrap();
    let mut slot = WorkerSlot::Empty;
    slot.start(Hangs(from, turns.clone()), thread.clone()).unwrap();
    let (mut other, mut to, answer) = device(&thread, || true);
    for round in 1..=3 {
        thread.hold(Park::Keep, SOON);
        assert_eq!(thread.is_held(Instant::now() + SOON), Ok(true));
        slot.park().unwrap();
        assert!(slot.parked().unwrap().is_some());
        other.park().unwrap();
        to.write_all(b"x").unwrap();
        let before = turns.load(Ordering::SeqCst);
        slot.unpark().unwrap();
        other.unpark().unwrap();
        thread.go();
        assert_eq!(answer.recv_timeout(SOON), Ok(round), "it runs on");
        while turns.load(Ordering::SeqCst) == before {
            thread::yield_now();
        }
        // The other kind of hold is refused, and nothing is lost by it.
        thread.hold(Park::Drain, SOON);
        assert_eq!(thread.is_held(Instant::now() + SOON), Ok(false));
    }
}

#[test]
fn a_hold_stays_asked_for_between_two_looks_at_it() {
    let thread = thread();
    let (rest, may_rest) = channel();
    let (mut slow, ..) = device(&thread, move || may_rest.recv().is_ok());
    thread.hold(Park::Drain, SOON);
    for _ in 0..3 {
        assert_eq!(thread.is_held(Instant::now()), Ok(false));
        thread.hold(Park::Drain, SOON);
    }
    rest.send(()).unwrap();
    assert_eq!(thread.is_held(Instant::now() + SOON), Ok(true), "it was asked once");
    slow.park().unwrap();
    assert!(slow.parked().unwrap().is_some());
}

#[test]
fn a_worker_that_is_called_home_during_a_hold_is_found_wherever_it_is_then() {
    for taken_back in [false, true] {
        let thread = thread();
        let (rest, may_rest) = channel();
        let (_slow, ..) = device(&thread, move || may_rest.recv().is_ok());
        let (mut slot, ..) = device(&thread, || true);
        thread.hold(Park::Drain, SOON);
        // A vCPU that resets a device.
        let resets = thread::spawn(move || slot.stop().unwrap().is_some());
        if taken_back {
            thread.go();
        }
        rest.send(()).unwrap();
        assert!(resets.join().unwrap(), "taken back: {taken_back}");
        thread.go();
    }
}

/// Always has more work, and takes its time for each piece.
struct Busy {
    more: UnixStream,
    _keeps: UnixStream,
    turns: Arc<AtomicUsize>,
    /// Its first turn reports that it has begun, and waits for permission to end.
    first: Option<(SyncSender<()>, Receiver<()>)>,
}

impl Worker for Busy {
    fn sources(&self) -> Vec<RawFd> {
        vec![self.more.as_raw_fd()]
    }
    fn ready(&mut self, _: usize) {
        self.turns.fetch_add(1, Ordering::SeqCst);
        if let Some((begun, leave)) = self.first.take() {
            begun.send(()).unwrap();
            leave.recv().unwrap();
        }
    }
    fn quiesce(&mut self, _: Option<Duration>) -> bool {
        true
    }
}

#[test]
fn an_order_waits_for_one_turn_and_not_for_those_of_all_workers() {
    const WORKERS: usize = 40;
    let thread = thread();
    let turns = Arc::new(AtomicUsize::new(0));
    let (begun, has_begun) = sync_channel(0);
    let (leave, may_end) = channel();
    let mut first = Some((begun, may_end));
    // All have work as soon as they are adopted, which is at the same time.
    assert!(holds(&thread));
    let slots: Vec<_> = (0..WORKERS)
        .map(|_| {
            let (mut to, more) = UnixStream::pair().unwrap();
            to.write_all(b"x").unwrap();
            let worker = Busy { more, _keeps: to, turns: turns.clone(), first: first.take() };
            let mut slot = WorkerSlot::Empty;
            slot.start(worker, thread.clone()).unwrap();
            slot
        })
        .collect();
    thread.go();
    has_begun.recv().unwrap();
    let before = turns.load(Ordering::SeqCst);
    thread.hold(Park::Drain, SOON);
    leave.send(()).unwrap();
    assert!(holds(&thread));
    assert_eq!(turns.load(Ordering::SeqCst), before, "the order came during that turn");
    thread.go();
    while turns.load(Ordering::SeqCst) < before + WORKERS {
        thread::yield_now();
    }
    drop(slots);
}

#[test]
fn all_workers_together_have_no_more_time_to_rest_than_was_given() {
    /// Needs a while to become quiet, and reports how much time it was given.
    struct Slow(UnixStream, Sender<Duration>);
    impl Worker for Slow {
        fn sources(&self) -> Vec<RawFd> {
            vec![self.0.as_raw_fd()]
        }
        fn ready(&mut self, _: usize) {}
        fn quiesce(&mut self, limit: Option<Duration>) -> bool {
            let Some(limit) = limit else { return true };
            self.1.send(limit).unwrap();
            let begin = Instant::now();
            while begin.elapsed() < Duration::from_millis(20) {
                thread::yield_now();
            }
            true
        }
    }
    let thread = thread();
    let (given, limits) = channel();
    let mut slots = Vec::new();
    for _ in 0..3 {
        let mut slot = WorkerSlot::Empty;
        let (_, from) = UnixStream::pair().unwrap();
        slot.start(Slow(from, given.clone()), thread.clone()).unwrap();
        slots.push(slot);
    }
    assert!(holds(&thread));
    let limits: Vec<Duration> = limits.try_iter().collect();
    assert!(limits[0] <= SOON, "{limits:?}");
    for pair in limits.windows(2) {
        assert!(pair[0] - pair[1] >= Duration::from_millis(20), "{limits:?}");
    }
}
