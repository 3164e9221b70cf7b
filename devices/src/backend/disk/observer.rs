//! The one place that sees every change of a disk, before it is started and after it is complete.
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

/// How a disk changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangeKind {
    /// Data is stored.
    Write,
    /// The content is lost.
    Discard,
    /// The content becomes zeroes.
    WriteZeroes,
    /// The image becomes longer or shorter by the range.
    Resize,
}

/// A change of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// How.
    pub kind: ChangeKind,
    /// The bytes of the disk that may differ afterwards.
    pub range: Range<u64>,
}

/// What an observer says to a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Start it.
    Start,
    /// Start it, and leave the observer out of everything from now on, `after` of this change
    /// included.
    Retire,
    /// Not yet. Ask again once the disk's [`Waker`] has been called.
    Wait,
}

/// Sees every change of a disk, as long as it is attached ([`super::Disk::observe`]).
pub trait Observer: Send + Sync {
    /// `change` is about to be started. It may be asked about one change several times, and a
    /// change that it allowed may be refused by somebody else.
    ///
    /// Called on the I/O thread, which serves other devices too: what takes long is done
    /// elsewhere, and the verdict is [`Verdict::Wait`] meanwhile.
    ///
    /// # Errors
    /// The change is not made, and the guest sees an I/O error.
    fn before(&self, change: &Change) -> io::Result<Verdict>;

    /// A change that every observer allowed is complete, and the guest does not know yet. After an
    /// error, any part of the range may have changed.
    fn after(&self, change: &Change, result: &io::Result<()>);
}

/// Has the changes asked about again that were to wait.
#[derive(Debug, Clone)]
pub struct Waker(Arc<OwnedFd>);

impl Waker {
    /// Ask again soon. From any thread.
    pub fn wake(&self) {
        // Fails only when it has been called 2^64 times in vain.
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
    /// Whether there are any. All that a request costs when there are none.
    any: AtomicBool,
    /// A lock, as observers come and go on other threads than the one that changes the disk. It is
    /// held to copy the list, or to change it.
    list: Mutex<List>,
    woken: Waker,
}

impl Observers {
    pub fn new() -> io::Result<Self> {
        let woken = Waker(Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?));
        Ok(Self { any: AtomicBool::new(false), list: Mutex::new(Arc::new([])), woken })
    }

    /// Add `observer` if it is not there, once `ready` has been called: it cannot retire between
    /// the two.
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
        // What waited for it may start.
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

    /// Readable when changes that were to wait should be tried again.
    pub fn source(&self) -> RawFd {
        self.woken.0.as_raw_fd()
    }

    /// Take note of the waker's call.
    pub fn heard(&self) {
        // Fails when there was none.
        let _ = rustix::io::read(&self.woken.0, &mut [0; 8]);
    }

    /// Whether there are any.
    #[cfg(test)]
    pub fn any(&self) -> bool {
        self.any.load(Ordering::Acquire)
    }

    /// Wait for the waker's call, for `limit` at most; whether it came.
    pub fn wait(&self, limit: Duration) -> io::Result<bool> {
        let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
        let mut woken = [PollFd::new(&self.woken.0, PollFlags::IN)];
        match rustix::event::poll(&mut woken, Some(&limit)) {
            Ok(0) => Ok(false),
            Ok(_) => {
                self.heard();
                Ok(true)
            }
            // The caller looks again, and at its clock.
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

/// Those of `list` but `observer`.
fn without(list: &List, observer: &dyn Observer) -> impl Iterator<Item = Arc<dyn Observer>> {
    list.iter().filter(move |o| !std::ptr::addr_eq(&raw const ***o, observer)).cloned()
}

impl fmt::Debug for Observers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} observers", self.list.lock().len())
    }
}

/// Leave to start a request, and for a change the observers that gave it: exactly they hear of its
/// end, even if others have come or gone meanwhile.
pub(super) struct Permit(Option<(List, Change)>);

impl Permit {
    /// For a request that changes nothing, or that has no observers.
    pub const UNOBSERVED: Self = Self(None);

    /// The request is complete.
    pub fn after(self, result: &io::Result<()>) {
        if let Some((observers, change)) = self.0 {
            observers.iter().for_each(|o| o.after(&change, result));
        }
    }
}
