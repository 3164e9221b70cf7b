//! ELF kernels: `vmlinux`, and any other file with a PVH note or a 64-bit entry.
//!
//! Nothing in the file is trusted until checked; segments are read straight into guest memory.
use std::ops::Range;

use devices::Memory;
use thiserror::Error;

use super::{KernelError, Loaded, Protocol, linux};
use crate::arch::layout;
use crate::boot::bytes;
use crate::boot::ram::Ram;
use crate::boot::source::Source;

const MAGIC: &[u8] = b"\x7fELF";
/// Most program headers that are read; a kernel has about five.
const PROGRAM_HEADERS_MAX: u16 = 128;
/// Most bytes of a note segment that are read; a kernel's has some hundred.
const NOTES_MAX: u64 = 64 << 10;

const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;
/// Xen's note that gives the 32-bit physical entry point (PVH).
const XEN_PHYS32_ENTRY: u32 = 18;
/// Xen's note that names the guest operating system.
const XEN_GUEST_OS: u32 = 6;

/// Why an ELF file cannot be booted.
#[derive(Debug, Error)]
pub enum ElfError {
    /// The file ends before a part that its headers describe.
    #[error("it is a truncated ELF file: {what} ends at byte {end}, the file at {len}")]
    Truncated {
        /// What is missing.
        what: String,
        /// Where it would end.
        end: u64,
        /// Bytes of the file.
        len: u64,
    },
    /// A field has an impossible value.
    #[error("it is a damaged ELF file: {0}")]
    Damaged(String),
    /// Two segments overlap in memory.
    #[error("it is a damaged ELF file: segments overlap at {at:#x}")]
    Overlap {
        /// First address of the overlap.
        at: u64,
    },
    /// A well-formed file for another purpose.
    #[error("it is {0}, not an x86-64 kernel")]
    Other(String),
    /// 32-bit code without a PVH entry, the only one that can start it.
    #[error(
        "it is a 32-bit ELF file without a PVH entry (Xen's PHYS32_ENTRY note), not an x86-64 kernel"
    )]
    NoPvhEntry,
}

/// A program header.
struct Segment {
    kind: u32,
    offset: u64,
    virt: u64,
    phys: u64,
    file_size: u64,
    mem_size: u64,
    align: u64,
}

impl Segment {
    fn end(&self) -> u64 {
        self.phys.saturating_add(self.mem_size)
    }
}

/// The contents of the notes.
#[derive(Default)]
struct Notes {
    linux: bool,
    pvh_entry: Option<u64>,
}

pub(super) fn is(head: &[u8]) -> bool {
    head.starts_with(MAGIC)
}

pub(super) fn load(
    memory: &Memory,
    ram: &Ram,
    file: &Source<'_>,
    head: &[u8],
) -> Result<Loaded, KernelError> {
    let wide = check_identity(file, head)?;
    let (entry, headers) = read_headers(file, head, wide)?;
    let mut notes = Notes::default();
    let mut segments = Vec::new();
    for segment in headers {
        match segment.kind {
            PT_INTERP => {
                return Err(ElfError::Other("a program for Linux's user space".into()).into());
            }
            PT_NOTE => read_notes(file, &segment, &mut notes)?,
            PT_LOAD if segment.mem_size > 0 => segments.push(segment),
            _ => {}
        }
    }
    let range = check_segments(ram, file, &mut segments)?;
    let (protocol, entry) = match notes {
        Notes { linux: true, .. } | Notes { pvh_entry: None, .. } if wide => {
            (Protocol::Linux64, physical(&segments, entry))
        }
        Notes { pvh_entry: Some(entry), .. } => (Protocol::Pvh, Some(entry)),
        Notes { pvh_entry: None, .. } => return Err(ElfError::NoPvhEntry.into()),
    };
    let entry = entry
        .filter(|entry| segments.iter().any(|s| (s.phys..s.end()).contains(entry)))
        .ok_or_else(|| ElfError::Damaged("its entry point is in none of its segments".into()))?;
    for segment in &segments {
        file.load(memory, segment.offset, segment.file_size, segment.phys)?;
    }
    let image = segments.iter().map(|s| s.phys..s.phys.saturating_add(s.file_size)).collect();
    Ok(Loaded {
        protocol,
        entry,
        linux: notes.linux,
        start: range.start,
        end: range.end,
        cmdline_max: match protocol {
            Protocol::Linux64 => linux::CMDLINE_MAX,
            Protocol::Pvh if notes.linux => linux::CMDLINE_MAX,
            Protocol::Pvh => layout::CMDLINE_MAX - 1,
        },
        initrd_max: linux::INITRD_MAX,
        header: None,
        image,
    })
}

/// Whether the file is 64-bit; an error if it is for another processor or not executable.
fn check_identity(file: &Source<'_>, head: &[u8]) -> Result<bool, ElfError> {
    let truncated =
        || ElfError::Truncated { what: "the ELF header".into(), end: 64, len: file.len };
    let class = *head.get(4).ok_or_else(truncated)?;
    let data = *head.get(5).ok_or_else(truncated)?;
    let wide = match (class, data) {
        (1, 1) => false,
        (2, 1) => true,
        (_, 2) => return Err(ElfError::Other("a big-endian ELF file".into())),
        _ => return Err(ElfError::Damaged(format!("class {class}, data encoding {data}"))),
    };
    let kind = bytes::u16(head, 16).ok_or_else(truncated)?;
    let machine = bytes::u16(head, 18).ok_or_else(truncated)?;
    let other = match machine {
        3 | 62 => None,
        40 => Some("a 32-bit ARM ELF file".into()),
        183 => Some("an aarch64 ELF file".into()),
        243 => Some("a RISC-V ELF file".into()),
        258 => Some("a LoongArch ELF file".into()),
        other => Some(format!("an ELF file for machine type {other}")),
    };
    if let Some(other) = other {
        return Err(ElfError::Other(other));
    }
    match kind {
        2 | 3 => Ok(wide),
        1 => Err(ElfError::Other("an object file or kernel module".into())),
        4 => Err(ElfError::Other("a core dump".into())),
        other => Err(ElfError::Damaged(format!("file type {other}"))),
    }
}

/// The entry point and the program headers.
fn read_headers(
    file: &Source<'_>,
    head: &[u8],
    wide: bool,
) -> Result<(u64, Vec<Segment>), KernelError> {
    let number = |offset| {
        if wide { bytes::u64(head, offset) } else { bytes::u32(head, offset).map(u64::from) }
    };
    let fields = if wide {
        (number(24), number(32), bytes::u16(head, 54), bytes::u16(head, 56), 56_u16)
    } else {
        (number(24), number(28), bytes::u16(head, 42), bytes::u16(head, 44), 32_u16)
    };
    let (Some(entry), Some(offset), Some(size), Some(count), expected) = fields else {
        let what = "the ELF header".into();
        return Err(ElfError::Truncated { what, end: 64, len: file.len }.into());
    };
    if count == 0 {
        return Err(ElfError::Damaged("it has no segments to load".into()).into());
    }
    if size != expected {
        let what = format!("its program headers have {size} bytes each, not {expected}");
        return Err(ElfError::Damaged(what).into());
    }
    if count > PROGRAM_HEADERS_MAX {
        let what = format!("it has {count} program headers, more than {PROGRAM_HEADERS_MAX}");
        return Err(ElfError::Damaged(what).into());
    }
    let bytes = u64::from(count) * u64::from(size);
    check_end(file, "the program header table", offset, bytes)?;
    let table = file.read(offset, bytes)?;
    let headers = table.chunks_exact(usize::from(size)).filter_map(|h| segment(h, wide)).collect();
    Ok((entry, headers))
}

fn segment(header: &[u8], wide: bool) -> Option<Segment> {
    let kind = bytes::u32(header, 0)?;
    let numbers: [u64; 6] = if wide {
        let at = |offset| bytes::u64(header, offset);
        [at(8)?, at(16)?, at(24)?, at(32)?, at(40)?, at(48)?]
    } else {
        let at = |offset| bytes::u32(header, offset).map(u64::from);
        [at(4)?, at(8)?, at(12)?, at(16)?, at(20)?, at(28)?]
    };
    let [offset, virt, phys, file_size, mem_size, align] = numbers;
    Some(Segment { kind, offset, virt, phys, file_size, mem_size, align })
}

fn check_end(file: &Source<'_>, what: &str, offset: u64, len: u64) -> Result<(), ElfError> {
    let end = offset.saturating_add(len);
    if end > file.len {
        return Err(ElfError::Truncated { what: what.to_owned(), end, len: file.len });
    }
    Ok(())
}

/// Sort the segments and return the range that they cover.
fn check_segments(
    ram: &Ram,
    file: &Source<'_>,
    segments: &mut [Segment],
) -> Result<Range<u64>, KernelError> {
    segments.sort_by_key(|segment| segment.phys);
    let mut range: Option<Range<u64>> = None;
    for (number, segment) in segments.iter().enumerate() {
        let part = format!("its segment {number}");
        check_end(file, &part, segment.offset, segment.file_size)?;
        if segment.file_size > segment.mem_size {
            let what = format!("{part} has more bytes in the file than in memory");
            return Err(ElfError::Damaged(what).into());
        }
        let end = ram.check(&part, segment.phys, segment.mem_size)?;
        range = match range {
            None => Some(segment.phys..end),
            Some(range) if segment.phys < range.end => {
                return Err(ElfError::Overlap { at: segment.phys }.into());
            }
            Some(range) => Some(range.start..end),
        };
    }
    range.ok_or_else(|| ElfError::Damaged("it has no segments to load".into()).into())
}

/// The entry point as a physical address. Linux gives the physical one; others may give the virtual
/// one.
fn physical(segments: &[Segment], entry: u64) -> Option<u64> {
    if segments.iter().any(|s| (s.phys..s.end()).contains(&entry)) {
        return Some(entry);
    }
    segments.iter().find_map(|s| {
        let offset = entry.checked_sub(s.virt).filter(|offset| *offset < s.mem_size)?;
        s.phys.checked_add(offset)
    })
}

/// Walk the notes of a segment (System V ABI, "Note Section"). Each step moves forward by at least
/// the twelve bytes of a note's header, so the loop always ends; invalid lengths cause an error.
fn read_notes(file: &Source<'_>, segment: &Segment, notes: &mut Notes) -> Result<(), KernelError> {
    if segment.file_size > NOTES_MAX {
        let what = format!(
            "its notes have {} bytes, more than the limit of {NOTES_MAX}",
            segment.file_size
        );
        return Err(ElfError::Damaged(what).into());
    }
    check_end(file, "its note segment", segment.offset, segment.file_size)?;
    let bytes = file.read(segment.offset, segment.file_size)?;
    let align = if segment.align == 8 { 8 } else { 4 };
    let mut at = 0;
    while bytes.len().saturating_sub(at) >= 12 {
        let (Some(name_len), Some(desc_len), Some(kind)) =
            (bytes::u32(&bytes, at), bytes::u32(&bytes, at + 4), bytes::u32(&bytes, at + 8))
        else {
            break;
        };
        let note = (|| {
            let name_at = at.checked_add(12)?;
            let name_end = name_at.checked_add(usize::try_from(name_len).ok()?)?;
            let desc_at = name_end.checked_next_multiple_of(align)?;
            let desc_end = desc_at.checked_add(usize::try_from(desc_len).ok()?)?;
            let next = desc_end.checked_next_multiple_of(align)?;
            Some((bytes.get(name_at..name_end)?, bytes.get(desc_at..desc_end)?, next))
        })();
        let Some((name, desc, next)) = note else {
            let what = format!(
                "a note of {name_len} + {desc_len} bytes does not fit into the {} bytes of its segment",
                bytes.len()
            );
            return Err(ElfError::Damaged(what).into());
        };
        match (name, kind) {
            (b"Linux\0", _) => notes.linux = true,
            (b"Xen\0", XEN_GUEST_OS) => notes.linux |= desc.starts_with(b"linux"),
            (b"Xen\0", XEN_PHYS32_ENTRY) => notes.pvh_entry = Some(pvh_entry(desc)?),
            _ => {}
        }
        at = next;
    }
    Ok(())
}

/// The entry point in a PVH note: four bytes, or eight as Linux writes them.
fn pvh_entry(desc: &[u8]) -> Result<u64, ElfError> {
    let entry = match desc.len() {
        4 => bytes::u32(desc, 0).map(u64::from),
        8 => bytes::u64(desc, 0),
        _ => None,
    };
    match entry {
        Some(entry) if entry < 1 << 32 => Ok(entry),
        Some(entry) => {
            Err(ElfError::Damaged(format!("its PVH entry point {entry:#x} is above 4 GiB")))
        }
        None => {
            Err(ElfError::Damaged(format!("its PVH note has {} bytes, not 4 or 8", desc.len())))
        }
    }
}

#[cfg(test)]
pub(super) mod tests;
