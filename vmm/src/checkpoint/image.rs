//! The file of guest memory: the image, sparse where it is zero, and one more page that says which
//! state it belongs to.
use std::{
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use machine::{
    Memory,
    memory::image::{self, PAGE_SIZE},
};

/// Bytes of a block: what has a checksum of its own.
pub const BLOCK: u64 = 2 << 20;
const MAGIC: &[u8; 8] = b"STRATOCM";

/// How far a save has come; written by one thread, read by others.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes of memory to look at.
    pub total: AtomicU64,
    /// Bytes of memory looked at.
    pub done: AtomicU64,
    /// Bytes written.
    pub written: AtomicU64,
    /// Pages that were zero.
    pub zero_pages: AtomicU64,
    /// Set to make it stop.
    pub cancelled: AtomicBool,
}

impl Progress {
    /// An error of the kind `Interrupted` once it is to stop.
    ///
    /// # Errors
    /// That one.
    pub fn check(&self) -> io::Result<()> {
        match self.cancelled.load(Ordering::Relaxed) {
            true => Err(io::Error::from(io::ErrorKind::Interrupted)),
            false => Ok(()),
        }
    }
}

/// Blocks of an image of `size` bytes.
pub fn blocks(size: u64) -> impl Iterator<Item = Range<u64>> {
    (0..size).step_by(BLOCK as usize).map(move |at| at..size.min(at + BLOCK))
}

/// The parts of `ranges`, ascending, that lie in each block that they touch.
pub fn by_block(
    ranges: &[Range<u64>],
    size: u64,
) -> impl Iterator<Item = (Range<u64>, Vec<Range<u64>>)> {
    let mut first = 0;
    blocks(size).filter_map(move |block| {
        while ranges.get(first).is_some_and(|r| r.end <= block.start) {
            first += 1;
        }
        let inside: Vec<_> = ranges
            .get(first..)?
            .iter()
            .take_while(|r| r.start < block.end)
            .map(|r| r.start.max(block.start)..r.end.min(block.end))
            .collect();
        (!inside.is_empty()).then_some((block, inside))
    })
}

/// Copies memory into a file and keeps the checksums.
pub struct Writer {
    memory: Memory,
    file: File,
    size: u64,
    sums: Vec<u32>,
    buffer: Vec<u8>,
    /// Memory outside of what is to be written may hold something.
    whole: bool,
    /// Something has been written before.
    again: bool,
}

impl Writer {
    /// A writer of `memory`, `size` bytes in all, into the empty `file`. With `base`, the checksums
    /// of what memory was like before, it writes what has changed since.
    ///
    /// # Errors
    /// When the file cannot be made as long.
    pub fn new(memory: Memory, size: u64, file: File, base: Option<Vec<u32>>) -> io::Result<Self> {
        file.set_len(size.saturating_add(PAGE_SIZE))?;
        let whole = base.is_some();
        let sums = base.unwrap_or_else(|| {
            let zero = ZeroSums::default();
            blocks(size).map(|block| zero.of(&block)).collect()
        });
        Ok(Self { memory, file, size, sums, buffer: vec![0; BLOCK as usize], whole, again: false })
    }

    /// Write what is in `ranges`, ascending. The first time, all outside of them must be zero, or
    /// what the base has; later, it must be as it was.
    ///
    /// # Errors
    /// When the file does not take it, or the save is cancelled.
    pub fn write(&mut self, ranges: &[Range<u64>], progress: &Progress) -> io::Result<()> {
        for (block, inside) in by_block(ranges, self.size) {
            progress.check()?;
            let length = usize::try_from(block.end - block.start).map_err(io::Error::other)?;
            let buffer = self.buffer.get_mut(..length).unwrap_or_default();
            if self.whole || self.again {
                image::read(&self.memory, block.start, buffer)?;
            } else {
                // Reading a page that nobody has touched would cost a page fault.
                buffer.fill(0);
                for range in &inside {
                    let part = part(buffer, &block, range);
                    image::read(&self.memory, range.start, part)?;
                }
            }
            let index = usize::try_from(block.start / BLOCK).map_err(io::Error::other)?;
            if let Some(sum) = self.sums.get_mut(index) {
                *sum = crc32fast::hash(buffer);
            }
            for range in inside {
                let part = part(buffer, &block, &range);
                if self.again {
                    self.file.write_all_at(part, range.start)?;
                    progress.written.fetch_add(part.len() as u64, Ordering::Relaxed);
                } else {
                    write_sparse(&self.file, range.start, part, progress)?;
                }
                progress.done.fetch_add(range.end - range.start, Ordering::Relaxed);
            }
        }
        self.again = true;
        Ok(())
    }

    /// Write the last page, sync, and give the checksums.
    ///
    /// # Errors
    /// When the file does not take it.
    pub fn finish(self, id: u128) -> io::Result<Vec<u32>> {
        self.file.write_all_at(&trailer(id, self.size), self.size)?;
        self.file.sync_all()?;
        Ok(self.sums)
    }
}

/// The part of `buffer`, which holds `block`, that holds `range`.
fn part<'b>(buffer: &'b mut [u8], block: &Range<u64>, range: &Range<u64>) -> &'b mut [u8] {
    let at = |offset: u64| usize::try_from(offset - block.start).unwrap_or(usize::MAX);
    buffer.get_mut(at(range.start)..at(range.end)).unwrap_or_default()
}

/// Write the pages of `part` that are not zero; the others are holes in the file.
fn write_sparse(file: &File, at: u64, part: &[u8], progress: &Progress) -> io::Result<()> {
    for (start, bytes, zero) in runs(part) {
        if zero {
            progress.zero_pages.fetch_add(bytes.len() as u64 / PAGE_SIZE, Ordering::Relaxed);
        } else {
            file.write_all_at(bytes, at + start)?;
            progress.written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        }
    }
    Ok(())
}

/// The runs of pages of one kind in `bytes`: where they begin, and whether they are zero.
pub fn runs(bytes: &[u8]) -> impl Iterator<Item = (u64, &[u8], bool)> {
    const PAGE: usize = PAGE_SIZE as usize;
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let zero = is_zero(rest.chunks(PAGE).next()?);
        let pages = rest.chunks(PAGE).take_while(|page| is_zero(page) == zero).count();
        let start = (bytes.len() - rest.len()) as u64;
        let run;
        (run, rest) = rest.split_at((pages * PAGE).min(rest.len()));
        Some((start, run, zero))
    })
}

/// Whether all of it is zero; quick to say no.
fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<64>();
    words.iter().all(|word| *word == [0; 64]) && rest.iter().all(|b| *b == 0)
}

/// Checksums of blocks of zeros.
pub struct ZeroSums {
    zeros: Vec<u8>,
    whole: u32,
}

impl Default for ZeroSums {
    fn default() -> Self {
        let zeros = vec![0; BLOCK as usize];
        let whole = crc32fast::hash(&zeros);
        Self { zeros, whole }
    }
}

impl ZeroSums {
    /// That of `block`.
    pub fn of(&self, block: &Range<u64>) -> u32 {
        match block.end - block.start {
            BLOCK => self.whole,
            length => {
                let length = usize::try_from(length).unwrap_or(usize::MAX);
                crc32fast::hash(self.zeros.get(..length).unwrap_or(&self.zeros))
            }
        }
    }
}

/// The last page: magic, id, bytes of memory, CRC-32 of these; zeros.
fn trailer(id: u128, size: u64) -> Vec<u8> {
    let mut page = MAGIC.to_vec();
    page.extend(id.to_le_bytes());
    page.extend(size.to_le_bytes());
    page.extend(crc32fast::hash(&page).to_le_bytes());
    page.resize(4096, 0);
    page
}

/// Whether `file` is the memory, `size` bytes of it, that belongs to the state `id`.
///
/// # Errors
/// Why it is not.
pub fn belongs(file: &File, id: u128, size: u64) -> Result<(), ImageError> {
    let length = file.metadata().map_err(ImageError::Io)?.len();
    let expected = size.saturating_add(PAGE_SIZE);
    if length != expected {
        return Err(ImageError::Length { length, expected });
    }
    let mut page = [0; 4096];
    file.read_exact_at(&mut page, size).map_err(ImageError::Io)?;
    if page.as_slice() != trailer(id, size) {
        return Err(ImageError::Other);
    }
    Ok(())
}

/// What is the matter with a memory file.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum ImageError {
    #[error("it has {length} bytes; {expected} belong to this state")]
    Length { length: u64, expected: u64 },
    #[error("it belongs to another state, or its last page is damaged")]
    Other,
    #[error("the block from {from:#x} to {to:#x} is damaged (checksum)")]
    Damaged { from: u64, to: u64 },
    #[error("cannot read it")]
    Io(#[source] io::Error),
}
