//! The hardware: KVM, memory, vCPU and I/O threads, interrupts, boot; configuration to machine.
mod backends;
pub mod boot;
mod builder;
pub mod config;
mod event;
mod generation;
pub mod io_thread;
pub mod kvm;
pub mod layout;
mod legacy;
mod machine;
pub mod memory;
mod quiesced;
mod slots;
mod survey;
pub mod vcpu;

pub use backends::{OpenDisk, PlugError, PluggedDisk, Shape};
pub use builder::{BuildError, Saved};
pub use devices::{
    Memory, PowerEvent,
    backend::{file::open_regular, inherited, release, writer},
};
pub use event::{Event, Report, Told};
pub use generation::GenerationId;
pub use kvm::Clock;
pub use machine::{Machine, RunError};
pub use quiesced::{
    CpuModel, DeviceState, Epoch, MachineState, Pages, Quiesced, RestoreError, SaveError,
};
pub use survey::{Part, survey};
pub use vcpu::Stopped;
