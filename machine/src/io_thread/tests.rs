use std::{
    io::{Read, Write},
    os::{fd::AsRawFd, unix::net::UnixStream},
    sync::Arc,
};

use devices::worker::Home;

use super::*;

const SOON: Duration = Duration::from_secs(20);

/// Counts the bytes that come.
struct Count {
    from: UnixStream,
    bytes: usize,
    seen: Sender<usize>,
    /// Whether it comes to rest, asked each time.
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

/// A device with a worker on `thread`, the way to send it bytes, and how many it has seen.
fn device(
    thread: &Arc<Handle>,
    rests: impl FnMut() -> bool + Send + 'static,
) -> (Home<Count>, UnixStream, Receiver<usize>) {
    let (to, from) = UnixStream::pair().unwrap();
    from.set_nonblocking(true).unwrap();
    let (seen, answer) = channel();
    let mut home = Home::Idle;
    home.start(Count { from, bytes: 0, seen, rests: Box::new(rests) }, thread.clone()).unwrap();
    (home, to, answer)
}

fn thread() -> Arc<Handle> {
    Arc::new(Handle::spawn("io0").unwrap())
}

#[test]
fn a_worker_leaves_and_comes_home() {
    let thread = thread();
    let (mut home, mut to, answer) = device(&thread, || true);
    to.write_all(b"abc").unwrap();
    assert_eq!(answer.recv_timeout(SOON), Ok(3));
    home.park();
    assert_eq!(home.parked().unwrap().bytes, 3);
    to.write_all(b"de").unwrap(); // arrives while parked
    home.unpark().unwrap();
    assert_eq!(answer.recv_timeout(SOON), Ok(5));
    to.write_all(b"f").unwrap();
    assert_eq!(answer.recv_timeout(SOON), Ok(6), "its descriptors are still watched");
}

#[test]
fn a_held_thread_gives_all_its_workers_away_and_takes_them_back() {
    let thread = thread();
    let mut devices: Vec<_> = (0..3).map(|_| device(&thread, || true)).collect();
    for round in 0..3 {
        let mut hold = thread.hold(SOON);
        assert_eq!(hold.wait(SOON), Ok(()));
        drop(hold);
        assert_eq!(thread.hold(SOON).wait(SOON), Ok(()), "held already");
        for (index, (home, to, _)) in devices.iter_mut().enumerate() {
            // One of them stays with the thread.
            if index != round {
                home.park();
            }
            to.write_all(b"x").unwrap();
        }
        for (_, _, answer) in &devices {
            assert!(answer.try_recv().is_err(), "a held worker works");
        }
        devices.iter_mut().for_each(|(home, ..)| home.unpark().unwrap());
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
    assert_eq!(thread.hold(SOON).wait(SOON), Ok(()));
    assert!(old.stop().is_some());
    let (mut parked, mut to, answer) = device(&thread, || true);
    parked.park();
    // What it waits on changes: the next place is a new one, for the descriptor may be the same.
    let change = parked.with(|worker| {
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
    assert!(parked.stop().is_some());
    assert!(parked.stop().is_none());
}

#[test]
fn a_thread_with_a_worker_that_does_not_rest_keeps_them_all() {
    let thread = thread();
    let mut rests = [false, true].into_iter();
    let (_restless, ..) = device(&thread, move || rests.next().unwrap());
    let (mut home, mut to, answer) = device(&thread, || true);
    assert_eq!(thread.hold(SOON).wait(SOON), Err(RecvTimeoutError::Disconnected));
    to.write_all(b"abc").unwrap();
    assert_eq!(answer.recv_timeout(SOON), Ok(3), "it runs on");
    assert_eq!(thread.hold(SOON).wait(SOON), Ok(()));
    home.park();
    assert_eq!(home.parked().unwrap().bytes, 3);
}

#[test]
fn a_hold_that_nobody_waits_for_any_more_is_as_if_it_had_never_been() {
    let thread = thread();
    let (rest, may_rest) = channel();
    let (_slow, ..) = device(&thread, move || may_rest.recv().is_ok());
    let (_home, mut to, answer) = device(&thread, || true);
    let mut hold = thread.hold(SOON);
    assert_eq!(hold.wait(Duration::from_millis(10)), Err(RecvTimeoutError::Timeout));
    drop(hold);
    rest.send(()).unwrap();
    to.write_all(b"abc").unwrap();
    assert_eq!(answer.recv_timeout(SOON), Ok(3));
}
