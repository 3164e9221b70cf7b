//! The balloon of a machine, as the monitor steers it.
use std::sync::Arc;

use devices::virtio::{
    VirtioDevice,
    balloon::{BALLOON_PAGE, Control},
};

use crate::{
    Machine,
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

    /// Ask the guest to leave itself `bytes` of memory, or all that it has if that is less. The guest
    /// hears of it by [`Machine::show_balloon`].
    pub fn set_target(&self, bytes: u64) {
        let pages = self.ram.saturating_sub(bytes) / BALLOON_PAGE;
        self.control.set_target(u32::try_from(pages).unwrap_or(u32::MAX));
    }

    /// Bytes that the guest has not put into the balloon, by what it says.
    pub fn actual(&self) -> u64 {
        self.ram.saturating_sub(u64::from(self.control.actual()) * BALLOON_PAGE)
    }
}

impl Machine {
    /// The balloon, if there is one.
    pub fn balloon(&self) -> Option<&Balloon> {
        self.balloon.as_ref()
    }

    /// Show the guest what the balloon's size is to be.
    pub fn show_balloon(&self) {
        if let Some(balloon) = &self.balloon {
            // Else its guest is resetting it, and reads everything again after that.
            if let Some(mut transport) = balloon.device.try_lock_for(DEVICE_LOCK_LIMIT) {
                transport.update(|_| ());
            }
        }
    }
}
