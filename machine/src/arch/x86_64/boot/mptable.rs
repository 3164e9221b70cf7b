//! The MP table (Intel MultiProcessor Specification 1.4, chapter 4), for kernels without ACPI.
use devices::Memory;
use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use crate::arch::layout;

const POINTER_SIZE: u64 = 16;
const HEADER_SIZE: u16 = 44;
const VERSION: u8 = 4;
/// Version of KVM's local APIC and IOAPIC.
const LAPIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;
/// Processor flags.
const ENABLED: u8 = 1;
const BOOT: u8 = 2;
/// Family 6, model 0, stepping 0; FPU and on-chip APIC. Operating systems use CPUID instead.
const SIGNATURE: u32 = 0x600;
const FEATURES: u32 = 0x201;
/// The ISA bus.
const BUS: u8 = 0;
/// Interrupt types: vectored, NMI, through the 8259.
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;
/// All local APICs.
const ALL: u8 = 0xff;

/// Write the table for the processors with these APIC ids, the boot processor first.
pub(super) fn write(memory: &Memory, apic_ids: &[u8]) -> Result<(), BootError> {
    let mut bytes = pointer();
    bytes.extend(table(apic_ids));
    memory
        .write_slice(&bytes, GuestAddress(layout::MP_TABLE))
        .map_err(|source| BootError::Tables { address: layout::MP_TABLE, source })
}

/// The floating pointer, followed by the table that it points to.
fn pointer() -> Vec<u8> {
    let table = u32::try_from(layout::MP_TABLE + POINTER_SIZE).unwrap_or(0);
    let mut bytes = b"_MP_".to_vec();
    bytes.extend(table.to_le_bytes());
    // One paragraph, version, checksum, five feature bytes: none of them a default configuration.
    bytes.extend([1, VERSION, 0, 0, 0, 0, 0, 0]);
    set_checksum(&mut bytes, 10);
    bytes
}

fn table(apic_ids: &[u8]) -> Vec<u8> {
    let mut entries: Vec<u8> = Vec::new();
    let mut count: u16 = 0;
    let mut add = |entry: &[u8]| {
        entries.extend(entry);
        count += 1;
    };
    for (index, id) in apic_ids.iter().enumerate() {
        let flags = if index == 0 { ENABLED | BOOT } else { ENABLED };
        let mut entry = vec![0, *id, LAPIC_VERSION, flags];
        entry.extend(SIGNATURE.to_le_bytes());
        entry.extend(FEATURES.to_le_bytes());
        entry.extend([0; 8]);
        add(&entry);
    }
    add(&[1, BUS, b'I', b'S', b'A', b' ', b' ', b' ']);
    let ioapic = super::ioapic_id(apic_ids);
    let mut entry = vec![2, ioapic, IOAPIC_VERSION, ENABLED];
    entry.extend(low32(layout::IOAPIC).to_le_bytes());
    add(&entry);
    for pin in (0..layout::IOAPIC_PINS).map_while(|pin| u8::try_from(pin).ok()) {
        add(&interrupt(3, INT, pin, ioapic, pin));
    }
    add(&interrupt(4, EXT_INT, 0, ALL, 0));
    add(&interrupt(4, NMI, 0, ALL, 1));

    let mut bytes = b"PCMP".to_vec();
    let size = usize::from(HEADER_SIZE) + entries.len();
    bytes.extend(u16::try_from(size).unwrap_or(u16::MAX).to_le_bytes());
    bytes.extend([VERSION, 0]);
    bytes.extend(b"STRATOVRMICROVM     ");
    // No OEM table: pointer and size.
    bytes.extend([0; 6]);
    bytes.extend(count.to_le_bytes());
    bytes.extend(low32(layout::LAPIC).to_le_bytes());
    // No extended table: length, checksum; reserved.
    bytes.extend([0; 4]);
    bytes.extend(entries);
    set_checksum(&mut bytes, 7);
    bytes
}

/// An interrupt (type 3) or local interrupt (type 4) entry; polarity and trigger as on the ISA bus:
/// active high, edge.
fn interrupt(entry: u8, kind: u8, irq: u8, apic: u8, pin: u8) -> [u8; 8] {
    [entry, kind, 0, 0, BUS, irq, apic, pin]
}

fn low32(address: u64) -> u32 {
    u32::try_from(address).unwrap_or(0)
}

/// Set the checksum so that all bytes add up to zero.
fn set_checksum(bytes: &mut [u8], at: usize) {
    let sum = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(checksum) = bytes.get_mut(at) {
        *checksum = sum.wrapping_neg();
    }
}

#[cfg(test)]
mod tests;
