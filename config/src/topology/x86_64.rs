//! APIC ids: which socket, core and thread a vCPU is.
use super::Topology;
use crate::types::CpuCount;

/// A topology that does not fit into 8-bit APIC ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this topology needs APIC ids above 254: use fewer sockets or powers of two")]
pub struct TopologyError;

/// The APIC ids of `cpus` vCPUs.
///
/// # Errors
/// When one would be above 254; 255 is the broadcast id.
pub fn cpu_ids(topology: &Topology, cpus: CpuCount) -> Result<Vec<u8>, TopologyError> {
    let id = |index| u8::try_from(apic_id(topology, index)).ok().filter(|id| *id < 255);
    (0..cpus.get()).map(id).collect::<Option<_>>().ok_or(TopologyError)
}

/// APIC id of vCPU `index`: socket, core and thread in separate bit fields, as the guest decodes
/// them.
fn apic_id(topology: &Topology, index: u8) -> u32 {
    let shape = Shape::new(topology);
    let (index, per_package) = (u16::from(index), shape.per_package.max(1));
    let (package, within) = (index / per_package, index % per_package);
    let (core, thread) = (within / shape.threads, within % shape.threads);
    u32::from(package) << shape.package_bits
        | u32::from(core) << shape.thread_bits
        | u32::from(thread)
}

/// Widths of the parts of an APIC id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Threads per package.
    pub per_package: u16,
    /// Threads per core.
    pub threads: u16,
    /// Bits of the thread's number.
    pub thread_bits: u32,
    /// Bits of the thread's and the core's number together.
    pub package_bits: u32,
}

impl Shape {
    /// The widths for `t`.
    pub fn new(t: &Topology) -> Self {
        // The width of 0..n; an invalid topology must not overflow.
        let bits = |n: u16| u16::BITS - n.saturating_sub(1).leading_zeros();
        let threads = u16::from(t.threads.max(1));
        let cores = [t.dies, t.clusters, t.cores]
            .iter()
            .fold(1u16, |cores, n| cores.saturating_mul(u16::from((*n).max(1))));
        let thread_bits = bits(threads);
        Self {
            per_package: cores.saturating_mul(threads),
            threads,
            thread_bits,
            package_bits: thread_bits + bits(cores),
        }
    }
}
