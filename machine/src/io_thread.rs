//! An I/O thread: one mio poll, many workers.
//!
//! ```text
//!            hold: all workers, quiet, in one message
//!   running ------------------------------------------> held
//!      ^                                                 | workers come and go without a message
//!      +------------------- go: those that are here -----+
//! ```
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    os::fd::RawFd,
    sync::{
        OnceLock,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SendError, Sender, SyncSender, channel, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use devices::worker::{IoThread, Worker};
use mio::{Events, Interest, Poll, Registry, Token, Waker, unix::SourceFd};
use parking_lot::{Mutex, MutexGuard};

/// Token of the waker; workers start above it.
const WAKE: Token = Token(0);
/// A token is a worker's key and the index of one of its sources.
const SOURCE_BITS: u32 = 8;

type Residents = BTreeMap<usize, Resident>;

enum Order {
    Adopt(Residents),
    Release(usize, Sender<Option<Resident>>),
    /// With the time that all workers together have to come to rest. The answer has no room to wait
    /// in, so that workers are either handed over or still the thread's, never lost on the way.
    Hold(Duration, SyncSender<Residents>),
    Exit,
}

/// The handle other threads hold.
pub struct Handle {
    orders: Sender<Order>,
    waker: Waker,
    registry: Registry,
    /// Key of the next worker.
    next: AtomicUsize,
    /// A lock and not a message: the main thread and the vCPU threads take workers of a held thread
    /// and bring them without waking it.
    desk: Mutex<Desk>,
    /// Told by the thread once it runs; nobody has to wait for that before it has work.
    tid: Mutex<Receiver<u32>>,
    known_tid: OnceLock<u32>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Handle {
    /// Start a thread called `name`.
    ///
    /// # Errors
    /// When the host refuses the thread or its descriptors.
    pub fn spawn(name: &str) -> io::Result<Self> {
        let poll = Poll::new()?;
        let registry = poll.registry().try_clone()?;
        let waker = Waker::new(&registry, WAKE)?;
        let (orders, inbox) = channel();
        let (started, tid) = channel();
        let body = Loop { poll, inbox, workers: BTreeMap::new(), due: VecDeque::new() };
        let thread = thread::Builder::new().name(name.into()).spawn(move || {
            let _ = started.send(crate::vcpu::kick::thread_number());
            body.run();
        })?;
        Ok(Self {
            orders,
            waker,
            registry,
            next: AtomicUsize::new(1),
            desk: Mutex::default(),
            tid: Mutex::new(tid),
            known_tid: OnceLock::new(),
            thread: Some(thread),
        })
    }

    /// One without a thread, for devices that never run. What it is given is lost.
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
            desk: Mutex::default(),
            tid: Mutex::new(channel().1),
            known_tid: OnceLock::new(),
            thread: None,
        })
    }

    /// The kernel's number of the thread; waits for it to have started. 0 if it ended at once.
    pub fn thread(&self) -> u32 {
        *self.known_tid.get_or_init(|| self.tid.lock().recv().unwrap_or(0))
    }

    /// Ask for all workers at once; nothing runs on the thread then until [`Handle::go`]. Ask all
    /// threads first, then wait for each. The thread refuses when what is in flight has not ended
    /// within `limit`.
    pub fn hold(&self, limit: Duration) -> Holding<'_> {
        let desk = self.desk.lock();
        let answer = desk.held.is_none().then(|| {
            let (reply, answer) = sync_channel(0);
            self.tell(Order::Hold(limit, reply));
            answer
        });
        Holding { desk, answer }
    }

    /// Let the workers that are here run again.
    pub fn go(&self) {
        // The lock covers the sending: whoever looks for a worker finds it here or on the thread.
        let mut desk = self.desk.lock();
        if let Some(residents) = desk.held.take().filter(|r| !r.is_empty()) {
            self.tell(Order::Adopt(residents));
        }
    }

    fn put(&self, desk: &mut Desk, key: usize, resident: Resident) {
        match &mut desk.held {
            Some(residents) => drop(residents.insert(key, resident)),
            None => self.tell(Order::Adopt(BTreeMap::from([(key, resident)]))),
        }
    }

    fn fetch(&self, key: usize) -> Option<Resident> {
        let answer = {
            let mut desk = self.desk.lock();
            if let Some(residents) = &mut desk.held {
                return residents.remove(&key);
            }
            let (reply, answer) = channel();
            self.tell(Order::Release(key, reply));
            answer
        };
        answer.recv().ok().flatten()
    }

    fn tell(&self, order: Order) {
        // A thread that has gone shows as an answer that never comes.
        let _ = self.orders.send(order);
        if let Err(e) = self.waker.wake() {
            log::error!("cannot wake an I/O thread: {e}");
        }
    }
}

impl IoThread for Handle {
    /// Does not wait for the thread: what can fail is done here, and events for a worker that the
    /// thread has not seen yet are made up for when it takes the worker in.
    fn adopt(&self, worker: Box<dyn Worker>) -> io::Result<usize> {
        let key = self.next.fetch_add(1, Ordering::Relaxed);
        let sources = worker.sources();
        for (i, fd) in sources.iter().enumerate() {
            let token = Token(key << SOURCE_BITS | i);
            match self.registry.register(&mut SourceFd(fd), token, Interest::READABLE) {
                Ok(()) => {}
                // A regular file cannot be waited on, and need not be: it is always ready.
                Err(e) if e.raw_os_error() == Some(libc::EPERM) => {}
                Err(e) => {
                    deregister(&self.registry, sources.get(..i).unwrap_or_default());
                    return Err(e);
                }
            }
        }
        self.put(&mut self.desk.lock(), key, Resident { worker, sources });
        Ok(key)
    }

    fn lend(&self, key: usize) -> Option<Box<dyn Worker>> {
        let Resident { worker, sources } = self.fetch(key)?;
        self.desk.lock().lent.insert(key, sources);
        Some(worker)
    }

    fn take_back(&self, key: usize, worker: Box<dyn Worker>) -> io::Result<()> {
        let mut desk = self.desk.lock();
        let sources = desk.lent.remove(&key).ok_or(io::ErrorKind::NotFound)?;
        self.put(&mut desk, key, Resident { worker, sources });
        Ok(())
    }

    fn release(&self, key: usize) -> Option<Box<dyn Worker>> {
        let lent = self.desk.lock().lent.remove(&key);
        if let Some(sources) = lent {
            deregister(&self.registry, &sources);
            return None;
        }
        let Resident { worker, sources } = self.fetch(key)?;
        deregister(&self.registry, &sources);
        Some(worker)
    }
}

/// What the thread knows of workers that it does not drive just now.
#[derive(Default)]
struct Desk {
    /// While the thread is held: those that nobody has taken away.
    held: Option<Residents>,
    /// The descriptors of those that are lent out.
    lent: BTreeMap<usize, Vec<RawFd>>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.tell(Order::Exit);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A thread that has been asked for its workers. Dropped, it keeps them.
#[must_use = "the thread is held when it has answered"]
pub struct Holding<'a> {
    desk: MutexGuard<'a, Desk>,
    /// `None`: it was held before.
    answer: Option<Receiver<Residents>>,
}

impl Holding<'_> {
    /// Wait for the thread to hand its workers over.
    ///
    /// # Errors
    /// `Timeout` when it has not done so within `patience`: wait again, or drop this.
    /// `Disconnected` when it will not.
    pub fn wait(&mut self, patience: Duration) -> Result<(), RecvTimeoutError> {
        if let Some(answer) = &self.answer {
            self.desk.held = Some(answer.recv_timeout(patience)?);
            self.answer = None;
        }
        Ok(())
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
    /// Sources that have fired, or may have, and whose workers have not been told.
    due: VecDeque<Token>,
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
            // An order waits for one worker's turn at most. What is due for a worker that leaves
            // meanwhile is made up for when it comes back.
            while let Some(token) = self.due.pop_front() {
                if let Some(r) = self.workers.get_mut(&(token.0 >> SOURCE_BITS)) {
                    r.worker.ready(token.0 & ((1 << SOURCE_BITS) - 1));
                }
                while let Ok(order) = self.inbox.try_recv() {
                    match order {
                        Order::Adopt(residents) => self.adopt(residents),
                        Order::Hold(limit, reply) => self.hold(limit, &reply),
                        Order::Release(key, reply) => drop(reply.send(self.release(key))),
                        Order::Exit => return,
                    }
                }
            }
        }
    }

    fn adopt(&mut self, mut residents: Residents) {
        // Work may have arrived while the worker was away, or before it was here.
        self.due.extend(residents.iter().flat_map(|(key, resident)| resident.tokens(*key)));
        self.workers.append(&mut residents);
    }

    fn hold(&mut self, limit: Duration, reply: &SyncSender<Residents>) {
        let deadline = Instant::now() + limit;
        let left = || deadline.saturating_duration_since(Instant::now());
        if self.workers.values_mut().all(|r| r.worker.quiesce(Some(left()))) {
            match reply.send(std::mem::take(&mut self.workers)) {
                Ok(()) => return,
                // The one that asked has given up.
                Err(SendError(workers)) => self.workers = workers,
            }
        }
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
    /// Its sources, for an I/O thread that knows it by `key`.
    fn tokens(&self, key: usize) -> impl Iterator<Item = Token> + use<> {
        (0..self.sources.len()).map(move |index| Token(key << SOURCE_BITS | index))
    }
}

fn deregister(registry: &Registry, sources: &[RawFd]) {
    for fd in sources {
        // Fails for a descriptor that could not be waited on, or that the kernel has taken away.
        let _ = registry.deregister(&mut SourceFd(fd));
    }
}
