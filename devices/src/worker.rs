//! Workers: the half of a device that lives on an I/O thread and owns its queues.
//!
//! A worker has exactly one owner at any time: its I/O thread while the device runs, the device
//! itself while it is parked. Ownership is the lock; there is no other.
//!
//! ```text
//!   Idle --start--> Away --park--> Parked --unpark--> Away
//!     ^                               |
//!     +------------ stop -------------+
//! ```
use std::{any::Any, io, marker::PhantomData, os::fd::RawFd, sync::Arc};

/// Work driven by file descriptors.
pub trait Worker: Any + Send {
    /// The descriptors to wait on for reading; [`Worker::ready`] receives the index of the one
    /// that fired. Asked once at each adoption. A worker that waits for something else as well
    /// (writability, descriptors that come and go) puts those into an epoll of its own and lists
    /// that epoll here.
    fn sources(&self) -> Vec<RawFd>;
    /// Source `index` fired. Must drain it: readiness is edge-triggered. Also called once for
    /// every source right after adoption, whether it has fired or not.
    fn ready(&mut self, index: usize);
    /// Last call before the worker leaves its thread: finish what is in flight.
    fn quiesce(&mut self);
}

/// An I/O thread, as devices see it.
pub trait IoThread: Send + Sync {
    /// Start driving a worker; the key takes it back.
    ///
    /// # Errors
    /// When one of its descriptors cannot be waited on, or the thread is gone.
    fn adopt(&self, worker: Box<dyn Worker>) -> io::Result<usize>;
    /// Quiesce a worker and give it back; `None` if there is none under this key.
    fn release(&self, key: usize) -> Option<Box<dyn Worker>>;
}

/// Where a device's worker is right now.
#[derive(Default)]
pub enum Home<W> {
    /// The driver has not set the device up yet.
    #[default]
    Idle,
    /// On the I/O thread, processing queues.
    Away(Lease<W>),
    /// With the device; its state can be read and written without a lock.
    Parked(Box<W>, Arc<dyn IoThread>),
}

/// A claim on a worker that is away.
pub struct Lease<W> {
    thread: Arc<dyn IoThread>,
    key: usize,
    worker: PhantomData<fn() -> W>,
}

impl<W: Worker> Home<W> {
    /// Send a fresh worker out.
    ///
    /// # Errors
    /// When the I/O thread cannot take it; the home is idle then.
    pub fn start(&mut self, worker: W, thread: Arc<dyn IoThread>) -> io::Result<()> {
        self.send(Box::new(worker), thread)
    }

    /// Call the worker home; nothing to do if it is not away.
    pub fn park(&mut self) {
        *self = match std::mem::take(self) {
            Self::Away(lease) => {
                let back = lease.thread.release(lease.key).map(|w| w as Box<dyn Any>);
                match back.and_then(|any| any.downcast::<W>().ok()) {
                    Some(worker) => Self::Parked(worker, lease.thread),
                    None => Self::Idle,
                }
            }
            other => other,
        };
    }

    /// Send a parked worker out again.
    ///
    /// # Errors
    /// As [`Home::start`].
    pub fn unpark(&mut self) -> io::Result<()> {
        match std::mem::take(self) {
            Self::Parked(worker, thread) => self.send(worker, thread),
            other => {
                *self = other;
                Ok(())
            }
        }
    }

    /// Call the worker home for good: quiesced, and dropped by the caller or reused.
    pub fn stop(&mut self) -> Option<Box<W>> {
        self.park();
        match std::mem::take(self) {
            Self::Parked(worker, _) => Some(worker),
            _ => None,
        }
    }

    /// The parked worker, if there is one.
    pub fn parked(&self) -> Option<&W> {
        match self {
            Self::Parked(worker, _) => Some(worker),
            _ => None,
        }
    }

    /// The parked worker, to be changed while nobody else can see it.
    pub fn parked_mut(&mut self) -> Option<&mut W> {
        match self {
            Self::Parked(worker, _) => Some(worker),
            _ => None,
        }
    }

    /// Change the worker wherever it is: an away one is called home and sent out again. `None`
    /// when there is no worker.
    ///
    /// # Errors
    /// As [`Home::start`].
    pub fn with<T>(&mut self, change: impl FnOnce(&mut W) -> T) -> io::Result<Option<T>> {
        let away = matches!(self, Self::Away(_));
        self.park();
        let result = self.parked_mut().map(change);
        if away {
            self.unpark()?;
        }
        Ok(result)
    }

    fn send(&mut self, worker: Box<W>, thread: Arc<dyn IoThread>) -> io::Result<()> {
        let key = thread.adopt(worker)?;
        *self = Self::Away(Lease { thread, key, worker: PhantomData });
        Ok(())
    }
}
