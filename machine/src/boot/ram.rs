//! Where RAM is, which of it a kernel may use, and the memory map that says so.
use std::fmt;
use std::ops::Range;

use devices::Memory;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::KernelError;
use crate::layout;

/// Guest RAM: ranges in ascending order, none touching the next.
pub(super) struct Ram(Vec<Range<u64>>);

/// What a range of the memory map is; the values of e820 and of PVH.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Ram = 1,
    Reserved = 2,
}

/// A range of the memory map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Area {
    pub(super) range: Range<u64>,
    pub(super) kind: Kind,
}

impl Ram {
    pub(super) fn of(memory: &Memory) -> Ram {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for region in memory.iter() {
            let start = region.start_addr().raw_value();
            let end = start.saturating_add(region.len());
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => ranges.push(start..end),
            }
        }
        Ram(ranges)
    }

    /// The parts that a kernel may use: those above the first megabyte.
    fn usable(&self) -> impl Iterator<Item = Range<u64>> {
        self.0
            .iter()
            .map(|range| range.start.max(layout::HIGH_RAM)..range.end)
            .filter(|range| !range.is_empty())
    }

    /// The part from the first megabyte to the hole, where kernels and initrds are put.
    pub(super) fn low(&self) -> Range<u64> {
        self.usable()
            .find(|range| range.start == layout::HIGH_RAM)
            .unwrap_or(layout::HIGH_RAM..layout::HIGH_RAM)
    }

    /// Says no where `len` bytes at `start` are not all RAM that a kernel may use.
    pub(super) fn check(&self, part: &str, start: u64, len: u64) -> Result<u64, KernelError> {
        let end = start.checked_add(len);
        match end {
            Some(end) if self.usable().any(|range| range.start <= start && end <= range.end) => {
                Ok(end)
            }
            _ => Err(KernelError::DoesNotFit {
                part: part.to_owned(),
                start,
                end: end.unwrap_or(u64::MAX),
                ram: self.to_string(),
            }),
        }
    }

    /// The memory map for e820 and PVH.
    pub(super) fn map(&self) -> Vec<Area> {
        let mut map = Vec::new();
        for range in &self.0 {
            if range.start < layout::EBDA {
                map.push(Area { range: range.start..layout::EBDA, kind: Kind::Ram });
                map.push(Area { range: layout::EBDA..layout::HIGH_RAM, kind: Kind::Reserved });
            }
            let high = range.start.max(layout::HIGH_RAM)..range.end;
            if !high.is_empty() {
                map.push(Area { range: high, kind: Kind::Ram });
            }
        }
        // KVM's own pages: the guest must not put a device there.
        let kvm = layout::KVM_IDENTITY..layout::KVM_TSS.saturating_add(3 * 4096);
        map.push(Area { range: kvm, kind: Kind::Reserved });
        map.sort_by_key(|area| area.range.start);
        map
    }
}

impl fmt::Display for Ram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut none = true;
        for range in self.usable() {
            write!(f, "{}{:#x} to {:#x}", if none { "" } else { " and " }, range.start, range.end)?;
            none = false;
        }
        if none { f.write_str("none") } else { Ok(()) }
    }
}
