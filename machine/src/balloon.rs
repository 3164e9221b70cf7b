//! The balloon of a machine, as the monitor controls it.
use std::sync::Arc;

use devices::virtio::{
    VirtioDevice,
    balloon::{BALLOON_PAGE, Control},
};

use crate::{
    Machine,
    memory::reclaim::Counts,
    slots::{DEVICE_LOCK_LIMIT, Handle},
};

/// A machine's balloon.
pub struct Balloon {
    /// Id of the device.
    pub id: String,
    /// Its sizes, in pages, and the guest's statistics.
    pub control: Arc<Control>,
    /// Bytes of guest memory.
    ram: u64,
    device: Handle<dyn VirtioDevice>,
}

impl Balloon {
    pub(crate) fn new(
        id: &str,
        control: Arc<Control>,
        ram: u64,
        device: Handle<dyn VirtioDevice>,
    ) -> Self {
        Self { id: id.to_owned(), control, ram, device }
    }

    /// Ask the guest to keep `bytes` of memory, or all of its memory if that is less. The guest is
    /// notified by [`Machine::show_balloon`].
    pub fn set_target(&self, bytes: u64) {
        let pages = self.ram.saturating_sub(bytes) / BALLOON_PAGE;
        self.control.set_target(u32::try_from(pages).unwrap_or(u32::MAX));
    }

    /// Bytes that are not in the balloon, as the guest reports.
    pub fn actual(&self) -> u64 {
        self.ram.saturating_sub(u64::from(self.control.actual()) * BALLOON_PAGE)
    }
}

impl Machine {
    /// The balloon, if there is one.
    pub fn balloon(&self) -> Option<&Balloon> {
        self.balloon.as_ref()
    }

    /// Bytes of memory that were given back to the host since this process began, and that could
    /// not be, however the guest has offered them.
    pub fn reclaimed(&self) -> Counts {
        self.reclaimer.counts()
    }

    /// Notify the guest of the balloon's target size.
    pub fn show_balloon(&self) {
        if let Some(balloon) = &self.balloon {
            // If the lock is not free, the guest is resetting the balloon and reads everything
            // again after that.
            if let Some(mut transport) = balloon.device.try_lock_for(DEVICE_LOCK_LIMIT) {
                transport.update(|_| ());
            }
        }
    }
}
