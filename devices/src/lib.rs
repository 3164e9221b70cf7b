//! The device interface and every device model.
//!
//! This crate knows guest memory, file descriptors and the virtio specification. It does not know
//! KVM (interrupts are [`irq::Line`]s that the VM binds), any event library (workers are driven
//! through [`worker::IoThread`]) or any protocol.
pub mod backend;
pub mod bus;
#[cfg(any(test, feature = "testing"))]
pub mod conformance;
pub mod irq;
pub mod legacy;
mod log_limit;
pub mod model;
pub mod random;
pub mod rate_limit;
pub mod reclaim;
pub mod state;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod threads;
pub mod virtio;
pub mod worker;

/// What threads share, by names that a test can give another meaning.
mod sync {
    pub use std::sync::atomic::AtomicBool;

    pub use parking_lot::Mutex;
}

/// Guest memory: regions of host memory, with a bitmap of the pages that device code has written.
///
/// The bitmap is the device side of dirty tracking; vCPU writes are tracked by KVM.
pub type Memory = vm_memory::GuestMemoryMmap<vm_memory::bitmap::AtomicBitmap>;

/// What the VM requires of every device, on any bus.
///
/// No method has a default body: a device author must *decide* what pausing or saving means,
/// because a silent `Ok(())` is how state gets lost.
pub trait Device: Send {
    /// The id given in the configuration; unique within a machine.
    fn id(&self) -> &str;
    /// Stop doing work. Called only after every vCPU is parked; returns when nothing is in flight.
    fn pause(&mut self);
    /// Resume work. Called before any vCPU runs.
    fn resume(&mut self);
    /// Return to power-on state. Called while paused (the VM resets) or by the driver.
    fn reset(&mut self);
    /// State of a paused device.
    ///
    /// # Errors
    /// When the state cannot be encoded.
    fn save(&self) -> Result<state::Section, state::StateError>;
    /// Load saved state into a paused device built from the same configuration.
    ///
    /// # Errors
    /// When the section is not this device's, or describes a state it cannot be in.
    fn restore(&mut self, section: &state::Section) -> Result<(), state::StateError>;
}

/// A guest request that affects the whole machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerEvent {
    /// Reboot: i8042 command 0xfe, the ACPI reset register.
    Reset,
    /// Power off: ACPI sleep state S5.
    Shutdown,
    /// The guest kernel reports that it has crashed: pvpanic.
    Panicked,
}

/// The callback by which a device model reports [`PowerEvent`]s. Must not block.
pub type PowerSink = std::sync::Arc<dyn Fn(PowerEvent) + Send + Sync>;
