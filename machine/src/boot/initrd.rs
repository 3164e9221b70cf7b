//! The initial RAM disk, placed as high as the kernel can reach.
use std::path::Path;

use devices::Memory;
use thiserror::Error;

use super::ram::Ram;
use super::source::{Reading, Source, SourceError};
use crate::arch::boot::Loaded;
use crate::arch::layout;

const PAGE: u64 = 4096;

/// Why an initrd cannot be loaded.
#[derive(Debug, Error)]
pub enum InitrdError {
    /// The file cannot be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The file is empty.
    #[error("it is empty; leave -initrd out, or create one with `cpio -o -H newc`")]
    Empty,
    /// Larger than the available room.
    #[error(
        "it has {size} bytes, but between the kernel's end ({start:#x}) and the highest address \
         allowed for it ({end:#x}) there are {}: give the machine more memory (-m), or make the \
         initrd smaller",
        end.saturating_sub(*start)
    )]
    TooBig {
        /// Its size.
        size: u64,
        /// First address after the kernel.
        start: u64,
        /// First address that it may not use.
        end: u64,
    },
}

/// An initrd in guest memory.
pub(crate) struct Initrd {
    pub(crate) address: u64,
    pub(crate) size: u64,
}

/// The file, which must not be empty.
pub(crate) fn open<'a>(path: &Path, reading: Reading<'a>) -> Result<Source<'a>, InitrdError> {
    let file = Source::open(path, reading)?;
    if file.len == 0 { Err(InitrdError::Empty) } else { Ok(file) }
}

pub(crate) fn load(
    memory: &Memory,
    ram: &Ram,
    path: &Path,
    kernel: &Loaded,
    reading: Reading<'_>,
) -> Result<Initrd, InitrdError> {
    let file = open(path, reading)?;
    let size = file.len;
    let low = ram.low();
    let end = low.end.min(layout::HOLE_START).min(kernel.initrd_max.saturating_add(1));
    // A kernel that lies above (it may be linked there) leaves the whole range free.
    let start = if kernel.start < end { kernel.end } else { low.start };
    let start = start.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX);
    match end.checked_sub(size).map(|address| address & !(PAGE - 1)) {
        Some(address) if address >= start => {
            file.load(memory, 0, size, address)?;
            Ok(Initrd { address, size })
        }
        _ => Err(InitrdError::TooBig { size, start: start.min(end), end }),
    }
}
