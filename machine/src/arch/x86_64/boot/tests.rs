//! What all kernel formats have in common: initrd, memory map, command line, layout. The tests of
//! the formats provide the kernels.
use std::fmt::Write as _;
use std::io::Write as _;

use devices::Memory;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::tempfile::TempFile;

use super::bzimage::tests::{bzimage, changed};
use super::elf::tests::{LOAD_AT, elf, elf_of, linux_note, pvh_note, segment_of};
use super::*;
use crate::arch::layout;

pub(super) const MIB: u64 = 1 << 20;
pub(super) const SLOTS: [VirtioSlot; 2] =
    [VirtioSlot { address: 0xf010_0000, irq: 5 }, VirtioSlot { address: 0xf010_1000, irq: 6 }];
pub(super) const PLATFORM: Platform =
    Platform { cpu_ids: &[0, 1], slots: &SLOTS, serial: true, vmgenid: None };

/// RAM from 0, with the hole if it is that big.
pub(super) fn memory(size: u64) -> Memory {
    let low = size.min(layout::HOLE_START);
    let mut ranges = vec![(GuestAddress(0), low as usize)];
    if size > low {
        ranges.push((GuestAddress(layout::HOLE_END), (size - low) as usize));
    }
    Memory::from_ranges(&ranges).unwrap()
}

pub(super) fn file(bytes: &[u8]) -> TempFile {
    let file = TempFile::new().unwrap();
    file.as_file().write_all(bytes).unwrap();
    file
}

pub(super) fn config(kernel: &TempFile) -> BootConfig {
    BootConfig {
        kernel: kernel.as_path().to_owned(),
        initrd: None,
        cmdline: "console=ttyS0".to_owned(),
    }
}

/// The whole chain of an error, in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        write!(text, ": {error}").unwrap();
        next = error.source();
    }
    text
}

pub(super) fn refusal(kernel: &[u8]) -> String {
    let kernel = file(kernel);
    chain(&load(&memory(64 * MIB), &config(&kernel), &PLATFORM).unwrap_err())
}

pub(super) fn read(memory: &Memory, address: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

pub(super) fn zero_page(memory: &Memory) -> linux_loader::loader::bootparam::boot_params {
    memory.read_obj(GuestAddress(layout::ZERO_PAGE)).unwrap()
}

fn with_initrd(size: u64, ram: u64, kernel: &[u8]) -> (Memory, Result<Entry, BootError>) {
    let kernel = file(kernel);
    let initrd = TempFile::new().unwrap();
    initrd.as_file().set_len(size).unwrap();
    let config = BootConfig { initrd: Some(initrd.as_path().to_owned()), ..config(&kernel) };
    let memory = memory(ram);
    let result = load(&memory, &config, &PLATFORM);
    (memory, result)
}

#[test]
fn an_initrd_lies_at_the_top_of_the_ram_that_the_kernel_can_reach() {
    let cases = [
        (64 * MIB, 64 * MIB),
        // Above 2 GiB this kernel cannot reach, and it cannot use RAM above 4 GiB at all.
        (5 << 30, 0x8000_0000),
    ];
    for (ram, top) in cases {
        let (memory, result) = with_initrd(4097, ram, &bzimage());
        result.unwrap();
        let params = zero_page(&memory);
        let (image, size) = (params.hdr.ramdisk_image, params.hdr.ramdisk_size);
        assert_eq!((u64::from(image), size), (top - 0x2000, 4097));
    }
}

#[test]
fn an_initrd_may_touch_the_kernel_but_not_overlap_it() {
    // 64 MiB of RAM, kernel with its init_size from 16 to 24 MiB: 40 MiB are left.
    let (memory, result) = with_initrd(40 * MIB, 64 * MIB, &bzimage());
    result.unwrap();
    let image = zero_page(&memory).hdr.ramdisk_image;
    assert_eq!(u64::from(image), 24 * MIB);
    for size in [40 * MIB + 1, 64 * MIB, 10 << 30] {
        let (_, result) = with_initrd(size, 64 * MIB, &bzimage());
        let text = chain(&result.unwrap_err());
        assert!(text.contains("cannot load the initrd /"), "{text}");
        assert!(text.contains(&format!("it has {size} bytes")), "{text}");
        assert!(text.contains("there are 41943040: give the machine more memory (-m)"), "{text}");
    }
}

#[test]
fn an_empty_initrd_is_refused() {
    let (_, result) = with_initrd(0, 64 * MIB, &bzimage());
    let text = chain(&result.unwrap_err());
    assert!(text.contains("it is empty; leave -initrd out"), "{text}");
}

#[test]
fn a_hostile_limit_for_the_initrd_leaves_no_room() {
    let mut kernel = bzimage();
    kernel[0x22c..0x230].copy_from_slice(&[0; 4]);
    let (_, result) = with_initrd(4096, 64 * MIB, &kernel);
    assert!(chain(&result.unwrap_err()).contains("there are 0"));
}

#[test]
fn the_memory_map_shows_ram_on_both_sides_of_the_hole() {
    let kernel = file(&bzimage());
    let memory = memory(5 << 30);
    load(&memory, &config(&kernel), &PLATFORM).unwrap();
    let params = zero_page(&memory);
    let table = params.e820_table;
    let map: Vec<(u64, u64, u32)> = table[..usize::from(params.e820_entries)]
        .iter()
        .map(|entry| (entry.addr, entry.size, entry.r#type))
        .collect();
    assert_eq!(
        map,
        [
            (0, 0x9_fc00, 1),
            (0x9_fc00, 0x6_0400, 2),
            (0x10_0000, 0xbff0_0000, 1),
            (layout::KVM_IDENTITY, 0x4000, 2),
            (1 << 32, 2 << 30, 1),
        ]
    );
}

#[test]
fn acpi_off_means_no_acpi_tables_at_all() {
    let kernel = file(&bzimage());
    let config = BootConfig { cmdline: "quiet acpi=off -- -x".into(), ..config(&kernel) };
    let memory = memory(64 * MIB);
    let entry = load(&memory, &config, &PLATFORM).unwrap();
    assert!(!entry.acpi);
    let devices = "virtio_mmio.device=4K@0xf0100000:5 virtio_mmio.device=4K@0xf0101000:6";
    assert_eq!(entry.cmdline, format!("quiet acpi=off {devices} pci=off -- -x"));
    let rsdp = zero_page(&memory).acpi_rsdp_addr;
    assert_eq!(rsdp, 0);
    let tables = (layout::MP_TABLE - layout::BIOS_AREA) as usize;
    assert_eq!(read(&memory, layout::BIOS_AREA, tables), vec![0; tables]);
    assert_eq!(read(&memory, layout::MP_TABLE, 4), b"_MP_");
}

#[test]
fn a_kernel_without_acpi_gets_its_devices_on_the_command_line() {
    let acpi_in = |words: &[&[u8]]| {
        let mut code = vec![0x90; 0x2_0000];
        for (number, word) in words.iter().enumerate() {
            // Across the boundary of a search block.
            let at = 0x1_0000 - 3 + number * 100;
            code[at..at + word.len()].copy_from_slice(word);
        }
        let kernel = file(&elf_of(true, LOAD_AT, &[segment_of(&code)], &[], &code));
        load(&memory(64 * MIB), &config(&kernel), &PLATFORM).unwrap().acpi
    };
    assert!(!acpi_in(&[b"virtio_mmio.device\0"]));
    assert!(acpi_in(&[b"RSD PTR ", b"virtio_mmio.device\0"]));
    assert!(acpi_in(&[]), "neither: no Linux, whose command line is its own");
}

#[test]
fn a_command_line_is_as_long_as_the_kernel_allows() {
    let line = |len: usize, kernel: &[u8]| {
        let kernel = file(kernel);
        let config = BootConfig { cmdline: "x".repeat(len), ..config(&kernel) };
        load(&memory(64 * MIB), &config, &PLATFORM).map(|_| ()).map_err(|error| chain(&error))
    };
    assert_eq!(line(2047, &bzimage()), Ok(()));
    let text = line(2048, &bzimage()).unwrap_err();
    assert!(text.ends_with("it has 2048 bytes; the kernel takes at most 2047"), "{text}");
    assert_eq!(line(255, &changed(0x238, &[255, 0, 0, 0])), Ok(()));
    assert!(line(256, &changed(0x238, &[255, 0, 0, 0])).is_err());
    // A hostile limit does not exceed the area.
    let most = layout::CMDLINE_MAX - 1;
    assert_eq!(line(most, &changed(0x238, &[0xff; 4])), Ok(()));
    assert!(line(most + 1, &changed(0x238, &[0xff; 4])).is_err());
    assert_eq!(line(most, &elf(true, LOAD_AT, &pvh_note(LOAD_AT))), Ok(()));
}

#[test]
fn nothing_in_the_first_megabyte_lies_on_anything_else() {
    let mut areas = vec![
        ("real-mode vectors and BIOS data", 0, 0x500),
        ("GDT", layout::BOOT_GDT, 48),
        ("start info", layout::PVH_START_INFO, 56),
        ("module list", layout::PVH_MODULES, 32),
        ("memory map", layout::PVH_MEMORY_MAP, layout::ZERO_PAGE - layout::PVH_MEMORY_MAP),
        ("zero page", layout::ZERO_PAGE, 4096),
        ("stack", 0x8000, layout::BOOT_STACK - 0x8000),
        ("page tables", layout::BOOT_PML4, 6 * 4096),
        ("command line", layout::CMDLINE, layout::CMDLINE_MAX as u64),
        ("EBDA", layout::EBDA, 0x400),
        ("ACPI tables", layout::BIOS_AREA, layout::MP_TABLE - layout::BIOS_AREA),
        ("MP table", layout::MP_TABLE, layout::HIGH_RAM - layout::MP_TABLE),
        ("kernel", layout::HIGH_RAM, 0),
    ];
    areas.sort_by_key(|(_, start, _)| *start);
    for pair in areas.windows(2) {
        let ((a, start, len), (b, next, _)) = (pair[0], pair[1]);
        assert!(start + len <= next, "{a} reaches into {b}");
    }
    // Room for any machine's memory map: two pieces of RAM, five entries.
    const { assert!((layout::ZERO_PAGE - layout::PVH_MEMORY_MAP) / 24 > 100) };
}

#[test]
fn nothing_in_the_hole_lies_on_anything_else() {
    let slots = layout::VIRTIO_IRQS.len() as u64;
    let mut areas = [
        ("RAM", 0, layout::HOLE_START),
        ("virtio-mmio", layout::VIRTIO_MMIO, slots * layout::VIRTIO_MMIO_STEP),
        ("IOAPIC", layout::IOAPIC, 0x1000),
        ("LAPIC", layout::LAPIC, 0x1000),
        ("identity map", layout::KVM_IDENTITY, 0x1000),
        ("TSS", layout::KVM_TSS, 0x3000),
        ("RAM above", layout::HOLE_END, 0),
    ];
    areas.sort_by_key(|(_, start, _)| *start);
    for pair in areas.windows(2) {
        let ((a, start, len), (b, next, _)) = (pair[0], pair[1]);
        assert!(start + len <= next, "{a} reaches into {b}");
    }
}

#[test]
fn no_interrupt_and_no_port_is_given_twice() {
    let mut irqs = layout::VIRTIO_IRQS.to_vec();
    irqs.extend([0, 2, 8, layout::GED_IRQ, layout::KEYBOARD_IRQ, layout::SERIAL_IRQ]);
    irqs.sort_unstable();
    let given = irqs.len();
    irqs.dedup();
    assert_eq!(irqs.len(), given);
    assert!(irqs.iter().all(|irq| *irq < layout::IOAPIC_PINS));

    let mut ports = [
        (layout::SERIAL_PORT, 8),
        (layout::I8042_PORT, 5),
        (layout::CMOS_PORT, 2),
        (layout::PVPANIC_PORT, 1),
        (layout::ACPI_POWER_PORT, 4),
    ];
    ports.sort_unstable();
    for pair in ports.windows(2) {
        assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
    }
}

/// `STRATOVIRT_GUEST_KERNEL` may name a kernel to use instead of the generated one.
#[test]
fn a_linux_kernel_lies_at_its_entry_when_it_is_loaded() {
    let made = file(&elf(true, LOAD_AT, &linux_note()));
    let given = std::env::var_os("STRATOVIRT_GUEST_KERNEL");
    let kernel = given.map_or_else(|| made.as_path().to_owned(), Into::into);
    let config = BootConfig { kernel, initrd: None, cmdline: "console=ttyS0".to_owned() };
    let memory = memory(256 * MIB);
    let entry = load(&memory, &config, &PLATFORM).unwrap();
    assert_eq!(entry.protocol, Protocol::Linux64);
    assert_ne!(read(&memory, entry.registers.rip, 16), [0; 16]);
    assert_eq!(read(&memory, layout::CMDLINE, 22), b"console=ttyS0 pci=off\0");
}
