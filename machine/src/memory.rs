//! Guest memory: its allocation and layout.
// UNSAFETY: advice about the mappings goes to the kernel by address.
#![expect(unsafe_code, reason = "madvise, and mappings with flags of our own")]
use std::{
    fs::{File, OpenOptions},
    io::{self, Read},
    ops::Range,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use config::{MemoryConfig, Thp, types::MemorySize};
use devices::{Memory, random};
use rustix::{fs::MemfdFlags, io::Errno};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
    bitmap::AtomicBitmap, mmap::MmapRegionBuilder,
};

use crate::layout;

pub(crate) mod dirty_logs;
pub mod fault;
pub mod image;
pub mod origin;
pub mod own;
pub mod reclaim;
pub mod staging;

const PAGE: std::num::NonZeroUsize = std::num::NonZeroUsize::MIN.saturating_add(4095);

/// Why guest memory could not be had.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the error messages describe them")]
pub enum MemoryError {
    #[error(
        "{asked} MiB of guest memory requested; this host has {available} MiB available: request \
         less with -m"
    )]
    TooMuch { asked: u64, available: u64 },
    #[error("cannot open {path} for guest memory")]
    Open { path: PathBuf, source: io::Error },
    #[error(
        "cannot allocate all of the guest's memory in {path} ({mib} MiB); for hugetlbfs, reserve \
         pages: sysctl vm.nr_hugepages={pages}"
    )]
    Grow { path: PathBuf, mib: u64, pages: u64, source: io::Error },
    #[error(
        "{path} is neither a file nor a directory: guest memory can be in a file that is empty or \
         does not exist yet, or in a directory, such as a hugetlbfs mount"
    )]
    Kind { path: PathBuf },
    #[error(
        "{path} is not empty, and guest memory starts empty: name a file that is empty or does not \
         exist yet, or a directory; if its contents are not needed: rm {path}"
    )]
    Contents { path: PathBuf },
    #[error("cannot map {mib} MiB of guest memory")]
    Map { mib: u64, source: io::Error },
    #[error("guest memory has inconsistent regions")]
    Layout,
}

/// The guest physical ranges that hold `size` bytes of RAM: up to the hole, the rest above it.
pub fn ranges(size: u64) -> Vec<(GuestAddress, u64)> {
    let low = size.min(layout::HOLE_START);
    let mut ranges = vec![(GuestAddress(0), low)];
    if size > low {
        ranges.push((GuestAddress(layout::HOLE_END), size - low));
    }
    ranges
}

/// Bytes of a huge page, the larger of the two page sizes that the kernel picks without hugetlbfs.
pub const HUGE_PAGE: u64 = 2 << 20;

/// Allocate guest memory as `config` asks.
///
/// # Errors
/// When the host does not have it. A request for more than is available fails here, rather than by
/// the kernel's out-of-memory killer later.
pub fn allocate(config: &MemoryConfig) -> Result<Memory, MemoryError> {
    let memory = allocate_for_little(config)?;
    populate(&memory, config)?;
    Ok(memory)
}

/// As [`allocate`], but with small pages until [`populate`]: a guest whose kernel is smaller than a
/// huge page would have two or three of those zeroed at each start and never fill them.
///
/// # Errors
/// As [`allocate`].
pub(crate) fn allocate_for_little(config: &MemoryConfig) -> Result<Memory, MemoryError> {
    if config.path.is_none()
        && let Some(available) = available()
        && config.size.bytes() > available
    {
        let (asked, available) = (config.size.bytes() >> 20, available >> 20);
        return Err(MemoryError::TooMuch { asked, available });
    }
    map(config)
}

/// As much memory as a kernel may be loaded into on a machine of `size` bytes. The host may have
/// less.
pub(crate) fn scratch(size: MemorySize) -> Result<Memory, MemoryError> {
    let size = MemorySize::try_from(layout::HOLE_START).map_or(size, |below| size.min(below));
    map(&MemoryConfig { dump: false, ..MemoryConfig::new(size) })
}

/// The address ranges of `size` bytes of guest memory, without usable contents: for comparisons
/// only.
pub(crate) fn addresses(size: MemorySize) -> Result<Memory, MemoryError> {
    map(&MemoryConfig { dump: false, ..MemoryConfig::new(size) })
}

fn map(config: &MemoryConfig) -> Result<Memory, MemoryError> {
    let mib = config.size.bytes() >> 20;
    let file = match &config.path {
        Some(path) => Some(backing_file(path, config.size.bytes())?),
        None if config.shared => Some(memfd(config.size.bytes())?),
        None => None,
    };
    // A file given by path is private to this VM unless sharing is asked for, as with QEMU.
    let shared = if config.shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
    let mut offset = 0;
    let mut regions = Vec::new();
    for (start, len) in ranges(config.size.bytes()) {
        let map_error = |e: io::Error| MemoryError::Map { mib, source: e };
        let size = usize::try_from(len).map_err(|_| MemoryError::Layout)?;
        let mut builder = MmapRegionBuilder::new_with_bitmap(size, AtomicBitmap::new(size, PAGE))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
        // For a path, pages are reserved now: a huge page that is missing later would end the VM.
        let reserve = if config.path.is_some() { 0 } else { libc::MAP_NORESERVE };
        builder = match &file {
            Some(file) => builder
                .with_mmap_flags(shared | reserve)
                .with_file_offset(FileOffset::new(file.try_clone().map_err(map_error)?, offset)),
            None => builder
                .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE),
        };
        let region = builder.build().map_err(|e| match &config.path {
            Some(path) => grow_error(path, config.size.bytes())(io::Error::other(e)),
            None => map_error(io::Error::other(e)),
        })?;
        if !config.dump {
            advise(&region, 0..region.size(), libc::MADV_DONTDUMP);
        }
        regions.push(GuestRegionMmap::new(region, start).ok_or(MemoryError::Layout)?);
        offset += len;
    }
    Memory::from_regions(regions).map_err(|_| MemoryError::Layout)
}

/// Zero all of `memory`, which was made from `config`, and give its pages back to the host.
///
/// # Errors
/// When the kernel refuses; memory may be partly cleared then.
pub fn clear(memory: &Memory, config: &MemoryConfig) -> io::Result<()> {
    empty(memory, config)?;
    if config.shared && config.path.is_some() {
        memory.iter().try_for_each(reserve_again)?;
    }
    populate(memory, config).map_err(io::Error::other)
}

fn empty(memory: &Memory, config: &MemoryConfig) -> io::Result<()> {
    // Pages of a shared mapping live in its file: only punching a hole there frees them.
    let advice = if config.shared { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
    for region in memory.iter() {
        let (address, size) = (region.as_ptr(), region.size());
        if !config.shared && config.path.is_none() {
            // Replaced, not given back: pages that are filled from a saved state would be filled
            // again.
            // SAFETY: the region's own mapping; the guest is paused, and what it loses is what the
            // caller asked for.
            unsafe { replace(address, size) }?;
        // SAFETY: the range is the region's own mapping; the guest is paused, and what it loses is
        // what the caller asked for.
        } else if unsafe { libc::madvise(address.cast(), size, advice) } != 0 {
            return Err(io::Error::last_os_error());
        }
        if !config.dump {
            advise(region, 0..region.size(), libc::MADV_DONTDUMP);
        }
    }
    Ok(())
}

/// In a hugetlbfs, a hole in a file has no pages reserved any more, and the guest's next access
/// would end the machine if there were none. A new shared mapping reserves them, for as long as
/// there is the file.
fn reserve_again(region: &GuestRegionMmap<AtomicBitmap>) -> io::Result<()> {
    let Some(at) = region.file_offset() else { return Ok(()) };
    let at = FileOffset::new(at.file().try_clone()?, at.start());
    let mapping = MmapRegionBuilder::<()>::new(region.size())
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED)
        .with_file_offset(at);
    mapping.build().map(drop).map_err(|e| {
        let lost = "no huge pages are left for the guest after a reset; raise vm.nr_hugepages";
        io::Error::other(format!("{lost}: {e}"))
    })
}

/// Replace the mapping at `address` by anonymous memory, which is zero.
///
/// # Safety
/// All `size` bytes there must be guest memory, and code that accesses them must expect their
/// contents to change.
unsafe fn replace(address: *mut u8, size: usize) -> io::Result<()> {
    let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the new mapping is as large and as accessible as the old one; the caller ensures the
    // rest.
    let to = unsafe { libc::mmap(address.cast(), size, protection, flags, -1, 0) };
    if to == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Empty the file behind a machine's memory, as it was at the start: another machine may use it.
/// The machine does not run any more.
pub fn leave_empty(memory: &Memory, config: &MemoryConfig) {
    if config.path.is_none() || !config.shared {
        return;
    }
    if let Err(e) = empty(memory, config) {
        log::warn!("cannot discard the contents of the guest memory file: {e}");
    }
}

/// Bytes of RAM in `memory`.
pub fn size(memory: &Memory) -> u64 {
    memory.iter().map(GuestMemoryRegion::len).sum()
}

/// From now on, use pages of the size that `config` wants for `memory`, and populate it if it is to
/// be preallocated.
///
/// # Errors
/// When the host cannot provide the pages.
pub(crate) fn populate(memory: &Memory, config: &MemoryConfig) -> Result<(), MemoryError> {
    for region in memory.iter() {
        advise_huge_pages(region, config, 0..region.size());
        if config.prealloc && !advise(region, 0..region.size(), libc::MADV_POPULATE_WRITE) {
            let source = io::Error::last_os_error();
            return Err(MemoryError::Map { mib: config.size.bytes() >> 20, source });
        }
    }
    Ok(())
}

/// Advise huge pages for these bytes of `region`, unless the configuration names a file, which
/// decides that.
fn advise_huge_pages(
    region: &GuestRegionMmap<AtomicBitmap>,
    config: &MemoryConfig,
    bytes: Range<usize>,
) {
    if config.path.is_none() {
        // Fewer, larger page faults; a host without transparent huge pages returns EINVAL. The
        // first huge page holds tables, and little of a guest.
        let low = match config.thp {
            Thp::Off => bytes.end,
            Thp::Auto | Thp::On if region.start_addr().0 == 0 => HUGE_PAGE as usize,
            Thp::Auto | Thp::On => 0,
        };
        advise(region, bytes.start.max(low)..bytes.end, libc::MADV_HUGEPAGE);
        advise(region, bytes.start..bytes.end.min(low), libc::MADV_NOHUGEPAGE);
    }
}

/// Advise the kernel about these bytes of `region`; returns whether it accepts.
fn advise(region: &MmapRegion<AtomicBitmap>, bytes: Range<usize>, advice: i32) -> bool {
    let end = bytes.end.min(region.size());
    let Some(size) = end.checked_sub(bytes.start).filter(|size| *size > 0) else { return true };
    // SAFETY: the range is this region's own mapping, and none of these advices changes its
    // contents.
    unsafe { libc::madvise(region.as_ptr().wrapping_add(bytes.start).cast(), size, advice) == 0 }
}

/// Memory that the host could still provide, by its own estimate.
fn available() -> Option<u64> {
    // Among the first lines, each of which is shorter than 32 bytes.
    let mut meminfo = [0; 256];
    let length = File::open("/proc/meminfo").and_then(|mut file| file.read(&mut meminfo)).ok()?;
    let meminfo = std::str::from_utf8(meminfo.get(..length)?).ok()?;
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn memfd(size: u64) -> Result<File, MemoryError> {
    let file = rustix::fs::memfd_create("guest-memory", MemfdFlags::CLOEXEC).map(File::from);
    let file = file.map_err(io::Error::from).and_then(|file| file.set_len(size).map(|()| file));
    file.map_err(|source| MemoryError::Map { mib: size >> 20, source })
}

/// `path` itself, or an unnamed file in the directory `path`; as large as the guest's memory, and
/// all zero.
fn backing_file(path: &Path, size: u64) -> Result<File, MemoryError> {
    let open_error = |source| MemoryError::Open { path: path.into(), source };
    // Check before opening: opening a device may have effects.
    let file = match std::fs::metadata(path) {
        Ok(found) if found.is_dir() => unnamed_file(path).map_err(open_error)?,
        Ok(found) if !found.is_file() => return Err(MemoryError::Kind { path: path.into() }),
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(open_error(e)),
        _ => {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(0o600);
            options.open(path).map_err(open_error)?
        }
    };
    if !is_zero(&file).map_err(open_error)? {
        return Err(MemoryError::Contents { path: path.into() });
    }
    let grow = grow_error(path, size);
    if file.metadata().map_err(&grow)?.len() < size {
        file.set_len(size).map_err(grow)?;
    }
    Ok(file)
}

/// Whether no data has been written to the file, whatever its length.
pub(crate) fn is_zero(file: &File) -> io::Result<bool> {
    let metadata = file.metadata()?;
    // hugetlbfs does not report holes, but counts its pages.
    let counted = rustix::fs::fstatfs(file)?.f_type == libc::HUGETLBFS_MAGIC;
    Ok(metadata.len() == 0
        || (counted && metadata.blocks() == 0)
        || rustix::fs::seek(file, rustix::fs::SeekFrom::Data(0)) == Err(Errno::NXIO))
}

fn grow_error(path: &Path, size: u64) -> impl Fn(io::Error) -> MemoryError {
    let (path, mib, pages) = (path.to_owned(), size >> 20, size.div_ceil(2 << 20));
    move |source| MemoryError::Grow { path: path.clone(), mib, pages, source }
}

/// hugetlbfs has no O_TMPFILE: make a named file and unlink it at once.
fn unnamed_file(directory: &Path) -> io::Result<File> {
    let number = u64::from_be_bytes(random::bytes()?);
    let path = directory.join(format!("stratovirt.{number:016x}"));
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true).mode(0o600).open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_steps_over_the_hole() {
        assert_eq!(ranges(16 << 20), [(GuestAddress(0), 16 << 20)]);
        assert_eq!(ranges(3 << 30), [(GuestAddress(0), 3 << 30)]);
        assert_eq!(
            ranges((3 << 30) + (1 << 20)),
            [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 1 << 20)]
        );
    }

    #[test]
    fn memory_comes_in_pages_of_the_size_that_is_asked_for() {
        /// `VmFlags` of the mapping that holds `address`: `hg` and `nh` are the two advices.
        fn advice(address: *const u8) -> &'static str {
            let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let mut here = false;
            for line in smaps.lines() {
                let range = line.split_whitespace().next().and_then(|word| word.split_once('-'));
                let number = |text| usize::from_str_radix(text, 16).ok();
                if let Some((Some(from), Some(to))) = range.map(|(a, b)| (number(a), number(b))) {
                    here = (from..to).contains(&address.addr());
                }
                if here && let Some(flags) = line.strip_prefix("VmFlags:") {
                    let has = |flag| flags.split_whitespace().any(|known| known == flag);
                    return if has("hg") {
                        "huge"
                    } else if has("nh") {
                        "small"
                    } else {
                        "any"
                    };
                }
            }
            "none"
        }
        for (thp, low, high) in
            [(Thp::Auto, "small", "huge"), (Thp::On, "small", "huge"), (Thp::Off, "small", "small")]
        {
            let (size, path) = (MemorySize::MIN, None);
            let config = MemoryConfig { path, thp, ..MemoryConfig::new(size) };
            let memory = allocate(&config).unwrap();
            let begin = memory.iter().next().unwrap().as_ptr();
            for (at, wanted) in [(0, low), (8 << 20, high)] {
                let found = advice(begin.wrapping_add(at));
                // A host without transparent huge pages accepts neither.
                assert!(found == wanted || found == "any", "{thp:?} at {at:#x}: {found}");
            }
        }
    }

    #[test]
    fn more_than_the_host_has_is_refused_before_anything_is_mapped() {
        let config = MemoryConfig::new(MemorySize::MAX);
        let error = allocate(&config).unwrap_err();
        assert!(error.to_string().contains("request less with -m"), "{error}");
    }

    #[test]
    fn a_file_with_contents_is_neither_taken_nor_touched() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| {
            let path = Some(dir.path().join(name));
            MemoryConfig { shared: true, path, ..MemoryConfig::new(MemorySize::MIN) }
        };
        let path = |config: &MemoryConfig| config.path.clone().unwrap();
        for contents in [&b"x"[..], &[0; 8192]] {
            let full = at("full");
            std::fs::write(path(&full), contents).unwrap();
            let error = allocate(&full).unwrap_err().to_string();
            assert!(error.contains("full") && error.contains("is not empty"), "{error}");
            assert_eq!(std::fs::read(path(&full)).unwrap(), contents);
        }
        for length in [0, 5, 64 << 20] {
            let file = File::create(path(&at("empty"))).unwrap();
            file.set_len(length).unwrap();
            drop(allocate(&at("empty")).unwrap());
            assert!(file.metadata().unwrap().len() >= 16 << 20);
        }
        for _ in 0..2 {
            let memory = allocate(&at("new")).unwrap();
            vm_memory::Bytes::write_obj(&memory, 7u64, GuestAddress(0)).unwrap();
            assert!(allocate(&at("new")).is_err(), "it is in use");
            leave_empty(&memory, &at("new"));
        }
        rustix::fs::mknodat(
            rustix::fs::CWD,
            path(&at("fifo")),
            rustix::fs::FileType::Fifo,
            0o600.into(),
            0,
        )
        .unwrap();
        let null = MemoryConfig { path: Some("/dev/null".into()), ..at("fifo") };
        for other in [at("fifo"), null] {
            let error = allocate(&other).unwrap_err().to_string();
            assert!(error.contains("neither a file nor a directory"), "{error}");
        }
    }
}
