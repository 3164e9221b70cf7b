//! The memory balloon (virtio 1.3, section 5.5).
//!
//! The guest returns pages to the host by putting them into the balloon, as many as the monitor
//! requests. Before the guest uses such a page again, it notifies the device; it then finds zeroes
//! in the page. With free page reporting the guest also reports on its own which pages it has
//! freed.
//!
//! ```text
//!   monitor: target --num_pages--> guest --inflate queue----> worker: Reclaim::withhold
//!   monitor <------- actual ------ guest --deflate queue----> worker: Reclaim::release
//!                                  guest --reporting queue--> worker: Reclaim::discard
//! ```
mod control;
mod saved;
mod stats;
#[cfg(test)]
mod tests;
mod worker;

use std::{io, sync::Arc};

use self::worker::{BalloonWorker, Queues, WorkerArgs};
pub use self::{control::Control, stats::Stats};
use super::{
    ActivateError, Activation, ActiveQueue, F_EVENT_IDX, F_INDIRECT_DESC, VirtioDevice,
    VirtioWorker, ring::Ring,
};
use crate::{model::Model, reclaim::Reclaim, worker::WorkerControl};

const DEVICE_TYPE: u32 = 5;
/// `VIRTIO_BALLOON_F_MUST_TELL_HOST`.
const F_MUST_TELL_HOST: u64 = 1 << 0;
/// `VIRTIO_BALLOON_F_STATS_VQ`.
const F_STATS_QUEUE: u64 = 1 << 1;
/// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM`.
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// `VIRTIO_BALLOON_F_PAGE_REPORTING`.
const F_PAGE_REPORTING: u64 = 1 << 5;
const QUEUE_SIZE: u16 = 128;
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const STATS: u16 = 2;
/// The reporting queue is number 4, after the one for free page hints. Linux before 6.11 does not
/// count queues whose features were not negotiated, and uses number 3. As hints are never offered
/// here, both numbers mean reporting.
const REPORTING: [u16; 2] = [3, 4];
/// Offset of `actual` in the configuration space.
const ACTUAL: u64 = 4;

/// Bytes of the pages in which a balloon is counted, whatever the page sizes of guest and host are.
pub const BALLOON_PAGE: u64 = 4096;

/// The settings of a balloon.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Settings {
    /// The guest takes pages out of the balloon before it runs out of memory.
    pub deflate_on_oom: bool,
    /// The guest reports the pages that it has freed.
    pub page_reporting: bool,
}

/// Called on a vCPU thread whenever the guest has changed the balloon's size; must not block.
pub type OnChange = Box<dyn Fn() + Send + Sync>;

/// A balloon.
pub struct Balloon {
    id: String,
    settings: Settings,
    control: Arc<Control>,
    memory: Arc<dyn Reclaim>,
    on_change: OnChange,
    worker: VirtioWorker<BalloonWorker>,
}

impl Balloon {
    /// An empty balloon. The pages in it are reclaimed from `memory`.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn new(
        id: impl Into<String>,
        settings: Settings,
        memory: Arc<dyn Reclaim>,
        on_change: OnChange,
    ) -> io::Result<Self> {
        let control = Arc::new(Control::new()?);
        Ok(Self {
            id: id.into(),
            settings,
            control,
            memory,
            on_change,
            worker: VirtioWorker::default(),
        })
    }

    /// The handle by which the monitor controls the balloon, also while the device is busy. A new
    /// target becomes visible when the transport next updates the configuration space.
    pub fn control(&self) -> Arc<Control> {
        self.control.clone()
    }
}

impl Model for Balloon {
    fn id(&self) -> &str {
        &self.id
    }

    fn worker(&mut self) -> Option<&mut dyn WorkerControl> {
        Some(&mut self.worker)
    }

    fn reset(&mut self) {
        self.worker.stop();
        self.control.emptied();
        self.memory.release_all();
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        let given = |is: bool, feature| if is { feature } else { 0 };
        F_INDIRECT_DESC
            | F_EVENT_IDX
            | F_MUST_TELL_HOST
            | F_STATS_QUEUE
            | given(self.settings.deflate_on_oom, F_DEFLATE_ON_OOM)
            | given(self.settings.page_reporting, F_PAGE_REPORTING)
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 5]
    }

    /// Section 5.5.4: num_pages, actual. The fields after these belong to features that are not
    /// offered.
    fn config(&self) -> Vec<u8> {
        [self.control.target(), self.control.actual()]
            .iter()
            .flat_map(|n| n.to_le_bytes())
            .collect()
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // Drivers write this field as a whole, and no other field.
        if let (ACTUAL, Ok(actual)) = (offset, data.try_into()) {
            self.control.set_actual(u32::from_le_bytes(actual));
            (self.on_change)();
        }
    }

    fn activate(&mut self, with: Activation) -> Result<(), ActivateError> {
        let indirect = with.features & F_INDIRECT_DESC != 0;
        let mut queues = with.queues;
        let mut ring = |index: u16| {
            let at = queues.iter().position(|q: &ActiveQueue| q.index == index)?;
            Some(Ring::new(queues.swap_remove(at), with.memory.clone(), indirect))
        };
        let required = |index| move || ActivateError::MissingQueue(index);
        let queues = Queues {
            inflate: ring(INFLATE).ok_or_else(required(INFLATE))?,
            deflate: ring(DEFLATE).ok_or_else(required(DEFLATE))?,
            stats: ring(STATS).filter(|_| with.features & F_STATS_QUEUE != 0),
            reporting: match with.features & F_PAGE_REPORTING != 0 {
                true => REPORTING.into_iter().filter_map(ring).collect(),
                false => Vec::new(),
            },
        };
        let worker = BalloonWorker::new(WorkerArgs {
            id: self.id.clone(),
            queues,
            memory: self.memory.clone(),
            tells_host: with.features & F_MUST_TELL_HOST != 0,
            control: self.control.clone(),
            interrupt: with.interrupt.clone(),
        });
        let failed = |source| ActivateError::Host { what: "make a timer for the balloon", source };
        self.worker.start(worker.map_err(failed)?, with.interrupt, with.thread)
    }
}
