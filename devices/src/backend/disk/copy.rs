//! A point-in-time copy of a disk, made while its guest keeps writing.
//!
//! ```text
//!   Idle --begin--> Delaying ---------------cloned------------------> Over
//!                    |  every change waits                             ^
//!                    +-> Copying ---------------copied-----------------+
//!                        a change waits until what it replaces has been copied
//! ```
//! Where the file system can share the blocks of two files (FICLONE: XFS, btrfs), changes wait for
//! that one call. Elsewhere the image is read from beginning to end, and blocks that the guest is
//! about to change are copied out of turn (copy-before-write). If the copy fails, for whatever
//! reason, the guest keeps running.
#[cfg(test)]
mod tests;

use std::{
    collections::VecDeque,
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use rustix::{fs::SeekFrom, io::Errno};

use super::{Change, Disk, DiskMark, Observer, Verdict, Waker, generation};
use crate::backend::sparse;

/// Bytes of a cluster, the unit of copying.
const CLUSTER: u64 = 64 << 10;
/// Clusters that are read at once: a change waits for at most these and its own.
const PIECE: u64 = 4;

/// A copy of a disk in progress. One thread begins it and may abandon it, another one does the
/// copying.
pub struct DiskCopy {
    disk: Arc<Disk>,
    waker: Waker,
    /// A lock, because I/O threads check what the copying thread updates between two reads.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    phase: Phase,
    /// The generation of the image at that moment.
    generation: Option<u128>,
    /// Since when changes have waited without any progress.
    waiting: Option<Instant>,
}

#[derive(Default)]
enum Phase {
    #[default]
    Idle,
    Delaying,
    Copying(Clusters),
    Over,
}

/// How a copy was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyMethod {
    /// It shares the blocks of the image. Changes waited for this long.
    Cloned(Duration),
    /// By reading the image.
    Copied,
}

/// Progress since the last report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Bytes of the image that are in the copy.
    pub done: u64,
    /// Bytes that were written for them.
    pub written: u64,
}

impl DiskCopy {
    /// Prepare a copy of `disk` as it will be when [`DiskCopy::begin`] is called.
    pub fn new(disk: Arc<Disk>) -> Arc<Self> {
        let (waker, state) = (disk.waker(), Mutex::default());
        Arc::new(Self { disk, waker, state })
    }

    /// The disk.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// Flush what has been written so far to the medium. Cloning then only has to wait for what is
    /// written after this.
    ///
    /// # Errors
    /// When the host cannot write it.
    pub fn sync(&self) -> io::Result<()> {
        self.disk.file.sync_all()
    }

    /// Begin the copy, which will show the disk as it is at this moment. No request may be under
    /// way. Changes wait from here on, until [`DiskCopy::make`] lets them pass.
    pub fn begin(self: &Arc<Self>) {
        let generation = self.disk.mark().and_then(|mark| mark.generation);
        let mut state = self.state.lock();
        if let Phase::Idle = state.phase {
            (state.phase, state.generation) = (Phase::Delaying, generation);
            drop(state);
            self.disk.observe(self.clone());
        }
    }

    /// Copy the disk, as it was when [`DiskCopy::begin`] was called, into `to`, which is empty.
    /// `progress` is called after each step; an error from it ends the copying. Afterwards, also
    /// after an error, changes pass.
    ///
    /// # Errors
    /// When the image cannot be read or the copy cannot be written. An error of the kind
    /// `Interrupted` when it was abandoned.
    pub fn make(
        &self,
        to: &File,
        progress: impl FnMut(Step) -> io::Result<()>,
    ) -> io::Result<CopyMethod> {
        let made = self.make_while_held(to, progress);
        self.abandon();
        made
    }

    fn make_while_held(
        &self,
        to: &File,
        mut progress: impl FnMut(Step) -> io::Result<()>,
    ) -> io::Result<CopyMethod> {
        let begin = Instant::now();
        let size = self.disk.bytes_of_image()?;
        // Most file systems refuse it, and so does any pair of different ones: then the image is
        // copied.
        let cloned = rustix::fs::ioctl_ficlone(to, &*self.disk.file);
        let next = match cloned {
            Ok(()) => Phase::Over,
            Err(_) => Phase::Copying(Clusters::new(size, !self.disk.device)?),
        };
        {
            let mut state = self.state.lock();
            let Phase::Delaying = state.phase else {
                return Err(io::ErrorKind::Interrupted.into());
            };
            (state.phase, state.waiting) = (next, None);
        }
        self.waker.wake();
        if cloned.is_ok() {
            progress(Step { done: size, written: 0 })?;
            return Ok(CopyMethod::Cloned(begin.elapsed()));
        }
        to.set_len(size)?;
        let mut buffer = vec![0; (PIECE * CLUSTER) as usize];
        loop {
            let Next { range, hole } = match self.next()? {
                Some(next) => next,
                None => return Ok(CopyMethod::Copied),
            };
            let length = range.end - range.start;
            let (done, written) = if hole {
                (self.copied(&range), 0)
            } else {
                let bytes =
                    usize::try_from(length).ok().and_then(|length| buffer.get_mut(..length));
                let bytes = bytes.ok_or(io::ErrorKind::InvalidInput)?;
                self.disk.file.read_exact_at(bytes, range.start)?;
                // The old data is in memory now: the change need not wait for the write to the
                // copy.
                (self.copied(&range), sparse::write(to, bytes, range.start)?)
            };
            progress(Step { done, written })?;
        }
    }

    /// The next range to read.
    fn next(&self) -> io::Result<Option<Next>> {
        let mut state = self.state.lock();
        match &mut state.phase {
            Phase::Copying(clusters) => clusters.next(&self.disk.file),
            _ => Err(io::ErrorKind::Interrupted.into()),
        }
    }

    /// Mark `range` as copied; returns how many bytes of it were not copied before.
    fn copied(&self, range: &Range<u64>) -> u64 {
        let mut state = self.state.lock();
        let State { phase, waiting, .. } = &mut *state;
        let Phase::Copying(clusters) = phase else { return 0 };
        let (new, released) = clusters.copied(range);
        if released {
            self.waker.wake();
        }
        *waiting = (!clusters.wanted.is_empty()).then(Instant::now);
        new
    }

    /// Let all changes pass; an incomplete copy is invalid from then on.
    pub fn abandon(&self) {
        {
            let mut state = self.state.lock();
            (state.phase, state.waiting) = (Phase::Over, None);
        }
        // Retries the changes that wait.
        self.disk.unobserve(self);
    }

    /// How long guest changes have waited without any copying progress.
    pub fn stalled(&self) -> Option<Duration> {
        self.state.lock().waiting.map(|since| since.elapsed())
    }

    /// Make the complete copy `to` durable, and give it the generation that the image had. Returns
    /// its mark.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn seal(&self, to: &File) -> io::Result<DiskMark> {
        if let Some(generation) = self.state.lock().generation
            && let Err(e) = generation::write(to, generation)
        {
            log::info!("the copy of {} has no generation mark ({e})", self.disk.path.display());
        }
        to.sync_all()?;
        DiskMark::of(to)
    }
}

impl Observer for DiskCopy {
    fn before(&self, change: &Change) -> io::Result<Verdict> {
        let mut state = self.state.lock();
        let State { phase, waiting, .. } = &mut *state;
        let waits = match phase {
            Phase::Idle | Phase::Over => return Ok(Verdict::Retire),
            Phase::Delaying => true,
            Phase::Copying(clusters) => clusters.want(&change.range),
        };
        if !waits {
            return Ok(Verdict::Start);
        }
        waiting.get_or_insert_with(Instant::now);
        Ok(Verdict::Wait)
    }

    fn after(&self, _: &Change, _: &io::Result<()>) {}
}

/// The next bytes to be read.
struct Next {
    range: Range<u64>,
    /// They are zero, and are not written.
    hole: bool,
}

/// Which clusters of an image have been copied.
struct Clusters {
    /// Bytes of the image.
    size: u64,
    /// Whether the host can report where data is.
    sparse: bool,
    /// One bit for each cluster.
    copied: Vec<u64>,
    /// All clusters before this one have been copied.
    first: u64,
    /// Where data begins at or after `first`, as far as known.
    data: u64,
    /// The ranges that waiting changes need.
    wanted: VecDeque<Range<u64>>,
}

impl Clusters {
    fn new(size: u64, sparse: bool) -> io::Result<Self> {
        let words =
            usize::try_from(size.div_ceil(CLUSTER).div_ceil(64)).map_err(io::Error::other)?;
        Ok(Self {
            size,
            sparse,
            copied: vec![0; words],
            first: 0,
            data: 0,
            wanted: VecDeque::new(),
        })
    }

    fn count(&self) -> u64 {
        self.size.div_ceil(CLUSTER)
    }

    /// The first of `clusters` that has not been copied.
    fn missing(&self, clusters: &Range<u64>) -> Option<u64> {
        let mut at = clusters.start.max(self.first);
        while at < clusters.end {
            let word = usize::try_from(at / 64).ok().and_then(|at| self.copied.get(at))?;
            let ones = u64::from((word >> (at % 64)).trailing_ones());
            match at % 64 + ones {
                // Skip the rest of the word: the shift has filled its upper bits with zeros.
                64.. => at = at / 64 * 64 + 64,
                _ => return Some(at + ones).filter(|at| *at < clusters.end),
            }
        }
        None
    }

    /// The clusters that `bytes` touch; none beyond the end of the copy.
    fn touched(&self, bytes: &Range<u64>) -> Range<u64> {
        bytes.start / CLUSTER..bytes.end.min(self.size).div_ceil(CLUSTER)
    }

    /// Request that the clusters of `bytes` be copied soon; false when they have been copied
    /// already.
    fn want(&mut self, bytes: &Range<u64>) -> bool {
        let touched = self.touched(bytes);
        let Some(start) = self.missing(&touched) else { return false };
        let known = |range: &Range<u64>| range.start <= start && touched.end <= range.end;
        if !self.wanted.iter().any(known) {
            self.wanted.push_back(start..touched.end);
        }
        true
    }

    /// Mark `bytes` as copied. Returns how many were not copied before (part of a hole may have
    /// been), and whether any waiting change now has all its clusters copied.
    fn copied(&mut self, bytes: &Range<u64>) -> (u64, bool) {
        let mut new = 0;
        for cluster in self.touched(bytes) {
            let (word, bit) = (usize::try_from(cluster / 64).ok(), 1 << (cluster % 64));
            if let Some(word) = word.and_then(|at| self.copied.get_mut(at))
                && *word & bit == 0
            {
                *word |= bit;
                new += CLUSTER.min(self.size - cluster * CLUSTER);
            }
        }
        let before = self.wanted.len();
        let mut wanted = std::mem::take(&mut self.wanted);
        wanted.retain_mut(|range| {
            range.start = self.missing(range).unwrap_or(range.end);
            !range.is_empty()
        });
        self.wanted = wanted;
        (new, self.wanted.len() < before)
    }

    fn next(&mut self, image: &File) -> io::Result<Option<Next>> {
        if let Some(wanted) = self.wanted.front() {
            return Ok(Some(self.piece(wanted.start)));
        }
        let Some(first) = self.missing(&(self.first..self.count())) else { return Ok(None) };
        self.first = first;
        let at = first * CLUSTER;
        if self.sparse && at >= self.data {
            // Nothing changes before it is copied: what is a hole now was one at that moment.
            self.data = data_after(image, at, self.size)?;
            let end = self.data / CLUSTER * CLUSTER;
            let end = if self.data >= self.size { self.size } else { end };
            if end > at {
                return Ok(Some(Next { range: at..end, hole: true }));
            }
            self.data = self.data.max(at + 1);
        }
        Ok(Some(self.piece(self.first)))
    }

    /// The run of uncopied clusters from `cluster` on that is read at once.
    fn piece(&self, cluster: u64) -> Next {
        let most = cluster..(cluster + PIECE).min(self.count());
        let end = most.take_while(|next| self.missing(&(*next..*next + 1)).is_some()).last();
        let range = cluster * CLUSTER..((end.unwrap_or(cluster) + 1) * CLUSTER).min(self.size);
        Next { range, hole: false }
    }
}

/// Where data begins in `file` at or after `at`; `size` when there is none.
///
/// # Errors
/// When the host cannot report it.
pub fn data_after(file: &File, at: u64, size: u64) -> io::Result<u64> {
    match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(data) => Ok(data.min(size)),
        Err(Errno::NXIO) => Ok(size),
        // A file system without holes.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(at),
        Err(e) => Err(e.into()),
    }
}
