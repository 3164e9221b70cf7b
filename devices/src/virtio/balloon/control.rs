//! What the monitor and the balloon's worker share.
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
    /// Tells the worker of a new interval.
    changed: EventFd,
    /// Written by the worker, read by the monitor, and held for no longer than a copy takes: a message
    /// for each statistic would be one that nobody may ever ask for.
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

    /// Ask for `pages` in the balloon.
    pub fn set_target(&self, pages: u32) {
        self.target.store(pages, Ordering::Relaxed);
    }

    /// Pages in the balloon, as the guest says. It may say anything.
    pub fn actual(&self) -> u32 {
        self.actual.load(Ordering::Relaxed)
    }

    pub(super) fn set_actual(&self, pages: u32) {
        self.actual.store(pages, Ordering::Relaxed);
    }

    /// Seconds between two statistics; 0: none are asked for.
    pub fn polling_interval(&self) -> u32 {
        self.interval.load(Ordering::Relaxed)
    }

    /// Ask the guest for statistics every so many `seconds`; 0: no more.
    pub fn set_polling_interval(&self, seconds: u32) {
        self.interval.store(seconds, Ordering::Relaxed);
        // Saturated: the worker has yet to look.
        let _ = self.changed.write(1);
    }

    /// What the guest has said last of its memory; `None` before it has said anything.
    pub fn stats(&self) -> Option<Stats> {
        *self.stats.lock()
    }

    pub(super) fn set_stats(&self, stats: Stats) {
        *self.stats.lock() = Some(stats);
    }

    /// The guest has been reset: nothing is in its balloon, and it has said nothing yet.
    pub(super) fn emptied(&self) {
        self.set_actual(0);
        *self.stats.lock() = None;
    }

    /// Signalled when the interval has changed.
    pub(super) fn fd(&self) -> RawFd {
        self.changed.as_raw_fd()
    }

    pub(super) fn drain(&self) {
        // WouldBlock: nothing was there.
        let _ = self.changed.read();
    }
}
