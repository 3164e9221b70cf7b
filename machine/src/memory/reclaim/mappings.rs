//! The number of the process's mappings that guest memory takes.
//!
//! Adjacent ranges that are replaced become one mapping, unless the guest has touched both before
//! the range between them was replaced (the kernel then has an `anon_vma` for each). A guest can
//! cause that repeatedly, so from time to time the mappings in the kernel's list are counted.
use std::{fs::File, io, ops::Range, os::unix::fs::FileExt};

use super::MAX_PIECES;

/// Number of replaced ranges after which the list is counted.
const COUNT_AFTER: usize = 1024;

/// The process's list of mappings.
pub(super) struct Mappings {
    /// Opened in advance, as it is read under the system-call filter. `None` if the host lacks it.
    list: Option<File>,
    /// Ranges replaced since the last count.
    since: usize,
    /// How many more mappings than pieces there were at the last count.
    excess: usize,
}

impl Mappings {
    pub fn open() -> Self {
        Self { list: File::open("/proc/self/maps").ok(), since: 0, excess: 0 }
    }

    /// Note that a range was replaced.
    pub fn note_made(&mut self) {
        self.since += 1;
    }

    /// Whether `pieces` pieces are too many for guest memory at these addresses. May count its
    /// mappings.
    pub fn are_too_many(&mut self, memory: &[Range<u64>], pieces: usize) -> bool {
        if self.since >= COUNT_AFTER || (self.since > 0 && pieces + self.excess > MAX_PIECES) {
            let mappings = self.list.as_ref().and_then(|list| count(list, memory).ok());
            // Without a count, assume that each has become a mapping of its own.
            let worst = self.excess + self.since;
            self.excess = mappings.map_or(worst, |mappings| mappings.saturating_sub(pieces));
            self.since = 0;
        }
        pieces + self.excess > MAX_PIECES
    }
}

/// The number of anonymous mappings that begin at these addresses (Linux,
/// Documentation/filesystems/proc).
fn count(list: &File, memory: &[Range<u64>]) -> io::Result<usize> {
    // Only by pread: the filter of an I/O thread allows neither seek nor stat.
    let (mut text, mut piece) = (Vec::new(), vec![0; 64 << 10]);
    loop {
        let read = list.read_at(&mut piece, text.len() as u64)?;
        match piece.get(..read) {
            Some(piece @ [_, ..]) => text.extend_from_slice(piece),
            _ => break,
        }
    }
    let text = String::from_utf8_lossy(&text);
    let is_ours = |line: &&str| {
        let mut fields = line.split_ascii_whitespace();
        let start = fields.next().and_then(|field| field.split_once('-')).map(|(start, _)| start);
        let start = start.and_then(|start| u64::from_str_radix(start, 16).ok());
        let inode = fields.nth(3);
        let inside = |start: u64| memory.iter().any(|range| range.contains(&start));
        inode == Some("0") && start.is_some_and(inside)
    };
    Ok(text.lines().filter(is_ours).count())
}

#[cfg(test)]
mod tests {
    use vm_memory::MmapRegion;

    use super::*;

    #[test]
    fn what_is_mapped_is_counted_and_without_a_list_each_counts() {
        let region = MmapRegion::<()>::new(64 << 12).unwrap();
        let start = region.as_ptr().addr() as u64;
        let memory = start..start + (64 << 12);
        let memory = std::slice::from_ref(&memory);
        let mut mappings = Mappings::open();
        assert!(!mappings.are_too_many(memory, MAX_PIECES));
        assert!(mappings.are_too_many(memory, MAX_PIECES + 1));
        mappings.note_made();
        assert!(!mappings.are_too_many(memory, MAX_PIECES));
        assert!(!mappings.are_too_many(memory, 0) && mappings.excess == 0);
        (0..COUNT_AFTER).for_each(|_| mappings.note_made());
        assert!(!mappings.are_too_many(memory, 0));
        assert!(mappings.excess <= 1, "{}", mappings.excess);

        let mut blind = Mappings { list: None, since: 0, excess: 0 };
        for _ in 0..MAX_PIECES {
            assert!(!blind.are_too_many(memory, 1));
            blind.note_made();
        }
        assert!(blind.are_too_many(memory, 1));
    }
}
