//! Staged pages: copies of guest memory, so that the guest can run again before they are written
//! out.
use std::{io, ops::Range};

use devices::Memory;

use super::image::{self, PAGE_SIZE};

/// Most bytes that are staged for a save.
pub const MAX_BYTES: u64 = 256 << 20;
/// Most ranges that are staged for a save.
pub const MAX_RANGES: usize = 32 << 10;

/// Copies of ranges of guest memory. Their buffer is touched before the guest is stopped: its first
/// page faults would prolong the pause.
#[derive(Debug, Default)]
pub struct Staging {
    room: Vec<u8>,
    /// Ascending, each with its offset in `room`.
    ranges: Vec<(Range<u64>, usize)>,
}

impl Staging {
    /// A buffer for `bytes` of memory, at most [`MAX_BYTES`], that causes no page faults when it is
    /// filled.
    ///
    /// # Errors
    /// When the host does not have it.
    pub fn touched(bytes: u64) -> io::Result<Self> {
        let mut staging = Self::default();
        staging.grow(usize::try_from(bytes.min(MAX_BYTES)).map_err(io::Error::other)?)?;
        Ok(staging)
    }

    /// Whether `ranges` are small enough to be staged for a save.
    pub fn takes(ranges: &[Range<u64>]) -> bool {
        ranges.len() <= MAX_RANGES && bytes(ranges) <= MAX_BYTES
    }

    /// Replace the contents by `ranges` of `memory`, ascending. Bytes beyond those touched before
    /// cost page faults, but do no harm.
    ///
    /// # Errors
    /// When the host has no memory, or a range is not inside of `memory`.
    pub fn fill(&mut self, memory: &Memory, ranges: &[Range<u64>]) -> io::Result<()> {
        self.ranges.clear();
        self.grow(usize::try_from(bytes(ranges)).map_err(io::Error::other)?)?;
        let mut rest = self.room.as_mut_slice();
        let mut at = 0;
        for range in ranges {
            let len = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
            let (part, after) = rest.split_at_mut_checked(len).ok_or_else(short)?;
            image::read(memory, range.start, part)?;
            self.ranges.push((range.clone(), at));
            (rest, at) = (after, at + len);
        }
        Ok(())
    }

    /// The copied ranges, with their contents.
    ///
    /// # Errors
    /// When the copies do not have the size of their ranges, which would be a bug.
    pub fn pieces(&self) -> impl Iterator<Item = io::Result<(u64, &[u8])>> {
        self.ranges.iter().map(|range| self.contents(range))
    }

    fn contents(&self, (range, at): &(Range<u64>, usize)) -> io::Result<(u64, &[u8])> {
        let len = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
        let end = at.checked_add(len).ok_or_else(short)?;
        Ok((range.start, self.room.get(*at..end).ok_or_else(short)?))
    }

    /// The copied range at place `index`, with its contents; `None` after the last.
    ///
    /// # Errors
    /// As [`Staging::pieces`].
    pub fn piece(&self, index: usize) -> io::Result<Option<(u64, &[u8])>> {
        self.ranges.get(index).map(|range| self.contents(range)).transpose()
    }

    /// The copied ranges, ascending.
    pub fn ranges(&self) -> Vec<Range<u64>> {
        self.ranges.iter().map(|(range, _)| range.clone()).collect()
    }

    /// Bytes copied.
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|(range, _)| range.end - range.start).sum()
    }

    fn grow(&mut self, len: usize) -> io::Result<()> {
        let more = len.saturating_sub(self.room.len());
        self.room.try_reserve_exact(more).map_err(|_| io::ErrorKind::OutOfMemory)?;
        self.room.resize(self.room.len() + more, 0);
        Ok(())
    }
}

/// Bytes in `ranges`.
pub fn bytes(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

/// How many bytes to touch when `left` bytes are left to be copied: the guest dirties more until it
/// is stopped.
pub fn room_for(left: u64) -> u64 {
    left.saturating_mul(2).max(1024 * PAGE_SIZE)
}

fn short() -> io::Error {
    io::Error::other("a copy of guest memory does not match the size of its ranges")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::allocate;
    use config::{MemoryConfig, types::MemorySize};

    #[test]
    fn what_was_copied_stays_whatever_becomes_of_the_memory() {
        let config = MemoryConfig::new(MemorySize::MIN);
        let memory = allocate(&config).unwrap();
        let page = |n: u64| n * PAGE_SIZE..(n + 1) * PAGE_SIZE;
        let ranges = [page(1), page(7).start..page(8).end, page(4095)];
        let mark = |with: u8| {
            for n in [1, 7, 8, 4095] {
                let contents = [with + u8::try_from(n % 100).unwrap(); 4096];
                image::write(&memory, page(n).start, &contents).unwrap();
            }
        };
        mark(1);
        // Once with enough room, once without.
        for mut staging in [Staging::touched(16 << 20).unwrap(), Staging::default()] {
            mark(1);
            staging.fill(&memory, &ranges).unwrap();
            mark(100);
            let copied: Vec<_> = staging.pieces().map(Result::unwrap).collect();
            assert_eq!(staging.bytes(), 4 * PAGE_SIZE);
            let seen: Vec<_> = copied
                .iter()
                .map(|(at, bytes)| (at / PAGE_SIZE, bytes.len(), bytes[0], bytes[bytes.len() - 1]))
                .collect();
            assert_eq!(seen, [(1, 4096, 2, 2), (7, 8192, 8, 9), (4095, 4096, 96, 96)]);
            staging.fill(&memory, &ranges[..1]).unwrap();
            assert_eq!(staging.pieces().count(), 1, "what it held before is gone");
        }
    }

    #[test]
    fn too_much_is_refused_and_not_cut_off() {
        let config = MemoryConfig::new(MemorySize::MIN);
        let memory = allocate(&config).unwrap();
        let all = std::slice::from_ref(&(0..MAX_BYTES + PAGE_SIZE));
        assert!(!Staging::takes(all));
        let many: Vec<_> = (0..=MAX_RANGES as u64).map(|n| n * 8192..n * 8192 + 4096).collect();
        assert!(Staging::takes(&many[1..]) && !Staging::takes(&many));
        let outside = std::slice::from_ref(&(15 << 20..17 << 20));
        assert!(Staging::default().fill(&memory, outside).is_err());
    }
}
