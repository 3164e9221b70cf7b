//! Code that differs between processor architectures. Each is a folder that provides the items
//! named here; the rest of this crate is the same for all of them.
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "x86_64")]
pub use x86_64::{
    boot,
    kvm::{
        chips::ChipState,
        clock::{
            Clock, ClockError, Moment, guest_tsc_is_its_own, has_hardware_virtualization,
            host_ticks,
        },
        cpu_model::{CpuFeatures, CpuModel},
        saved::VcpuError,
        state::VcpuState,
        vcpu::{Buses, BusesBuilder, KvmCpu, VcpuFactory},
    },
    layout,
};
#[cfg(target_arch = "x86_64")]
pub(crate) use x86_64::{
    kvm::{entry, vm},
    legacy,
};
