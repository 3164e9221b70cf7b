//! Guest memory on disk: one full memory file, and over it the changes of each incremental save.
use std::{
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use crate::{
    memory_file::{BLOCK, MemoryFileError, ZeroSums, blocks},
    sparse,
};

/// One memory file, and the ranges of guest memory that are taken from it.
pub struct Layer {
    /// Where it is.
    pub path: PathBuf,
    /// The open file.
    pub file: File,
    /// The ranges, ascending; in the lowest layer they cover all of memory.
    pub ranges: Vec<Range<u64>>,
}

/// A range of guest memory, and the index of the layer that holds it.
pub type Piece = (Range<u64>, usize);

/// All memory files of a save, the lowest first, with the checksums of the combined memory.
pub struct BackingChain {
    /// Bytes of memory.
    pub size: u64,
    /// The files, the lowest first.
    pub layers: Vec<Layer>,
    /// CRC-32 of each block of the combined memory.
    pub sums: Vec<u32>,
}

impl BackingChain {
    /// Which layer holds each range: the highest one that has it.
    pub fn pieces(&self) -> Vec<Piece> {
        let mut pieces = vec![(0..self.size, 0)];
        for (index, layer) in self.layers.iter().enumerate().skip(1) {
            pieces = without(pieces, &layer.ranges);
            pieces.extend(layer.ranges.iter().map(|range| (range.clone(), index)));
            pieces.sort_unstable_by_key(|(range, _)| range.start);
        }
        pieces
    }

    /// Layer `index`, where 0 is the lowest.
    ///
    /// # Errors
    /// When there is none.
    pub fn layer(&self, index: usize) -> io::Result<&Layer> {
        self.layers.get(index).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
    }

    /// Find the ranges that contain data.
    ///
    /// # Errors
    /// When a file cannot be searched.
    pub fn open(self) -> Result<Contents, (PathBuf, MemoryFileError)> {
        let mut pieces = Vec::new();
        for (range, index) in self.pieces() {
            let layer = self.layer(index).map_err(|e| (PathBuf::new(), MemoryFileError::Io(e)))?;
            let Layer { path, file, .. } = layer;
            let data = sparse::data(file, range.start, range.end - range.start)
                .map_err(|e| (path.clone(), MemoryFileError::Io(e)))?;
            let place = |r: &Range<u64>| range.start + r.start..range.start + r.end;
            pieces.extend(data.iter().map(|r| (place(r), index)));
        }
        Ok(Contents { chain: self, pieces, zero: ZeroSums::default() })
    }
}

/// The parts of `below` outside of `over`; both are ascending.
fn without(below: Vec<Piece>, over: &[Range<u64>]) -> Vec<Piece> {
    let mut left = Vec::with_capacity(below.len() + over.len());
    let mut rest = over;
    for (range, layer) in below {
        let mut at = range.start;
        while let [first, others @ ..] = rest
            && first.end <= at
        {
            rest = others;
        }
        for hidden in rest.iter().take_while(|hidden| hidden.start < range.end) {
            if at < hidden.start {
                left.push((at..hidden.start, layer));
            }
            at = at.max(hidden.end);
        }
        if at < range.end {
            left.push((at..range.end, layer));
        }
    }
    left
}

/// The combined contents of the files, block by block.
pub struct Contents {
    chain: BackingChain,
    /// The ranges with data; the rest are holes.
    pieces: Vec<Piece>,
    zero: ZeroSums,
}

impl Contents {
    /// The blocks with data, in order; all others are zero.
    pub fn filled(&self) -> Vec<Range<u64>> {
        let mut next = 0;
        let mut filled: Vec<Range<u64>> = Vec::new();
        for (range, _) in &self.pieces {
            let end = range.end.next_multiple_of(BLOCK).min(self.chain.size);
            let start = (range.start / BLOCK * BLOCK).max(next);
            if start < end {
                match filled.last_mut() {
                    Some(last) if last.end == start => last.end = end,
                    _ => filled.push(start..end),
                }
                next = end;
            }
        }
        filled
    }

    /// Compare the blocks without data with their checksums.
    ///
    /// # Errors
    /// The first block that should have data.
    pub fn check_zeros(&self) -> Result<(), (PathBuf, MemoryFileError)> {
        let filled = self.filled();
        let mut filled = filled.iter().peekable();
        for block in blocks(self.chain.size) {
            while filled.next_if(|range| range.end <= block.start).is_some() {}
            if filled.peek().is_none_or(|range| range.start >= block.end) {
                let zeros = self.read(&block, &mut []);
                zeros.map_err(|source| (self.path(&block).to_owned(), source))?;
            }
        }
        Ok(())
    }

    /// Read `block` into `buffer` and compare it with its checksum. False when there is nothing to
    /// read because all of it is zero.
    ///
    /// # Errors
    /// When it is damaged or cannot be read.
    pub fn read<'b>(
        &self,
        block: &Range<u64>,
        buffer: &'b mut [u8],
    ) -> Result<Option<&'b [u8]>, MemoryFileError> {
        let sum = usize::try_from(block.start / BLOCK).ok().and_then(|i| self.chain.sums.get(i));
        let damaged = || MemoryFileError::Damaged { from: block.start, to: block.end };
        let check = |found: u32| if sum == Some(&found) { Ok(()) } else { Err(damaged()) };
        let first = self.pieces.partition_point(|(range, _)| range.end <= block.start);
        let (_, pieces) = self.pieces.split_at(first);
        let mut pieces = pieces.iter().take_while(|(range, _)| range.start < block.end).peekable();
        if pieces.peek().is_none() {
            return check(self.zero.of(block)).map(|()| None);
        }
        let outside = || MemoryFileError::Io(io::Error::other("a block is larger than its buffer"));
        let at = |offset: u64| {
            let inside = offset.checked_sub(block.start).and_then(|at| usize::try_from(at).ok());
            inside.ok_or_else(outside)
        };
        let buffer = buffer.get_mut(..at(block.end)?).ok_or_else(outside)?;
        buffer.fill(0);
        for (range, layer) in pieces {
            let inside = range.start.max(block.start)..range.end.min(block.end);
            let part = at(inside.start)?..at(inside.end)?;
            let part = buffer.get_mut(part).ok_or_else(outside)?;
            let layer = self.chain.layer(*layer).map_err(MemoryFileError::Io)?;
            layer.file.read_exact_at(part, inside.start).map_err(MemoryFileError::Io)?;
        }
        check(crc32fast::hash(buffer))?;
        Ok(Some(buffer))
    }

    /// The newest file that holds a part of `block`, for messages.
    pub fn path(&self, block: &Range<u64>) -> &Path {
        let inside = |(range, _): &&Piece| range.start < block.end && block.start < range.end;
        let newest = self.pieces.iter().filter(inside).map(|(_, layer)| *layer).max();
        let layer = newest.and_then(|index| self.chain.layers.get(index));
        layer.or(self.chain.layers.last()).map_or(Path::new(""), |layer| &layer.path)
    }

    /// Compare all of it with the checksums, and pass each block with data to `each`, with its
    /// offset.
    ///
    /// # Errors
    /// The first block that is damaged or cannot be read, and the file that holds it.
    pub fn verify(
        &self,
        mut each: impl FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> Result<(), (PathBuf, MemoryFileError)> {
        let mut buffer = vec![0; BLOCK as usize];
        for block in blocks(self.chain.size) {
            let read = self.read(&block, &mut buffer);
            read.and_then(|data| {
                data.map_or(Ok(()), |data| each(block.start, data)).map_err(MemoryFileError::Io)
            })
            .map_err(|source| (self.path(&block).to_owned(), source))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;

    fn layers(ranges: &[&[Range<u64>]]) -> BackingChain {
        let layer = |ranges: &&[Range<u64>]| Layer {
            path: PathBuf::new(),
            file: tempfile::tempfile().unwrap(),
            ranges: ranges.to_vec(),
        };
        BackingChain { size: 64 * PAGE, layers: ranges.iter().map(layer).collect(), sums: vec![] }
    }

    #[test]
    fn the_highest_layer_counts() {
        let pages = |a: u64, b: u64| a * PAGE..b * PAGE;
        let layers = layers(&[
            &[pages(0, 64)],
            &[pages(2, 6), pages(8, 9), pages(20, 30)],
            &[pages(0, 1), pages(5, 8), pages(22, 23), pages(29, 31), pages(63, 64)],
        ]);
        let found = layers.pieces();
        let counts = |page: u64| {
            let at = page * PAGE;
            let mut found = found.iter().filter(|(range, _)| range.contains(&at));
            let (_, layer) = found.next().unwrap();
            assert!(found.next().is_none(), "page {page} is in one piece");
            *layer
        };
        for page in 0..64 {
            let expected = layers.layers.iter().enumerate().rev();
            let mut expected = expected
                .filter(|(_, layer)| layer.ranges.iter().any(|r| r.contains(&(page * PAGE))));
            assert_eq!(counts(page), expected.next().unwrap().0, "page {page}");
        }
        assert!(found.is_sorted_by(|(a, _), (b, _)| a.end <= b.start), "{found:?}");
    }
}
