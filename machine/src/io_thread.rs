//! An I/O thread: one mio poll, many workers.
use std::{
    collections::BTreeMap,
    io,
    os::fd::RawFd,
    sync::{
        OnceLock,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread,
};

use devices::worker::{IoThread, Worker};
use mio::{Events, Interest, Poll, Registry, Token, Waker, unix::SourceFd};
use parking_lot::Mutex;

/// Token of the waker; workers start above it.
const WAKE: Token = Token(0);
/// A token is a worker's key and the index of one of its sources.
const SOURCE_BITS: u32 = 8;

enum Order {
    Adopt(usize, Resident),
    Release(usize, Sender<Option<Box<dyn Worker>>>),
    Exit,
}

/// The handle other threads hold.
pub struct Handle {
    orders: Sender<Order>,
    waker: Waker,
    registry: Registry,
    /// Key of the next worker.
    next: AtomicUsize,
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
        let body = Loop { poll, inbox, workers: BTreeMap::new() };
        let thread = thread::Builder::new().name(name.into()).spawn(move || {
            let _ = started.send(crate::vcpu::kick::thread_number());
            body.run();
        })?;
        Ok(Self {
            orders,
            waker,
            registry,
            next: AtomicUsize::new(1),
            tid: Mutex::new(tid),
            known_tid: OnceLock::new(),
            thread: Some(thread),
        })
    }

    /// The kernel's number of the thread; waits for it to have started. 0 if it ended at once.
    pub fn thread(&self) -> u32 {
        *self.known_tid.get_or_init(|| self.tid.lock().recv().unwrap_or(0))
    }

    fn ask<T>(&self, order: impl FnOnce(Sender<T>) -> Order) -> Option<T> {
        let (reply, answer) = channel();
        self.tell(order(reply));
        answer.recv().ok()
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
        self.tell(Order::Adopt(key, Resident { worker, sources }));
        Ok(key)
    }

    fn release(&self, key: usize) -> Option<Box<dyn Worker>> {
        self.ask(|reply| Order::Release(key, reply)).flatten()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.tell(Order::Exit);
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
    workers: BTreeMap<usize, Resident>,
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
            let mut ordered = false;
            for token in events.iter().map(|e| e.token()) {
                if token == WAKE {
                    ordered = true;
                } else if let Some(r) = self.workers.get_mut(&(token.0 >> SOURCE_BITS)) {
                    r.worker.ready(token.0 & ((1 << SOURCE_BITS) - 1));
                }
            }
            // After the events, so that none is left for a worker that has been released.
            while ordered && let Ok(order) = self.inbox.try_recv() {
                match order {
                    Order::Adopt(key, resident) => self.adopt(key, resident),
                    Order::Release(key, reply) => drop(reply.send(self.release(key))),
                    Order::Exit => return,
                }
            }
        }
    }

    fn adopt(&mut self, key: usize, mut resident: Resident) {
        // Work may have arrived while the worker was away, or before it was here.
        (0..resident.sources.len()).for_each(|i| resident.worker.ready(i));
        self.workers.insert(key, resident);
    }

    fn release(&mut self, key: usize) -> Option<Box<dyn Worker>> {
        let mut resident = self.workers.remove(&key)?;
        deregister(self.poll.registry(), &resident.sources);
        resident.worker.quiesce();
        Some(resident.worker)
    }
}

fn deregister(registry: &Registry, sources: &[RawFd]) {
    for fd in sources {
        // Fails for a descriptor that could not be waited on, or that the kernel has taken away.
        let _ = registry.deregister(&mut SourceFd(fd));
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::{fd::AsRawFd, unix::net::UnixStream},
        sync::Arc,
        time::Duration,
    };

    use devices::worker::Home;

    use super::*;

    struct Count {
        from: UnixStream,
        bytes: usize,
        seen: Sender<usize>,
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
        fn quiesce(&mut self) {}
    }

    #[test]
    fn a_worker_leaves_and_comes_home() {
        let thread: Arc<dyn IoThread> = Arc::new(Handle::spawn("io0").unwrap());
        let (mut to, from) = UnixStream::pair().unwrap();
        from.set_nonblocking(true).unwrap();
        let (seen, answer) = channel();
        let mut home = Home::Idle;
        home.start(Count { from, bytes: 0, seen }, thread).unwrap();
        to.write_all(b"abc").unwrap();
        assert_eq!(answer.recv_timeout(Duration::from_secs(5)), Ok(3));
        home.park();
        assert_eq!(home.parked().unwrap().bytes, 3);
        to.write_all(b"de").unwrap(); // arrives while parked
        home.unpark().unwrap();
        assert_eq!(answer.recv_timeout(Duration::from_secs(5)), Ok(5));
    }
}
