//! The one place that sees every change of a disk, before it starts and after it completes.
//!
//! ```text
//!   change --> before --> Start: it is carried out --> after --> the guest sees it complete
//!                    \--> Wait: it stays in the guest's queue until the disk's waker is called
//!                     \-> an error: the guest sees it, and the disk is as it was
//! ```
use std::{
    fmt, io,
    ops::Range,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd},
    io::Errno,
};

/// The kind of a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangeKind {
    /// Data is stored.
    Write,
    /// The content is lost.
    Discard,
    /// The content becomes zeroes.
    WriteZeroes,
    /// The image grows or shrinks by the range.
    Resize,
}

/// A change of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Its kind.
    pub kind: ChangeKind,
    /// The bytes of the disk that may differ afterwards.
    pub range: Range<u64>,
}

/// An observer's answer to a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Start it.
    Start,
    /// Start it, and detach the observer; it gets no further calls, not even `after` for this
    /// change.
    Retire,
    /// Not yet. Ask again once the disk's [`Waker`] has been called.
    Wait,
}

/// Sees every change of a disk while attached ([`super::Disk::observe`]).
pub trait Observer: Send + Sync {
    /// `change` is about to start. This may be called several times for one change, and another
    /// observer may refuse a change that this one allowed.
    ///
    /// Called on the I/O thread, which serves other devices too: anything slow must be done
    /// elsewhere, returning [`Verdict::Wait`] meanwhile.
    ///
    /// # Errors
    /// The change is not made, and the guest sees an I/O error.
    fn before(&self, change: &Change) -> io::Result<Verdict>;

    /// A change that every observer allowed is complete, and the guest has not been notified yet.
    /// After an error, any part of the range may have changed.
    fn after(&self, change: &Change, result: &io::Result<()>);
}

/// Causes changes that had to wait to be tried again.
#[derive(Debug, Clone)]
pub struct Waker(Arc<OwnedFd>);

impl Waker {
    /// Try again soon. May be called from any thread.
    pub fn wake(&self) {
        // Fails only if it was called 2^64 times without being read.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

type List = Arc<[Arc<dyn Observer>]>;

/// The observers of one disk.
pub(super) struct Observers {
    /// Whether there are any. When there are none, this check is all that a request costs.
    any: AtomicBool,
    /// A lock, because observers are added and removed on other threads than the one that changes
    /// the disk. It is held only to copy or change the list.
    list: Mutex<List>,
    woken: Waker,
}

impl Observers {
    pub fn new() -> io::Result<Self> {
        let woken = Waker(Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?));
        Ok(Self { any: AtomicBool::new(false), list: Mutex::new(Arc::new([])), woken })
    }

    /// Add `observer` if it is not in the list, once `ready` has been called: it cannot retire
    /// between the two.
    pub fn add<T>(&self, observer: &Arc<dyn Observer>, ready: impl FnOnce() -> T) -> T {
        let mut list = self.list.lock();
        let result = ready();
        let all = without(&list, &**observer).chain([observer.clone()]).collect();
        self.replace(&mut list, all);
        result
    }

    pub fn remove(&self, observer: &dyn Observer) {
        let mut list = self.list.lock();
        let others = without(&list, observer).collect();
        self.replace(&mut list, others);
        // Changes that waited for it may start.
        self.woken.wake();
    }

    /// Remove `observer` if it still wants to retire.
    fn retire(&self, observer: &dyn Observer, change: &Change) -> io::Result<()> {
        let mut list = self.list.lock();
        if observer.before(change)? == Verdict::Retire {
            let others = without(&list, observer).collect();
            self.replace(&mut list, others);
        }
        Ok(())
    }

    fn replace(&self, list: &mut List, new: List) {
        self.any.store(!new.is_empty(), Ordering::Release);
        *list = new;
    }

    pub fn waker(&self) -> Waker {
        self.woken.clone()
    }

    /// Readable when changes that had to wait should be tried again.
    pub fn source(&self) -> RawFd {
        self.woken.0.as_raw_fd()
    }

    /// Consume the waker's signal.
    pub fn heard(&self) {
        // Fails when there was none.
        let _ = rustix::io::read(&self.woken.0, &mut [0; 8]);
    }

    /// Whether there are any.
    #[cfg(test)]
    pub fn any(&self) -> bool {
        self.any.load(Ordering::Acquire)
    }

    /// Wait for the waker's signal, for at most `limit`; whether it came.
    pub fn wait(&self, limit: Duration) -> io::Result<bool> {
        let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
        let mut woken = [PollFd::new(&self.woken.0, PollFlags::IN)];
        match rustix::event::poll(&mut woken, Some(&limit)) {
            Ok(0) => Ok(false),
            Ok(_) => {
                self.heard();
                Ok(true)
            }
            // The caller checks again, and checks its clock.
            Err(Errno::INTR) => Ok(true),
            Err(e) => Err(e.into()),
        }
    }

    /// Ask about a change; `None`: it has to wait.
    pub fn before(&self, change: impl FnOnce() -> Change) -> io::Result<Option<Permit>> {
        if !self.any.load(Ordering::Acquire) {
            return Ok(Some(Permit::UNOBSERVED));
        }
        let change = change();
        'ask: loop {
            let observers = self.list.lock().clone();
            for observer in &*observers {
                match observer.before(&change)? {
                    Verdict::Start => {}
                    Verdict::Wait => return Ok(None),
                    Verdict::Retire => {
                        self.retire(&**observer, &change)?;
                        continue 'ask;
                    }
                }
            }
            return Ok(Some(Permit(Some((observers, change)))));
        }
    }
}

/// The observers in `list` except `observer`.
fn without(list: &List, observer: &dyn Observer) -> impl Iterator<Item = Arc<dyn Observer>> {
    list.iter().filter(move |o| !std::ptr::addr_eq(&raw const ***o, observer)).cloned()
}

impl fmt::Debug for Observers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} observers", self.list.lock().len())
    }
}

/// Permission to start a request, with the observers that allowed the change: exactly these are
/// notified of its end, even if others were added or removed meanwhile.
pub(super) struct Permit(Option<(List, Change)>);

impl Permit {
    /// For a request that changes nothing, or a disk without observers.
    pub const UNOBSERVED: Self = Self(None);

    /// The request is complete.
    pub fn after(self, result: &io::Result<()>) {
        if let Some((observers, change)) = self.0 {
            observers.iter().for_each(|o| o.after(&change, result));
        }
    }
}
