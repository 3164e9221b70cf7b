//! ELF kernels, valid and hostile.
use config::BootConfig;
use vm_memory::{Bytes, GuestAddress};

use super::super::tests::{MIB, PLATFORM, config, file, memory, read, refusal, zero_page};
use crate::arch::layout;
use crate::boot::{self, Protocol};

/// A note: name with terminator, type, description.
fn note(name: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend((name.len() as u32).to_le_bytes());
    bytes.extend((desc.len() as u32).to_le_bytes());
    bytes.extend(kind.to_le_bytes());
    for part in [name, desc] {
        bytes.extend(part);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

pub(in crate::arch::x86_64::boot) fn linux_note() -> Vec<u8> {
    note(b"Linux\0", 0x100, &[0; 4])
}

pub(in crate::arch::x86_64::boot) fn pvh_note(entry: u64) -> Vec<u8> {
    note(b"Xen\0", 18, &entry.to_le_bytes())
}

/// A program header in either width.
#[derive(Clone, Copy)]
pub(in crate::arch::x86_64::boot) struct Header {
    kind: u32,
    offset: u64,
    virt: u64,
    phys: u64,
    file_size: u64,
    mem_size: u64,
}

pub(in crate::arch::x86_64::boot) const LOAD_AT: u64 = 0x20_0000;
const CODE_AT: u64 = 0x1000;

/// One segment of code at 2 MiB, twice as big in memory.
fn code_header() -> Header {
    Header {
        kind: 1,
        offset: CODE_AT,
        virt: 0xffff_ffff_8020_0000,
        phys: LOAD_AT,
        file_size: 0x1000,
        mem_size: 0x2000,
    }
}

/// A segment that consists of this code.
pub(in crate::arch::x86_64::boot) fn segment_of(code: &[u8]) -> Header {
    let size = code.len() as u64;
    Header { file_size: size, mem_size: size, ..code_header() }
}

/// An ELF file of these headers; code at 0x1000, notes at 0x800.
pub(in crate::arch::x86_64::boot) fn elf_of(
    wide: bool,
    entry: u64,
    headers: &[Header],
    notes: &[u8],
    code: &[u8],
) -> Vec<u8> {
    let mut bytes = vec![0x7f, b'E', b'L', b'F', 1 + u8::from(wide), 1, 1];
    bytes.resize(16, 0);
    bytes.extend(2_u16.to_le_bytes());
    bytes.extend(if wide { 62_u16 } else { 3 }.to_le_bytes());
    bytes.extend(1_u32.to_le_bytes());
    let number = |bytes: &mut Vec<u8>, value: u64| {
        bytes.extend(&value.to_le_bytes()[..if wide { 8 } else { 4 }]);
    };
    number(&mut bytes, entry);
    let size: u16 = if wide { 56 } else { 32 };
    number(&mut bytes, if wide { 64 } else { 52 });
    number(&mut bytes, 0);
    bytes.extend([0; 6]);
    bytes.extend(size.to_le_bytes());
    bytes.extend((headers.len() as u16).to_le_bytes());
    bytes.extend([0; 6]);
    for header in headers {
        let Header { kind, offset, virt, phys, file_size, mem_size } = *header;
        bytes.extend(kind.to_le_bytes());
        if wide {
            bytes.extend([0; 4]);
        }
        for value in [offset, virt, phys, file_size, mem_size] {
            number(&mut bytes, value);
        }
        if !wide {
            bytes.extend([0; 4]);
        }
        number(&mut bytes, 4);
    }
    assert!(bytes.len() <= 0x800);
    bytes.resize(0x800, 0);
    bytes.extend(notes);
    bytes.resize(bytes.len().max(CODE_AT as usize), 0);
    bytes.extend(code);
    bytes
}

pub(in crate::arch::x86_64::boot) fn elf(wide: bool, entry: u64, notes: &[u8]) -> Vec<u8> {
    let note = Header { kind: 4, offset: 0x800, file_size: notes.len() as u64, ..code_header() };
    let headers = [code_header(), note];
    elf_of(wide, entry, &headers[..if notes.is_empty() { 1 } else { 2 }], notes, &[0x90; 0x1000])
}

#[test]
fn a_linux_elf_is_entered_in_64_bit_mode_even_if_it_has_pvh() {
    let notes = [pvh_note(LOAD_AT), linux_note()].concat();
    let kernel = file(&elf(true, LOAD_AT + 0x123, &notes));
    let memory = memory(64 * MIB);
    let entry = boot::load(&memory, &config(&kernel), &PLATFORM).unwrap();
    assert_eq!(entry.protocol, Protocol::Linux64);
    let r = entry.registers;
    assert_eq!((r.rip, r.rsi, r.rsp), (LOAD_AT + 0x123, layout::ZERO_PAGE, layout::BOOT_STACK));
    assert_eq!((r.cr0, r.cr4, r.efer, r.rflags), (0x8000_0011, 0x20, 0x500, 2));
    assert_eq!((r.cs.selector, r.cs.l, r.cs.db), (0x10, 1, 0));
    assert_eq!(read(&memory, LOAD_AT, 0x1000), [0x90; 0x1000]);
    assert_eq!(read(&memory, LOAD_AT + 0x1000, 0x1000), [0; 0x1000]);

    let params = zero_page(&memory);
    let (magic, flag, line) = (params.hdr.header, params.hdr.boot_flag, params.hdr.cmd_line_ptr);
    assert_eq!((magic, flag, u64::from(line)), (0x5372_6448, 0xaa55, layout::CMDLINE));
    let rsdp = params.acpi_rsdp_addr;
    assert_eq!(rsdp, layout::BIOS_AREA);
    assert_eq!(read(&memory, layout::CMDLINE, 22), b"console=ttyS0 pci=off\0");
    assert!(entry.acpi);
}

#[test]
fn the_boot_page_tables_map_the_first_4_gib_onto_themselves() {
    let kernel = file(&elf(true, LOAD_AT, &[]));
    let memory = memory(64 * MIB);
    let cr3 = boot::load(&memory, &config(&kernel), &PLATFORM).unwrap().registers.cr3;
    let entry = |table: u64, index: u64| -> u64 {
        let word: u64 = memory.read_obj(GuestAddress(table + index * 8)).unwrap();
        assert_eq!(word & 1, 1, "present");
        word
    };
    for address in [0, 0x7000, LOAD_AT + 5, 0xbfff_ffff, 0xfee0_0000, 0xffff_ffff_u64] {
        let pdpt = entry(cr3, address >> 39) & !0xfff;
        let directory = entry(pdpt, address >> 30) & !0xfff;
        let page = entry(directory, address >> 21 & 0x1ff);
        assert_eq!(page & 0x80, 0x80, "2 MiB page");
        assert_eq!((page & !0x1f_ffff) | (address & 0x1f_ffff), address);
    }
}

#[test]
fn the_gdt_holds_what_the_segment_registers_say() {
    let kernel = file(&elf(true, LOAD_AT, &[]));
    let memory = memory(64 * MIB);
    let r = boot::load(&memory, &config(&kernel), &PLATFORM).unwrap().registers;
    let descriptor = |selector: u16| -> u64 {
        assert!(selector + 7 <= r.gdt_limit);
        memory.read_obj(GuestAddress(r.gdt_base + u64::from(selector))).unwrap()
    };
    assert_eq!(descriptor(r.cs.selector), 0x00af_9b00_0000_ffff);
    assert_eq!(descriptor(r.data.selector), 0x00cf_9300_0000_ffff);
    assert_eq!(descriptor(r.tr.selector), 0x0000_8b00_0000_0067);
}

#[test]
fn an_elf_with_only_a_pvh_entry_is_entered_by_it_in_either_width() {
    for wide in [true, false] {
        for entry_note in [pvh_note(LOAD_AT + 8), note(b"Xen\0", 18, &0x20_0008_u32.to_le_bytes())]
        {
            let notes = [note(b"GNU\0", 3, &[7; 20]), entry_note].concat();
            let kernel = file(&elf(wide, LOAD_AT, &notes));
            let memory = memory(64 * MIB);
            let entry = boot::load(&memory, &config(&kernel), &PLATFORM).unwrap();
            assert_eq!(entry.protocol, Protocol::Pvh);
            let r = entry.registers;
            assert_eq!((r.rip, r.rbx), (LOAD_AT + 8, layout::PVH_START_INFO));
            assert_eq!((r.cr0, r.cr4, r.efer, r.cs.l, r.cs.db), (0x11, 0, 0, 0, 1));
            let info: linux_loader::start_info::hvm_start_info =
                memory.read_obj(GuestAddress(layout::PVH_START_INFO)).unwrap();
            assert_eq!((info.magic, info.version), (0x336e_c578, 1));
            assert_eq!((info.cmdline_paddr, info.rsdp_paddr), (layout::CMDLINE, layout::BIOS_AREA));
            assert_eq!(info.nr_modules, 0);
        }
    }
}

#[test]
fn pvh_gets_all_ram_and_the_initrd() {
    let kernel = file(&elf(true, LOAD_AT, &pvh_note(LOAD_AT)));
    let initrd = file(&[7; 5000]);
    let config = BootConfig { initrd: Some(initrd.as_path().to_owned()), ..config(&kernel) };
    let memory = memory(64 * MIB);
    boot::load(&memory, &config, &PLATFORM).unwrap();
    let info: linux_loader::start_info::hvm_start_info =
        memory.read_obj(GuestAddress(layout::PVH_START_INFO)).unwrap();
    assert_eq!(info.nr_modules, 1);
    let module: linux_loader::start_info::hvm_modlist_entry =
        memory.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
    assert_eq!((module.paddr, module.size), (64 * MIB - 0x2000, 5000));
    let map: Vec<(u64, u64, u32)> = (0..info.memmap_entries)
        .map(|i| {
            let entry: linux_loader::start_info::hvm_memmap_table_entry =
                memory.read_obj(GuestAddress(info.memmap_paddr + u64::from(i) * 24)).unwrap();
            (entry.addr, entry.size, entry.type_)
        })
        .collect();
    assert_eq!(
        map,
        [
            (0, 0x9_fc00, 1),
            (0x9_fc00, 0x6_0400, 2),
            (0x10_0000, 63 * MIB, 1),
            (layout::KVM_IDENTITY, 0x4000, 2)
        ]
    );
}

#[test]
fn an_elf_without_notes_is_entered_at_its_64_bit_entry_virtual_or_physical() {
    for entry in [LOAD_AT + 16, 0xffff_ffff_8020_0010] {
        let kernel = file(&elf(true, entry, &[]));
        let entry = boot::load(&memory(64 * MIB), &config(&kernel), &PLATFORM).unwrap();
        assert_eq!((entry.protocol, entry.registers.rip), (Protocol::Linux64, LOAD_AT + 16));
    }
    // Older Linux, before it had notes of its own, identifies itself in Xen's.
    let notes = [note(b"Xen\0", 6, b"linux\0"), pvh_note(LOAD_AT)].concat();
    let kernel = file(&elf(true, LOAD_AT, &notes));
    let entry = boot::load(&memory(64 * MIB), &config(&kernel), &PLATFORM).unwrap();
    assert_eq!(entry.protocol, Protocol::Linux64);
}

#[test]
fn an_elf_with_false_fields_is_refused_and_they_are_named() {
    let with = |offset: usize, bytes: &[u8]| {
        let mut kernel = elf(true, LOAD_AT, &linux_note());
        kernel[offset..offset + bytes.len()].copy_from_slice(bytes);
        refusal(&kernel)
    };
    let header = |change: fn(&mut Header)| {
        let mut header = code_header();
        change(&mut header);
        refusal(&elf_of(true, LOAD_AT, &[header], &[], &[0x90; 0x1000]))
    };
    let says = |text: String, what: &str| assert!(text.contains(what), "{what:?} not in {text:?}");

    says(refusal(b"\x7fELF"), "truncated ELF file: the ELF header ends at byte 64, the file at 4");
    says(refusal(&elf(true, LOAD_AT, &[])[..60]), "truncated ELF file");
    says(refusal(&elf(true, LOAD_AT, &[])[..100]), "the program header table ends at byte 120");
    says(
        refusal(&elf(true, LOAD_AT, &[])[..0x1fff]),
        "its segment 0 ends at byte 8192, the file at 8191",
    );
    says(refusal(&elf(false, LOAD_AT, &[])), "a 32-bit ELF file without a PVH entry");
    says(with(4, &[9]), "class 9");
    says(with(5, &[2]), "a big-endian ELF file");
    says(with(16, &[1]), "an object file or kernel module");
    says(with(16, &[4]), "a core dump");
    says(with(18, &[183]), "an aarch64 ELF file, not an x86-64 kernel");
    says(with(18, &[8]), "machine type 8");
    says(with(24, &[0; 8]), "its entry point is in none of its segments");
    says(with(32, &[0xff; 8]), "the program header table ends at byte 18446744073709551615");
    says(with(54, &[55]), "program headers have 55 bytes each, not 56");
    says(with(56, &[0, 0]), "no segments to load");
    says(with(56, &[0xff, 0xff]), "65535 program headers, more than 128");
    says(with(64, &[2]), "no segments to load");
    says(with(64, &[3]), "a program for Linux's user space");

    says(header(|h| h.file_size = 0x3000), "its segment 0 ends at byte 16384");
    says(header(|h| h.mem_size = 0x800), "more bytes in the file than in memory");
    says(header(|h| h.offset = u64::MAX), "its segment 0 ends at byte 18446744073709551615");
    says(
        header(|h| h.phys = 0x8000),
        "needs 0x8000 to 0xa000, but the RAM for kernels is 0x100000 to 0x4000000: link it at 1 \
         MiB or above",
    );
    says(header(|h| h.phys = u64::MAX - 4), "needs 0xfffffffffffffffb to 0xffffffffffffffff");
    says(header(|h| h.phys = 64 * MIB - 0x1000), "give the machine more memory (-m)");
    says(header(|h| h.mem_size = u64::MAX), "its segment 0 needs 0x200000 to 0xffffffffffffffff");
    let overlap = [code_header(), Header { phys: LOAD_AT + 0x1fff, ..code_header() }];
    says(
        refusal(&elf_of(true, LOAD_AT, &overlap, &[], &[0; 0x1000])),
        "segments overlap at 0x201fff",
    );
}

#[test]
fn notes_that_lie_are_refused_and_never_loop() {
    let says = |notes: &[u8], what: &str| {
        let text = refusal(&elf(true, LOAD_AT, notes));
        assert!(text.contains(what), "{what:?} not in {text:?}");
    };
    let raw = |name: u32, desc: u32| {
        [&name.to_le_bytes()[..], &desc.to_le_bytes(), &18_u32.to_le_bytes(), b"Xen\0"].concat()
    };
    says(&raw(4, u32::MAX), "a note of 4 + 4294967295 bytes does not fit into the 16 bytes");
    says(&raw(u32::MAX, 0), "a note of 4294967295 + 0 bytes");
    says(&raw(u32::MAX, u32::MAX), "does not fit");
    says(&raw(u32::MAX - 11, 0), "does not fit");
    says(&note(b"Xen\0", 18, &[1, 2]), "its PVH note has 2 bytes, not 4 or 8");
    says(&note(b"Xen\0", 18, &[0; 12]), "its PVH note has 12 bytes");
    says(&pvh_note(1 << 32), "its PVH entry point 0x100000000 is above 4 GiB");
    says(&pvh_note(0x10), "its entry point is in none of its segments");
    // Only zeros: notes without name and description, one after another. They have no effect.
    let kernel = file(&elf(true, LOAD_AT, &[0; 1200]));
    assert!(boot::load(&memory(64 * MIB), &config(&kernel), &PLATFORM).is_ok());
    // A segment that claims more than the file has, and more than is read.
    let note = Header { kind: 4, offset: 0x800, file_size: 0x1_0000, ..code_header() };
    let text = refusal(&elf_of(true, LOAD_AT, &[code_header(), note], &[], &[0; 0x1000]));
    assert!(text.contains("its note segment ends at byte 67584"), "{text}");
    let note = Header { file_size: u64::MAX, ..note };
    let text = refusal(&elf_of(true, LOAD_AT, &[code_header(), note], &[], &[0; 0x1000]));
    assert!(text.contains("its notes have 18446744073709551615 bytes"), "{text}");
}

#[test]
fn any_byte_of_the_headers_and_notes_may_be_wrong() {
    let notes = [linux_note(), pvh_note(LOAD_AT)].concat();
    let memory = memory(16 * MIB);
    for wide in [true, false] {
        let honest = elf(wide, LOAD_AT, &notes);
        for offset in (0..64 + 2 * 56).chain(0x800..0x800 + notes.len()) {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut kernel = honest.clone();
                kernel[offset] = value;
                // It is loaded or refused, and never does harm.
                if let Ok(entry) = boot::load(&memory, &config(&file(&kernel)), &PLATFORM) {
                    let rip = entry.registers.rip;
                    assert!((MIB..32 * MIB).contains(&rip), "{offset:#x} {value:#x}");
                }
            }
        }
    }
}
