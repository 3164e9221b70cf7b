//! What a machine reports to the program that runs it.
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use devices::threads::ThreadStart;

use crate::{helpers::Helpers, vcpu::Stopped};

/// Something that the machine cannot handle by itself.
#[derive(Debug)]
pub enum Event {
    /// A vCPU stopped by itself; the others still run.
    Vcpu(usize, Stopped),
    /// A part of guest memory is lost, for this reason; a thread that touches it never continues.
    MemoryLost(String),
    /// The user at the console typed `Ctrl-a x`.
    Escape,
    /// The guest has changed the size of its balloon. Drop the value once that has been handled: no
    /// other change is reported until then.
    BalloonChanged(ReportToken),
    /// A disk could not carry out a request of the guest.
    DiskError {
        /// The disk's id.
        id: String,
        /// The request was a write, not a read.
        write: bool,
        /// The error.
        error: std::io::Error,
        /// Drop it once the event has been handled: the disk reports no other until then, so a
        /// guest on a failing disk cannot fill the event queue.
        token: ReportToken,
    },
}

/// Whether an event of one source is pending; only one may be.
#[derive(Debug, Default)]
pub struct ReportToken(Arc<AtomicBool>);

impl ReportToken {
    /// The right to report an event, if none is pending.
    pub(crate) fn begin(&self) -> Option<Self> {
        (!self.0.swap(true, Ordering::AcqRel)).then(|| Self(self.0.clone()))
    }
}

impl Drop for ReportToken {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Where events go. Called on vCPU and I/O threads: must not block.
pub type Report = Arc<dyn Fn(Event) + Send + Sync>;

/// The machine's callbacks into the program that it runs in.
#[derive(Clone)]
pub struct Callbacks {
    /// Where its events go.
    pub report: Report,
    /// What its threads do before they serve. If it fails, the thread ends and the machine is
    /// unusable.
    pub start: ThreadStart,
    /// Threads that help to build it.
    pub helpers: Helpers,
}

impl From<Report> for Callbacks {
    /// Threads do nothing first, and there is one for each task.
    fn from(report: Report) -> Self {
        Self { report, start: ThreadStart::default(), helpers: Helpers::default() }
    }
}
