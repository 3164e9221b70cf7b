//! A ring of bytes in a journal, behind its header. Positions only grow, and are taken modulo the
//! capacity.
use std::io;

use crate::medium::Medium;

/// Bytes before the ring.
pub(crate) const HEADER: u64 = 8192;

#[derive(Debug)]
pub(crate) struct Ring<M> {
    pub medium: M,
    pub capacity: u64,
}

impl<M: Medium> Ring<M> {
    pub fn read(&self, position: u64, bytes: &mut [u8]) -> io::Result<()> {
        let (at, first) = self.place(position, bytes.len());
        let (first, rest) = bytes.split_at_mut_checked(first).ok_or(io::ErrorKind::InvalidInput)?;
        self.medium.read_at(at, first)?;
        if rest.is_empty() { Ok(()) } else { self.medium.read_at(HEADER, rest) }
    }

    pub fn write(&self, position: u64, bytes: &[u8]) -> io::Result<()> {
        let (at, first) = self.place(position, bytes.len());
        let (first, rest) = bytes.split_at_checked(first).ok_or(io::ErrorKind::InvalidInput)?;
        self.medium.write_at(at, first)?;
        if rest.is_empty() { Ok(()) } else { self.medium.write_at(HEADER, rest) }
    }

    /// Where `position` is on the medium, and how many of `length` bytes lie there before the end of
    /// the ring.
    fn place(&self, position: u64, length: usize) -> (u64, usize) {
        let at = position % self.capacity;
        let before_end = usize::try_from(self.capacity - at).unwrap_or(usize::MAX);
        (HEADER + at, length.min(before_end))
    }
}
