//! Spot checks: a host block device is recognised by the contents of some of its blocks.
//!
//! A block device has neither extended attributes nor a modification time that reflects its
//! content, so it cannot be marked as an image is. Instead a save hashes its first and its last
//! MiB, where partition tables, superblocks and journals are, and 64 blocks chosen by the save's
//! id, so that each save checks different ones.
//!
//! The hash must cover what the disk held when the machine was captured, but the guest must not be
//! stopped for it, nor may the main thread wait for storage. So nothing is read during the pause. A
//! [`SpotCheck`] is made then, while no request is under way, and the checkpoint thread reads
//! afterwards: a change of a block that has not been read yet waits in the guest's queue until it
//! has. Reading beforehand, and re-reading what has changed since, would have to track the requests
//! that were under way when it began, and would have to wait in the end anyway.
#[cfg(test)]
mod tests;

use std::{
    fs::File,
    io,
    ops::Range,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    sync::Arc,
};

use parking_lot::Mutex;
use sha2::{Digest, Sha256};

use super::{Change, DiskError, Observer, Verdict, Waker};

/// Bytes at each end of the device that are hashed.
const ENDS: u64 = 1 << 20;
/// Bytes of each block in between.
const BLOCK: u64 = 4096;
/// How many of these blocks.
const BLOCKS: u32 = 64;
/// Most bytes read at once, and so the most that a change may have to wait for.
const PIECE: u64 = 256 << 10;
/// Alignment of buffer addresses that suits every disk.
const ALIGN: usize = 64 << 10;

/// SHA-256 of the checked ranges.
pub type SpotHash = [u8; 32];

/// A pending spot check of the disk as it was at one moment. Dropping it stops it from delaying
/// changes.
#[derive(Debug)]
pub struct SpotCheck {
    file: Arc<File>,
    size: u64,
    hold: Arc<Hold>,
}

impl SpotCheck {
    /// A check of the first `size` bytes of `file`, for the save `id`. Its observer must be
    /// attached before the next change starts.
    pub(super) fn new(file: &Arc<File>, size: u64, id: u128, waker: Waker) -> Self {
        let state = Mutex::new(State { read: 0, waited: false, retired: false });
        let hold = Hold { ranges: ranges(size, id), state, waker };
        Self { file: file.clone(), size, hold: Arc::new(hold) }
    }

    /// Check that the first `size` bytes of `path` still hold what the save `id` has hashed. Waits
    /// for the storage.
    ///
    /// # Errors
    /// [`DiskError::SpotCheck`] when they differ; when they cannot be read.
    pub fn verify(path: &Path, size: u64, id: u128, seen: &SpotHash) -> Result<(), DiskError> {
        let read = |flags| {
            let mut options = File::options();
            let file = options.read(true).custom_flags(libc::O_NONBLOCK | flags).open(path)?;
            hash(&file, size, &ranges(size, id), || ())
        };
        // From the medium: this host's page cache does not have what another host has written.
        // Dirty pages in it are written back by the kernel first.
        let found = match read(libc::O_DIRECT) {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => read(0),
            other => other,
        };
        let failed =
            |source| DiskError::Open { path: path.into(), purpose: "a spot check", source };
        match found.map_err(failed)? == *seen {
            true => Ok(()),
            false => Err(DiskError::SpotCheck { path: path.into() }),
        }
    }

    pub(super) fn observer(&self) -> Arc<dyn Observer> {
        self.hold.clone()
    }

    /// Read and hash. Waits for the storage.
    ///
    /// # Errors
    /// When it cannot be read, or the machine has closed the disk meanwhile, so that it may have
    /// been changed since.
    pub fn take(self) -> io::Result<SpotHash> {
        let hash = hash(&self.file, self.size, &self.hold.ranges, || self.hold.next())?;
        // The disk's observer list holds one reference, until a change finds nothing left to wait
        // for. If the disk is gone, changes were not delayed.
        if Arc::strong_count(&self.hold) == 1 && !self.hold.state.lock().retired {
            return Err(io::Error::other("it has been closed"));
        }
        Ok(hash)
    }
}

impl Drop for SpotCheck {
    fn drop(&mut self) {
        self.hold.end();
    }
}

/// Delays changes of ranges that have not been read yet.
#[derive(Debug)]
struct Hold {
    /// The ranges to read, ascending.
    ranges: Vec<Range<u64>>,
    /// A lock, because the I/O thread checks while the checkpoint thread reads.
    state: Mutex<State>,
    waker: Waker,
}

#[derive(Debug)]
struct State {
    /// How many of the ranges have been read.
    read: usize,
    /// A change is waiting.
    waited: bool,
    /// This observer is no longer attached to the disk.
    retired: bool,
}

impl Hold {
    /// One more range has been read.
    fn next(&self) {
        self.advance(|read| read + 1);
    }

    /// Reading has ended.
    fn end(&self) {
        self.advance(|_| self.ranges.len());
    }

    fn advance(&self, to: impl FnOnce(usize) -> usize) {
        let mut state = self.state.lock();
        state.read = to(state.read);
        if std::mem::take(&mut state.waited) {
            self.waker.wake();
        }
    }
}

impl Observer for Hold {
    fn before(&self, Change { range, .. }: &Change) -> io::Result<Verdict> {
        let mut state = self.state.lock();
        let left = self.ranges.get(state.read..);
        let left = left.ok_or_else(|| io::Error::other("a spot check is beyond its end"))?;
        let touched = left.iter().any(|r| r.start < range.end && range.start < r.end);
        state.waited |= touched;
        state.retired |= left.is_empty();
        Ok(match (left, touched) {
            ([], _) => Verdict::Retire,
            (_, true) => Verdict::Wait,
            (_, false) => Verdict::Start,
        })
    }

    fn after(&self, _: &Change, _: &io::Result<()>) {}
}

/// The ranges to check of `size` bytes: ascending, in whole blocks except at the end, none longer
/// than [`PIECE`] and none twice.
fn ranges(size: u64, id: u128) -> Vec<Range<u64>> {
    let tail = size.saturating_sub(ENDS);
    let mut wanted = vec![0..ENDS.min(size), tail - tail % BLOCK..size];
    wanted.extend((0..BLOCKS).filter_map(|number| {
        let chosen = Sha256::new().chain_update(id.to_be_bytes());
        let chosen = chosen.chain_update(number.to_be_bytes()).finalize();
        let chosen = chosen.first_chunk().copied().map_or(0, u64::from_be_bytes);
        let block = chosen.checked_rem(size / BLOCK)?;
        Some(block * BLOCK..(block + 1) * BLOCK)
    }));
    wanted.sort_by_key(|range| range.start);
    let (mut ranges, mut end) = (Vec::new(), 0);
    for range in wanted {
        let mut start = range.start.max(end);
        while start < range.end {
            let next = range.end.min(start + PIECE);
            ranges.push(start..next);
            start = next;
        }
        end = end.max(range.end);
    }
    ranges
}

/// Hash `size` and the contents of `ranges`; `done` is called after each range.
fn hash(file: &File, size: u64, ranges: &[Range<u64>], done: impl Fn()) -> io::Result<SpotHash> {
    let mut hash = Sha256::new().chain_update(size.to_be_bytes());
    let mut buffer = vec![0; PIECE as usize + ALIGN];
    let aligned = buffer.as_ptr().align_offset(ALIGN);
    let buffer = buffer.get_mut(aligned..).ok_or(io::ErrorKind::InvalidInput)?;
    for range in ranges {
        let length = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
        let bytes = buffer.get_mut(..length).ok_or(io::ErrorKind::InvalidInput)?;
        file.read_exact_at(bytes, range.start)?;
        done();
        hash.update(bytes);
    }
    Ok(hash.finalize().into())
}
