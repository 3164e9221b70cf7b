//! The kernel command line, and how the guest learns of its virtio-mmio devices.
//!
//! A device is described in the ACPI tables or on the command line, never both: the second driver
//! instance would find the registers in use. The rule, in [`discover`]:
//!
//! 1. `acpi=off` on the command line: no ACPI tables, every device on the command line.
//! 2. A kernel that can be searched (ELF, flat) has no code that looks for ACPI tables but knows
//!    `virtio_mmio.device=`, and the command line does not say `acpi=force`: the same.
//! 3. Otherwise: ACPI tables with every device.
//!
//! A device for which the command line already has `virtio_mmio.device=` is not added.
//!
//! A kernel that is known to be Linux is also told that there is no PCI, unless the command line
//! says something about PCI: see [`NO_PCI`].
//!
//! The MP table is always present: Linux reads it only if there is no ACPI.
use std::ops::Range;

use config::{
    cmdline::{self, CmdlineError},
    places::VirtioSlot,
};
use devices::Memory;
use memchr::memmem::Finder;
use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use crate::arch::layout;

const PARAMETER: &str = "virtio_mmio.device=";
/// Linux has no other way to learn that there is no PCI, and looks for more than a hundred devices
/// by accesses to ports that exit to the monitor. Added only if there is room.
const NO_PCI: &str = " pci=off";
/// Separates the kernel's parameters from those of init.
const END: &str = "--";

/// The kernel's abilities, as found in its image in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct KernelWords {
    /// It looks for ACPI tables.
    acpi: bool,
    /// It takes virtio-mmio devices from the command line.
    virtio_mmio: bool,
}

/// Search an uncompressed kernel. `None` when there is nothing to search.
pub(super) fn kernel_words(memory: &Memory, image: &[Range<u64>]) -> Option<KernelWords> {
    if image.is_empty() {
        return None;
    }
    // The signature that ACPI code compares with, and the parameter's name.
    let acpi = contains(memory, image, b"RSD PTR ");
    Some(KernelWords { acpi, virtio_mmio: !acpi && contains(memory, image, b"virtio_mmio.device") })
}

fn contains(memory: &Memory, image: &[Range<u64>], word: &[u8]) -> bool {
    let finder = Finder::new(word);
    // No larger than needed: what is allocated may have to be touched.
    let longest = image.iter().map(|range| range.end.saturating_sub(range.start)).max();
    let size = usize::try_from(longest.unwrap_or(0)).unwrap_or(usize::MAX).min(64 << 10);
    let mut buffer = vec![0; size];
    image.iter().any(|range| {
        let mut at = range.start;
        while at < range.end {
            let len = usize::try_from(range.end - at).unwrap_or(usize::MAX).min(buffer.len());
            let Some(part) = buffer.get_mut(..len) else { return false };
            if memory.read_slice(part, GuestAddress(at)).is_err() {
                return false;
            }
            if finder.find(part).is_some() {
                return true;
            }
            // A word may cross two parts.
            at += if at + len as u64 == range.end { len } else { len + 1 - word.len() } as u64;
        }
        false
    })
}

/// How the guest learns of its devices.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Discovery<'a> {
    pub(super) cmdline: Composed<'a>,
    /// The slots for the ACPI tables; `None`: no tables.
    pub(super) acpi: Option<Vec<VirtioSlot>>,
}

/// The user's command line and additions to it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Composed<'a> {
    user: &'a str,
    added: String,
}

/// Decide how the guest learns of its devices; the rule is at the top of this module.
pub(super) fn discover<'a>(
    user: &'a str,
    slots: &[VirtioSlot],
    kernel: impl FnOnce() -> Option<KernelWords>,
) -> Discovery<'a> {
    let words = || kernel_parameters(user);
    let wish = words().filter(|word| matches!(*word, "acpi=off" | "acpi=force")).last();
    let acpi = match wish {
        Some(wish) => wish == "acpi=force",
        None => kernel() != Some(KernelWords { acpi: false, virtio_mmio: true }),
    };
    let given: Vec<u64> = words()
        .filter_map(|word| word.strip_prefix(PARAMETER))
        .filter_map(|value| value.split(['@', ':']).nth(1))
        .filter_map(number)
        .collect();
    let slots: Vec<VirtioSlot> =
        slots.iter().filter(|slot| !given.contains(&u64::from(slot.address))).copied().collect();
    let added = if acpi { String::new() } else { cmdline_devices(&slots) };
    Discovery { cmdline: Composed { user, added }, acpi: acpi.then_some(slots) }
}

/// The words of `line` that the kernel reads.
fn kernel_parameters(line: &str) -> impl Iterator<Item = &str> {
    line.split_ascii_whitespace().take_while(|word| *word != END)
}

/// Parse a number as Linux does: decimal, 0x for hexadecimal, 0 for octal.
fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None if text.starts_with('0') => u64::from_str_radix(text, 8).ok(),
        None => text.parse().ok(),
    }
}

/// ` virtio_mmio.device=4K@0xf0100000:5` for each slot (Linux `drivers/virtio/virtio_mmio.c`).
fn cmdline_devices(slots: &[VirtioSlot]) -> String {
    let size = layout::VIRTIO_MMIO_STEP >> 10;
    slots
        .iter()
        .map(|slot| format!(" {PARAMETER}{size}K@0x{:08x}:{}", slot.address, slot.irq))
        .collect()
}

/// The command line for a kernel, which may be known to be Linux, that accepts `max` bytes of it.
/// Additions go before the parameters of init.
pub(super) fn check(line: Composed, linux: bool, max: usize) -> Result<String, CmdlineError> {
    let Composed { user, mut added } = line;
    cmdline::check(user, added.len(), max)?;
    let room = max - user.len() - added.len();
    let unsaid = || !kernel_parameters(user).any(|word| word.starts_with("pci="));
    if linux && room >= NO_PCI.len() && unsaid() {
        added.push_str(NO_PCI);
    }
    let (kernel, init) = user.split_at(init_parameters(user));
    Ok(match (added.trim_start(), init) {
        ("", _) => user.to_owned(),
        (_, "") => format!("{user}{added}"),
        (added, init) => format!("{kernel}{added} {init}"),
    })
}

/// Where the parameters of init begin: at the word `--`, or at the end.
fn init_parameters(line: &str) -> usize {
    let mut at = 0;
    for word in line.split([' ', '\t']) {
        if word == END {
            return at;
        }
        at += word.len() + 1;
    }
    line.len()
}

/// Write the command line and its terminator to guest memory.
pub(super) fn write(memory: &Memory, line: &str) -> Result<(), BootError> {
    let mut bytes = line.as_bytes().to_vec();
    bytes.push(0);
    memory
        .write_slice(&bytes, GuestAddress(layout::CMDLINE))
        .map_err(|source| BootError::Tables { address: layout::CMDLINE, source })
}

#[cfg(test)]
mod tests;
