//! The path from a device to its driver: guest-visible status, and interrupts.
use vmm_sys_util::eventfd::EventFd;

use super::mmio::registers::{CONFIG_GENERATION, INTERRUPT_STATUS, Registers, STATUS};
use crate::irq::Line;

/// Cause of an interrupt: the device used a buffer.
pub const INT_USED: u32 = 1;
/// Cause of an interrupt: the configuration changed.
pub const INT_CONFIG: u32 = 2;
/// Status bit: the device has met an error that it cannot recover from.
pub const DEVICE_NEEDS_RESET: u32 = 0x40;

/// How a device interrupts its driver.
///
/// A device says which of its queues an interrupt is for. With a line, the driver finds out by
/// itself; a transport with MSI-X would be another variant, with one vector for each queue and one
/// for the configuration.
#[derive(Clone, Debug)]
pub enum Interrupt {
    /// virtio-mmio: one line for all causes, and the register page that shows them.
    Line(Line, Registers),
}

impl Interrupt {
    /// The device has used buffers of queue `queue`, and the driver wants an interrupt for them.
    pub fn used(&self, _queue: u16) {
        match self {
            // Bit 0 of InterruptStatus has been set since DRIVER_OK: see `Registers`.
            Self::Line(line, _) => line.trigger(),
        }
    }

    /// As [`Interrupt::used`], for all of `queues` at once.
    pub fn used_all(&self, queues: impl Iterator<Item = u16>) {
        match self {
            Self::Line(line, _) => {
                if queues.count() > 0 {
                    line.trigger();
                }
            }
        }
    }

    /// The configuration space has changed. Call after the driver can see the new contents.
    pub fn config_changed(&self) {
        match self {
            Self::Line(line, registers) => {
                registers.set(INTERRUPT_STATUS, INT_CONFIG);
                line.trigger();
            }
        }
    }

    /// The driver or the host caused an error after which the device cannot continue (virtio 1.3,
    /// section 2.1.2). Nothing else happens on the host; the driver has to reset the device.
    pub fn needs_reset(&self) {
        self.set_status(DEVICE_NEEDS_RESET);
        self.config_changed();
    }

    /// The eventfd behind [`Interrupt::used`] for queue `queue`: for back-ends that serve the queue
    /// elsewhere, such as vhost.
    pub fn queue_eventfd(&self, _queue: u16) -> &EventFd {
        match self {
            Self::Line(line, _) => line.eventfd(),
        }
    }
}

/// The guest-visible status of the device, wherever the transport shows it.
impl Interrupt {
    /// The device status (section 2.1).
    pub(super) fn status(&self) -> u32 {
        match self {
            Self::Line(_, registers) => registers.load(STATUS),
        }
    }

    /// Set bits of the device status, visible to the driver and to other threads at once.
    pub(super) fn set_status(&self, bits: u32) {
        match self {
            Self::Line(_, registers) => registers.set(STATUS, bits),
        }
    }

    /// Replace the device status.
    pub(super) fn store_status(&self, status: u32) {
        match self {
            Self::Line(_, registers) => registers.store(STATUS, status),
        }
    }

    /// The pending causes: [`INT_USED`] and [`INT_CONFIG`].
    pub(super) fn causes(&self) -> u32 {
        match self {
            Self::Line(_, registers) => registers.load(INTERRUPT_STATUS),
        }
    }

    /// As [`Interrupt::causes`].
    pub(super) fn store_causes(&self, causes: u32) {
        match self {
            Self::Line(_, registers) => registers.store(INTERRUPT_STATUS, causes),
        }
    }

    /// DRIVER_OK, before the worker starts, since it may raise interrupts at once.
    pub(super) fn driver_ok(&self, bit: u32) {
        match self {
            Self::Line(_, registers) => registers.set(INTERRUPT_STATUS, INT_USED),
        }
        self.set_status(bit);
    }

    /// The generation of the configuration space (section 2.5.1).
    pub(super) fn generation(&self) -> u32 {
        match self {
            Self::Line(_, registers) => registers.load(CONFIG_GENERATION),
        }
    }

    /// As [`Interrupt::generation`].
    pub(super) fn store_generation(&self, generation: u32) {
        match self {
            Self::Line(_, registers) => registers.store(CONFIG_GENERATION, generation),
        }
    }

    /// Show `config` in place of a configuration space of `shown` bytes. False when it has not
    /// changed.
    pub(super) fn show_config(&self, config: &[u8], shown: usize) -> bool {
        match self {
            Self::Line(_, registers) => registers.show_config(config, shown),
        }
    }

    /// Raise all causes, so that the driver checks everything, in case an interrupt has been lost.
    pub(super) fn raise_all(&self) {
        match self {
            Self::Line(line, _) => line.trigger(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::registers;

    #[test]
    fn a_line_is_raised_for_each_cause_and_once_for_several_queues() {
        let line = Line::new().unwrap();
        let interrupt = Interrupt::Line(line.clone(), registers());
        let edges = || line.eventfd().read().unwrap_or(0);
        interrupt.used(3);
        assert_eq!(interrupt.queue_eventfd(3).read().unwrap(), 1, "vhost would signal the same");
        interrupt.used_all([0, 2].into_iter());
        assert_eq!(edges(), 1);
        interrupt.used_all(std::iter::empty());
        assert_eq!((edges(), interrupt.causes(), interrupt.status()), (0, 0, 0));
        interrupt.needs_reset();
        assert_eq!((edges(), interrupt.causes()), (1, INT_CONFIG));
        assert_eq!(interrupt.status(), DEVICE_NEEDS_RESET);
    }
}
