//! The hardware: KVM, memory, vCPU and I/O threads, interrupts, boot; configuration to machine.
mod backends;
mod backing;
pub mod boot;
mod builder;
pub mod config;
mod dry_restore;
mod event;
mod fits;
mod generation;
pub mod io_thread;
pub mod kvm;
pub mod layout;
mod legacy;
mod machine;
pub mod memory;
mod quiesced;
mod reload;
mod rest;
mod saved;
mod slots;
mod spot_check;
mod survey;
pub mod vcpu;

pub use backends::{OpenDisk, PlugError, PluggedDisk, Shape};
pub use builder::{BuildError, Saved};
pub use devices::{
    Memory, PowerEvent,
    backend::{disk, file::open_regular, inherited, release, sparse, writer},
    random,
};
pub use dry_restore::{Restorable, dry_restore};
pub use event::{Event, Report, Told};
pub use generation::GenerationId;
pub use kvm::Clock;
pub use machine::{Machine, RunError};
pub use quiesced::{CpuModel, Epoch, MachineState, Pages, Quiesced, RestoreError, SaveError};
pub use reload::{ReloadError, Reloaded};
pub use rest::AT_ONCE;
pub use saved::{Description, DescriptionError};
pub use spot_check::{SpotCheckError, SpotChecks};
pub use survey::{Part, survey};
pub use vcpu::Stopped;
