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
use std::{any::Any, io, marker::PhantomData, os::fd::RawFd, sync::Arc, time::Duration};

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
    /// Last call before the worker leaves its thread: finish what is in flight. False when that has
    /// not ended within `limit`: the worker then stays where it is, and continues.
    fn quiesce(&mut self, limit: Option<Duration>) -> bool;
}

/// An I/O thread, as devices see it.
pub trait IoThread: Send + Sync {
    /// Start driving a worker; the key takes it back.
    ///
    /// # Errors
    /// When one of its descriptors cannot be waited on, or the thread is gone.
    fn adopt(&self, worker: Box<dyn Worker>) -> io::Result<usize>;
    /// Quiesce a worker and lend it out, with its place kept: nothing is forgotten of what happens
    /// to its descriptors meanwhile, and they must stay what they are. `None` if it is not here.
    fn lend(&self, key: usize) -> Option<Box<dyn Worker>>;
    /// Go on driving a worker that was lent out.
    ///
    /// # Errors
    /// As [`IoThread::adopt`].
    fn take_back(&self, key: usize, worker: Box<dyn Worker>) -> io::Result<()>;
    /// Quiesce a worker and give it and its place up; `None` if it is not here.
    fn release(&self, key: usize) -> Option<Box<dyn Worker>>;
}

/// Where a device's worker is right now.
#[derive(Default)]
pub enum Home<W> {
    /// The driver has not set the device up yet.
    #[default]
    Idle,
    /// On the I/O thread, processing queues.
    Away(Place<W>),
    /// With the device; its state can be read and written without a lock.
    Parked(Box<W>, Place<W>),
}

/// A worker's place on an I/O thread.
pub struct Place<W> {
    thread: Arc<dyn IoThread>,
    /// `None`: given up; it needs a new one.
    key: Option<usize>,
    worker: PhantomData<fn() -> W>,
}

impl<W: Worker> Place<W> {
    /// Call the worker home.
    fn call(
        &self,
        how: impl FnOnce(&dyn IoThread, usize) -> Option<Box<dyn Worker>>,
    ) -> Option<Box<W>> {
        let worker: Box<dyn Any> = how(&*self.thread, self.key?)?;
        worker.downcast().ok()
    }

    fn give_up(&mut self) {
        if let Some(key) = self.key.take() {
            drop(self.thread.release(key));
        }
    }
}

impl<W: Worker> Home<W> {
    /// Send a fresh worker out.
    ///
    /// # Errors
    /// When the I/O thread cannot take it; the home is idle then.
    pub fn start(&mut self, worker: W, thread: Arc<dyn IoThread>) -> io::Result<()> {
        self.send(Box::new(worker), Place { thread, key: None, worker: PhantomData })
    }

    /// Call the worker home; nothing to do if it is not away.
    pub fn park(&mut self) {
        *self = match std::mem::take(self) {
            Self::Away(place) => match place.call(|thread, key| thread.lend(key)) {
                Some(worker) => Self::Parked(worker, place),
                None => Self::Idle,
            },
            other => other,
        };
    }

    /// Send a parked worker out again.
    ///
    /// # Errors
    /// As [`Home::start`].
    pub fn unpark(&mut self) -> io::Result<()> {
        match std::mem::take(self) {
            Self::Parked(worker, place) => self.send(worker, place),
            other => {
                *self = other;
                Ok(())
            }
        }
    }

    /// Call the worker home for good: quiesced, and dropped by the caller or reused.
    pub fn stop(&mut self) -> Option<Box<W>> {
        match std::mem::take(self) {
            Self::Idle => None,
            Self::Away(place) => place.call(|thread, key| thread.release(key)),
            Self::Parked(worker, mut place) => {
                place.give_up();
                Some(worker)
            }
        }
    }

    /// The parked worker, if there is one.
    pub fn parked(&self) -> Option<&W> {
        match self {
            Self::Parked(worker, _) => Some(worker),
            _ => None,
        }
    }

    /// The parked worker, to be changed while nobody else can see it. What it waits on stays as it
    /// is: [`Home::with`] is for the rest.
    pub fn parked_mut(&mut self) -> Option<&mut W> {
        match self {
            Self::Parked(worker, _) => Some(worker),
            _ => None,
        }
    }

    /// Change the worker and what it waits on, wherever it is: an away one is called home and sent
    /// out again. `None` when there is no worker.
    ///
    /// # Errors
    /// As [`Home::start`].
    pub fn with<T>(&mut self, change: impl FnOnce(&mut W) -> T) -> io::Result<Option<T>> {
        let away = matches!(self, Self::Away(_));
        self.park();
        let Self::Parked(worker, place) = self else { return Ok(None) };
        // Before the descriptors change, so that no new one is taken for an old one.
        place.give_up();
        let result = change(worker);
        if away {
            self.unpark()?;
        }
        Ok(Some(result))
    }

    fn send(&mut self, worker: Box<W>, mut place: Place<W>) -> io::Result<()> {
        match place.key {
            Some(key) => place.thread.take_back(key, worker)?,
            None => place.key = Some(place.thread.adopt(worker)?),
        }
        *self = Self::Away(place);
        Ok(())
    }
}
