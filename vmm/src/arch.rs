//! What differs between processor architectures: each is a file with the items named here.
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "x86_64")]
pub use x86_64::{
    AUDIT_ARCH, CPU_INFO, CPU_MODEL, HOTPLUGGABLE_CPU, MACHINE_IOCTLS, TARGET, VCPU_IOCTLS,
};
