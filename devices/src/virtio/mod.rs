//! Virtio devices: the interface between a device and its transport.
//!
//! A device has two halves. The *front* ([`VirtioDevice`]) answers the transport; its *worker*
//! ([`crate::worker::Worker`]) owns the queues and runs on an I/O thread from DRIVER_OK to reset.
//! Where the worker is, and what happens to the device when its I/O thread fails, is the same for
//! all of them: see `worker.rs`. The part common to every transport is in `transport/`; virtio-mmio
//! is one.
pub mod balloon;
pub mod blk;
pub mod chain;
pub mod console;
pub mod interrupt;
pub mod mmio;
pub mod net;
mod ring;
pub mod rng;
mod spin;
mod transport;
mod worker;

use std::{any::Any, sync::Arc};

use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use crate::{Device, Memory, state::StateError, worker::IoThread};
pub use interrupt::Interrupt;
pub(crate) use worker::VirtioWorker;

/// `VIRTIO_F_VERSION_1`: every device offers it and refuses drivers that do not accept it.
pub const F_VERSION_1: u64 = 1 << 32;
/// `VIRTIO_RING_F_INDIRECT_DESC`.
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_RING_F_EVENT_IDX`.
pub const F_EVENT_IDX: u64 = 1 << 29;

/// Why [`VirtioDevice::offer`] fails.
const CANNOT_OFFER: &str = "virtio features that this device cannot offer";

/// One configured queue and the eventfd that the driver's notifications arrive on.
#[derive(Debug)]
pub struct ActiveQueue {
    /// Position among the device's queues.
    pub index: u16,
    /// The ring, with its addresses checked and EVENT_IDX set as negotiated.
    pub queue: Queue,
    /// Signalled by the driver's write to QueueNotify.
    pub notify: EventFd,
}

/// Everything a device receives when its driver sets DRIVER_OK.
pub struct Activation {
    /// The queues that the driver made ready; the device owns them until it is reset.
    pub queues: Vec<ActiveQueue>,
    /// Negotiated feature bits.
    pub features: u64,
    /// Guest memory.
    pub memory: Memory,
    /// Interrupts and status towards the guest.
    pub interrupt: Interrupt,
    /// Where the worker runs.
    pub thread: Arc<dyn IoThread>,
}

/// A virtio device, independent of its transport.
///
/// The transport calls `pause`, `resume` and `reset` of [`Device`]; `reset` stops the worker and
/// discards the activation. `save` and `restore` carry the device's own state (never the ring state
/// of an inactive device); for an active one the section includes each queue's `QueueState`, and
/// the transport activates the device, pauses it and only then restores it. The worker does not run
/// in between: it never processes its queues before it knows its position in them.
pub trait VirtioDevice: Device + Any {
    /// Device type number (virtio 1.3, section 5).
    fn device_type(&self) -> u32;
    /// Feature bits offered: the device's own and the ring features that its worker supports
    /// ([`F_INDIRECT_DESC`], [`F_EVENT_IDX`]). The transport adds [`F_VERSION_1`].
    fn features(&self) -> u64;
    /// Offer `features`, without [`F_VERSION_1`], from now on: those that a restored slot offered
    /// when its guest started. They belong to the slot, whatever has been plugged into it since.
    ///
    /// # Errors
    /// When the device, with its current back-end, does not support one of them. It then offers the
    /// same as before.
    fn offer(&mut self, features: u64) -> Result<(), StateError> {
        match features == self.features() & !F_VERSION_1 {
            true => Ok(()),
            false => Err(StateError::Invalid(CANNOT_OFFER)),
        }
    }
    /// Maximum size of each queue; its length is the number of queues.
    fn queue_sizes(&self) -> &[u16];
    /// The device-specific configuration space as it is now. The transport copies it into the
    /// register page, at build and after each change.
    fn config(&self) -> Vec<u8>;
    /// The driver writes the device-specific configuration space. Out-of-range and read-only
    /// writes are ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);
    /// Whether writes to the configuration space take effect in any driver state, as those to a
    /// console's emerg_wr do (section 5.3.4).
    fn configurable_always(&self) -> bool {
        false
    }
    /// DRIVER_OK: take the queues and start.
    ///
    /// # Errors
    /// When the device cannot begin; the transport sets DEVICE_NEEDS_RESET.
    fn activate(&mut self, with: Activation) -> Result<(), ActivateError>;
}

/// Why a device could not be activated.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver has not set up a queue that the device requires.
    #[error("queue {0} is not ready")]
    MissingQueue(u16),
    /// A host operation failed.
    #[error("cannot {what}")]
    Host {
        /// The operation that failed.
        what: &'static str,
        /// The cause.
        source: std::io::Error,
    },
}
