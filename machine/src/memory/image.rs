//! Guest memory as one flat memory file: the guest's RAM ranges one after another, without the
//! holes in the address space. Saved states store it in this form.
use std::{
    fs::File,
    io,
    ops::Range,
    os::{fd::AsRawFd, unix::fs::FileExt},
};

use config::MemoryConfig;
use devices::Memory;
use state::sparse;
use vm_memory::{
    Bytes, FileOffset, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress,
    MmapRegion, bitmap::AtomicBitmap, mmap::MmapRegionBuilder,
};

use super::{MemoryError, PAGE, advise, populate, ranges};

/// Bytes of a page.
pub const PAGE_SIZE: u64 = 4096;

/// Map guest memory from `file`, private to this process: pages are read when the guest first
/// touches them, so this takes no longer for a large guest than for a small one. The file must not
/// change for as long as the machine lives.
///
/// Each range of `overlays` is mapped from the same range of its own file instead. The ranges
/// consist of whole pages; a later one takes precedence.
///
/// # Errors
/// When the host cannot map it.
pub fn map(
    config: &MemoryConfig,
    file: &File,
    overlays: &[(Range<u64>, &File)],
) -> Result<Memory, MemoryError> {
    let mib = config.size.bytes() >> 20;
    let failed = |source: io::Error| MemoryError::Map { mib, source };
    let mut offset = 0;
    let mut regions = Vec::new();
    for (start, len) in ranges(config.size.bytes()) {
        let size = usize::try_from(len).map_err(|_| MemoryError::Layout)?;
        let file = FileOffset::new(file.try_clone().map_err(failed)?, offset);
        let region = MmapRegionBuilder::new_with_bitmap(size, AtomicBitmap::new(size, PAGE))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
            .with_file_offset(file)
            .build()
            .map_err(|e| failed(io::Error::other(e)))?;
        for (range, file) in overlays {
            let inside = range.start.max(offset)..range.end.min(offset + len);
            if !inside.is_empty() {
                overlay(&region, inside.start - offset, inside, file).map_err(failed)?;
            }
        }
        if !config.dump {
            advise(&region, 0..region.size(), libc::MADV_DONTDUMP);
        }
        regions.push(GuestRegionMmap::new(region, start).ok_or(MemoryError::Layout)?);
        offset += len;
    }
    let memory = Memory::from_regions(regions).map_err(|_| MemoryError::Layout)?;
    populate(&memory, config)?;
    Ok(memory)
}

/// Map the bytes of `region` from `at` on to `range` of `file`.
fn overlay(
    region: &MmapRegion<AtomicBitmap>,
    at: u64,
    range: Range<u64>,
    file: &File,
) -> io::Result<()> {
    let len = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
    let at = usize::try_from(at).map_err(io::Error::other)?;
    let offset = libc::off_t::try_from(range.start).map_err(io::Error::other)?;
    if at.checked_add(len).is_none_or(|end| end > region.size()) {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_NORESERVE;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: at..at + len is inside of the region's own mapping, and nothing refers to it yet; the
    // new mapping is as accessible and is unmapped with the region.
    let to = unsafe {
        let address = region.as_ptr().add(at);
        libc::mmap(address.cast(), len, protection, flags, file.as_raw_fd(), offset)
    };
    if to == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Copy `buf.len()` bytes from guest memory, from `offset` in the memory file on.
///
/// # Errors
/// When the range is not all inside.
pub fn read(memory: &Memory, offset: u64, buf: &mut [u8]) -> io::Result<()> {
    let mut rest = buf;
    each_piece(memory, offset, rest.len(), |region, at, len| {
        let (piece, after) = std::mem::take(&mut rest).split_at_mut(len);
        rest = after;
        region.read_slice(piece, at).map_err(io::Error::other)
    })
}

/// Copy `buf` into guest memory, from `offset` in the memory file on.
///
/// # Errors
/// When the range is not all inside.
pub fn write(memory: &Memory, offset: u64, buf: &[u8]) -> io::Result<()> {
    let mut rest = buf;
    each_piece(memory, offset, rest.len(), |region, at, len| {
        let (piece, after) = rest.split_at(len);
        rest = after;
        region.write_slice(piece, at).map_err(io::Error::other)
    })
}

/// Where the guest-physical `address` is in the memory file, if it is memory.
pub fn offset(memory: &Memory, address: u64) -> Option<u64> {
    let mut base = 0;
    for region in memory.iter() {
        match address.checked_sub(region.start_addr().0) {
            Some(inside) if inside < region.len() => return Some(base + inside),
            _ => base += region.len(),
        }
    }
    None
}

type Region = GuestRegionMmap<AtomicBitmap>;

/// Split `offset..offset + len` by region.
fn each_piece(
    memory: &Memory,
    offset: u64,
    len: usize,
    mut act: impl FnMut(&Region, MemoryRegionAddress, usize) -> io::Result<()>,
) -> io::Result<()> {
    let (mut base, mut from, mut left) = (0u64, offset, len as u64);
    for region in memory.iter() {
        let end = base + region.len();
        if left > 0 && from >= base && from < end {
            let piece = left.min(end - from);
            let size = usize::try_from(piece).map_err(io::Error::other)?;
            act(region, MemoryRegionAddress(from - base), size)?;
            from += piece;
            left -= piece;
        }
        base = end;
    }
    if left > 0 { Err(io::Error::from(io::ErrorKind::UnexpectedEof)) } else { Ok(()) }
}

/// The page ranges of the memory file that may not be zero: pages that this process has touched,
/// those with data in the file behind them, and `filled`, which are not zero although they may not
/// have been touched. All others read as zero. Ascending, none empty.
///
/// # Errors
/// When the kernel does not report them.
pub fn used(memory: &Memory, filled: &[Range<u64>]) -> io::Result<Vec<Range<u64>>> {
    check_files(memory)?;
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut used = Vec::new();
    let mut base = 0;
    for region in memory.iter() {
        let mut found = touched(&pagemap, region)?;
        if let Some(behind) = region.file_offset() {
            found.extend(sparse::data(behind.file(), behind.start(), region.len())?);
            found.sort_unstable_by_key(|r| r.start);
        }
        for range in found {
            let end = range.end.next_multiple_of(PAGE_SIZE).min(region.len());
            push(&mut used, base + range.start / PAGE_SIZE * PAGE_SIZE..base + end);
        }
        base += region.len();
    }
    Ok(union(&used, filled))
}

/// The union of `a` and `b`, both ascending.
pub fn union(a: &[Range<u64>], b: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut all: Vec<_> = a.iter().chain(b).collect();
    all.sort_unstable_by_key(|r| r.start);
    let mut joined = Vec::with_capacity(all.len());
    all.into_iter().for_each(|range| push(&mut joined, range.clone()));
    joined
}

/// Check that the files that memory is mapped from have not been truncated: pages cut off are lost
/// to the guest, too, and do not read as zero.
///
/// # Errors
/// When one is too short.
pub fn check_files(memory: &Memory) -> io::Result<()> {
    for behind in memory.iter().filter_map(|region| Some((region.file_offset()?, region.len()))) {
        let (there, end) = (behind.0.file().metadata()?.len(), behind.0.start() + behind.1);
        if there < end {
            return Err(io::Error::other(format!(
                "the file that guest memory is mapped from was truncated: {there} of {end} bytes \
                 are left"
            )));
        }
    }
    Ok(())
}

/// The dirty page ranges of the memory file: those in `by_vcpus`, which has a bit per page for each
/// region, and those that devices have written since the last call. Ascending, none empty.
///
/// # Errors
/// When `by_vcpus` does not cover all pages of `memory`.
pub fn dirty(memory: &Memory, by_vcpus: &[Vec<u64>]) -> io::Result<Vec<Range<u64>>> {
    let words = memory.iter().map(|region| (region.len() / PAGE_SIZE).div_ceil(64));
    if !by_vcpus.iter().map(|words| words.len() as u64).eq(words) {
        return Err(io::Error::other("the dirty log does not match the size of memory"));
    }
    let mut dirty = Vec::new();
    let mut base = 0;
    for (region, vcpus) in memory.iter().zip(by_vcpus) {
        let mapping: &MmapRegion<AtomicBitmap> = region;
        let devices = mapping.bitmap().get_and_reset();
        let devices = devices.iter().copied().chain(std::iter::repeat(0));
        for (word, (vcpus, devices)) in (0u64..).zip(vcpus.iter().zip(devices)) {
            let mut bits = vcpus | devices;
            while bits != 0 {
                let at = base + (word * 64 + u64::from(bits.trailing_zeros())) * PAGE_SIZE;
                push(&mut dirty, at..at + PAGE_SIZE);
                bits &= bits - 1;
            }
        }
        base += region.len();
    }
    Ok(dirty)
}

/// Clear the bitmap of pages written by devices.
pub fn forget_dirty(memory: &Memory) {
    for region in memory.iter() {
        let mapping: &MmapRegion<AtomicBitmap> = region;
        mapping.bitmap().reset();
    }
}

/// Append a range that does not begin before the last one.
fn push(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
        _ => ranges.push(range),
    }
}

/// Pages of `region` that are in memory or in swap (Linux, Documentation/admin-guide/mm/pagemap).
fn touched(pagemap: &File, region: &Region) -> io::Result<Vec<Range<u64>>> {
    const PRESENT_OR_SWAPPED: u64 = 3 << 62;
    let mapping: &MmapRegion<AtomicBitmap> = region;
    let first = mapping.as_ptr() as u64 / PAGE_SIZE;
    let pages = region.len() / PAGE_SIZE;
    let mut touched = Vec::new();
    let mut buf = vec![0u8; 128 << 10];
    let mut page = 0;
    while page < pages {
        let entries = (pages - page).min(buf.len() as u64 / 8);
        let len = usize::try_from(entries * 8).map_err(io::Error::other)?;
        let (buf, _) = buf.split_at_mut(len);
        pagemap.read_exact_at(buf, (first + page) * 8)?;
        for entry in buf.as_chunks::<8>().0 {
            if u64::from_ne_bytes(*entry) & PRESENT_OR_SWAPPED != 0 {
                push(&mut touched, page * PAGE_SIZE..(page + 1) * PAGE_SIZE);
            }
            page += 1;
        }
    }
    Ok(touched)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::GuestAddress;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn config(size: u64) -> MemoryConfig {
        let size = size.try_into().unwrap();
        MemoryConfig::new(size)
    }

    #[test]
    fn the_image_leaves_the_hole_in_the_address_space_out() {
        let high = 3 * 1024 * MIB;
        let memory = super::super::allocate(&config(high + 4 * MIB)).unwrap();
        memory.write_slice(b"below", GuestAddress(high - 5)).unwrap();
        memory.write_slice(b"above", GuestAddress(4 << 30)).unwrap();
        let mut buf = [0; 10];
        read(&memory, high - 5, &mut buf).unwrap();
        assert_eq!(&buf, b"belowabove");
        write(&memory, high - 2, b"WABO").unwrap();
        memory.read_slice(&mut buf[..5], GuestAddress(4 << 30)).unwrap();
        assert_eq!(&buf[..5], b"BOove");
        assert!(read(&memory, high + 4 * MIB - 1, &mut [0; 2]).is_err());
        let used = used(&memory, &[]).unwrap();
        let inside = |at: u64| used.iter().any(|r| r.contains(&at));
        assert!(inside(high - 1) && inside(high) && !inside(high / 2));
    }

    #[test]
    fn what_lies_in_the_file_is_used_although_nobody_has_touched_it() {
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(32 * MIB).unwrap();
        file.write_all_at(b"x", 5 * MIB).unwrap();
        file.flush().unwrap();
        let memory = map(&config(32 * MIB), &file, &[]).unwrap();
        memory.write_obj(1u8, GuestAddress(20 * MIB)).unwrap();
        let used = used(&memory, std::slice::from_ref(&(24 * MIB..25 * MIB))).unwrap();
        assert!(used.contains(&(24 * MIB..25 * MIB)), "{used:?}");
        let inside = |at: u64| used.iter().any(|r| r.contains(&at));
        assert!(inside(5 * MIB) && inside(20 * MIB) && !inside(12 * MIB), "{used:?}");
        let mut byte = [0];
        read(&memory, 5 * MIB, &mut byte).unwrap();
        assert_eq!(&byte, b"x");
        file.read_exact_at(&mut byte, 20 * MIB).unwrap();
        assert_eq!(byte, [0], "the guest's writes stay out of the file");
        super::super::clear(&memory, &config(32 * MIB)).unwrap();
        read(&memory, 5 * MIB, &mut byte).unwrap();
        assert_eq!(byte, [0], "a cleared memory is zero, whatever the file holds");
    }

    #[test]
    fn overlays_count_in_their_ranges_on_both_sides_of_the_hole() {
        let high = 3 * 1024 * MIB;
        let size = high + 4 * MIB;
        let file = |mark: &[u8]| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(size).unwrap();
            for at in [0, MIB, high - 1, high, high + MIB] {
                file.write_all_at(mark, at).unwrap();
            }
            file
        };
        let (base, over, last) = (file(b"b"), file(b"o"), file(b"l"));
        let overlays = [
            (MIB..MIB + PAGE_SIZE, &over),
            (high - MIB..high + MIB, &over),
            (high..high + PAGE_SIZE, &last),
        ];
        let memory = map(&config(size), &base, &overlays).unwrap();
        let marks = [0, MIB, high - 1, high, high + MIB].map(|at| {
            let mut byte = [0];
            read(&memory, at, &mut byte).unwrap();
            byte[0]
        });
        assert_eq!(&marks, b"boolb");
    }

    #[test]
    fn a_log_of_another_size_is_an_error_and_not_less_memory() {
        let memory = super::super::allocate(&config(16 * MIB)).unwrap();
        let words = usize::try_from(16 * MIB / PAGE_SIZE / 64).unwrap();
        assert_eq!(dirty(&memory, &[vec![1; words]]).unwrap().len(), words);
        for wrong in [vec![], vec![vec![0; words - 1]], vec![vec![0; words], vec![]]] {
            assert!(dirty(&memory, &wrong).is_err());
        }
    }
}
