//! The hardware: KVM, memory, vCPU and I/O threads, interrupts, boot; configuration to machine.
pub mod arch;
mod backends;
mod backing;
mod balloon;
pub mod boot;
mod builder;
mod captured;
mod description;
mod dirty;
mod dry_restore;
mod event;
mod fits;
mod gates;
mod generation;
mod helpers;
pub mod io_thread;
mod kinds;
pub mod kvm;
mod machine;
pub mod memory;
mod preflight;
mod quiesced;
mod reload;
mod rest;
mod slots;
mod spot_check;
mod undo;
pub mod vcpu;

pub use arch::{Clock, CpuModel, Moment, layout};
pub use backends::{OpenDisk, PlugError, PluggedDisk, Shape};
pub use balloon::Balloon;
pub use builder::{BuildError, Saved};
pub use captured::{Captured, EpochError, Taken};
pub use devices::{
    Memory, PowerEvent,
    backend::{disk, inherited, release, sparse, writer},
    random,
    threads::{FirstStep, Refused, ThreadKind, ThreadStart},
};
pub use dirty::DirtyError;
pub use dry_restore::{Restorable, dry_restore};
pub use event::{Callbacks, Event, Report, ReportToken};
pub use fits::{Tsc, TscMismatch, check_cpu, check_taps, check_tsc};
pub use gates::{Gates, Markers};
pub use generation::GenerationId;
pub use helpers::{Helpers, Pending};
pub use machine::{Machine, RunError};
pub use preflight::preflight;
pub use quiesced::{Epoch, MachineState, Pages, Quiesced, RestoreError, SaveError};
pub use reload::{ReloadError, Reloaded};
pub use rest::AT_ONCE;
pub use spot_check::{SpotCheckError, SpotChecks, check_spots};
pub use undo::UndoError;
pub use vcpu::Stopped;

pub(crate) use arch::legacy;
