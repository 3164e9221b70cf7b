//! State shared by the monitor and the balloon's worker.
use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    sync::atomic::{AtomicU32, Ordering},
};

use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Stats;

/// Sizes and statistics of a balloon.
#[derive(Debug)]
pub struct Control {
    target: AtomicU32,
    actual: AtomicU32,
    interval: AtomicU32,
    /// Signals a new interval to the worker.
    changed: EventFd,
    /// Written by the worker, read by the monitor, and locked only for the time of a copy. Messages
    /// would not do: most updates are never read.
    stats: Mutex<Option<Stats>>,
}

impl Control {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            target: AtomicU32::new(0),
            actual: AtomicU32::new(0),
            interval: AtomicU32::new(0),
            changed: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            stats: Mutex::new(None),
        })
    }

    /// Pages of [`super::BALLOON_PAGE`] bytes that the guest is to put into the balloon.
    pub fn target(&self) -> u32 {
        self.target.load(Ordering::Relaxed)
    }

    /// Set the number of pages that the guest is to put into the balloon.
    pub fn set_target(&self, pages: u32) {
        self.target.store(pages, Ordering::Relaxed);
    }

    /// Pages in the balloon, as reported by the guest, which may report any number.
    pub fn actual(&self) -> u32 {
        self.actual.load(Ordering::Relaxed)
    }

    pub(super) fn set_actual(&self, pages: u32) {
        self.actual.store(pages, Ordering::Relaxed);
    }

    /// Seconds between two requests for statistics; 0: none.
    pub fn polling_interval(&self) -> u32 {
        self.interval.load(Ordering::Relaxed)
    }

    /// Request statistics from the guest every `seconds`; 0: stop.
    pub fn set_polling_interval(&self, seconds: u32) {
        self.interval.store(seconds, Ordering::Relaxed);
        // Saturated: the worker has not read it yet.
        let _ = self.changed.write(1);
    }

    /// The guest's latest memory statistics; `None` before the first.
    pub fn stats(&self) -> Option<Stats> {
        *self.stats.lock()
    }

    pub(super) fn set_stats(&self, stats: Stats) {
        *self.stats.lock() = Some(stats);
    }

    /// The guest has been reset: its balloon is empty, and there are no statistics.
    pub(super) fn emptied(&self) {
        self.set_actual(0);
        *self.stats.lock() = None;
    }

    /// Signalled when the interval has changed.
    pub(super) fn fd(&self) -> RawFd {
        self.changed.as_raw_fd()
    }

    pub(super) fn drain(&self) {
        // WouldBlock: not signalled.
        let _ = self.changed.read();
    }
}
