//! bzImage (the boot protocol, "The Real-Mode Kernel Header" and "64-bit boot protocol").
use devices::Memory;
use linux_loader::loader::bootparam::setup_header;
use thiserror::Error;
use vm_memory::ByteValued;

use super::{KernelError, Loaded, Protocol, linux};
use crate::arch::layout;
use crate::boot::bytes;
use crate::boot::ram::Ram;
use crate::boot::source::Source;

/// Offset of the header in the file.
const HEADER: usize = 0x1f1;
/// Offset of its magic.
const MAGIC: usize = 0x202;
/// Offset of the byte that gives the header's end, relative to `MAGIC`.
const JUMP: usize = 0x201;
const SECTOR: u64 = 512;
/// Sectors of real-mode code when the field is 0.
const SETUP_SECTORS: u8 = 4;
/// First version with `xloadflags`: 2.12.
const VERSION_64: u16 = 0x020c;
/// `loadflags`: the protected-mode code is loaded high.
const LOADED_HIGH: u8 = 1;
/// `xloadflags`: there is a 64-bit entry point at 0x200.
const KERNEL_64: u16 = 1;
const ENTRY_64: u64 = 0x200;

/// Why a bzImage cannot be booted.
#[derive(Debug, Error)]
pub enum BzImageError {
    /// The file ends before a part that its header describes.
    #[error("it is a truncated bzImage: {what} ends at byte {end}, the file at {len}")]
    Truncated {
        /// What is missing.
        what: &'static str,
        /// Where it would end.
        end: u64,
        /// Bytes of the file.
        len: u64,
    },
    /// No 64-bit entry point.
    #[error(
        "it is a bzImage without a 64-bit entry point (boot protocol {}.{:02}): use an x86-64 \
         kernel, Linux 3.8 or newer",
        version >> 8,
        version & 0xff
    )]
    No64BitEntry {
        /// Its boot protocol.
        version: u16,
    },
    /// A zImage, the predecessor of bzImage.
    #[error("it is a zImage, which loads below 1 MiB; make a bzImage")]
    LoadedLow,
    /// The payload is not where the header says.
    #[error(
        "it is a damaged bzImage: the payload ends at byte {end} of the protected-mode code, which has {len} (syssize)"
    )]
    Payload {
        /// Where the payload would end.
        end: u64,
        /// Bytes of protected-mode code.
        len: u64,
    },
}

pub(super) fn is(head: &[u8]) -> bool {
    bytes::u32(head, MAGIC) == Some(linux::MAGIC)
}

pub(super) fn load(
    memory: &Memory,
    ram: &Ram,
    file: &Source<'_>,
    head: &[u8],
) -> Result<Loaded, KernelError> {
    let header = read_header(file, head)?;
    let (version, flags, wide) = (header.version, header.loadflags, header.xloadflags);
    if version < VERSION_64 || wide & KERNEL_64 == 0 {
        return Err(BzImageError::No64BitEntry { version }.into());
    }
    if flags & LOADED_HIGH == 0 {
        return Err(BzImageError::LoadedLow.into());
    }
    let sectors = if header.setup_sects == 0 { SETUP_SECTORS } else { header.setup_sects };
    let setup = (u64::from(sectors) + 1) * SECTOR;
    let size = code_size(file, &header, setup)?;
    // The kernel also unpacks to this address: loading it elsewhere would not need less memory.
    let start = header.pref_address;
    let end =
        ram.check("its init_size at pref_address", start, size.max(u64::from(header.init_size)))?;
    file.load(memory, setup, size, start)?;
    let limit = usize::try_from(header.cmdline_size).unwrap_or(usize::MAX);
    let mut header = header;
    // The 64-bit entry does not use it; set it to the code's address anyway.
    header.code32_start = u32::try_from(start).unwrap_or(0);
    header.setup_data = 0;
    Ok(Loaded {
        protocol: Protocol::Linux64,
        entry: start + ENTRY_64,
        linux: true,
        start,
        end,
        cmdline_max: limit.min(layout::CMDLINE_MAX - 1),
        initrd_max: u64::from(header.initrd_addr_max),
        header: Some(header),
        image: Vec::new(),
    })
}

/// The header, with the length of this kernel's protocol version.
fn read_header(file: &Source<'_>, head: &[u8]) -> Result<setup_header, BzImageError> {
    let jump = head.get(JUMP).copied().unwrap_or(0);
    let end = MAGIC + usize::from(jump);
    let size = end.saturating_sub(HEADER).min(size_of::<setup_header>());
    let source = head.get(HEADER..HEADER + size).ok_or(BzImageError::Truncated {
        what: "the setup header",
        end: end as u64,
        len: file.len,
    })?;
    let mut header = setup_header::default();
    if let Some(target) = header.as_mut_slice().get_mut(..size) {
        target.copy_from_slice(source);
    }
    Ok(header)
}

/// Bytes of protected-mode code, which begins at byte `setup` of the file. A signature appended to
/// it is not loaded.
fn code_size(file: &Source<'_>, header: &setup_header, setup: u64) -> Result<u64, BzImageError> {
    let promised = u64::from(header.syssize) * 16;
    let truncated = |what, end| BzImageError::Truncated { what, end, len: file.len };
    let there = file.len.checked_sub(setup);
    let there = there.ok_or_else(|| truncated("the real-mode code", setup))?;
    // `syssize` counts paragraphs of 16 bytes: the last one may be incomplete.
    let size = promised.min(there);
    if promised - size > 15 || size <= ENTRY_64 {
        let end = setup + promised.max(ENTRY_64 + 1);
        return Err(truncated("the protected-mode code", end));
    }
    let payload = u64::from(header.payload_offset) + u64::from(header.payload_length);
    if payload > size {
        return Err(BzImageError::Payload { end: payload, len: size });
    }
    Ok(size)
}

#[cfg(test)]
pub(super) mod tests;
