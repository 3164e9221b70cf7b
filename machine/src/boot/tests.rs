//! Kernels made here, honest and hostile, put into real guest memory.
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

use devices::Memory;
use vm_memory::{ByteValued, Bytes, GuestAddress};
use vmm_sys_util::tempfile::TempFile;

use super::*;
use crate::layout;

const MIB: u64 = 1 << 20;
pub(super) const SLOTS: [VirtioSlot; 2] =
    [VirtioSlot { address: 0xf010_0000, irq: 5 }, VirtioSlot { address: 0xf010_1000, irq: 6 }];
pub(super) const PLATFORM: Platform =
    Platform { cpus: 2, slots: &SLOTS, serial: true, vmgenid: None };

/// RAM from 0, with the hole if it is that big.
pub(super) fn memory(size: u64) -> Memory {
    let low = size.min(layout::HOLE_START);
    let mut ranges = vec![(GuestAddress(0), low as usize)];
    if size > low {
        ranges.push((GuestAddress(layout::HOLE_END), (size - low) as usize));
    }
    Memory::from_ranges(&ranges).unwrap()
}

fn file(bytes: &[u8]) -> TempFile {
    let file = TempFile::new().unwrap();
    file.as_file().write_all(bytes).unwrap();
    file
}

fn config(kernel: &TempFile) -> BootConfig {
    BootConfig {
        kernel: kernel.as_path().to_owned(),
        initrd: None,
        cmdline: "console=ttyS0".to_owned(),
    }
}

/// The whole chain of an error, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        write!(text, ": {error}").unwrap();
        next = error.source();
    }
    text
}

fn refusal(kernel: &[u8]) -> String {
    let kernel = file(kernel);
    chain(&load(&memory(64 * MIB), &config(&kernel), &PLATFORM).unwrap_err())
}

fn read(memory: &Memory, address: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

fn zero_page(memory: &Memory) -> linux_loader::loader::bootparam::boot_params {
    memory.read_obj(GuestAddress(layout::ZERO_PAGE)).unwrap()
}

// --- ELF -----------------------------------------------------------------------------------------

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

fn linux_note() -> Vec<u8> {
    note(b"Linux\0", 0x100, &[0; 4])
}

fn pvh_note(entry: u64) -> Vec<u8> {
    note(b"Xen\0", 18, &entry.to_le_bytes())
}

/// A program header in either width.
#[derive(Clone, Copy)]
struct Header {
    kind: u32,
    offset: u64,
    virt: u64,
    phys: u64,
    file_size: u64,
    mem_size: u64,
}

const LOAD_AT: u64 = 0x20_0000;
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

/// An ELF file of these headers; code at 0x1000, notes at 0x800.
fn elf_of(wide: bool, entry: u64, headers: &[Header], notes: &[u8], code: &[u8]) -> Vec<u8> {
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

fn elf(wide: bool, entry: u64, notes: &[u8]) -> Vec<u8> {
    let note = Header { kind: 4, offset: 0x800, file_size: notes.len() as u64, ..code_header() };
    let headers = [code_header(), note];
    elf_of(wide, entry, &headers[..if notes.is_empty() { 1 } else { 2 }], notes, &[0x90; 0x1000])
}

#[test]
fn a_linux_elf_is_entered_in_64_bit_mode_even_if_it_has_pvh() {
    let notes = [pvh_note(LOAD_AT), linux_note()].concat();
    let kernel = file(&elf(true, LOAD_AT + 0x123, &notes));
    let memory = memory(64 * MIB);
    let entry = load(&memory, &config(&kernel), &PLATFORM).unwrap();
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
    assert_eq!(read(&memory, layout::CMDLINE, 14), b"console=ttyS0\0");
    assert!(entry.acpi);
}

#[test]
fn the_boot_page_tables_map_the_first_4_gib_onto_themselves() {
    let kernel = file(&elf(true, LOAD_AT, &[]));
    let memory = memory(64 * MIB);
    let cr3 = load(&memory, &config(&kernel), &PLATFORM).unwrap().registers.cr3;
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
    let r = load(&memory, &config(&kernel), &PLATFORM).unwrap().registers;
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
            let entry = load(&memory, &config(&kernel), &PLATFORM).unwrap();
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
fn pvh_is_told_of_all_ram_and_of_the_initrd() {
    let kernel = file(&elf(true, LOAD_AT, &pvh_note(LOAD_AT)));
    let initrd = file(&[7; 5000]);
    let config = BootConfig { initrd: Some(initrd.as_path().to_owned()), ..config(&kernel) };
    let memory = memory(64 * MIB);
    load(&memory, &config, &PLATFORM).unwrap();
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
        let entry = load(&memory(64 * MIB), &config(&kernel), &PLATFORM).unwrap();
        assert_eq!((entry.protocol, entry.registers.rip), (Protocol::Linux64, LOAD_AT + 16));
    }
    // Linux of the time before its own notes says so in Xen's.
    let notes = [note(b"Xen\0", 6, b"linux\0"), pvh_note(LOAD_AT)].concat();
    let kernel = file(&elf(true, LOAD_AT, &notes));
    let entry = load(&memory(64 * MIB), &config(&kernel), &PLATFORM).unwrap();
    assert_eq!(entry.protocol, Protocol::Linux64);
}

#[test]
fn an_elf_that_lies_is_refused_with_the_lie() {
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
        "wants 0x8000 to 0xa000, but the RAM a kernel can use is 0x100000 to 0x4000000: link it at 1 MiB or above",
    );
    says(header(|h| h.phys = u64::MAX - 4), "wants 0xfffffffffffffffb to 0xffffffffffffffff");
    says(header(|h| h.phys = 64 * MIB - 0x1000), "give the machine more memory (-m)");
    says(header(|h| h.mem_size = u64::MAX), "its segment 0 wants 0x200000 to 0xffffffffffffffff");
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
    // Only zeros: notes without name and description, one after the other. They say nothing.
    let kernel = file(&elf(true, LOAD_AT, &[0; 1200]));
    assert!(load(&memory(64 * MIB), &config(&kernel), &PLATFORM).is_ok());
    // A segment that claims more than there is, and more than is looked at.
    let note = Header { kind: 4, offset: 0x800, file_size: 0x1_0000, ..code_header() };
    let text = refusal(&elf_of(true, LOAD_AT, &[code_header(), note], &[], &[0; 0x1000]));
    assert!(text.contains("its note segment ends at byte 67584"), "{text}");
    let note = Header { file_size: u64::MAX, ..note };
    let text = refusal(&elf_of(true, LOAD_AT, &[code_header(), note], &[], &[0; 0x1000]));
    assert!(text.contains("its notes have 18446744073709551615 bytes"), "{text}");
}

// --- bzImage -------------------------------------------------------------------------------------

const SETUP: usize = 5 * 512;
const CODE_SIZE: usize = 0x8000;

/// A 64-bit bzImage; `setup_sects` 4, code full of 0xf4.
fn bzimage() -> Vec<u8> {
    let mut bytes = vec![0; SETUP];
    bytes.resize(SETUP + CODE_SIZE, 0xf4);
    let mut put = |offset: usize, value: &[u8]| {
        bytes[offset..offset + value.len()].copy_from_slice(value);
    };
    put(0x1f1, &[4]);
    put(0x1f4, &((CODE_SIZE / 16) as u32).to_le_bytes());
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &0x20f_u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x234, &[1, 0, 0x3f, 0]);
    put(0x238, &2047_u32.to_le_bytes());
    put(0x248, &0x100_u32.to_le_bytes());
    put(0x24c, &0x1000_u32.to_le_bytes());
    put(0x258, &(16 * MIB).to_le_bytes());
    put(0x260, &(8 * MIB as u32).to_le_bytes());
    bytes
}

fn changed(offset: usize, value: &[u8]) -> Vec<u8> {
    let mut bytes = bzimage();
    bytes[offset..offset + value.len()].copy_from_slice(value);
    bytes
}

#[test]
fn a_bzimage_is_loaded_where_it_wants_to_be_and_entered_at_0x200() {
    let kernel = file(&bzimage());
    let memory = memory(64 * MIB);
    let entry = load(&memory, &config(&kernel), &PLATFORM).unwrap();
    assert_eq!((entry.protocol, entry.registers.rip), (Protocol::Linux64, 16 * MIB + 0x200));
    assert_eq!(read(&memory, 16 * MIB, CODE_SIZE), [0xf4; CODE_SIZE]);
    assert_eq!(read(&memory, 16 * MIB + CODE_SIZE as u64, 4096), [0; 4096]);
    // The header is the kernel's own, with the loader's answers in it.
    let params = zero_page(&memory);
    let (version, size, loader) =
        (params.hdr.version, params.hdr.init_size, params.hdr.type_of_loader);
    assert_eq!((version, u64::from(size), loader), (0x20f, 8 * MIB, 0xff));
    let line = params.hdr.cmd_line_ptr;
    assert_eq!(u64::from(line), layout::CMDLINE);
}

#[test]
fn a_bzimage_may_have_odd_but_true_fields() {
    let loads = |bytes: &[u8]| {
        let kernel = file(bytes);
        load(&memory(64 * MIB), &config(&kernel), &PLATFORM).map(|entry| entry.registers.rip)
    };
    // 0 setup sectors mean 4.
    assert_eq!(loads(&changed(0x1f1, &[0])).unwrap(), 16 * MIB + 0x200);
    // 255 are all there.
    let mut long = changed(0x1f1, &[255]);
    long.splice(SETUP..SETUP, vec![0; 251 * 512]);
    assert_eq!(loads(&long).unwrap(), 16 * MIB + 0x200);
    // A signature behind the code; the last paragraph cut.
    assert!(loads(&[bzimage(), vec![1; 1500]].concat()).is_ok());
    assert!(loads(&bzimage()[..SETUP + CODE_SIZE - 15]).is_ok());
}

#[test]
fn a_bzimage_that_lies_is_refused_with_the_lie() {
    let says = |kernel: &[u8], what: &str| {
        let text = refusal(kernel);
        assert!(text.contains(what), "{what:?} not in {text:?}");
    };
    says(
        &changed(0x1f1, &[255]),
        "truncated bzImage: the real-mode code ends at byte 131072, the file at 35328",
    );
    says(&changed(0x1f4, &[0xff; 4]), "the protected-mode code ends at byte 68719479280");
    says(
        &bzimage()[..SETUP + CODE_SIZE - 16],
        "the protected-mode code ends at byte 35328, the file at 35312",
    );
    says(&changed(0x1f4, &[0; 4]), "the protected-mode code ends at byte");
    says(&bzimage()[..SETUP], "the protected-mode code ends at byte");
    says(
        &changed(0x1f4, &0x100_u32.to_le_bytes()),
        "the payload ends at byte 4352 of the protected-mode code, which has 4096",
    );
    says(&changed(0x24c, &[0xff; 4]), "damaged bzImage: the payload ends at byte 4294967551");
    says(&changed(0x206, &[5, 2]), "without a 64-bit entry point (boot protocol 2.05)");
    says(&changed(0x206, &[6, 2]), "boot protocol 2.06");
    says(&changed(0x206, &[0, 0]), "boot protocol 0.00");
    says(&changed(0x236, &[0x3e]), "without a 64-bit entry point (boot protocol 2.15)");
    says(&changed(0x211, &[0]), "it is a zImage");
    // The second byte of the jump cuts the header off before what is needed.
    says(&changed(0x201, &[0x10]), "without a 64-bit entry point");
    says(&bzimage()[..0x210], "truncated bzImage: the setup header");
    says(&changed(0x258, &[0; 8]), "wants 0x0 to 0x800000");
    says(&changed(0x258, &[0xff; 8]), "its init_size at pref_address wants 0xffffffffffffffff");
    says(
        &changed(0x260, &[0xff; 4]),
        "wants 0x1000000 to 0x100ffffff, but the RAM a kernel can use is 0x100000 to 0x4000000",
    );
}

// --- Flat ----------------------------------------------------------------------------------------

#[test]
fn a_flat_image_lies_at_16_mib_and_is_entered_at_its_start() {
    let kernel = file(b"\x66\xba\xf8\x03\xb0\x41\xee\xf4");
    let memory = memory(64 * MIB);
    let entry = load(&memory, &config(&kernel), &PLATFORM).unwrap();
    assert_eq!((entry.protocol, entry.registers.rip), (Protocol::Linux64, layout::FLAT_KERNEL));
    assert_eq!(read(&memory, layout::FLAT_KERNEL, 8), b"\x66\xba\xf8\x03\xb0\x41\xee\xf4");
}

#[test]
fn a_flat_image_that_begins_with_the_pvh_entry_is_entered_so() {
    let kernel = file(b"\xfc\x8b\x03\x8d\x63\x04\xe8\0\0\0\0");
    let entry = load(&memory(64 * MIB), &config(&kernel), &PLATFORM).unwrap();
    assert_eq!((entry.protocol, entry.registers.rip), (Protocol::Pvh, layout::FLAT_KERNEL));
}

#[test]
fn what_is_no_kernel_is_called_by_its_name() {
    let at = |offset: usize, mark: &[u8], fill: u8| {
        let mut bytes = vec![fill; 8192];
        bytes[offset..offset + mark.len()].copy_from_slice(mark);
        bytes
    };
    let cases: [(&str, Vec<u8>); 17] = [
        ("it is an empty file; a kernel is an x86-64 ELF vmlinux", vec![]),
        ("it is a file of 1 byte;", vec![0xf4]),
        ("it is a file of 7 bytes;", vec![0x90; 7]),
        ("it is a text file;", b"Hello, this is not a kernel.\n".to_vec()),
        ("it is a text file;", "Gr\u{fc}\u{df}e ".repeat(1000).into_bytes()),
        ("it is a script;", b"#!/bin/sh\nexit 0\n".to_vec()),
        ("it is a gzip file;", at(0, b"\x1f\x8b\x08", 0x90)),
        ("unpack it with `unzstd`", at(0, b"\x28\xb5\x2f\xfd", 0x90)),
        ("it is an xz file;", at(0, b"\xfd7zXZ\0", 0x90)),
        ("it is an aarch64 kernel Image;", at(0x38, b"ARM\x64", 0x90)),
        ("it is a RISC-V kernel Image;", at(0x38, b"RSC\x05", 0x90)),
        ("it is an EFI program without a Linux boot header;", at(0, b"MZ", 0x90)),
        ("it is a cpio archive;", at(0, b"070701", 0x90)),
        ("it is an ext2/3/4 file system;", at(0x438, b"\x53\xef", 0)),
        ("it is a disk image;", at(510, b"\x55\xaa", 0)),
        ("it is a qcow2 disk image;", at(0, b"QFI\xfb", 0)),
        ("it is a file that begins with zeros;", vec![0; 8192]),
    ];
    for (what, bytes) in cases {
        let text = refusal(&bytes);
        assert!(text.contains(what), "{what:?} not in {text:?}");
        assert!(text.starts_with("cannot boot the kernel /"), "{text}");
    }
    // Two bytes that happen to be in code are no mark.
    let kernel = file(&at(510, b"\x55\xaa", 0x90));
    assert!(load(&memory(64 * MIB), &config(&kernel), &PLATFORM).is_ok());
}

#[test]
fn a_flat_image_that_is_bigger_than_ram_is_refused() {
    let kernel = file(&[0x90; 4096]);
    let text = chain(&load(&memory(16 * MIB), &config(&kernel), &PLATFORM).unwrap_err());
    assert!(text.contains("the flat image wants 0x1000000 to 0x1001000"), "{text}");
    assert!(text.contains("0x100000 to 0x1000000"), "{text}");
}

#[test]
fn only_regular_files_are_read() {
    let cases = [
        ("/nonexistent", "it cannot be opened: No such file or directory"),
        ("/", "it is a directory, not a regular file"),
        ("/dev/zero", "it is a character device or socket"),
    ];
    for (path, what) in cases {
        let config =
            BootConfig { kernel: Path::new(path).to_owned(), initrd: None, cmdline: String::new() };
        let text = chain(&load(&memory(16 * MIB), &config, &PLATFORM).unwrap_err());
        assert!(text.contains(what), "{what:?} not in {text:?}");
    }
}

// --- initrd, memory map, command line --------------------------------------------------------------

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
        // Above 2 GiB this kernel cannot reach, and RAM above 4 GiB is none at all for it.
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
    assert_eq!(entry.cmdline, format!("quiet acpi=off {devices} -- -x"));
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
            // Across the border of what is searched at a time.
            let at = 0x1_0000 - 3 + number * 100;
            code[at..at + word.len()].copy_from_slice(word);
        }
        let size = code.len() as u64;
        let header = Header { file_size: size, mem_size: size, ..code_header() };
        let kernel = file(&elf_of(true, LOAD_AT, &[header], &[], &code));
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
    assert!(text.contains("it has 2048 bytes, 0 of them"), "{text}");
    assert!(text.contains("this kernel takes 2047"), "{text}");
    assert_eq!(line(255, &changed(0x238, &[255, 0, 0, 0])), Ok(()));
    assert!(line(256, &changed(0x238, &[255, 0, 0, 0])).is_err());
    // A hostile limit does not get past the area.
    let most = layout::CMDLINE_MAX - 1;
    assert_eq!(line(most, &changed(0x238, &[0xff; 4])), Ok(()));
    assert!(line(most + 1, &changed(0x238, &[0xff; 4])).is_err());
    assert_eq!(line(most, &elf(true, LOAD_AT, &pvh_note(LOAD_AT))), Ok(()));
}

// --- Layout and real kernels -----------------------------------------------------------------------

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
    // Room for any memory map that a machine has: two pieces of RAM, five entries.
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

/// With `STRATOVIRT_GUEST_KERNEL` set to a kernel file, that one is loaded too.
#[test]
fn a_real_kernel_loads() {
    let Some(path) = std::env::var_os("STRATOVIRT_GUEST_KERNEL") else {
        println!("STRATOVIRT_GUEST_KERNEL is not set: only made kernels were loaded");
        return;
    };
    let config =
        BootConfig { kernel: path.into(), initrd: None, cmdline: "console=ttyS0".to_owned() };
    let memory = memory(256 * MIB);
    let start = std::time::Instant::now();
    let entry = load(&memory, &config, &PLATFORM).unwrap();
    println!("loaded in {:?}", start.elapsed());
    assert_eq!(entry.protocol, Protocol::Linux64);
    assert_ne!(read(&memory, entry.registers.rip, 16), [0; 16]);
    assert_eq!(zero_page(&memory).as_slice().len(), 4096);
}
