//! Where RAM is, which part a kernel may use, and the memory map that describes it.
use std::ops::Range;

use devices::Memory;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::KernelError;
use crate::arch::layout;

/// Guest RAM: ranges in ascending order, none touching the next.
pub(crate) struct Ram(Vec<Range<u64>>);

/// Type of a range of the memory map; the values of e820 and of PVH.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Ram = 1,
    Reserved = 2,
}

/// A range of the memory map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Area {
    pub(crate) range: Range<u64>,
    pub(crate) kind: Kind,
}

impl Ram {
    pub(crate) fn of(memory: &Memory) -> Ram {
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

    /// From the first megabyte to the hole: kernels and initrds are loaded here. The boot page
    /// tables and 32-bit addresses reach all of it.
    pub(crate) fn low(&self) -> Range<u64> {
        let start = layout::HIGH_RAM;
        let end =
            self.0.iter().find(|range| range.contains(&start)).map_or(start, |range| range.end);
        start..end.min(layout::HOLE_START)
    }

    /// The end of `len` bytes at `start`, if a kernel may use them.
    pub(crate) fn check(&self, part: &str, start: u64, len: u64) -> Result<u64, KernelError> {
        let low = self.low();
        let end = start.saturating_add(len);
        if low.start <= start && end <= low.end {
            return Ok(end);
        }
        let hint = if start < low.start {
            "link it at 1 MiB or above"
        } else if end > layout::HOLE_START {
            "link it below 3 GiB"
        } else {
            "give the machine more memory (-m)"
        };
        Err(KernelError::DoesNotFit { part: part.to_owned(), start, end, ram: low, hint })
    }

    /// The memory map for e820 and PVH.
    pub(crate) fn map(&self) -> Vec<Area> {
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
        // KVM's own pages: the guest must not place a device there.
        let kvm = layout::KVM_IDENTITY..layout::KVM_TSS.saturating_add(3 * 4096);
        map.push(Area { range: kvm, kind: Kind::Reserved });
        map.sort_by_key(|area| area.range.start);
        map
    }
}
