//! An I/O thread that runs when the test calls it.
use std::{
    io,
    os::fd::RawFd,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::worker::{IoThread, Park, Refused, Worker};

/// An I/O thread without the thread: workers run when the test calls [`InlineThread::turn`].
/// Readiness is edge-triggered, as on the real one.
pub struct InlineThread {
    epoll: Epoll,
    workers: Mutex<Vec<Option<Adopted>>>,
    fault: Mutex<Option<ThreadFault>>,
    park: Mutex<Park>,
}

/// How an I/O thread fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadFault {
    /// It takes no worker.
    Refuses,
    /// It returns no worker.
    Loses,
}

/// A worker and the descriptors that are watched for it.
type Adopted = (Option<Box<dyn Worker>>, Vec<RawFd>);

impl InlineThread {
    /// A thread with nothing to do.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            epoll: Epoll::new().unwrap(),
            workers: Mutex::default(),
            fault: Mutex::default(),
            park: Mutex::new(Park::Drain),
        })
    }

    /// Handle pending events, waiting up to `patience` for the first; returns how many sources
    /// fired.
    pub fn turn(&self, patience: Duration) -> usize {
        let mut events = [EpollEvent::default(); 64];
        let patience = i32::try_from(patience.as_millis()).unwrap();
        let fired = self.epoll.wait(patience, &mut events).unwrap_or(0);
        let mut workers = self.workers.lock();
        for event in events.iter().take(fired) {
            let (key, index) = (event.data() >> 32, event.data() & 0xffff_ffff);
            if let Some(Some((Some(worker), _))) = workers.get_mut(key as usize) {
                worker.ready(index as usize);
            }
        }
        fired
    }

    /// Handle events until nothing fires any more.
    pub fn settle(&self) {
        self.until("the workers are quiet", || self.turn(Duration::ZERO) == 0);
    }

    /// Handle events until `done` returns true; panics if it never does.
    pub fn until(&self, what: &str, mut done: impl FnMut() -> bool) {
        let begin = Instant::now();
        while !done() {
            assert!(begin.elapsed() < Duration::from_secs(20), "{what}: never happened");
            self.turn(Duration::from_millis(5));
        }
    }

    /// Fail in this way from now on.
    pub fn fail(&self, fault: impl Into<Option<ThreadFault>>) {
        *self.fault.lock() = fault.into();
    }

    /// How workers are parked from now on.
    pub fn parks(&self, park: Park) {
        *self.park.lock() = park;
    }

    fn fails(&self, fault: ThreadFault) -> bool {
        *self.fault.lock() == Some(fault)
    }

    /// How many workers have been adopted.
    pub fn workers(&self) -> usize {
        self.workers.lock().iter().flatten().filter(|(worker, _)| worker.is_some()).count()
    }
}

impl IoThread for InlineThread {
    fn adopt(&self, mut worker: Box<dyn Worker>) -> Result<usize, Refused> {
        if self.fails(ThreadFault::Refuses) {
            return Err(Refused::new(worker, io::ErrorKind::QuotaExceeded));
        }
        let mut workers = self.workers.lock();
        let key = workers.len();
        let sources = worker.sources();
        for (index, fd) in sources.iter().enumerate() {
            let data = (key as u64) << 32 | index as u64;
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, data);
            self.epoll.ctl(ControlOperation::Add, *fd, event).unwrap();
        }
        for index in 0..sources.len() {
            worker.ready(index);
        }
        workers.push(Some((Some(worker), sources)));
        Ok(key)
    }

    fn lend(&self, key: usize) -> Option<Box<dyn Worker>> {
        if self.fails(ThreadFault::Loses) {
            return self.release(key);
        }
        let mut worker = self.workers.lock().get_mut(key)?.as_mut()?.0.take()?;
        worker.park(*self.park.lock(), None);
        Some(worker)
    }

    fn take_back(&self, key: usize, mut worker: Box<dyn Worker>) -> Result<(), Refused> {
        if self.fails(ThreadFault::Refuses) {
            return Err(Refused::new(worker, io::ErrorKind::QuotaExceeded));
        }
        let mut workers = self.workers.lock();
        let (place, sources) = workers[key].as_mut().unwrap();
        assert_eq!(*sources, worker.sources(), "a lent worker waits on something else");
        for index in 0..sources.len() {
            worker.ready(index);
        }
        *place = Some(worker);
        Ok(())
    }

    fn release(&self, key: usize) -> Option<Box<dyn Worker>> {
        let (worker, sources) = self.workers.lock().get_mut(key)?.take()?;
        for fd in sources {
            self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default()).unwrap();
        }
        let mut worker = worker?;
        worker.quiesce(None);
        (!self.fails(ThreadFault::Loses)).then_some(worker)
    }
}
