//! Guest memory that is given back to the host while the guest runs, and reads as zero afterwards.
//!
//! | memory | how | unit |
//! |---|---|---|
//! | anonymous, or private to this process over an empty file | MADV_DONTNEED | page |
//! | shared: a memfd or a file | MADV_REMOVE | page |
//! | in a hugetlbfs | not at all | |
//! | mapped from a save | replaced by anonymous memory, once; then MADV_DONTNEED | 64 KiB |
//! | filled when it is touched (userfaultfd) | MADV_DONTNEED, then filled with zeros | page |
//!
//! A page of a hugetlbfs that was given back would have to come from the pool again when the guest
//! touches it, and if another process has emptied the pool meanwhile, that kills the monitor. Where
//! the kernel keeps a page reserved against that (a private mapping, since Linux 6.8), no other
//! process can use it either.
//!
//! Memory that is mapped from a save would read as the file's contents again after MADV_DONTNEED.
//! Its replacement is a further mapping of the process, which may have 65,530 (vm.max_map_count):
//! so the number of pieces is limited, and beyond that nothing is replaced that would add a piece.
mod mappings;
#[cfg(test)]
mod tests;
mod units;

use std::{
    io,
    ops::Range,
    sync::{
        Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use config::MemoryConfig;
use devices::{Memory, reclaim::Reclaim};
use parking_lot::Mutex;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
    bitmap::{AtomicBitmap, Bitmap},
};

use self::{
    mappings::Mappings,
    units::{Step, Units},
};
use super::{advise, advise_huge_pages, fault::Filler, image::PAGE_SIZE, origin::Origin, replace};

/// Bytes of a unit of memory that is mapped from a save.
const MAPPED_UNIT: u64 = 64 << 10;
/// Most pieces of such memory that are replaced.
const MAX_PIECES: usize = 4096;

/// What was done with memory to be given back, in bytes.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Given back.
    pub taken: u64,
    /// Not given back: the host refused, or there would have been too many pieces.
    pub refused: u64,
}

/// Gives memory of one machine back to the host, for its devices.
pub struct Reclaimer {
    memory: Memory,
    /// Addresses of its regions in this process.
    addresses: Vec<Range<u64>>,
    config: MemoryConfig,
    /// A lock: devices on several I/O threads may give memory back at the same time, and share this
    /// state.
    method: Mutex<Method>,
    taken: AtomicU64,
    refused: AtomicU64,
}

/// How memory is given back.
enum Method {
    /// With this advice, page by page.
    Pages(i32),
    /// It is in a hugetlbfs and stays there.
    Kept,
    /// By replacing it. With the units of each region, which are set up when first needed.
    Mapped(Mappings, Vec<Units>),
    /// These ranges are filled by the filler.
    Missing(Vec<Range<u64>>, Weak<Filler>),
}

type Region = GuestRegionMmap<AtomicBitmap>;

impl Reclaimer {
    /// For `memory`, made from `config`, with contents from `origin`.
    pub fn new(memory: &Memory, config: &MemoryConfig, origin: Origin) -> Self {
        let method = match origin {
            Origin::Written => Method::of_written(memory, config),
            Origin::Mapped => Method::Mapped(Mappings::open(), Vec::new()),
            Origin::Missing(ranges, filler) => Method::Missing(ranges, filler),
        };
        let address = |region: &Region| {
            let start = region.as_ptr().addr() as u64;
            start..start + region.len()
        };
        Self {
            memory: memory.clone(),
            addresses: memory.iter().map(address).collect(),
            config: config.clone(),
            method: Mutex::new(method),
            taken: AtomicU64::default(),
            refused: AtomicU64::default(),
        }
    }

    /// Bytes given back and refused so far.
    pub fn counts(&self) -> Counts {
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Counts { taken: load(&self.taken), refused: load(&self.refused) }
    }

    /// Record that all of the memory was cleared, as by [`super::clear`], so that its origin does
    /// not matter any more.
    pub fn note_cleared(&self) {
        *self.method.lock() = Method::of_written(&self.memory, &self.config);
    }

    /// Call `act` for each part of a range of guest addresses, reduced to whole pages.
    fn each_part(&self, at: GuestAddress, len: u64, mut act: impl FnMut(Part<'_>)) {
        let start = at.0.checked_next_multiple_of(PAGE_SIZE).unwrap_or(u64::MAX);
        let end = at.0.saturating_add(len) / PAGE_SIZE * PAGE_SIZE;
        let mut base = 0;
        for (index, region) in self.memory.iter().enumerate() {
            let first = region.start_addr().0;
            let inside = start.max(first)..end.min(first.saturating_add(region.len()));
            if inside.start < inside.end {
                let bytes = inside.start - first..inside.end - first;
                let addresses = &self.addresses;
                act(Part { region, index, base, bytes, addresses });
            }
            base += region.len();
        }
    }

    fn take(&self, at: GuestAddress, len: u64, withhold: bool) {
        let mut method = self.method.lock();
        method.prepare(&self.memory);
        self.each_part(at, len, |part| {
            if withhold && let Some(units) = method.units(part.index) {
                units.withhold(&part.bytes, true);
            }
            for (bytes, result) in method.take(&part, &self.config) {
                let len = bytes.end - bytes.start;
                match result {
                    Ok(()) => {
                        // Marked after the discard, so that a copy of the earlier contents is known
                        // to be stale.
                        mark_dirty(part.region, &bytes);
                        self.taken.fetch_add(len, Ordering::Relaxed);
                    }
                    Err(e) => {
                        if self.refused.fetch_add(len, Ordering::Relaxed) == 0 {
                            log::warn!(
                                "cannot return all of the guest's unused memory to the \
                                        host: {e}"
                            );
                        }
                    }
                }
            }
        });
    }
}

impl Reclaim for Reclaimer {
    fn discard(&self, at: GuestAddress, len: u64) {
        self.take(at, len, false);
    }

    fn withhold(&self, at: GuestAddress, len: u64) {
        self.take(at, len, true);
    }

    fn release(&self, at: GuestAddress, len: u64) {
        let mut method = self.method.lock();
        // Pages that are only partly in the range are in use, too.
        let start = at.0 / PAGE_SIZE * PAGE_SIZE;
        let len = len.saturating_add(at.0 - start).checked_next_multiple_of(PAGE_SIZE);
        self.each_part(GuestAddress(start), len.unwrap_or(u64::MAX), |part| {
            if let Some(units) = method.units(part.index) {
                units.withhold(&part.bytes, false);
            }
        });
    }

    fn release_all(&self) {
        if let Method::Mapped(_, units) = &mut *self.method.lock() {
            units.iter_mut().for_each(Units::release_all);
        }
    }
}

/// A part of a range of guest memory.
struct Part<'m> {
    region: &'m Region,
    /// The region's index.
    index: usize,
    /// Offset of the region in the memory file.
    base: u64,
    /// Offsets from the region's start.
    bytes: Range<u64>,
    /// Addresses of all regions in this process.
    addresses: &'m [Range<u64>],
}

impl Part<'_> {
    /// The result for a part whose region is unknown: not taken.
    fn unknown(&self) -> Vec<Taken> {
        vec![(self.bytes.clone(), Err(io::Error::other("unknown memory region")))]
    }
}

/// Offsets from a region's start, and whether they could be given back.
type Taken = (Range<u64>, io::Result<()>);

impl Method {
    /// The method for memory that is not mapped from a save and has no filler.
    fn of_written(memory: &Memory, config: &MemoryConfig) -> Self {
        let advice = match config.shared {
            true => libc::MADV_REMOVE,
            false => libc::MADV_DONTNEED,
        };
        match config.path.is_some() && memory.iter().any(is_in_hugetlbfs) {
            true => Self::Kept,
            false => Self::Pages(advice),
        }
    }

    /// Set up the units of all regions.
    fn prepare(&mut self, memory: &Memory) {
        if let Self::Mapped(_, all) = self
            && all.is_empty()
        {
            all.extend(memory.iter().map(|region| Units::new(region.len(), MAPPED_UNIT)));
        }
    }

    /// The units of a region, if memory is given back in units.
    fn units(&mut self, index: usize) -> Option<&mut Units> {
        match self {
            Self::Mapped(_, all) => all.get_mut(index),
            _ => None,
        }
    }

    /// Give back as much of a part as possible; returns what was taken and what the host refused.
    fn take(&mut self, part: &Part<'_>, config: &MemoryConfig) -> Vec<Taken> {
        let Part { region, bytes, .. } = part;
        match self {
            Self::Pages(advice) => vec![(bytes.clone(), give_back(region, bytes, *advice))],
            Self::Kept => {
                let why = "it is in a hugetlbfs, whose pages stay with the machine";
                vec![(bytes.clone(), Err(io::Error::other(why)))]
            }
            Self::Mapped(mappings, all) => take_mapped(part, config, mappings, all),
            Self::Missing(ranges, filler) => {
                let Some(filler) = filler.upgrade() else {
                    // All missing memory has been filled.
                    *self = Self::Pages(libc::MADV_DONTNEED);
                    return self.take(part, config);
                };
                take_missing(part, ranges, &filler)
            }
        }
    }
}

fn take_mapped(
    part: &Part<'_>,
    config: &MemoryConfig,
    mappings: &mut Mappings,
    all: &mut [Units],
) -> Vec<Taken> {
    let Some(units) = all.get(part.index) else { return part.unknown() };
    let steps = units.steps(&part.bytes);
    let mut taken = Vec::with_capacity(steps.len());
    for step in steps {
        let pieces = all.iter().map(Units::pieces).sum::<usize>();
        let Some(units) = all.get_mut(part.index) else { return taken };
        let (bytes, result) = match step {
            Step::Release(bytes) => {
                let result = give_back(part.region, &bytes, libc::MADV_DONTNEED);
                (bytes, result)
            }
            Step::Replace(bytes) => {
                let pieces = pieces + units.pieces_with(&bytes) - units.pieces();
                let result = match mappings.are_too_many(part.addresses, pieces) {
                    true => Err(io::Error::other("it is mapped in too many pieces already")),
                    false => replace_with_zeros(part.region, &bytes, config),
                };
                if result.is_ok() {
                    units.note_replaced(&bytes);
                    mappings.note_made();
                }
                (bytes, result)
            }
        };
        taken.push((bytes, result));
    }
    taken
}

/// The filler has to discard its ranges itself; all else is plain memory.
fn take_missing(part: &Part<'_>, ranges: &[Range<u64>], filler: &Filler) -> Vec<Taken> {
    let Part { region, base, bytes, .. } = part;
    let (mut at, end) = (base + bytes.start, base + bytes.end);
    let first = ranges.partition_point(|range| range.end <= at);
    let mut ranges = ranges.iter().skip(first);
    let mut taken = Vec::new();
    while at < end {
        let missing = ranges.next().map_or(end..end, |r| r.start.clamp(at, end)..r.end.min(end));
        let within = |image: Range<u64>| image.start - base..image.end - base;
        if at < missing.start {
            let plain = within(at..missing.start);
            let result = give_back(region, &plain, libc::MADV_DONTNEED);
            taken.push((plain, result));
        }
        if !missing.is_empty() {
            let result = filler.discard(&missing);
            taken.push((within(missing.clone()), result));
        }
        at = missing.end.max(at);
    }
    taken
}

/// Whether the file behind `region` is in a hugetlbfs.
fn is_in_hugetlbfs(region: &Region) -> bool {
    let status = region.file_offset().and_then(|at| rustix::fs::fstatfs(at.file()).ok());
    status.is_some_and(|status| status.f_type == libc::HUGETLBFS_MAGIC)
}

fn mark_dirty(region: &Region, bytes: &Range<u64>) {
    if let (Ok(at), Ok(len)) =
        (usize::try_from(bytes.start), usize::try_from(bytes.end - bytes.start))
    {
        let mapping: &MmapRegion<AtomicBitmap> = region;
        mapping.bitmap().mark_dirty(at, len);
    }
}

/// Advise the kernel to discard these bytes of `region`.
fn give_back(region: &Region, bytes: &Range<u64>, advice: i32) -> io::Result<()> {
    let (address, size) = within(region, bytes)?;
    // SAFETY: the bytes are the region's own mapping, which stays; the guest has requested that
    // their contents be discarded, and the monitor only accesses guest memory as volatile.
    match unsafe { libc::madvise(address.cast(), size, advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Replace these bytes of `region` by anonymous memory with the same advice.
fn replace_with_zeros(
    region: &Region,
    bytes: &Range<u64>,
    config: &MemoryConfig,
) -> io::Result<()> {
    let (address, size) = within(region, bytes)?;
    // SAFETY: the bytes are the region's own mapping; the replacement is as large and as
    // accessible, and is unmapped with the region. The guest has requested that their contents be
    // discarded, and the monitor only accesses guest memory as volatile.
    unsafe { replace(address, size) }?;
    let start = usize::try_from(bytes.start).map_err(io::Error::other)?;
    advise_huge_pages(region, config, start..start + size);
    if !config.dump {
        advise(region, start..start + size, libc::MADV_DONTDUMP);
    }
    Ok(())
}

/// Address and length of these bytes of `region`, which must be inside of it.
fn within(region: &Region, bytes: &Range<u64>) -> io::Result<(*mut u8, usize)> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
    if bytes.start >= bytes.end || bytes.end > region.len() {
        return Err(invalid());
    }
    let start = usize::try_from(bytes.start).map_err(|_| invalid())?;
    let size = usize::try_from(bytes.end - bytes.start).map_err(|_| invalid())?;
    let mapping: &MmapRegion<AtomicBitmap> = region;
    Ok((mapping.as_ptr().wrapping_add(start), size))
}
