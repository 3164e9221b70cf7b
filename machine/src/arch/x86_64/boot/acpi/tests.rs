//! The ACPI tables, read as an operating system reads them.
use std::collections::BTreeMap;

use super::super::tests::{PLATFORM, SLOTS, memory};
use super::*;

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
}

/// All tables by signature, reached from the RSDP; checksums, lengths and addresses are checked.
fn tables(platform: &Platform) -> BTreeMap<String, Vec<u8>> {
    let memory = memory(16 << 20);
    let rsdp = write(&memory, platform).unwrap();
    let read = |address: u64, len: usize| {
        let end = address + len as u64;
        assert!((layout::BIOS_AREA..layout::MP_TABLE).contains(&address));
        assert!(end <= layout::MP_TABLE, "{end:#x}");
        let mut bytes = vec![0; len];
        memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    };
    let table = |address: u64| {
        let len = u32_at(&read(address, 36), 4) as usize;
        let bytes = read(address, len);
        assert_eq!(sum(&bytes), 0);
        (String::from_utf8(bytes[..4].to_vec()).unwrap(), bytes)
    };
    assert_eq!(rsdp.0 % 16, 0);
    let rsdp = read(rsdp.0, 36);
    assert_eq!((&rsdp[..8], rsdp[15]), (&b"RSD PTR "[..], 2));
    assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
    let (signature, xsdt) = table(u64_at(&rsdp, 24));
    assert_eq!(signature, "XSDT");
    let mut found: BTreeMap<_, _> =
        xsdt[36..].chunks_exact(8).map(|entry| table(u64_at(entry, 0))).collect();
    let (signature, dsdt) = table(u64_at(&found["FACP"], 140));
    found.insert(signature, dsdt);
    assert_eq!(found.keys().collect::<Vec<_>>(), ["APIC", "DSDT", "FACP"]);
    found
}

#[test]
fn the_fadt_describes_hardware_reduced_acpi_with_three_ports() {
    let fadt = &tables(&PLATFORM)["FACP"];
    assert_eq!((fadt.len(), fadt[8]), (276, 6));
    let flags = u32_at(fadt, 112);
    assert_eq!(flags & (1 << 20 | 1 << 10 | 1 << 4), 1 << 20 | 1 << 10 | 1 << 4);
    assert_eq!(u16::from_le_bytes([fadt[109], fadt[110]]), 0b111);
    // One byte each, in I/O space.
    let port = |offset: usize| {
        assert_eq!(fadt[offset..offset + 4], [1, 8, 0, 1]);
        u64_at(fadt, offset + 4)
    };
    let base = u64::from(layout::ACPI_POWER_PORT);
    assert_eq!((port(244), port(256), port(116)), (base, base + 1, base + 2));
    assert_eq!(fadt[128], layout::ACPI_RESET_VALUE);
}

#[test]
fn the_madt_lists_every_processor_and_one_ioapic() {
    // One, many, and with gaps, as with three cores per socket.
    let many: Vec<u8> = (0..254).collect();
    for (apic_ids, ioapic) in [(&[0][..], 1), (&many, 254), (&[0, 1, 2, 4, 5, 6], 7)] {
        let madt = &tables(&Platform { cpu_ids: apic_ids, ..PLATFORM })["APIC"];
        assert_eq!((u32_at(madt, 36), u32_at(madt, 40)), (0xfee0_0000, 1));
        let mut rest = &madt[44..];
        let mut ids = Vec::new();
        let mut others = Vec::new();
        while let [kind, len, ..] = rest {
            let (entry, next) = rest.split_at(usize::from(*len));
            if *kind == 0 {
                assert_eq!((usize::from(entry[2]), u32_at(entry, 4)), (ids.len(), 1));
                ids.push(entry[3]);
            } else {
                others.push(entry.to_vec());
            }
            rest = next;
        }
        assert_eq!(ids, apic_ids);
        let ioapic = [&[1, 12, ioapic, 0][..], &0xfec0_0000_u32.to_le_bytes(), &[0; 4]].concat();
        assert_eq!(others, [ioapic, vec![4, 6, 0xff, 0, 0, 1]]);
    }
}

/// Whether `bytes` contain `part`.
fn has(bytes: &[u8], part: &[u8]) -> bool {
    memchr::memmem::find(bytes, part).is_some()
}

#[test]
fn the_dsdt_has_each_device_with_its_registers_and_interrupt() {
    let dsdt = &tables(&PLATFORM)["DSDT"];
    for slot in SLOTS {
        let memory = [&[0x86, 9, 0, 1][..], &slot.address.to_le_bytes(), &[0, 0x10, 0, 0]].concat();
        // Consumer, edge, active high, exclusive.
        let interrupt = [&[0x89, 6, 0, 0b0011, 1][..], &slot.irq.to_le_bytes()].concat();
        assert!(has(dsdt, &[memory, interrupt].concat()), "{slot:?}");
    }
    for name in
        [&b"V000"[..], b"V001", b"LNRO0005\0", b"ACPI0013\0", b"QEMU0001\0", b"COM1", b"_EVT"]
    {
        assert!(has(dsdt, name), "{}", String::from_utf8_lossy(name));
    }
    for port in [0x3f8_u16, 0x60, 0x64, 0x70, 0x505] {
        let [low, high] = port.to_le_bytes();
        assert!(has(dsdt, &[0x47, 1, low, high, low, high, 1]), "{port:#x}");
    }
    // Name (_S5, Package (4) {5, 0, 0, 0}).
    assert!(
        has(dsdt, b"\x08_S5_\x12\x07\x04\x0a\x05\x00\x00\x00")
            || has(dsdt, b"\x08_S5_\x12\x0b\x04\x0a\x05\x0a\0\x0a\0\x0a\0")
    );
    assert!(!has(dsdt, b"V002"));
    assert!(!has(dsdt, b"QEMUVGID"));
}

#[test]
fn what_the_machine_has_not_is_not_declared() {
    let without = Platform { serial: false, slots: &[], ..PLATFORM };
    let dsdt = &tables(&without)["DSDT"];
    assert!(!has(dsdt, b"COM1"));
    assert!(!has(dsdt, b"LNRO0005"));
}

#[test]
fn the_generation_id_is_declared_where_it_lies() {
    let with = Platform { vmgenid: Some(GuestAddress(0x1_2345_6780)), ..PLATFORM };
    let dsdt = &tables(&with)["DSDT"];
    assert!(has(dsdt, b"VM_Gen_Counter\0"));
    assert!(has(dsdt, &[0x0c, 0x80, 0x67, 0x45, 0x23]));
}

#[test]
fn the_largest_machine_fits() {
    let slots: Vec<_> = layout::VIRTIO_IRQS
        .iter()
        .enumerate()
        .map(|(number, irq)| VirtioSlot {
            address: (layout::VIRTIO_MMIO + number as u64 * layout::VIRTIO_MMIO_STEP) as u32,
            irq: *irq,
        })
        .collect();
    let apic_ids: Vec<u8> = (0..254).collect();
    tables(&Platform {
        cpu_ids: &apic_ids,
        slots: &slots,
        serial: true,
        vmgenid: Some(GuestAddress(0)),
    });
}

#[test]
fn more_devices_than_fit_are_an_error() {
    let slots = vec![SLOTS[0]; 2000];
    let platform = Platform { slots: &slots, ..PLATFORM };
    let error = write(&memory(16 << 20), &platform).unwrap_err();
    assert!(error.to_string().contains("there is room for 65536"), "{error}");
}
