//! The guest's CPUID: what KVM supports on this host, with this machine's topology.
use config::{Topology, topology::Shape};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use crate::kvm::{KvmError, refused};

/// Leaf 1 EDX: several logical processors per package.
const HTT: u32 = 1 << 28;
/// Leaf 1 ECX: TSC deadline timer.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1 ECX: running under a hypervisor.
const HYPERVISOR: u32 = 1 << 31;

/// The CPUID leaves that all vCPUs share.
///
/// # Errors
/// When KVM does not report what it supports.
pub fn supported(kvm: &Kvm) -> Result<CpuId, KvmError> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(refused("list its CPUID leaves"))
}

/// `base` for vCPU `id` of a machine with `topology`.
pub fn for_vcpu(kvm: &Kvm, base: &CpuId, id: u8, topology: &Topology) -> CpuId {
    shown(base, id, topology, kvm.check_extension(Cap::TscDeadlineTimer))
}

fn shown(base: &CpuId, id: u8, topology: &Topology, tsc_deadline: bool) -> CpuId {
    let mut cpuid = base.clone();
    let shape = Shape::new(topology);
    let mut levels = Vec::new();
    for e in cpuid.as_mut_slice() {
        match e.function {
            1 => {
                // Initial APIC id, logical processors per package, CLFLUSH line of 64 bytes.
                let per_package = u32::from(shape.per_package).next_power_of_two().min(255);
                e.ebx = u32::from(id) << 24 | per_package << 16 | e.ebx & 0xffff;
                e.ecx |= HYPERVISOR;
                if tsc_deadline {
                    e.ecx |= TSC_DEADLINE;
                }
                e.edx = if shape.per_package > 1 { e.edx | HTT } else { e.edx & !HTT };
            }
            // Deterministic cache parameters: how many threads share each cache.
            4 | 0x8000_001d if e.eax & 0x1f != 0 => {
                let level = e.eax >> 5 & 7;
                let shared = if level >= 3 { shape.package_bits } else { shape.thread_bits };
                e.eax = e.eax & 0x3fff | ((1 << shared) - 1) << 14;
                if e.function == 4 {
                    let cores = shape.package_bits - shape.thread_bits;
                    e.eax = e.eax & 0x03ff_ffff | ((1u32 << cores).min(64) - 1) << 26;
                }
            }
            0xb | 0x1f => {
                topology_leaf(&shape, e, id);
                levels.extend((e.index == 0).then_some(*e));
            }
            // AMD: processors per package, and bits of the APIC id.
            0x8000_0008 => {
                let count = u32::from(shape.per_package).saturating_sub(1);
                e.ecx = e.ecx & !0xf0ff | shape.package_bits << 12 | count.min(255);
            }
            // AMD: extended APIC id, threads per core, node.
            0x8000_001e => {
                e.eax = u32::from(id);
                e.ebx = (u32::from(id) >> shape.thread_bits) & 0xff
                    | (u32::from(topology.threads).max(1) - 1) << 8;
                e.ecx = u32::from(id) >> shape.package_bits;
            }
            _ => {}
        }
    }
    // KVM lists only subleaf 0 on some hosts: add the core level and the end after it.
    for first in levels {
        for index in 1..=2 {
            let is_this = |e: &kvm_cpuid_entry2| (e.function, e.index) == (first.function, index);
            if !cpuid.as_slice().iter().any(is_this) {
                let mut e = kvm_cpuid_entry2 { index, ..first };
                topology_leaf(&shape, &mut e, id);
                // If the table is full, nothing is added: the guest then sees one level less.
                let _ = cpuid.push(e);
            }
        }
    }
    cpuid
}

/// Extended topology enumeration: level 1 threads, level 2 cores, then nothing.
fn topology_leaf(shape: &Shape, e: &mut kvm_cpuid_entry2, id: u8) {
    let (shift, count, kind) = match e.index {
        0 => (shape.thread_bits, shape.threads, 1),
        1 => (shape.package_bits, shape.per_package, 2),
        _ => (0, 0, 0),
    };
    e.eax = shift;
    e.ebx = u32::from(count);
    e.ecx = kind << 8 | e.index & 0xff;
    e.edx = u32::from(id);
    // KVM_CPUID_FLAG_SIGNIFCANT_INDEX
    e.flags |= 1;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_leaves_of_the_topology_have_all_levels() {
        let leaf = |function| kvm_cpuid_entry2 { function, ..Default::default() };
        let base = CpuId::from_entries(&[leaf(0xb), leaf(0x1f)]).unwrap();
        let four = Topology { sockets: 1, dies: 1, clusters: 1, cores: 2, threads: 2 };
        let cpuid = shown(&base, 3, &four, true);
        for function in [0xb, 0x1f] {
            let level = |index| {
                let mut all = cpuid.as_slice().iter();
                let e = all.find(|e| (e.function, e.index) == (function, index)).unwrap();
                (e.eax, e.ebx, e.ecx, e.edx)
            };
            assert_eq!(level(0), (1, 2, 1 << 8, 3), "{function:#x}: threads");
            assert_eq!(level(1), (2, 4, 2 << 8 | 1, 3), "{function:#x}: cores");
            assert_eq!(level(2), (0, 0, 2, 3), "{function:#x}: the end");
        }
        // A table that has all levels already stays as it is.
        assert_eq!(shown(&cpuid, 3, &four, true).as_slice(), cpuid.as_slice());
    }

    #[test]
    fn one_processor_does_not_show_the_hosts_cores() {
        let e = kvm_cpuid_entry2 { function: 0x8000_0008, ecx: 0x703f, ..Default::default() };
        let base = CpuId::from_entries(&[e]).unwrap();
        let one = Topology { sockets: 1, dies: 1, clusters: 1, cores: 1, threads: 1 };
        assert_eq!(shown(&base, 0, &one, true).as_slice()[0].ecx, 0);
    }
}
