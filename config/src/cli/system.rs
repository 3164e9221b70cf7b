//! Machine, memory, vCPUs and boot: flags and the file's `machine-config` and `boot-source`.
use std::path::PathBuf;

use crate::types::CpuCount;
use crate::{Part, Thp, Topology, limits, topology};

use super::draft::Draft;
use super::fields::{Fields, choose};
use crate::value;

const MACHINES: &[(&str, Result<(), &str>)] = &[
    ("microvm", Ok(())),
    ("q35", Err("machine type 'q35'")),
    ("virt", Err("machine type 'virt'")),
];
const THP: &[(&str, Result<Thp, &str>)] =
    &[("auto", Ok(Thp::Auto)), ("on", Ok(Thp::On)), ("off", Ok(Thp::Off))];
const ACCELERATORS: &[(&str, Result<(), &str>)] =
    &[("kvm", Ok(())), ("kvm:tcg", Ok(())), ("tcg", Err("accelerator 'tcg'"))];

/// Record the place of `part` as `key`, if it is given.
fn note(draft: &mut Draft, f: &Fields, part: Part, key: &str) {
    if f.has(key) {
        draft.places.note(part, f.place().key(key));
    }
}

pub(crate) fn name(draft: &mut Draft, f: &mut Fields) {
    draft.name = f.id("");
}

pub(crate) fn uuid(draft: &mut Draft, f: &mut Fields) {
    draft.uuid = f.text("", value::uuid);
}

/// `disk-slots` and `nic-slots`, which have the same names in the flag and the file.
fn slots(draft: &mut Draft, f: &mut Fields) {
    let mut number = |key| f.number(key, 0..=limits::VIRTIO_SLOTS).map(|n| (f.place().key(key), n));
    draft.disk_slots = number("disk-slots").or(draft.disk_slots.take());
    draft.nic_slots = number("nic-slots").or(draft.nic_slots.take());
}

pub(crate) fn machine(draft: &mut Draft, f: &mut Fields) {
    let none = f.text("type", |word| match word.eq_ignore_ascii_case("none") {
        true => Ok(true),
        false => choose(word, MACHINES).map(|()| false),
    });
    draft.no_machine = none == Some(true);
    slots(draft, f);
    let _ = f.choice("accel", ACCELERATORS);
    draft.dump_guest_core = f.boolean("dump-guest-core").or(draft.dump_guest_core);
    draft.mem_share = f.boolean("mem-share").or(draft.mem_share);
    f.only_off("usb", "USB");
    f.refuse("gic-version", "aarch64");
}

pub(crate) fn accel(_: &mut Draft, f: &mut Fields) {
    let _ = f.choice("", ACCELERATORS);
}

pub(crate) fn cpu(_: &mut Draft, f: &mut Fields) {
    let _ = f.choice("model", &[("host", Ok(()))]);
    f.only_off("pmu", "enabling performance counters");
    f.only_off("sve", "aarch64");
    f.refuse("kvm-steal-time", "selecting this CPU feature");
}

pub(crate) fn smp(draft: &mut Draft, f: &mut Fields) {
    f.require(&["cpus"]);
    let cpus = f.parsed::<CpuCount>("cpus");
    let most = f.parsed::<CpuCount>("maxcpus");
    let mut part = |key| f.parsed::<CpuCount>(key).map(CpuCount::get);
    let [sockets, dies, clusters, cores, threads] =
        [part("sockets"), part("dies"), part("clusters"), part("cores"), part("threads")];
    let Some(cpus) = cpus else { return };
    if most.is_some_and(|most| most != cpus) {
        f.problem("maxcpus", format!("vCPU hot-plug is not supported; must be {cpus}"));
    }
    // Factors not given become 1, except the first missing one of cores, sockets and threads: that
    // gets the value that makes the product right.
    let given: u64 = [sockets, dies, clusters, cores, threads]
        .iter()
        .flatten()
        .map(|part| u64::from(*part))
        .product();
    let rest = u64::from(cpus.get()).checked_div(given).and_then(|rest| u8::try_from(rest).ok());
    let rest = rest.unwrap_or(1).max(1);
    let (spare_core, spare_socket) = (cores.is_none(), cores.is_some() && sockets.is_none());
    let spare_thread = cores.is_some() && sockets.is_some() && threads.is_none();
    let fill = |part: Option<u8>, spare| part.unwrap_or(if spare { rest } else { 1 });
    let topology = Topology {
        sockets: fill(sockets, spare_socket),
        dies: fill(dies, false),
        clusters: fill(clusters, false),
        cores: fill(cores, spare_core),
        threads: fill(threads, spare_thread),
    };
    let Topology { sockets: s, dies: d, clusters: l, cores: c, threads: t } = topology;
    let product: u64 = [s, d, l, c, t].iter().map(|part| u64::from(*part)).product();
    if product != u64::from(cpus.get()) {
        f.problem(
            "",
            format!(
                "sockets {s} x dies {d} x clusters {l} x cores {c} x threads {t} = {product}; must \
                 equal cpus {cpus}"
            ),
        );
    } else if let Err(rule) = topology::cpu_ids(&topology, cpus) {
        f.problem("", rule);
    }
    note(draft, f, Part::Cpus, "cpus");
    draft.smp = Some((cpus, topology));
}

pub(crate) fn memory(draft: &mut Draft, f: &mut Fields) {
    draft.thp = f.choice("thp", THP).or(draft.thp);
    if !f.has("thp") {
        f.require(&["size"]);
    }
    draft.memory = f.memory_size("size").or(draft.memory);
    note(draft, f, Part::MemorySize, "size");
    if let (Some(most), Some(size)) = (f.memory_size("maxmem"), draft.memory)
        && most != size
    {
        f.problem("maxmem", format!("memory hot-plug is not supported; must be {size}"));
    }
}

pub(crate) fn mem_path(draft: &mut Draft, f: &mut Fields) {
    draft.mem_path = f.path("");
    note(draft, f, Part::MemoryPath, "");
}

pub(crate) fn mem_prealloc(draft: &mut Draft, _: &mut Fields) {
    draft.mem_prealloc = true;
}

pub(crate) fn omit_vm_memory(draft: &mut Draft, _: &mut Fields) {
    draft.omit_vm_memory = true;
}

pub(crate) fn kernel(draft: &mut Draft, f: &mut Fields) {
    // Kept even when wrong: it must not be reported as missing.
    draft.kernel = Some(f.path("").unwrap_or_default());
    note(draft, f, Part::Kernel, "");
}

pub(crate) fn append(draft: &mut Draft, f: &mut Fields) {
    draft.cmdline = f.text("", value::cmdline);
    note(draft, f, Part::Cmdline, "");
}

pub(crate) fn initrd(draft: &mut Draft, f: &mut Fields) {
    draft.initrd = f.path("");
    note(draft, f, Part::Initrd, "");
}

/// `boot-source`.
pub(crate) fn boot_source(draft: &mut Draft, f: &mut Fields) {
    if f.has("kernel_image_path") {
        // Kept even when wrong: it must not be reported as missing.
        draft.kernel = Some(PathBuf::new());
    }
    draft.kernel = f.path("kernel_image_path").or(draft.kernel.take());
    draft.cmdline = f.text("boot_args", value::cmdline);
    draft.initrd = f.path("initrd_fs_path");
    note(draft, f, Part::Kernel, "kernel_image_path");
    note(draft, f, Part::Cmdline, "boot_args");
    note(draft, f, Part::Initrd, "initrd_fs_path");
}

/// `machine-config`.
pub(crate) fn machine_config(draft: &mut Draft, f: &mut Fields) {
    draft.name = f.id("name");
    let _ = f.choice("type", MACHINES);
    if let Some(cpus) = f.parsed::<CpuCount>("vcpu_count") {
        let cores = cpus.get();
        draft.smp = Some((cpus, Topology { sockets: 1, dies: 1, clusters: 1, cores, threads: 1 }));
    }
    draft.memory = f.memory_size("mem_size");
    draft.mem_path = f.path("mem_path");
    note(draft, f, Part::Cpus, "vcpu_count");
    note(draft, f, Part::MemorySize, "mem_size");
    note(draft, f, Part::MemoryPath, "mem_path");
    draft.mem_share = f.boolean("mem_share");
    let documented = f.boolean("mem-share");
    if f.has("mem_share") && f.has("mem-share") {
        f.problem("mem-share", "the same as mem_share; give one of them");
    }
    draft.mem_share = draft.mem_share.or(documented);
    draft.thp = f.choice("mem_thp", THP);
    draft.dump_guest_core = f.boolean("dump_guest_core");
    slots(draft, f);
    if f.boolean("omit_vm_memory") == Some(true) {
        if draft.dump_guest_core == Some(true) {
            f.problem("omit_vm_memory", "dump_guest_core contradicts it; give one of them");
        }
        draft.dump_guest_core = Some(false);
    }
}
