//! A dirty log: the pages of guest memory that another process has written, as a bitmap in shared
//! memory. This is the log of vhost-user back-ends (VHOST_USER_SET_LOG_BASE, with
//! VHOST_USER_PROTOCOL_F_LOG_SHMFD).
//!
//! The page of 4 KiB at the guest address `a` is bit `a / 4096 % 8` of byte `a / 32768`. The
//! back-end sets a bit, atomically, after it has written to the page.
use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vm_memory::{
    Address, FileOffset, GuestMemoryBackend, GuestMemoryRegion, MmapRegion, VolatileMemory,
};

use crate::Memory;

/// Bytes of a page.
const PAGE: u64 = 4096;
/// Bytes of guest memory that a word of the log covers.
const WORD: u64 = 64 * PAGE;

/// A dirty log written by another process.
pub struct DirtyLog {
    file: File,
    map: MmapRegion<()>,
}

impl DirtyLog {
    /// A log for all of `memory`, with no bit set.
    ///
    /// # Errors
    /// When the host has no memory or descriptor for it; when a region of `memory` is not aligned
    /// to whole words of the log.
    pub fn new(memory: &Memory) -> io::Result<Self> {
        let is_whole =
            |value: u64| (value.is_multiple_of(WORD)).then_some(value).ok_or_else(not_whole);
        let mut end = 0;
        for region in memory.iter() {
            let start = is_whole(region.start_addr().raw_value())?;
            end = end.max(start + is_whole(region.len())?);
        }
        // Whole pages, because other processes map it.
        let size = (end / WORD * 8).next_multiple_of(PAGE).max(PAGE);
        let file = memfd_create("dirty-log", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        let file = File::from(file);
        file.set_len(size)?;
        // If another process truncated the file, this one would be killed by SIGBUS.
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let size = usize::try_from(size).map_err(io::Error::other)?;
        let map = MmapRegion::from_file(FileOffset::new(file.try_clone()?, 0), size);
        Ok(Self { file, map: map.map_err(io::Error::other)? })
    }

    /// Bytes of the log.
    pub fn size(&self) -> u64 {
        self.map.size() as u64
    }

    /// Move its bits into `bitmaps`, one bitmap for each region of `memory` and one bit for each
    /// page from its start. A page written meanwhile is moved now or the next time.
    ///
    /// # Errors
    /// When `memory` is not the one that the log was made for, or `bitmaps` are not of its size.
    pub fn move_into(&self, memory: &Memory, bitmaps: &mut [Vec<u64>]) -> io::Result<()> {
        if bitmaps.len() != memory.num_regions() {
            return Err(not_whole());
        }
        for (region, bitmap) in memory.iter().zip(bitmaps) {
            let first = region.start_addr().raw_value() / WORD;
            if bitmap.len() as u64 != region.len() / WORD {
                return Err(not_whole());
            }
            for (index, to) in (first..).zip(bitmap) {
                *to |= self.take(index)?;
            }
        }
        Ok(())
    }

    /// Clear the log.
    ///
    /// # Errors
    /// When it cannot be accessed, which would be a bug.
    pub fn forget(&self) -> io::Result<()> {
        (0..self.size() / 8).try_for_each(|index| self.take(index).map(drop))
    }

    /// Return a word of the log and clear it.
    fn take(&self, index: u64) -> io::Result<u64> {
        let at = usize::try_from(index.saturating_mul(8)).map_err(io::Error::other)?;
        let word = self.map.get_atomic_ref::<AtomicU64>(at).map_err(io::Error::other)?;
        // Most are zero: a plain load does not take the cache line from the other process.
        if word.load(Ordering::Relaxed) == 0 {
            return Ok(0);
        }
        // Writes to memory that were made before the bit was set are visible from here on.
        Ok(u64::from_le(word.swap(0, Ordering::AcqRel)))
    }
}

impl AsFd for DirtyLog {
    /// The descriptor to pass to the process that writes it, which cannot shrink it.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn not_whole() -> io::Error {
    io::Error::other("a dirty log does not match the size of guest memory")
}

#[cfg(test)]
mod tests {
    use std::{
        os::fd::AsRawFd,
        process::Command,
        sync::{
            Barrier,
            atomic::{AtomicBool, AtomicU8},
        },
        thread,
    };

    use vm_memory::{GuestAddress, bitmap::AtomicBitmap};

    use super::*;

    const MIB: u64 = 1 << 20;

    /// 16 MiB, and 1 MiB above a hole.
    fn memory() -> Memory {
        let ranges = [(GuestAddress(0), 16 << 20), (GuestAddress(4 << 30), 1 << 20)];
        Memory::from_ranges(&ranges).unwrap()
    }

    fn empty(memory: &Memory) -> Vec<Vec<u64>> {
        memory.iter().map(|r| vec![0; (r.len() / WORD) as usize]).collect()
    }

    #[test]
    fn what_another_process_writes_comes_in_once() {
        let memory = memory();
        let log = DirtyLog::new(&memory).unwrap();
        assert_eq!(log.size(), ((4 << 30) + MIB) / WORD * 8 / PAGE * PAGE + PAGE);
        // Pages 8..16 of the first region, 0..8 of the second, and 8 in the hole.
        let path = format!("/proc/{}/fd/{}", std::process::id(), log.as_fd().as_raw_fd());
        for byte in [1, (4 << 30) / (8 * PAGE), (3 << 30) / (8 * PAGE)] {
            let write = format!(
                "printf '\\377' | dd of={path} bs=1 seek={byte} conv=notrunc 2>/dev/null && ! \
                 truncate -s 0 {path} 2>/dev/null"
            );
            assert!(Command::new("sh").args(["-c", &write]).status().unwrap().success());
        }
        let mut bitmaps = empty(&memory);
        bitmaps[0][0] = 1;
        log.move_into(&memory, &mut bitmaps).unwrap();
        assert_eq!((bitmaps[0][0], bitmaps[1][0]), (0xff01, 0xff));
        assert_eq!(bitmaps.iter().flatten().map(|word| word.count_ones()).sum::<u32>(), 17);
        let mut bitmaps = empty(&memory);
        log.move_into(&memory, &mut bitmaps).unwrap();
        assert!(bitmaps.iter().flatten().all(|word| *word == 0), "only once");
        log.forget().unwrap();
        assert_eq!(log.take((3 << 30) / WORD).unwrap(), 0);
    }

    #[test]
    fn nothing_is_lost_that_is_written_while_it_is_moved() {
        let memory = memory();
        let log = DirtyLog::new(&memory).unwrap();
        let pages = 16 * MIB / PAGE;
        let (start, done) = (Barrier::new(2), AtomicBool::new(false));
        thread::scope(|scope| {
            // Through a mapping of its own, byte by byte, as another program would.
            scope.spawn(|| {
                let file = File::from(log.as_fd().try_clone_to_owned().unwrap());
                let size = usize::try_from(log.size()).unwrap();
                let map = MmapRegion::<()>::from_file(FileOffset::new(file, 0), size).unwrap();
                for _ in 0..20 {
                    start.wait();
                    for page in (0..pages).step_by(3).chain((1..pages).step_by(3)) {
                        let at = usize::try_from(page / 8).unwrap();
                        let byte = map.get_atomic_ref::<AtomicU8>(at).unwrap();
                        byte.fetch_or(1 << (page % 8), Ordering::AcqRel);
                    }
                    done.store(true, Ordering::Release);
                    start.wait();
                }
            });
            for _ in 0..20 {
                let mut bitmaps = empty(&memory);
                start.wait();
                while !done.swap(false, Ordering::AcqRel) {
                    log.move_into(&memory, &mut bitmaps).unwrap();
                }
                log.move_into(&memory, &mut bitmaps).unwrap();
                for page in 0..pages {
                    let bit = bitmaps[0][(page / 64) as usize] >> (page % 64) & 1;
                    assert_eq!(bit, u64::from(page % 3 != 2), "{page}");
                }
                start.wait();
            }
        });
    }

    #[test]
    fn memory_of_another_form_is_refused() {
        let odd = Memory::from_ranges(&[(GuestAddress(PAGE), 1 << 20)]).unwrap();
        assert!(DirtyLog::new(&odd).is_err());
        let memory = memory();
        let log = DirtyLog::new(&memory).unwrap();
        assert!(log.move_into(&memory, &mut [Vec::new(), Vec::new()]).is_err());
        assert!(log.move_into(&memory, &mut empty(&memory)[..1]).is_err());
        let higher = GuestAddress(8 << 30);
        let bitmap = MmapRegion::<AtomicBitmap>::new(1 << 20).unwrap();
        let region = vm_memory::GuestRegionMmap::new(bitmap, higher).unwrap();
        let other = Memory::from_regions(vec![region]).unwrap();
        assert!(log.move_into(&other, &mut empty(&other)).is_err());
    }
}
