//! What a machine reports to whoever runs it.
use std::sync::Arc;

use devices::PowerEvent;

use crate::vcpu::Stopped;

/// Something that the machine cannot decide by itself.
#[derive(Debug)]
pub enum Event {
    /// The guest asks for a reset, a power-off, or says that it has crashed.
    Power(PowerEvent),
    /// A vCPU stopped by itself; the others still run.
    Vcpu(usize, Stopped),
    /// The person at the console typed `Ctrl-a x`.
    Escape,
    /// A disk could not do what the guest asked.
    DiskError {
        /// The disk's id.
        id: String,
        /// Writing, not reading.
        write: bool,
        /// Why.
        error: std::io::Error,
    },
}

/// Where events go. Called on vCPU and I/O threads: must not block.
pub type Report = Arc<dyn Fn(Event) + Send + Sync>;
