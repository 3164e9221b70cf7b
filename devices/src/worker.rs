//! Workers: the half of a device that lives on an I/O thread and owns its queues.
//!
//! A worker has exactly one owner at any time: its I/O thread while the device runs, the device
//! itself while it is parked. Ownership is the lock; there is no other.
//!
//! ```text
//!            start                park
//!   Empty ----------> Running -------------> Parked
//!     ^                 |  ^                  |  |
//!     |   not returned  |  +----- unpark -----+  |
//!     |                 v                        |
//!     +----- stop ---- Lost                      |
//!     +--------------------- stop ---------------+
//! ```
//! Two things can go wrong. A worker that its thread does not return, because the thread has ended,
//! is lost. A worker that its thread refuses, for lack of descriptors, is parked: its state can
//! still be saved, and its resources can be reused.
use std::{any::Any, fmt, io, marker::PhantomData, os::fd::RawFd, sync::Arc, time::Duration};

/// What a worker does with its requests in flight before it leaves its thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Park {
    /// It waits for them.
    Drain,
    /// They go on while it is away, and are part of its device's saved state. Its device must be
    /// neither changed nor reset before the worker has run again.
    Keep,
}

/// Work driven by file descriptors.
pub trait Worker: Any + Send {
    /// The descriptors to wait on for reading; [`Worker::ready`] receives the index of the one that
    /// fired. Called once at each adoption. A worker that waits for something else as well
    /// (writability, descriptors that come and go) puts those into an epoll of its own and lists
    /// that epoll here.
    fn sources(&self) -> Vec<RawFd>;
    /// Source `index` fired. Must drain it: readiness is edge-triggered. Also called once for
    /// every source right after adoption, whether it has fired or not.
    fn ready(&mut self, index: usize);
    /// Last call before the worker leaves its thread: finish what is in flight. False when that has
    /// not ended within `limit`: the worker then stays on its thread and continues.
    fn quiesce(&mut self, limit: Option<Duration>) -> bool;
    /// As [`Worker::quiesce`], but with [`Park::Keep`] a worker whose requests may take long leaves
    /// at once, between two of them. For all others there is no difference.
    fn park(&mut self, _: Park, limit: Option<Duration>) -> bool {
        self.quiesce(limit)
    }
}

/// An I/O thread, as devices see it.
pub trait IoThread: Send + Sync {
    /// Start driving a worker; the returned key identifies it from then on.
    ///
    /// # Errors
    /// When one of its descriptors cannot be waited on, or the thread is gone.
    fn adopt(&self, worker: Box<dyn Worker>) -> Result<usize, Refused>;
    /// Quiesce a worker and lend it out, with its registration kept: events on its descriptors are
    /// not lost meanwhile, and the descriptors must not change. `None` if it is not on this thread.
    fn lend(&self, key: usize) -> Option<Box<dyn Worker>>;
    /// Resume driving a worker that was lent out.
    ///
    /// # Errors
    /// As [`IoThread::adopt`].
    fn take_back(&self, key: usize, worker: Box<dyn Worker>) -> Result<(), Refused>;
    /// Quiesce a worker, remove its registration and return it; `None` if it is not on this thread.
    fn release(&self, key: usize) -> Option<Box<dyn Worker>>;
}

/// A worker that an I/O thread has refused, and why.
pub struct Refused {
    /// The worker, unchanged.
    pub worker: Box<dyn Worker>,
    /// Why.
    pub error: io::Error,
}

impl Refused {
    /// `worker` was refused because of `error`.
    pub fn new(worker: Box<dyn Worker>, error: impl Into<io::Error>) -> Self {
        Self { worker, error: error.into() }
    }
}

impl fmt::Debug for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

/// The I/O thread has ended, and a worker with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the I/O thread does not return the device's worker")]
pub struct Lost;

impl From<Lost> for io::Error {
    fn from(lost: Lost) -> Self {
        Self::other(lost)
    }
}

/// Where a device's worker is right now.
#[derive(Default)]
pub enum WorkerSlot<W> {
    /// There is none: the driver has not set the device up yet.
    #[default]
    Empty,
    /// On the I/O thread, processing queues.
    Running(Registration<W>),
    /// With the device; its state can be read and written without a lock.
    Parked(Box<W>, Registration<W>),
    /// Not returned by its thread.
    Lost,
}

/// How an I/O thread identifies a worker.
pub struct Registration<W> {
    thread: Arc<dyn IoThread>,
    /// `None`: released; the worker has to be adopted again.
    key: Option<usize>,
    worker: PhantomData<fn() -> W>,
}

impl<W: Worker> Registration<W> {
    /// Get the worker back from its thread.
    fn fetch(
        &self,
        how: impl FnOnce(&dyn IoThread, usize) -> Option<Box<dyn Worker>>,
    ) -> Option<Box<W>> {
        how(&*self.thread, self.key?).and_then(downcast)
    }

    fn give_up(&mut self) {
        if let Some(key) = self.key.take() {
            drop(self.thread.release(key));
        }
    }
}

fn downcast<W: Worker>(worker: Box<dyn Worker>) -> Option<Box<W>> {
    let worker: Box<dyn Any> = worker;
    worker.downcast().ok()
}

impl<W: Worker> WorkerSlot<W> {
    /// Start a new worker on `thread`.
    ///
    /// # Errors
    /// When the I/O thread refuses it: it is parked then, and [`WorkerSlot::stop`] returns it.
    pub fn start(&mut self, worker: W, thread: Arc<dyn IoThread>) -> io::Result<()> {
        let registration = Registration { thread, key: None, worker: PhantomData };
        *self = Self::Parked(Box::new(worker), registration);
        self.unpark()
    }

    /// Take the worker back permanently: it is quiesced, and the caller drops or reuses it. `None`
    /// when there is none.
    ///
    /// # Errors
    /// When its thread does not return it. The slot is empty in any case.
    pub fn stop(&mut self) -> Result<Option<Box<W>>, Lost> {
        match std::mem::take(self) {
            Self::Empty | Self::Lost => Ok(None),
            Self::Running(registration) => {
                registration.fetch(|thread, key| thread.release(key)).map(Some).ok_or(Lost)
            }
            Self::Parked(worker, mut registration) => {
                registration.give_up();
                Ok(Some(worker))
            }
        }
    }

    /// The parked worker, if there is one.
    ///
    /// # Errors
    /// When it is lost.
    pub fn parked(&self) -> Result<Option<&W>, Lost> {
        match self {
            Self::Parked(worker, _) => Ok(Some(worker)),
            Self::Lost => Err(Lost),
            Self::Empty | Self::Running(_) => Ok(None),
        }
    }

    /// The parked worker, to be changed while no other thread can see it. Its descriptors must stay
    /// the same: [`WorkerSlot::change`] may change those too.
    pub fn parked_mut(&mut self) -> Option<&mut W> {
        match self {
            Self::Parked(worker, _) => Some(worker),
            _ => None,
        }
    }

    /// Change the worker and its descriptors, wherever it is: a running one is parked and
    /// restarted. `None` when there is no worker.
    ///
    /// # Errors
    /// Those of [`WorkerControl::park`]: then nothing has changed. Those of
    /// [`WorkerControl::unpark`]: then the change is made.
    pub fn change<T>(&mut self, change: impl FnOnce(&mut W) -> T) -> io::Result<Option<T>> {
        let running = matches!(self, Self::Running(_));
        self.park()?;
        let Self::Parked(worker, registration) = self else { return Ok(None) };
        // Before the descriptors change, so that no new one is mistaken for an old one.
        registration.give_up();
        let result = change(worker);
        if running {
            self.unpark()?;
        }
        Ok(Some(result))
    }
}

/// What a pause does to a worker, whatever it works on.
pub trait WorkerControl {
    /// Take the worker back from its thread; does nothing if it does not run.
    ///
    /// # Errors
    /// When its thread does not return it: it is lost then.
    fn park(&mut self) -> Result<(), Lost>;
    /// Return a parked worker to its thread.
    ///
    /// # Errors
    /// When the I/O thread refuses it: it stays parked.
    fn unpark(&mut self) -> io::Result<()>;
}

impl<W: Worker> WorkerControl for WorkerSlot<W> {
    fn park(&mut self) -> Result<(), Lost> {
        let Self::Running(registration) = self else { return Ok(()) };
        match registration.fetch(|thread, key| thread.lend(key)) {
            Some(worker) => {
                if let Self::Running(registration) = std::mem::take(self) {
                    *self = Self::Parked(worker, registration);
                }
                Ok(())
            }
            None => {
                *self = Self::Lost;
                Err(Lost)
            }
        }
    }

    fn unpark(&mut self) -> io::Result<()> {
        let (worker, mut registration) = match std::mem::take(self) {
            Self::Parked(worker, registration) => (worker, registration),
            other => {
                *self = other;
                return Ok(());
            }
        };
        let thread = &registration.thread;
        let sent = match registration.key {
            Some(key) => thread.take_back(key, worker).map(|()| key),
            None => thread.adopt(worker),
        };
        match sent {
            Ok(key) => {
                registration.key = Some(key);
                *self = Self::Running(registration);
                Ok(())
            }
            Err(Refused { worker, error }) => {
                *self = downcast(worker)
                    .map_or(Self::Lost, |worker| Self::Parked(worker, registration));
                Err(error)
            }
        }
    }
}
