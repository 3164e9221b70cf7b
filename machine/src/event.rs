//! What a machine reports to whoever runs it.
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use devices::threads::ThreadStart;

use crate::vcpu::Stopped;

/// Something that the machine cannot decide by itself.
#[derive(Debug)]
pub enum Event {
    /// A vCPU stopped by itself; the others still run.
    Vcpu(usize, Stopped),
    /// A part of guest memory cannot be had; whoever touches it waits for ever. Why.
    MemoryLost(String),
    /// The person at the console typed `Ctrl-a x`.
    Escape,
    /// The guest has changed the size of its balloon. To be dropped when that has been noted: no other
    /// change is reported until then.
    BalloonChanged(Told),
    /// A disk could not do what the guest asked.
    DiskError {
        /// The disk's id.
        id: String,
        /// Writing, not reading.
        write: bool,
        /// Why.
        error: std::io::Error,
        /// To be dropped when the event has been dealt with: the disk reports no other until then,
        /// so a guest on a failing disk cannot fill the queue of events.
        told: Told,
    },
}

/// Whether an event of one source is under way; one at a time is.
#[derive(Debug, Default)]
pub struct Told(Arc<AtomicBool>);

impl Told {
    /// The right to report one, if none is under way.
    pub(crate) fn begin(&self) -> Option<Self> {
        (!self.0.swap(true, Ordering::AcqRel)).then(|| Self(self.0.clone()))
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Where events go. Called on vCPU and I/O threads: must not block.
pub type Report = Arc<dyn Fn(Event) + Send + Sync>;

/// What a machine calls of the program that it runs in.
#[derive(Clone)]
pub struct Callbacks {
    /// Where its events go.
    pub report: Report,
    /// What its threads do before they serve. One that must not serve ends, and the machine is unusable.
    pub start: ThreadStart,
}

impl From<Report> for Callbacks {
    /// Threads have nothing to do first.
    fn from(report: Report) -> Self {
        Self { report, start: ThreadStart::default() }
    }
}
