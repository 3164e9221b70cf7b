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

/// Blocks of an image of `size` bytes.
pub fn blocks(size: u64) -> impl Iterator<Item = Range<u64>> {
    (0..size).step_by(2 << 20).map(move |at| at..size.min(at + BLOCK))
}

/// The parts of `ranges`, ascending, that lie in each block that they touch.
fn by_block(
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
pub struct Writer<'a> {
    memory: &'a Memory,
    file: &'a File,
    size: u64,
    sums: Vec<u32>,
    buffer: Vec<u8>,
    /// Something has been written before.
    again: bool,
}

impl<'a> Writer<'a> {
    /// A writer of `memory`, `size` bytes in all, into the empty `file`.
    ///
    /// # Errors
    /// When the file cannot be made as long.
    pub fn new(memory: &'a Memory, size: u64, file: &'a File) -> io::Result<Self> {
        file.set_len(size.saturating_add(PAGE_SIZE))?;
        let buffer = vec![0; 2 << 20];
        let zero = crc32fast::hash(&buffer);
        let sum = |block: Range<u64>| match block.end - block.start {
            BLOCK => zero,
            _ => zero_sum(&buffer, &block),
        };
        let sums = blocks(size).map(sum).collect();
        Ok(Self { memory, file, size, sums, buffer, again: false })
    }

    /// Write what is in `ranges`, ascending. The first time, all outside of them must be zero;
    /// later, it must be as it was.
    ///
    /// # Errors
    /// When the file does not take it, or the save is cancelled.
    pub fn write(&mut self, ranges: &[Range<u64>], progress: &Progress) -> io::Result<()> {
        for (block, inside) in by_block(ranges, self.size) {
            if progress.cancelled.load(Ordering::Relaxed) {
                return Err(io::Error::from(io::ErrorKind::Interrupted));
            }
            let length = usize::try_from(block.end - block.start).map_err(io::Error::other)?;
            let buffer = self.buffer.get_mut(..length).unwrap_or_default();
            if self.again {
                image::read(self.memory, block.start, buffer)?;
            } else {
                // Reading a page that nobody has touched would cost a page fault.
                buffer.fill(0);
                for range in &inside {
                    let part = part(buffer, &block, range);
                    image::read(self.memory, range.start, part)?;
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
                    write_sparse(self.file, range.start, part, progress)?;
                }
                progress.done.fetch_add(range.end - range.start, Ordering::Relaxed);
            }
        }
        self.again = true;
        Ok(())
    }

    /// Write the last page, and give the checksums.
    ///
    /// # Errors
    /// When the file does not take it.
    pub fn finish(self, id: u128) -> io::Result<Vec<u32>> {
        self.file.write_all_at(&trailer(id, self.size), self.size)?;
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
    let page = usize::try_from(PAGE_SIZE).map_err(io::Error::other)?;
    let mut offset = at;
    // Runs of pages of one kind.
    for run in part.chunks(page).collect::<Vec<_>>().chunk_by(|a, b| is_zero(a) == is_zero(b)) {
        let length: usize = run.iter().map(|page| page.len()).sum();
        let start = usize::try_from(offset - at).map_err(io::Error::other)?;
        let bytes = part.get(start..start + length).unwrap_or_default();
        if is_zero(bytes) {
            progress.zero_pages.fetch_add(run.len() as u64, Ordering::Relaxed);
        } else {
            file.write_all_at(bytes, offset)?;
            progress.written.fetch_add(length as u64, Ordering::Relaxed);
        }
        offset += length as u64;
    }
    Ok(())
}

/// Whether all of it is zero; quick to say no.
fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<64>();
    words.iter().all(|word| *word == [0; 64]) && rest.iter().all(|b| *b == 0)
}

fn zero_sum(zeros: &[u8], block: &Range<u64>) -> u32 {
    let length = usize::try_from(block.end - block.start).unwrap_or(usize::MAX);
    crc32fast::hash(zeros.get(..length).unwrap_or(zeros))
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

/// Compare the image in `file` with its checksums, and show each block with data to `each`, with
/// its offset.
///
/// # Errors
/// When a block is damaged or cannot be read.
pub fn verify(
    file: &File,
    size: u64,
    sums: &[u32],
    mut each: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> Result<(), ImageError> {
    let mut buffer = vec![0; 2 << 20];
    let zero = crc32fast::hash(&buffer);
    let data = image::data(file, 0, size).map_err(ImageError::Io)?;
    let mut full = by_block(&data, size).map(|(block, _)| block.start).peekable();
    for (block, sum) in blocks(size).zip(sums) {
        let damaged = || ImageError::Damaged { from: block.start, to: block.end };
        if full.next_if_eq(&block.start).is_none() {
            let expected = if block.end - block.start == BLOCK {
                zero
            } else {
                zero_sum(&vec![0; 2 << 20], &block)
            };
            if *sum != expected {
                return Err(damaged());
            }
            continue;
        }
        let length = usize::try_from(block.end - block.start).unwrap_or(0);
        let buffer = buffer.get_mut(..length).unwrap_or_default();
        file.read_exact_at(buffer, block.start).map_err(ImageError::Io)?;
        if crc32fast::hash(buffer) != *sum {
            return Err(damaged());
        }
        each(block.start, buffer).map_err(ImageError::Io)?;
    }
    Ok(())
}

/// What is the matter with a memory file.
#[derive(Debug, thiserror::Error)]
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
