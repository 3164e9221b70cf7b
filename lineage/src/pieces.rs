//! Which pieces of two images differ: each side hashes its own, and only the hashes are sent.
//!
//! An image is divided into pieces of [`PIECE`] bytes; the last one may be shorter. A guest writes
//! while they are compared, so each of its writes puts the pieces that it touches back into the
//! [`Set`] of those that still have to be sent: before the write is made and again when it is
//! complete, as a piece may be read in between.
//!
//! Memory: one bit and, for [`BATCH`] pieces at a time, 32 bytes a piece; one piece's contents.
use std::{
    io,
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

use crate::medium::Image;

/// Bytes of a piece.
pub const PIECE: u64 = 1 << 20;
/// How many hashes are made, sent and compared at a time: 128 KiB of them, for 4 GiB of an image.
pub const BATCH: u64 = 4096;

/// The BLAKE3 of a piece.
pub type Hash = [u8; blake3::OUT_LEN];

/// How many pieces an image of `bytes` has.
#[must_use]
pub fn count(bytes: u64) -> u64 {
    bytes.div_ceil(PIECE)
}

/// The bytes of piece `index` of an image of `bytes`; empty beyond its end.
#[must_use]
pub fn bytes_of(index: u64, bytes: u64) -> Range<u64> {
    let start = index.saturating_mul(PIECE).min(bytes);
    start..start.saturating_add(PIECE).min(bytes)
}

/// Hashes pieces one after another, through one buffer.
#[derive(Debug)]
pub struct Hasher {
    buffer: Vec<u8>,
    zero: Hash,
}

impl Default for Hasher {
    fn default() -> Self {
        let buffer = vec![0; PIECE as usize];
        let zero = *blake3::hash(&buffer).as_bytes();
        Self { buffer, zero }
    }
}

impl Hasher {
    /// The hashes of `pieces` of `image`, of which the caller takes [`BATCH`] at most.
    ///
    /// # Errors
    /// When the image cannot be read.
    pub fn hash(&mut self, image: &impl Image, pieces: Range<u64>) -> io::Result<Vec<Hash>> {
        let size = image.size()?;
        pieces.map(|index| self.hash_one(image, bytes_of(index, size))).collect()
    }

    fn hash_one(&mut self, image: &impl Image, bytes: Range<u64>) -> io::Result<Hash> {
        let length = usize::try_from(bytes.end - bytes.start).map_err(io::Error::other)?;
        let buffer = self.buffer.get_mut(..length).ok_or(io::ErrorKind::InvalidInput)?;
        image.read_at(bytes.start, buffer)?;
        Ok(hash(buffer, &self.zero))
    }

    /// The hash of a piece with these contents.
    #[must_use]
    pub fn of(&self, piece: &[u8]) -> Hash {
        hash(piece, &self.zero)
    }
}

fn hash(piece: &[u8], zero: &Hash) -> Hash {
    // Much of a young image is empty, and zeroes are found faster than they are hashed.
    if piece.len() == PIECE as usize && is_zero(piece) {
        return *zero;
    }
    *blake3::hash(piece).as_bytes()
}

fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<64>();
    rest.iter().all(|byte| *byte == 0)
        && words.iter().all(|word| word.iter().fold(0, |bits, byte| bits | byte) == 0)
}

/// Put those of the pieces from `first` on into `set` whose hashes differ between the two images. A
/// piece that only one has differs.
pub fn insert_differing(set: &Set, first: u64, mine: &[Hash], theirs: &[Hash]) {
    for n in 0..mine.len().max(theirs.len()) {
        if mine.get(n) != theirs.get(n) {
            set.insert(first.saturating_add(n as u64));
        }
    }
}

/// Pieces that have to be sent. Shared by the thread that sends them and the one that serves the
/// guest's writes: one bit each, without a lock.
#[derive(Debug)]
pub struct Set {
    words: Vec<AtomicU64>,
    pieces: u64,
}

impl Set {
    /// None of an image of `bytes`.
    #[must_use]
    pub fn new(bytes: u64) -> Self {
        let pieces = count(bytes);
        let words = (0..pieces.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self { words, pieces }
    }

    /// Put a piece in; one that the image does not have is ignored.
    pub fn insert(&self, piece: u64) {
        if piece < self.pieces
            && let Some((word, bit)) = self.place(piece)
        {
            // Release, with the Acquire of `take`: who takes the piece out reads what was written
            // before it was put in.
            word.fetch_or(bit, Ordering::Release);
        }
    }

    /// Put in every piece that these bytes touch.
    pub fn insert_bytes(&self, bytes: Range<u64>) {
        if bytes.start < bytes.end {
            let last = (bytes.end.saturating_sub(1) / PIECE).min(self.pieces.saturating_sub(1));
            (bytes.start / PIECE..=last).for_each(|piece| self.insert(piece));
        }
    }

    /// Take out the next piece from `from` on, to be read and sent; a write that happens from now on
    /// puts it in again.
    pub fn take(&self, from: u64) -> Option<u64> {
        // Only this side takes bits out, so this one stays set until it does.
        let (word, piece) = self.find(from)?;
        word.fetch_and(!(1 << (piece % 64)), Ordering::Acquire);
        Some(piece)
    }

    fn find(&self, from: u64) -> Option<(&AtomicU64, u64)> {
        let first = usize::try_from(from / 64).ok()?;
        self.words.iter().enumerate().skip(first).find_map(|(n, word)| {
            let mask = if n == first { u64::MAX << (from % 64) } else { u64::MAX };
            let found = word.load(Ordering::Relaxed) & mask;
            (found != 0).then(|| (word, n as u64 * 64 + u64::from(found.trailing_zeros())))
        })
    }

    /// The next piece from `from` on, which stays in it.
    #[must_use]
    pub fn next(&self, from: u64) -> Option<u64> {
        self.find(from).map(|(_, piece)| piece)
    }

    /// Take out this piece, which was sent.
    pub fn remove(&self, piece: u64) {
        if let Some((word, bit)) = self.place(piece) {
            word.fetch_and(!bit, Ordering::AcqRel);
        }
    }

    /// Whether one of the pieces that these bytes touch is in it.
    #[must_use]
    pub fn touches(&self, bytes: Range<u64>) -> bool {
        let last = bytes.end.saturating_sub(1) / PIECE;
        bytes.start < bytes.end
            && (bytes.start / PIECE..=last.min(self.pieces.saturating_sub(1))).any(|piece| {
                self.place(piece).is_some_and(|(word, bit)| word.load(Ordering::Acquire) & bit != 0)
            })
    }

    /// How many are in it.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.load(Ordering::Relaxed).count_ones())).sum()
    }

    /// Whether none is in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| word.load(Ordering::Relaxed) == 0)
    }

    fn place(&self, piece: u64) -> Option<(&AtomicU64, u64)> {
        let word = self.words.get(usize::try_from(piece / 64).ok()?)?;
        Some((word, 1 << (piece % 64)))
    }
}

#[cfg(test)]
mod tests;
