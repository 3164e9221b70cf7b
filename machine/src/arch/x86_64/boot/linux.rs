//! Linux's zero page (the boot protocol; `Documentation/arch/x86/zero-page.rst`).
use devices::Memory;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{Address, Bytes, GuestAddress};

use super::{BootError, Loaded};
use crate::arch::layout;
use crate::boot::initrd::Initrd;
use crate::boot::ram::Area;

/// Boot sector signature.
const BOOT_FLAG: u16 = 0xaa55;
/// "HdrS".
pub(super) const MAGIC: u32 = 0x5372_6448;
/// Newest version of the boot protocol that this module was written for: 2.15.
const VERSION: u16 = 0x020f;
/// Type of a loader without an assigned number.
const UNDEFINED_LOADER: u8 = 0xff;
/// "Normal" text mode.
const VIDEO_NORMAL: u16 = 0xffff;

/// Longest command line if the kernel does not give one (`COMMAND_LINE_SIZE` without terminator).
pub(super) const CMDLINE_MAX: usize = 2047;
/// Last byte of an initrd if the kernel does not give a limit.
pub(super) const INITRD_MAX: u64 = 0x7fff_ffff;

pub(super) fn write(
    memory: &Memory,
    loaded: &Loaded,
    cmdline: &str,
    initrd: Option<&Initrd>,
    rsdp: Option<GuestAddress>,
    map: &[Area],
) -> Result<(), BootError> {
    let mut params = boot_params::default();
    if let Some(header) = loaded.header {
        params.hdr = header;
    } else {
        params.hdr.boot_flag = BOOT_FLAG;
        params.hdr.header = MAGIC;
        params.hdr.version = VERSION;
        params.hdr.loadflags = 1;
        params.hdr.cmdline_size = u32::try_from(cmdline.len()).unwrap_or(u32::MAX);
    }
    params.hdr.type_of_loader = UNDEFINED_LOADER;
    params.hdr.vid_mode = VIDEO_NORMAL;
    // Addresses below 4 GiB: the layout's, and below the initrd's 32-bit limit.
    params.hdr.cmd_line_ptr = low32(layout::CMDLINE);
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = low32(initrd.address);
        params.hdr.ramdisk_size = low32(initrd.size);
    }
    params.acpi_rsdp_addr = rsdp.map_or(0, |address| address.raw_value());
    let mut entries = 0;
    for (entry, area) in params.e820_table.iter_mut().zip(map) {
        *entry = boot_e820_entry {
            addr: area.range.start,
            size: area.range.end.saturating_sub(area.range.start),
            r#type: area.kind as u32,
        };
        entries += 1;
    }
    params.e820_entries = entries;
    memory
        .write_obj(params, GuestAddress(layout::ZERO_PAGE))
        .map_err(|source| BootError::Tables { address: layout::ZERO_PAGE, source })
}

fn low32(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
