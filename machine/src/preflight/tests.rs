//! The errors that are reported, and the files that are left behind.
use std::{error::Error, path::Path};

use config::{
    Aio, BootConfig, ConsoleConfig, DeviceConfig, DiskConfig, Expect, Topology,
    slots::Wanted,
    types::{CpuCount, DiskQueueSize, DiskQueues, MemorySize, NicQueuePairs, NicQueueSize},
};

use super::*;

/// A machine whose files in `dir` are all missing.
fn config(dir: &Path) -> MachineConfig {
    let disk = |id: &str| DiskConfig {
        id: id.parse().unwrap(),
        path: dir.join(id),
        readonly: false,
        direct: false,
        serial: None,
        aio: Aio::Auto,
        discard: false,
        iops: None,
        bps: None,
        queues: DiskQueues::default(),
        queue_size: DiskQueueSize::default(),
        iothread: None,
        backend: None,
        probe: false,
        expect: Expect::default(),
    };
    // Numbers of no open descriptors: a process does not have so many.
    let nic = |id: &str, fd| NicConfig {
        id: id.parse().unwrap(),
        tap: Tap::Fds(vec![fd]),
        mac: None,
        queue_pairs: NicQueuePairs::default(),
        queue_size: NicQueueSize::default(),
        pps: None,
        bps: None,
        iothread: None,
        backend: None,
    };
    let file = |name| CharBackend::File(dir.join(name));
    MachineConfig {
        name: "n".parse().unwrap(),
        uuid: String::new(),
        cpus: CpuCount::MIN,
        topology: Topology { sockets: 1, dies: 1, clusters: 1, cores: 1, threads: 1 },
        memory: MemoryConfig { path: Some(dir.join("ram")), ..MemoryConfig::new(MemorySize::MIN) },
        boot: BootConfig {
            kernel: dir.join("kernel"),
            initrd: Some(dir.join("initrd")),
            cmdline: String::new(),
        },
        slots: Wanted::default().try_into().unwrap(),
        iothreads: Vec::new(),
        serial: Some(file("serial")),
        disks: vec![disk("a"), disk("b")],
        nics: vec![nic("m", i32::MAX), nic("n", i32::MAX - 1)],
        devices: vec![DeviceConfig::Console(ConsoleConfig {
            id: "c".parse().unwrap(),
            backend: file("console"),
            iothread: None,
        })],
    }
}

fn nic_error(id: &str) -> BuildError {
    let source = devices::backend::net::tap::TapError::NoDescriptor;
    BuildError::Tap { id: id.into(), source }
}

fn parts(config: &MachineConfig, first: BuildError) -> Vec<Option<Part>> {
    preflight(config, first).iter().map(BuildError::part).collect()
}

fn disk(id: &str) -> Option<Part> {
    Some(Part::Disk(id.into()))
}

fn nic(id: &str) -> Option<Part> {
    Some(Part::Nic(id.into()))
}

#[test]
fn each_part_is_reported_once_in_order_and_nothing_stays() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path());
    let files = [Some(Part::Kernel), Some(Part::Initrd), disk("a"), disk("b")];
    let Err(first) = Backing::Host { callbacks: &(Arc::new(|_| {}) as Report).into(), held: true }
        .block(0, None, config.disks.first())
    else {
        panic!("there is such a disk")
    };
    assert_eq!(parts(&config, first), [&files[..], &[nic("m"), nic("n")]].concat());
    let whole = || BuildError::Kvm(KvmError::Missing);
    assert_eq!(parts(&config, whole()), [&[None], &files[..]].concat(), "its own error stays");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);

    // Files that existed before still exist.
    for name in ["serial", "ram"] {
        fs::write(dir.path().join(name), "").unwrap();
    }
    preflight(&config, whole());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
}

#[test]
fn descriptors_that_the_build_has_taken_over_are_not_missed() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path());
    config.disks.clear();
    config.boot.initrd = None;
    let kernel = Some(Part::Kernel);
    assert_eq!(parts(&config, nic_error("m")), [kernel.clone(), nic("m"), nic("n")]);
    assert_eq!(parts(&config, nic_error("n")), [kernel.clone(), nic("n")]);
    let source = io_error();
    let first = BootError::Kernel { path: "k".into(), source };
    assert_eq!(parts(&config, first.into()), [kernel]);
}

fn io_error() -> boot::KernelError {
    boot::SourceError::Open(std::io::ErrorKind::NotFound.into()).into()
}

#[test]
fn a_kernel_is_judged_by_the_machines_size_even_where_the_host_has_less() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path());
    config.disks.clear();
    config.nics.clear();
    config.memory.path = None;
    config.memory.size = MemorySize::MAX;
    fs::write(dir.path().join("kernel"), "no kernel").unwrap();
    fs::write(dir.path().join("initrd"), "").unwrap();
    let first = memory::allocate(&config.memory).unwrap_err();
    let faults = preflight(&config, first.into());
    let said: Vec<_> = faults
        .iter()
        .map(|fault| match fault.source() {
            Some(source) => format!("{fault}: {source}"),
            None => fault.to_string(),
        })
        .collect();
    for (line, words) in said.iter().zip(["it is", "it is empty", "request less with -m"]) {
        assert!(line.contains(words), "{said:?}");
    }
    assert_eq!(said.len(), 3, "{said:?}");
}
