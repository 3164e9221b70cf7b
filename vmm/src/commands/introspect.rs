//! Commands that describe the machine.
use qmp::{Error, schema::*};

use crate::{arch, vmm::Vmm};

fn qom_path(index: usize) -> String {
    format!("/machine/unattached/device[{index}]")
}

/// Position of vCPU `index` in the configured topology.
fn props(vmm: &Vmm, index: usize) -> CpuInstanceProperties {
    let t = vmm.machine.config().topology;
    let mut rest = u32::try_from(index).unwrap_or(u32::MAX);
    let mut take = |n: u8| {
        let n = u32::from(n.max(1));
        let id = rest % n;
        rest /= n;
        Some(id)
    };
    CpuInstanceProperties {
        thread_id: take(t.threads),
        core_id: take(t.cores),
        cluster_id: take(t.clusters),
        die_id: take(t.dies),
        socket_id: take(t.sockets),
    }
}

pub fn query_cpus(vmm: &mut Vmm, _: QueryCpus) -> Result<Vec<CpuInfo>, Error> {
    let threads = vmm.machine.vcpu_threads().into_iter().enumerate();
    Ok(threads
        .map(|(index, thread)| CpuInfo {
            cpu: u32::try_from(index).unwrap_or(u32::MAX),
            arch: arch::CPU_INFO,
            current: true,
            halted: false,
            props: props(vmm, index),
            qom_path: qom_path(index),
            thread_id: u64::from(thread),
        })
        .collect())
}

pub fn query_cpus_fast(vmm: &mut Vmm, _: QueryCpusFast) -> Result<Vec<CpuInfoFast>, Error> {
    let threads = vmm.machine.vcpu_threads().into_iter().enumerate();
    Ok(threads
        .map(|(index, thread)| CpuInfoFast {
            cpu_index: u32::try_from(index).unwrap_or(u32::MAX),
            qom_path: qom_path(index),
            thread_id: u64::from(thread),
            props: props(vmm, index),
            target: arch::TARGET,
        })
        .collect())
}

pub fn query_hotpluggable_cpus(
    vmm: &mut Vmm,
    _: QueryHotpluggableCpus,
) -> Result<Vec<HotpluggableCpu>, Error> {
    let count = vmm.machine.vcpu_threads().len();
    Ok((0..count)
        .map(|index| HotpluggableCpu {
            props: props(vmm, index),
            qom_path: Some(qom_path(index)),
            r#type: arch::HOTPLUGGABLE_CPU.into(),
            vcpus_count: 1,
        })
        .collect())
}

pub fn query_chardev(vmm: &mut Vmm, _: QueryChardev) -> Result<Vec<ChardevInfo>, Error> {
    let info = |(label, filename): &(String, String)| ChardevInfo {
        label: label.clone(),
        filename: filename.clone(),
        frontend_open: true,
    };
    Ok(vmm.machine.chardevs().iter().map(info).collect())
}

pub fn query_iothreads(vmm: &mut Vmm, _: QueryIothreads) -> Result<Vec<IoThreadInfo>, Error> {
    Ok(vmm
        .machine
        .io_threads()
        .map(|(id, thread)| IoThreadInfo {
            id: id.into(),
            thread_id: u64::from(thread),
            poll_max_ns: 0,
            poll_grow: 0,
            poll_shrink: 0,
            aio_max_batch: 0,
        })
        .collect())
}

pub fn query_kvm(_: &mut Vmm, _: QueryKvm) -> Result<KvmInfo, Error> {
    Ok(KvmInfo { enabled: true, present: true })
}

pub fn query_name(vmm: &mut Vmm, _: QueryName) -> Result<NameInfo, Error> {
    Ok(NameInfo { name: Some(vmm.machine.config().name.to_string()) })
}

pub fn query_vm_generation_id(vmm: &mut Vmm, _: QueryVmGenerationId) -> Result<GuidInfo, Error> {
    Ok(GuidInfo { guid: vmm.machine.generation_id().to_string() })
}

pub fn query_uuid(vmm: &mut Vmm, _: QueryUuid) -> Result<UuidInfo, Error> {
    Ok(UuidInfo { uuid: vmm.machine.config().uuid.clone() })
}
