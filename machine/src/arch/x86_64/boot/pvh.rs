//! PVH's start info (Xen `arch-x86/hvm/start_info.h`, version 1).
use devices::Memory;
use linux_loader::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Address, ByteValued, Bytes, GuestAddress};

use super::BootError;
use crate::arch::layout;
use crate::boot::initrd::Initrd;
use crate::boot::ram::Area;

pub(super) fn write(
    memory: &Memory,
    initrd: Option<&Initrd>,
    rsdp: Option<GuestAddress>,
    map: &[Area],
) -> Result<(), BootError> {
    let mut info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: rsdp.map_or(0, |address| address.raw_value()),
        memmap_paddr: layout::PVH_MEMORY_MAP,
        memmap_entries: u32::try_from(map.len()).unwrap_or(u32::MAX),
        ..hvm_start_info::default()
    };
    if let Some(initrd) = initrd {
        info.nr_modules = 1;
        info.modlist_paddr = layout::PVH_MODULES;
        let module = hvm_modlist_entry {
            paddr: initrd.address,
            size: initrd.size,
            ..hvm_modlist_entry::default()
        };
        put(memory, layout::PVH_MODULES, module)?;
    }
    let mut address = layout::PVH_MEMORY_MAP;
    for area in map {
        let entry = hvm_memmap_table_entry {
            addr: area.range.start,
            size: area.range.end.saturating_sub(area.range.start),
            type_: area.kind as u32,
            reserved: 0,
        };
        put(memory, address, entry)?;
        address = address.saturating_add(size_of::<hvm_memmap_table_entry>() as u64);
    }
    put(memory, layout::PVH_START_INFO, info)
}

fn put(memory: &Memory, address: u64, value: impl ByteValued) -> Result<(), BootError> {
    memory
        .write_obj(value, GuestAddress(address))
        .map_err(|source| BootError::Tables { address, source })
}
