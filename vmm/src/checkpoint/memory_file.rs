//! Writing the memory file, and the progress of a save.
use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering},
};

use machine::sparse;
use state::{
    file::PAGE_SIZE,
    memory_file::{BLOCK, trailer},
};

/// Progress of a save; written by one thread, read by others.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes of memory to process.
    pub total: AtomicU64,
    /// Bytes of memory processed.
    pub done: AtomicU64,
    /// Bytes written.
    pub written: AtomicU64,
    /// Pages of zeros.
    pub zero_pages: AtomicU64,
    /// Bytes of disks to process.
    pub disks_total: AtomicU64,
    /// Bytes of disks processed.
    pub disks_done: AtomicU64,
    /// Bytes of disks written.
    pub disks_written: AtomicU64,
    /// Whether the last round of copying has left about as much as the one before.
    pub diverges: AtomicBool,
    /// One of [`RUNS`], [`CANCELLED`], [`COMMITTED`].
    fate: AtomicU8,
}

/// The save can still be cancelled.
const RUNS: u8 = 0;
/// The save is to stop as soon as possible.
const CANCELLED: u8 = 1;
/// The save counts, and can no longer be cancelled.
const COMMITTED: u8 = 2;

impl Progress {
    /// Make the save stop as soon as possible; whether that is still possible.
    pub fn cancel(&self) -> bool {
        self.settle(CANCELLED)
    }

    /// Make the save count: from now on it cannot be cancelled.
    ///
    /// # Errors
    /// An error of the kind `Interrupted` when it has been cancelled before.
    pub fn commit(&self) -> io::Result<()> {
        if self.settle(COMMITTED) { Ok(()) } else { self.check() }
    }

    /// Check that the save has not been cancelled.
    ///
    /// # Errors
    /// An error of the kind `Interrupted` when it has.
    pub fn check(&self) -> io::Result<()> {
        match self.is_cancelled() {
            true => Err(io::Error::from(io::ErrorKind::Interrupted)),
            false => Ok(()),
        }
    }

    /// Whether the save has been cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.fate.load(Ordering::Acquire) == CANCELLED
    }

    /// Set the fate if it is still open; whether it is `fate` now.
    fn settle(&self, fate: u8) -> bool {
        let (is, failed) = (Ordering::AcqRel, Ordering::Acquire);
        self.fate.compare_exchange(RUNS, fate, is, failed).is_ok()
            || self.fate.load(Ordering::Acquire) == fate
    }
}

/// Copies memory into a file and keeps its checksums.
///
/// There is one checksum for each page, so that rewriting a page requires reading only that page:
/// the guest may have changed the rest of its block since. The checksum of a block is computed from
/// those of its pages. The checksums take one thousandth of the size of guest memory during the
/// save.
pub struct Writer {
    file: File,
    size: u64,
    pages: Vec<u32>,
    /// Whether pages have been written before: then a page that is zero now may not be zero in the
    /// file.
    again: bool,
}

impl Writer {
    /// A writer of `size` bytes of memory into the empty `file`. With `base`, the page checksums of
    /// the earlier save, only changes since that save are written.
    ///
    /// # Errors
    /// When the file cannot be extended to that size.
    pub fn new(size: u64, file: File, base: Option<Vec<u32>>) -> io::Result<Self> {
        file.set_len(size.saturating_add(PAGE_SIZE))?;
        let zero = crc32fast::hash(&[0; PAGE_SIZE as usize]);
        let pages = usize::try_from(size / PAGE_SIZE).map_err(io::Error::other)?;
        Ok(Self { file, size, pages: base.unwrap_or_else(|| vec![zero; pages]), again: false })
    }

    /// Write `bytes`, whole pages of memory, at `at`. Pages that are never written must be zero, or
    /// as in the base.
    ///
    /// # Errors
    /// When the file cannot be written, or `bytes` is outside of memory.
    pub fn write(&mut self, at: u64, bytes: &[u8], progress: &Progress) -> io::Result<()> {
        let outside = || {
            io::Error::other(
                "memory to be saved does not consist of whole guest \
                                           pages",
            )
        };
        let first = usize::try_from(at / PAGE_SIZE).map_err(io::Error::other)?;
        let (pages, rest) = bytes.as_chunks::<{ PAGE_SIZE as usize }>();
        let sums = first.checked_add(pages.len()).and_then(|end| self.pages.get_mut(first..end));
        let sums = sums.filter(|_| at.is_multiple_of(PAGE_SIZE) && rest.is_empty());
        for (sum, page) in sums.ok_or_else(outside)?.iter_mut().zip(pages) {
            *sum = crc32fast::hash(page);
        }
        if self.again {
            self.file.write_all_at(bytes, at)?;
            progress.written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        } else {
            write_sparse(&self.file, at, bytes, progress)?;
        }
        Ok(())
    }

    /// From here on, pages may be written for a second time.
    pub fn again(&mut self) {
        self.again = true;
    }

    /// Write the last page, sync, and return the checksums.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn finish(self, id: u128) -> io::Result<Sums> {
        self.file.write_all_at(&trailer(id, self.size), self.size)?;
        self.file.sync_all()?;
        Ok(Sums { blocks: block_sums(&self.pages), pages: self.pages })
    }
}

/// CRC-32 checksums of all memory.
pub struct Sums {
    /// Of each block.
    pub blocks: Vec<u32>,
    /// Of each page.
    pub pages: Vec<u32>,
}

/// The CRC-32 of each block, computed from those of its pages.
fn block_sums(pages: &[u32]) -> Vec<u32> {
    // How a CRC changes when a page of zeros is appended: that is linear in each bit, so one table
    // for each byte of the CRC is enough. crc32fast would process the zeros each time.
    let followed = |crc: u32| {
        let mut hasher = crc32fast::Hasher::new_with_initial_len(crc, 0);
        hasher.combine(&crc32fast::Hasher::new_with_initial_len(0, PAGE_SIZE));
        hasher.finalize()
    };
    let table = |shift: u32| -> [u32; 256] {
        std::array::from_fn(|byte| followed(u32::try_from(byte).unwrap_or(0) << shift))
    };
    let tables = [table(0), table(8), table(16), table(24)];
    let follow = |crc: u32| {
        let each = tables.iter().zip(crc.to_le_bytes());
        each.fold(0, |sum, (table, byte)| sum ^ table.get(usize::from(byte)).unwrap_or(&0))
    };
    let block = |pages: &[u32]| pages.iter().fold(0, |sum, page| follow(sum) ^ page);
    pages.chunks((BLOCK / PAGE_SIZE) as usize).map(block).collect()
}

/// Write the pages of `part` that are not zero; the others are holes in the file.
fn write_sparse(file: &File, at: u64, part: &[u8], progress: &Progress) -> io::Result<()> {
    let written = sparse::write(file, part, at)?;
    progress.written.fetch_add(written, Ordering::Relaxed);
    progress.zero_pages.fetch_add((part.len() as u64 - written) / PAGE_SIZE, Ordering::Relaxed);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_of_blocks_follow_from_those_of_their_pages() {
        let size = 2 * BLOCK + 5 * PAGE_SIZE;
        let bytes: Vec<u8> = (0..size).map(|at| ((at * at / 4099) >> 3) as u8).collect();
        let pages: Vec<_> = bytes.chunks(4096).map(crc32fast::hash).collect();
        let expected: Vec<_> = bytes.chunks(BLOCK as usize).map(crc32fast::hash).collect();
        assert_eq!(block_sums(&pages), expected);
    }

    #[test]
    fn what_counts_cannot_be_cancelled_and_what_was_cancelled_never_counts() {
        let progress = Progress::default();
        assert!(progress.commit().is_ok() && progress.commit().is_ok());
        assert!(!progress.cancel() && progress.check().is_ok());
        let progress = Progress::default();
        assert!(progress.cancel() && progress.cancel());
        assert!(progress.commit().is_err() && progress.check().is_err());
    }
}
