//! The vCPU topology that the guest sees, and the ids that its vCPUs have in hardware.
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "x86_64")]
pub use x86_64::{Shape, TopologyError, cpu_ids};

/// `-smp`: sockets x dies x clusters x cores x threads. The product equals the number of vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "standard terms")]
pub struct Topology {
    pub sockets: u8,
    pub dies: u8,
    pub clusters: u8,
    pub cores: u8,
    pub threads: u8,
}
