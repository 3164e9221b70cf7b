//! The form of a frame, and the kinds of those with contents.
use std::ops::Range;

use super::{PAGE, PAGES, Page};
use crate::identity::{Epoch, Term};

pub const BEGIN: u32 = 32;
pub const PAGES_KIND: u32 = 33;
pub const ZEROS: u32 = 34;
pub const DELTA: u32 = 35;
pub const SECTION: u32 = 36;
pub const DISK: u32 = 37;
pub const CLOSE: u32 = 38;
/// All of them.
pub const KINDS: std::ops::RangeInclusive<u32> = BEGIN..=CLOSE;
/// Kinds with this bit may be skipped.
pub const OPTIONAL: u32 = 1 << 31;

/// Kind and length.
pub const HEADER: usize = 8;
/// Term and epoch, the beginning of each body.
pub const NUMBERS: usize = 16;
/// The checksum.
pub const CRC: usize = 4;
/// Longest body: full pages with address, base and length.
pub const LONGEST: usize = NUMBERS + PAGES * (PAGE + 14);

/// Begin a frame at the end of `to`; returns where.
pub fn open(to: &mut Vec<u8>, kind: u32, term: Term, epoch: Epoch) -> usize {
    let at = to.len();
    to.extend(kind.to_le_bytes());
    to.extend([0; 4]);
    to.extend(term.0.to_le_bytes());
    to.extend(epoch.0.to_le_bytes());
    at
}

/// Complete the frame that begins at `at` and ends with `to`; its checksum.
pub fn close(to: &mut Vec<u8>, at: usize) -> u32 {
    let length = u32::try_from(to.len().saturating_sub(at + HEADER)).unwrap_or(u32::MAX);
    if let Some(place) = to.get_mut(at + 4..at + HEADER) {
        place.copy_from_slice(&length.to_le_bytes());
    }
    let crc = crc32fast::hash(to.get(at..).unwrap_or_default());
    to.extend(crc.to_le_bytes());
    crc
}

/// Bytes that are read from the front, in a frame that begins at 0.
pub struct Body<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Body<'a> {
    /// What follows `at` in `bytes`.
    pub const fn new(bytes: &'a [u8], at: usize) -> Self {
        Self { bytes, at }
    }

    /// Where the next byte is.
    pub const fn at(&self) -> usize {
        self.at
    }

    /// How many bytes are left.
    pub const fn left(&self) -> usize {
        self.bytes.len().saturating_sub(self.at)
    }

    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let taken = *self.bytes.get(self.at..)?.first_chunk()?;
        self.at += N;
        Some(taken)
    }

    pub fn u8(&mut self) -> Option<u8> {
        self.take().map(u8::from_le_bytes)
    }

    pub fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_le_bytes)
    }

    pub fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    /// The place of the next `length` bytes, and the bytes.
    pub fn bytes(&mut self, length: usize) -> Option<(Range<usize>, &'a [u8])> {
        let place = self.at..self.at.checked_add(length)?;
        let bytes = self.bytes.get(place.clone())?;
        self.at = place.end;
        Some((place, bytes))
    }
}

/// Whether all bytes of a page are zero.
pub fn is_zero(page: &Page) -> bool {
    page.as_chunks::<64>().0.iter().all(|part| *part == [0; 64])
}
