//! Initial registers of the boot vCPU, and the tables in guest memory that they point to.
use devices::Memory;
use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use crate::arch::layout;

/// CR0: protected mode.
const PE: u64 = 1;
/// CR0: extension type, always one.
const ET: u64 = 1 << 4;
/// CR0: paging.
const PG: u64 = 1 << 31;
/// CR4: physical address extension.
const PAE: u64 = 1 << 5;
/// EFER: long mode enabled and active.
const LME_LMA: u64 = 1 << 8 | 1 << 10;

/// Page table entry: present, writable.
const TABLE: u64 = 0b11;
/// Page directory entry: present, writable, 2 MiB.
const PAGE_2M: u64 = 1 << 7 | TABLE;
const PAGE: u64 = 4096;
const ENTRIES: u64 = 512;

/// A segment register, with the fields of KVM's `struct kvm_segment`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "KVM's names")]
pub struct Segment {
    pub base: u64,
    pub limit: u32,
    pub selector: u16,
    pub type_: u8,
    pub present: u8,
    pub dpl: u8,
    pub db: u8,
    pub s: u8,
    pub l: u8,
    pub g: u8,
}

/// Initial registers of the boot vCPU. General registers not listed here are zero, interrupts are
/// off, and the IDT is empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the processor's names")]
pub struct Registers {
    pub rip: u64,
    pub rsp: u64,
    pub rbx: u64,
    pub rsi: u64,
    pub rflags: u64,
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    /// Code segment.
    pub cs: Segment,
    /// DS, ES, FS, GS and SS.
    pub data: Segment,
    /// Task register.
    pub tr: Segment,
    pub gdt_base: u64,
    pub gdt_limit: u16,
}

/// `__BOOT_CS`, `__BOOT_DS` (the boot protocol, "64-bit boot protocol") and the next one.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

fn flat(selector: u16, type_: u8, db: u8, l: u8) -> Segment {
    Segment { base: 0, limit: 0xffff_ffff, selector, type_, present: 1, dpl: 0, db, s: 1, l, g: 1 }
}

fn task() -> Segment {
    // KVM requires a busy TSS (type 11); the limit is that of a TSS without I/O map.
    let task = flat(TASK, 11, 0, 0);
    Segment { limit: 0x67, s: 0, g: 0, ..task }
}

impl Segment {
    /// The descriptor (Intel SDM volume 3, 3.4.5).
    fn descriptor(&self) -> u64 {
        let limit = u64::from(if self.g == 1 { self.limit >> 12 } else { self.limit });
        let flags = self.g << 3 | self.db << 2 | self.l << 1;
        let access = self.present << 7 | self.dpl << 5 | self.s << 4 | self.type_;
        (limit & 0xffff)
            | (self.base & 0x00ff_ffff) << 16
            | u64::from(access) << 40
            | (limit >> 16 & 0xf) << 48
            | u64::from(flags) << 52
            | (self.base >> 24 & 0xff) << 56
    }
}

/// 64-bit mode, the first 4 GiB identity-mapped, `rsi` at the zero page (the boot protocol,
/// "64-bit boot protocol").
pub(super) fn linux64(memory: &Memory, entry: u64) -> Result<Registers, BootError> {
    write_page_tables(memory)?;
    let registers = Registers {
        rip: entry,
        rsp: layout::BOOT_STACK,
        rsi: layout::ZERO_PAGE,
        cr0: PE | ET | PG,
        cr3: layout::BOOT_PML4,
        cr4: PAE,
        efer: LME_LMA,
        cs: flat(CODE, 11, 0, 1),
        ..protected_mode()
    };
    write_gdt(memory, &registers)?;
    Ok(registers)
}

/// 32-bit protected mode without paging, `ebx` at the start info (PVH, "x86 boot ABI").
pub(super) fn pvh(memory: &Memory, entry: u64) -> Result<Registers, BootError> {
    let registers = Registers { rip: entry, rbx: layout::PVH_START_INFO, ..protected_mode() };
    write_gdt(memory, &registers)?;
    Ok(registers)
}

fn protected_mode() -> Registers {
    Registers {
        rip: 0,
        rsp: layout::BOOT_STACK,
        rbx: 0,
        rsi: 0,
        rflags: 2,
        cr0: PE | ET,
        cr3: 0,
        cr4: 0,
        efer: 0,
        cs: flat(CODE, 11, 1, 0),
        data: flat(DATA, 3, 1, 0),
        tr: task(),
        gdt_base: layout::BOOT_GDT,
        // Two null descriptors, code, data, and 16 bytes for the task: in 64-bit mode it takes two.
        gdt_limit: 6 * 8 - 1,
    }
}

fn write_gdt(memory: &Memory, registers: &Registers) -> Result<(), BootError> {
    let gdt = [
        0,
        0,
        registers.cs.descriptor(),
        registers.data.descriptor(),
        registers.tr.descriptor(),
        0,
    ];
    write(memory, layout::BOOT_GDT, &gdt)
}

fn write_page_tables(memory: &Memory) -> Result<(), BootError> {
    let pml4 = layout::BOOT_PML4;
    let pdpt = pml4 + PAGE;
    let directories = pdpt + PAGE;
    write(memory, pml4, &[pdpt | TABLE])?;
    let table: Vec<u64> = (0..4).map(|i| (directories + i * PAGE) | TABLE).collect();
    write(memory, pdpt, &table)?;
    let pages: Vec<u64> = (0..4 * ENTRIES).map(|i| i << 21 | PAGE_2M).collect();
    write(memory, directories, &pages)
}

fn write(memory: &Memory, address: u64, words: &[u64]) -> Result<(), BootError> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    memory
        .write_slice(&bytes, GuestAddress(address))
        .map_err(|source| BootError::Tables { address, source })
}
