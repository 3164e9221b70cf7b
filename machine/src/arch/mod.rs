//! What differs between architectures of processors. Each is a folder that has what is named here;
//! all else of this crate is the same for every one of them.
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "x86_64")]
pub use x86_64::{
    boot,
    kvm::{
        chips::ChipState,
        clock::{Clock, has_hardware_virtualization, host_ticks},
        cpu_model::{CpuFeatures, CpuModel},
        saved::VcpuError,
        state::VcpuState,
        vcpu::{Buses, KvmCpu, VcpuFactory},
    },
    layout,
};
#[cfg(target_arch = "x86_64")]
pub(crate) use x86_64::{
    kvm::{entry, vm},
    legacy,
};
