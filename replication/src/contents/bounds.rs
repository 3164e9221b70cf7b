//! What a receiver takes.
use std::ops::Range;

use super::PAGE;

/// What a peer may send: anything else is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bounds {
    /// Guest memory: pieces in ascending order, of whole pages, that do not touch.
    pub ram: Vec<Range<u64>>,
    /// The size of each disk, in bytes.
    pub disks: Vec<u64>,
    /// The names of the sections of the machine's state.
    pub sections: Vec<String>,
    /// Most bytes that one epoch may need at the receiver until it is applied: pages unpacked, and
    /// [`Bounds::RECORD`] bytes for each page, range, section and disk write. While the receiver is
    /// being filled and keeps nothing, the sizes of memory and disks are added.
    pub max_epoch: u64,
}

impl Bounds {
    /// What a record needs besides its contents, in bytes.
    pub const RECORD: u64 = 64;

    /// How many pages there are.
    pub(super) fn pages(&self) -> usize {
        let pages = self.ram.iter().map(|range| pages_of(range.end.saturating_sub(range.start)));
        pages.sum()
    }

    /// The number, among all pages, of the first of `pages` pages at `address`, if all of them are
    /// in one piece of memory.
    pub(super) fn place(&self, address: u64, pages: u64) -> Option<Range<usize>> {
        let end = address.checked_add(pages.checked_mul(PAGE as u64)?)?;
        let mut before = 0;
        for range in &self.ram {
            if range.start <= address && end <= range.end {
                let first = before + pages_of(address - range.start);
                return Some(first..first + usize::try_from(pages).ok()?);
            }
            before += pages_of(range.end.saturating_sub(range.start));
        }
        None
    }

    /// Most bytes of one round.
    pub(super) fn most(&self, filling: bool) -> u64 {
        let sizes = self.ram.iter().map(|range| range.end.saturating_sub(range.start));
        let all = sizes.chain(self.disks.iter().copied()).fold(0, u64::saturating_add);
        // Each page needs a record, too.
        let all = if filling { all.saturating_add(all / 4096 * Self::RECORD) } else { 0 };
        self.max_epoch.saturating_add(all)
    }
}

fn pages_of(bytes: u64) -> usize {
    usize::try_from(bytes / PAGE as u64).unwrap_or(usize::MAX)
}
