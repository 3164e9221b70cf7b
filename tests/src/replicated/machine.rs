//! The machine of the replicated guest, in one host or the other.
use std::env;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use serde_json::json;

use crate::guest::{Kernel, replicated_initramfs};
use crate::lab::hosts::{GUEST_MAC, Hosts, Side, TAP};
use crate::lab::namespace::shift_clocks;
use crate::monitor::{Monitor, Vm};
use crate::paths::{GUEST_KERNEL, Paths};

/// MiB of RAM: as little as the kernel starts in.
const MIB: u64 = 64;
/// MiB that Debian's kernel needs.
const DEBIAN_MIB: u64 = 128;
/// Seconds by which the clocks of the right host are ahead.
const AHEAD: u32 = 100_000;

/// The machine: one vCPU and a NIC. With 64 MiB and the kernel that `STRATOVIRT_GUEST_KERNEL`
/// names, or with 128 MiB and Debian's.
///
/// # Errors
/// No KVM.
pub fn vm(paths: &Paths) -> Result<Vm> {
    let (vm, mib) = match env::var_os(GUEST_KERNEL) {
        Some(_) => (Vm::native(paths)?, MIB),
        None => (Vm::linux(paths, Kernel::Elf), DEBIAN_MIB),
    };
    let mac = GUEST_MAC.map(|byte| format!("{byte:02x}")).join(":");
    let vm = vm.initramfs(&replicated_initramfs(paths)).machine("mem_size", mib << 20);
    Ok(vm.nic("net0", TAP, &mac))
}

/// How often a guest or a probe does something that it does every millisecond at best: an emulated
/// host is a hundred times slower, and does nothing else when too many datagrams come.
#[must_use]
pub fn pace() -> Duration {
    Duration::from_millis(if env::var_os(GUEST_KERNEL).is_some() { 1 } else { 50 })
}

/// Starts `vm` in a host; its files are in `dir`. The two hosts have different clocks.
///
/// # Errors
/// The monitor cannot be started.
pub fn start(vm: Vm, hosts: &Hosts, side: Side, paths: &Paths, dir: &Path) -> Result<Monitor> {
    hosts.host(side).enter(|| {
        if side == Side::Right {
            shift_clocks(AHEAD)?;
        }
        vm.start(paths, dir)
    })?
}

/// Starts a monitor in a host that waits there for the machine; `from` is as its `-incoming` has
/// it.
///
/// # Errors
/// The monitor cannot be started.
pub fn await_incoming(
    from: &str,
    hosts: &Hosts,
    side: Side,
    paths: &Paths,
    dir: &Path,
) -> Result<Monitor> {
    start(waiting(from), hosts, side, paths, dir)
}

/// A monitor that waits for the machine; `from` is as its `-incoming` has it.
#[must_use]
pub fn waiting(from: &str) -> Vm {
    Vm::described(json!({})).args(&["-incoming", from])
}
