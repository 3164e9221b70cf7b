//! Kernels in every format boot with the processors and the memory that they were given.
use anyhow::{Result, ensure};
use serde_json::json;
use stories::agent::Story;
use stories::guest::{Kernel, root_disk};
use stories::monitor::{Monitor, Vm};

use crate::snapshot::Shape;

/// Boots to the shell and checks what every guest must have.
fn boots(story: &Story, kernel: Kernel) -> Result<Monitor> {
    let vm = Vm::linux(&story.paths, kernel).append("one=1=1 rootflags=data=ordered");
    let mut cmdline = vm.cmdline().to_owned();
    // Of a flat image the monitor does not know that it is Linux.
    if kernel != Kernel::Flat {
        cmdline.push_str(" pci=off");
    }
    let mut guest = vm.start(&story.paths, &story.dir)?;
    guest.wait_ready()?;
    let shown = guest.sh("cat /proc/cmdline")?;
    ensure!(shown == cmdline, "the command line arrived as '{shown}'");
    let log = guest.sh("dmesg")?;
    for bad in ["Call Trace", "BUG:", "MP-BIOS bug"] {
        ensure!(!log.contains(bad), "the kernel reports '{bad}'");
    }
    Ok(guest)
}

pub fn elf(story: &Story) -> Result<()> {
    let mut guest = boots(story, Kernel::Elf)?;
    ensure!(guest.sh("nproc")? == "1");
    let clock = guest.sh("cat /sys/devices/system/clocksource/clocksource0/current_clocksource")?;
    ensure!(clock == "kvm-clock" || clock == "tsc", "the guest's clock is {clock}");
    let buttons = guest.sh("cat /sys/class/input/*/name")?;
    ensure!(buttons.contains("Power Button"), "no power button: {buttons}");
    Ok(())
}

pub fn bzimage(story: &Story) -> Result<()> {
    boots(story, Kernel::BzImage).map(drop)
}

pub fn flat(story: &Story) -> Result<()> {
    boots(story, Kernel::Flat).map(drop)
}

pub fn root_on_a_disk(story: &Story, shape: Shape) -> Result<()> {
    let image = story.dir.join("root.img");
    root_disk(&story.debian, &image)?;
    let vm = shape.vm(story)?.disk("rootfs", &image, false).append("story=disk disk=/dev/vda");
    let mut guest = vm.start(&story.paths, &story.dir)?;
    guest.wait_ready()?;
    let mounts = guest.sh("cat /proc/mounts")?;
    ensure!(mounts.lines().any(|line| line.starts_with("/dev/vda / ext4 rw")), "{mounts}");
    Ok(())
}

pub fn four_vcpus(story: &Story) -> Result<()> {
    let vm = Vm::linux(&story.paths, Kernel::Elf).machine("vcpu_count", 4);
    let mut guest = vm.start(&story.paths, &story.dir)?;
    guest.wait_ready()?;
    ensure!(guest.sh("nproc")? == "4");
    let ids = guest.sh("grep ^apicid /proc/cpuinfo | cut -d: -f2 | tr -d '\\n'")?;
    ensure!(ids == "0 1 2 3", "the APIC ids are {ids}");
    let cores = guest
        .sh("cat /sys/devices/system/cpu/cpu*/topology/thread_siblings_list | sort -u | wc -l")?;
    ensure!(cores.trim() == "4", "{cores} cores instead of 4");
    // Each of them runs tasks and gets timer interrupts.
    guest.sh("for cpu in 0 1 2 3; do taskset -c $cpu sleep 0.05 & done; wait")?;
    let online = guest.sh("cat /sys/devices/system/cpu/online")?;
    ensure!(online == "0-3", "online are {online}");
    Ok(())
}

pub fn memory_above_4_gib(story: &Story, shape: Shape) -> Result<()> {
    let size: u64 = 4608 << 20;
    let vm = shape.vm(story)?.machine("mem_size", size);
    let mut guest = vm.start(&story.paths, &story.dir)?;
    guest.wait_ready()?;
    let total: u64 = guest.sh("awk '/^MemTotal/ { print $2 }' /proc/meminfo")?.trim().parse()?;
    ensure!(total * 1024 > size / 100 * 95, "the guest sees {total} KiB");
    let map = guest.sh("grep 'System RAM' /proc/iomem")?;
    ensure!(map.contains("100000000-"), "no memory at 4 GiB:\n{map}");
    // Linux allocates the highest memory first: this data is above the hole.
    let sum = guest.sh("seq 1 200000 > /tmp/numbers && md5sum < /tmp/numbers")?;
    let again = guest.sh("seq 1 200000 | md5sum")?;
    ensure!(sum == again, "memory does not keep what is written");
    Ok(())
}

/// Debian's kernel has neither MP tables nor `virtio_mmio.device=`: without ACPI it has one
/// processor and the devices of an old PC. These have to work.
pub fn without_acpi(story: &Story) -> Result<()> {
    let vm = Vm::linux(&story.paths, Kernel::Elf).append("acpi=off");
    let mut guest = vm.start(&story.paths, &story.dir)?;
    guest.wait_ready()?;
    let log = guest.sh("dmesg")?;
    ensure!(!log.contains("ACPI: RSDP"), "the kernel found ACPI tables despite acpi=off");
    let mut qmp = guest.qmp()?;
    qmp.execute_raw("system_reset", json!({}))?;
    guest.wait_ready()
}

/// As Kata boots its guests: an MP table, and virtio devices on the command line.
pub fn virtio_without_acpi(story: &Story) -> Result<()> {
    let image = story.dir.join("root.img");
    root_disk(&story.debian, &image)?;
    let vm = Vm::native(&story.paths)?
        .disk("rootfs", &image, false)
        .append("acpi=off story=disk disk=/dev/vda");
    let mut guest = vm.start(&story.paths, &story.dir)?;
    guest.wait_ready()?;
    let mounts = guest.sh("cat /proc/mounts")?;
    ensure!(mounts.contains("/dev/vda / ext4"), "{mounts}");
    // As many as StratoVirt's own suite counts in every guest of its microVM.
    for (driver, count) in [("virtio_blk", "4"), ("virtio_net", "2"), ("virtio_console", "1")] {
        let bound = format!("ls -d /sys/bus/virtio/drivers/{driver}/virtio* | wc -l");
        let bound = guest.sh(&bound)?;
        ensure!(bound == count, "{driver} has {bound} devices");
    }
    Ok(())
}
