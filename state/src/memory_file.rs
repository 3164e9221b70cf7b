//! The memory file: all guest memory, sparse where it is zero, followed by a page that identifies
//! the state it belongs to.
use std::{fs::File, io, ops::Range, os::unix::fs::FileExt};

use crate::file::PAGE_SIZE;

/// Bytes of a block, the unit of checksums.
pub const BLOCK: u64 = 2 << 20;
const MAGIC: &[u8; 8] = b"STRATOCM";

/// The blocks of `size` bytes of memory.
pub fn blocks(size: u64) -> impl Iterator<Item = Range<u64>> {
    (0..size).step_by(BLOCK as usize).map(move |at| at..size.min(at + BLOCK))
}

/// Checksums of blocks of zeros.
pub struct ZeroSums {
    zeros: Vec<u8>,
    whole: u32,
}

impl Default for ZeroSums {
    fn default() -> Self {
        let zeros = vec![0; BLOCK as usize];
        let whole = crc32fast::hash(&zeros);
        Self { zeros, whole }
    }
}

impl ZeroSums {
    /// The checksum of `block` if it is all zeros.
    pub fn of(&self, block: &Range<u64>) -> u32 {
        match block.end - block.start {
            BLOCK => self.whole,
            length => {
                let length = usize::try_from(length).unwrap_or(usize::MAX);
                crc32fast::hash(self.zeros.get(..length).unwrap_or(&self.zeros))
            }
        }
    }
}

/// The last page: magic, id, size of memory in bytes, CRC-32 of these; then zeros.
pub fn trailer(id: u128, size: u64) -> Vec<u8> {
    let mut page = MAGIC.to_vec();
    page.extend(id.to_le_bytes());
    page.extend(size.to_le_bytes());
    page.extend(crc32fast::hash(&page).to_le_bytes());
    page.resize(4096, 0);
    page
}

/// Check that `file` holds the memory, of `size` bytes, that belongs to the state `id`.
///
/// # Errors
/// When it does not; the error says why.
pub fn belongs(file: &File, id: u128, size: u64) -> Result<(), MemoryFileError> {
    let length = file.metadata().map_err(MemoryFileError::Io)?.len();
    let expected = size.saturating_add(PAGE_SIZE);
    if length != expected {
        return Err(MemoryFileError::Length { length, expected });
    }
    let mut page = [0; 4096];
    file.read_exact_at(&mut page, size).map_err(MemoryFileError::Io)?;
    if page.as_slice() != trailer(id, size) {
        return Err(MemoryFileError::Other);
    }
    Ok(())
}

/// Why a memory file cannot be used.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the error messages describe them")]
pub enum MemoryFileError {
    #[error("it has {length} bytes; this state needs {expected}")]
    Length { length: u64, expected: u64 },
    #[error("it belongs to another state, or its last page is damaged")]
    Other,
    #[error("the block from {from:#x} to {to:#x} is damaged (checksum)")]
    Damaged { from: u64, to: u64 },
    #[error("cannot read it")]
    Io(#[source] io::Error),
}
