//! Spot checks: a block device of the host is known again by what is in some of its blocks.
//!
//! A block device has neither extended attributes nor a time of last change that means its content, so it
//! cannot be marked as an image is. Instead a save hashes its first and its last MiB, where partition
//! tables, superblocks and logs lie, and 64 blocks that the save's id chooses, others in each save.
//!
//! What is hashed has to be what the disk held when the machine was captured, and the guest is not to
//! be stopped for it, nor the main thread to wait for storage. So nothing is read in the pause. A [`SpotCheck`] is made
//! there, while no request is under way, and the checkpoint thread reads afterwards: a change of a block that
//! has not been read yet waits in the guest's queue until it has. Reading beforehand, and once more what has
//! changed since, would have to learn of requests that were under way when it began, and would have to
//! wait in the end anyway.
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
/// How many of these.
const BLOCKS: u32 = 64;
/// Most bytes that are read at once, and that a change may have to wait for.
const PIECE: u64 = 256 << 10;
/// What every disk wants the addresses of buffers to be multiples of.
const ALIGN: usize = 64 << 10;

/// SHA-256 of what was looked at.
pub type SpotHash = [u8; 32];

/// A spot check that was ordered at one moment and is still to be made. Dropped, it holds up no change.
#[derive(Debug)]
pub struct SpotCheck {
    file: Arc<File>,
    size: u64,
    hold: Arc<Hold>,
}

impl SpotCheck {
    /// Of the first `size` bytes of `file`, for the save `id`. Its observer is to be attached before
    /// the next change is started.
    pub(super) fn new(file: &Arc<File>, size: u64, id: u128, waker: Waker) -> Self {
        let state = Mutex::new(State { read: 0, waited: false, retired: false });
        let hold = Hold { ranges: ranges(size, id), state, waker };
        Self { file: file.clone(), size, hold: Arc::new(hold) }
    }

    /// Check that `path` holds in its first `size` bytes what the save `id` has seen there. Waits for
    /// its storage.
    ///
    /// # Errors
    /// [`DiskError::SpotCheck`] when it does not; when it cannot be read.
    pub fn verify(path: &Path, size: u64, id: u128, seen: &SpotHash) -> Result<(), DiskError> {
        let read = |flags| {
            let mut options = File::options();
            let file = options.read(true).custom_flags(libc::O_NONBLOCK | flags).open(path)?;
            hash(&file, size, &ranges(size, id), || ())
        };
        // From the medium: the page cache of this host does not know what another one has written.
        // What it knows and the medium does not, the kernel writes first.
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
    /// When it cannot be read, or the machine has closed it meanwhile, so that it may have been changed
    /// since.
    pub fn take(self) -> io::Result<SpotHash> {
        let hash = hash(&self.file, self.size, &self.hold.ranges, || self.hold.next())?;
        // One is the disk's, until a change has found nothing to wait for any more. Without the disk
        // nothing has held changes up.
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

/// Holds changes up of what has not been read yet.
#[derive(Debug)]
struct Hold {
    /// What is read, ascending.
    ranges: Vec<Range<u64>>,
    /// The lock, because the I/O thread asks while the checkpoint thread reads.
    state: Mutex<State>,
    waker: Waker,
}

#[derive(Debug)]
struct State {
    /// How many of the ranges have been read.
    read: usize,
    /// A change waits.
    waited: bool,
    /// The disk asks no more.
    retired: bool,
}

impl Hold {
    /// One more range has been read.
    fn next(&self) {
        self.advance(|read| read + 1);
    }

    /// Nothing is read any more.
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

/// What is looked at of `size` bytes: ascending, in whole blocks but for the end, none longer than
/// [`PIECE`] and none twice.
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

/// Hash `size` and what is in `ranges`; `done` is called after each.
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
