//! An I/O thread: one mio poll, many workers.
//!
//! ```text
//!            hold              all workers are quiet
//!   running ------> asked -----------------------------> held
//!    ^  ^             |                                   | workers move without a message
//!    |  +-------------+ limit exceeded, or go             |
//!    +------------------- go: workers at the desk --------+
//! ```
//! The thread may be in a system call that waits for storage when a hold is requested, so no caller
//! waits longer than its deadline. A request stays pending between two checks of it.
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    os::fd::RawFd,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use devices::{
    threads::{ThreadKind, ThreadStart},
    worker::{IoThread, Park, Refused, Worker},
};
use mio::{Events, Interest, Poll, Registry, Token, Waker, unix::SourceFd};
use parking_lot::{Condvar, Mutex, MutexGuard};

/// Token of the waker; workers start above it.
const WAKE: Token = Token(0);
/// A token is a worker's key and the index of one of its sources.
const SOURCE_BITS: u32 = 8;

type Residents = BTreeMap<usize, Resident>;

enum Order {
    Adopt(Residents),
    Release(usize, Sender<Option<Resident>>),
    /// The number of the hold, and the time limit for all workers together to become quiet.
    Hold(u64, Park, Duration),
    Exit,
}

/// The handle that other threads use.
pub struct Handle {
    orders: Sender<Order>,
    waker: Waker,
    registry: Registry,
    /// Key of the next worker.
    next: AtomicUsize,
    counter: Arc<Counter>,
    /// Sent by the thread once it runs; no caller waits for that before it needs the number.
    tid: Mutex<Receiver<u32>>,
    known_tid: OnceLock<u32>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Handle {
    /// Start a thread called `name`, set up by `start`.
    ///
    /// # Errors
    /// When the host refuses the thread or its descriptors.
    pub fn spawn(name: &str, start: &ThreadStart) -> io::Result<Self> {
        let poll = Poll::new()?;
        let registry = poll.registry().try_clone()?;
        let waker = Waker::new(&registry, WAKE)?;
        let (orders, inbox) = channel();
        let (started, tid) = channel();
        let counter = Arc::<Counter>::default();
        let body = Loop {
            poll,
            inbox,
            workers: BTreeMap::new(),
            due: VecDeque::new(),
            counter: counter.clone(),
        };
        let first_step = start.first_step(ThreadKind::Io, name);
        let thread = thread::Builder::new().name(name.into()).spawn(move || {
            let _ = started.send(crate::vcpu::kick::thread_number());
            if first_step().is_ok() {
                body.run();
            }
        })?;
        Ok(Self {
            orders,
            waker,
            registry,
            next: AtomicUsize::new(1),
            counter,
            tid: Mutex::new(tid),
            known_tid: OnceLock::new(),
            thread: Some(thread),
        })
    }

    /// A handle without a thread, for devices that never run. Workers given to it are lost.
    ///
    /// # Errors
    /// When the host refuses its descriptors.
    pub fn without_thread() -> io::Result<Self> {
        let registry = Poll::new()?.registry().try_clone()?;
        let waker = Waker::new(&registry, WAKE)?;
        Ok(Self {
            orders: channel().0,
            waker,
            registry,
            next: AtomicUsize::new(1),
            counter: Arc::default(),
            tid: Mutex::new(channel().1),
            known_tid: OnceLock::new(),
            thread: None,
        })
    }

    /// The kernel's thread id; waits for the thread to have started. 0 if it ended at once.
    pub fn thread(&self) -> u32 {
        *self.known_tid.get_or_init(|| self.tid.lock().recv().unwrap_or(0))
    }

    /// Request all workers; once they are held, nothing runs on the thread until [`Handle::go`].
    /// Send the request to all threads first, then wait for each. The thread gives up when its
    /// workers have not parked within `limit`; a request while one is pending or held changes
    /// nothing.
    pub fn hold(&self, park: Park, limit: Duration) {
        let mut desk = self.counter.desk.lock();
        if let Hold::No = desk.hold
            && !desk.ended
        {
            desk.last += 1;
            desk.hold = Hold::Requested(desk.last);
            self.send(Order::Hold(desk.last, park, limit));
        }
    }

    /// Whether the thread is held; waits until `deadline` for it to be.
    ///
    /// # Errors
    /// When the thread has ended and so never will be held.
    pub fn is_held(&self, deadline: Instant) -> Result<bool, Ended> {
        let mut desk = self.counter.desk.lock();
        while let Hold::Requested(_) = desk.hold
            && !self.counter.changed.wait_until(&mut desk, deadline).timed_out()
        {}
        match desk.hold {
            Hold::Held(_) => Ok(true),
            _ if desk.ended => Err(Ended),
            Hold::No | Hold::Requested(_) => Ok(false),
        }
    }

    /// Let the workers at the desk run again, or withdraw a pending hold.
    pub fn go(&self) {
        // The lock is held while sending: a caller that looks for a worker finds it either here or
        // on the thread.
        let mut desk = self.counter.desk.lock();
        if let Hold::Held(residents) = std::mem::take(&mut desk.hold)
            && !residents.is_empty()
        {
            self.send(Order::Adopt(residents));
        }
        self.counter.changed.notify_all();
    }

    /// The desk, once no hold is pending, so that each worker's place is certain. The main thread
    /// must not call this while it waits for a thread that it has asked to hold.
    fn settled(&self) -> MutexGuard<'_, Desk> {
        let mut desk = self.counter.desk.lock();
        while let Hold::Requested(_) = desk.hold {
            self.counter.changed.wait(&mut desk);
        }
        desk
    }

    fn put(&self, desk: &mut Desk, key: usize, resident: Resident) {
        match &mut desk.hold {
            Hold::Held(residents) => drop(residents.insert(key, resident)),
            Hold::No | Hold::Requested(_) => {
                self.send(Order::Adopt(BTreeMap::from([(key, resident)])));
            }
        }
    }

    fn fetch(&self, key: usize) -> Option<Resident> {
        let answer = {
            let mut desk = self.settled();
            if let Hold::Held(residents) = &mut desk.hold {
                return residents.remove(&key);
            }
            let (reply, answer) = channel();
            self.send(Order::Release(key, reply));
            answer
        };
        answer.recv().ok().flatten()
    }

    fn send(&self, order: Order) {
        // If the thread has ended, the caller sees that by the missing answer.
        let _ = self.orders.send(order);
        if let Err(e) = self.waker.wake() {
            log::error!("cannot wake an I/O thread: {e}");
        }
    }
}

impl IoThread for Handle {
    /// Does not wait for the thread: all steps that can fail are done here, and events for a worker
    /// that the thread has not seen yet are made up for when the thread adopts it.
    fn adopt(&self, worker: Box<dyn Worker>) -> Result<usize, Refused> {
        let key = self.next.fetch_add(1, Ordering::Relaxed);
        let sources = worker.sources();
        for (i, fd) in sources.iter().enumerate() {
            let token = Token(key << SOURCE_BITS | i);
            match self.registry.register(&mut SourceFd(fd), token, Interest::READABLE) {
                Ok(()) => {}
                // epoll refuses a regular file, which is always ready and needs no waiting.
                Err(e) if e.raw_os_error() == Some(libc::EPERM) => {}
                Err(e) => {
                    deregister(&self.registry, sources.get(..i).unwrap_or_default());
                    return Err(Refused::new(worker, e));
                }
            }
        }
        self.put(&mut self.settled(), key, Resident { worker, sources });
        Ok(key)
    }

    fn lend(&self, key: usize) -> Option<Box<dyn Worker>> {
        let Resident { worker, sources } = self.fetch(key)?;
        self.counter.desk.lock().lent.insert(key, sources);
        Some(worker)
    }

    fn take_back(&self, key: usize, worker: Box<dyn Worker>) -> Result<(), Refused> {
        let mut desk = self.settled();
        let Some(sources) = desk.lent.remove(&key) else {
            return Err(Refused::new(worker, io::ErrorKind::NotFound));
        };
        self.put(&mut desk, key, Resident { worker, sources });
        Ok(())
    }

    fn release(&self, key: usize) -> Option<Box<dyn Worker>> {
        let lent = self.counter.desk.lock().lent.remove(&key);
        if let Some(sources) = lent {
            deregister(&self.registry, &sources);
            return None;
        }
        let Resident { worker, sources } = self.fetch(key)?;
        deregister(&self.registry, &sources);
        Some(worker)
    }
}

/// Where the handle and the thread exchange workers.
#[derive(Default)]
struct Counter {
    /// A lock rather than messages: the main thread and the vCPU threads take workers of a held
    /// thread and return them without waking it. The thread moves all its workers here at once, so
    /// that they are either here or still on the thread, even if the hold was withdrawn meanwhile.
    desk: Mutex<Desk>,
    /// A hold was answered or taken back.
    changed: Condvar,
}

/// The workers that the thread does not drive at the moment.
#[derive(Default)]
struct Desk {
    hold: Hold,
    /// Number of the last hold.
    last: u64,
    /// The thread has ended.
    ended: bool,
    /// The descriptors of workers that are lent out.
    lent: BTreeMap<usize, Vec<RawFd>>,
}

/// Whether the thread is to pause.
#[derive(Default)]
enum Hold {
    #[default]
    No,
    /// The hold of this number is pending.
    Requested(u64),
    /// The thread is paused. Holds the workers that have not been taken away.
    Held(Residents),
}

/// The I/O thread has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended;

impl Drop for Handle {
    fn drop(&mut self) {
        self.send(Order::Exit);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A worker and the descriptors that it was registered with.
struct Resident {
    worker: Box<dyn Worker>,
    sources: Vec<RawFd>,
}

struct Loop {
    poll: Poll,
    inbox: Receiver<Order>,
    workers: Residents,
    /// Sources that have fired, or may have, and whose workers have not been called yet.
    due: VecDeque<Token>,
    counter: Arc<Counter>,
}

impl Drop for Loop {
    fn drop(&mut self) {
        let mut desk = self.counter.desk.lock();
        desk.ended = true;
        if let Hold::Requested(_) = desk.hold {
            desk.hold = Hold::No;
        }
        self.counter.changed.notify_all();
    }
}

impl Loop {
    fn run(mut self) {
        let mut events = Events::with_capacity(64);
        loop {
            match self.poll.poll(&mut events, None) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return log::error!("an I/O thread cannot wait for work: {e}"),
            }
            self.due.extend(events.iter().map(|e| e.token()));
            // An order waits at most for one worker's turn. Events for a worker that leaves
            // meanwhile are made up for when it comes back.
            while let Some(token) = self.due.pop_front() {
                if let Some(r) = self.workers.get_mut(&(token.0 >> SOURCE_BITS)) {
                    r.worker.ready(token.0 & ((1 << SOURCE_BITS) - 1));
                }
                while let Ok(order) = self.inbox.try_recv() {
                    match order {
                        Order::Adopt(residents) => self.adopt(residents),
                        Order::Hold(number, park, limit) => self.hold(number, park, limit),
                        Order::Release(key, reply) => drop(reply.send(self.release(key))),
                        Order::Exit => return,
                    }
                }
            }
        }
    }

    fn adopt(&mut self, mut residents: Residents) {
        // Events may have arrived while the worker was away or before it was adopted.
        self.due.extend(residents.iter().flat_map(|(key, resident)| resident.tokens(*key)));
        self.workers.append(&mut residents);
    }

    fn hold(&mut self, number: u64, park: Park, limit: Duration) {
        let is_requested =
            |desk: &Desk| matches!(desk.hold, Hold::Requested(requested) if requested == number);
        // The hold may have been withdrawn while the thread waited for storage.
        if !is_requested(&self.counter.desk.lock()) {
            return;
        }
        let deadline = Instant::now() + limit;
        let left = || deadline.saturating_duration_since(Instant::now());
        let quiet = self.workers.values_mut().all(|r| r.worker.park(park, Some(left())));
        let mut desk = self.counter.desk.lock();
        if is_requested(&desk) {
            desk.hold = match quiet {
                true => Hold::Held(std::mem::take(&mut self.workers)),
                false => Hold::No,
            };
            self.counter.changed.notify_all();
        }
        drop(desk);
        let workers = std::mem::take(&mut self.workers);
        self.adopt(workers);
    }

    fn release(&mut self, key: usize) -> Option<Resident> {
        let mut resident = self.workers.remove(&key)?;
        resident.worker.quiesce(None);
        Some(resident)
    }
}

impl Resident {
    /// The tokens of its sources, for an I/O thread that knows it by `key`.
    fn tokens(&self, key: usize) -> impl Iterator<Item = Token> + use<> {
        (0..self.sources.len()).map(move |index| Token(key << SOURCE_BITS | index))
    }
}

fn deregister(registry: &Registry, sources: &[RawFd]) {
    for fd in sources {
        // Fails for a descriptor that epoll refused, or that the kernel has removed already.
        let _ = registry.deregister(&mut SourceFd(fd));
    }
}
