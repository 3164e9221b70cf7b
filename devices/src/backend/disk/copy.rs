//! A copy of a disk as it is at one moment, while its guest writes on.
//!
//! ```text
//!   Idle --begin--> Held -------------------cloned------------------> Over
//!                    |  every change waits                             ^
//!                    +-> Copying ---------------copied-----------------+
//!                        a change waits until what it replaces has been copied
//! ```
//! Where the file system can share the blocks of two files (FICLONE: XFS, btrfs), changes wait for that one
//! call. Elsewhere the image is read from its beginning to its end, and what the guest is about to change
//! out of turn (copy-before-write). If the copy fails, for whatever reason, the guest keeps running.
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

/// Bytes that are copied, or not, as one.
const CLUSTER: u64 = 64 << 10;
/// Clusters that are read at once: a change waits for no more than these and its own.
const PIECE: u64 = 4;

/// A copy of a disk in the making. One thread begins it and may abandon it, another one makes it.
pub struct DiskCopy {
    disk: Arc<Disk>,
    waker: Waker,
    /// A lock, because I/O threads ask what the thread that copies changes, between two reads of it.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    phase: Phase,
    /// Of the image at that moment.
    generation: Option<u128>,
    /// Since when changes have waited without any progress.
    waiting: Option<Instant>,
}

#[derive(Default)]
enum Phase {
    #[default]
    Idle,
    Held,
    Copying(Clusters),
    Over,
}

/// How a copy was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Made {
    /// It shares the blocks of the image. Changes waited for so long.
    Cloned(Duration),
    /// By reading the image.
    Copied,
}

/// What has been done since it was last told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Bytes of the image that are in the copy.
    pub done: u64,
    /// Bytes that were written for them.
    pub written: u64,
}

impl DiskCopy {
    /// A copy of `disk`, of a moment to come.
    pub fn new(disk: Arc<Disk>) -> Arc<Self> {
        let (waker, state) = (disk.waker(), Mutex::default());
        Arc::new(Self { disk, waker, state })
    }

    /// The disk.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// Bring what has been written so far to the medium. What remains of that is all that cloning will
    /// have to wait for.
    ///
    /// # Errors
    /// When the medium does not take it.
    pub fn sync(&self) -> io::Result<()> {
        self.disk.file.sync_all()
    }

    /// This is the moment: no request is under way. Changes wait from here on, until
    /// [`DiskCopy::make`] lets them pass.
    pub fn begin(self: &Arc<Self>) {
        let generation = self.disk.mark().and_then(|mark| mark.generation);
        let mut state = self.state.lock();
        if let Phase::Idle = state.phase {
            (state.phase, state.generation) = (Phase::Held, generation);
            drop(state);
            self.disk.observe(self.clone());
        }
    }

    /// Copy the disk, as it was when [`DiskCopy::begin`] was called, into `to`, which is empty; with each
    /// step `progress` is called, and an error of it ends the copying. Changes pass afterwards, whatever
    /// comes of it.
    ///
    /// # Errors
    /// When the image cannot be read, or the copy not be written. An error of the kind `Interrupted` when
    /// it was abandoned.
    pub fn make(
        &self,
        to: &File,
        progress: impl FnMut(Step) -> io::Result<()>,
    ) -> io::Result<Made> {
        let made = self.make_while_held(to, progress);
        self.abandon();
        made
    }

    fn make_while_held(
        &self,
        to: &File,
        mut progress: impl FnMut(Step) -> io::Result<()>,
    ) -> io::Result<Made> {
        let begin = Instant::now();
        let size = self.disk.bytes_of_image()?;
        // Refused by most file systems, and between two of them: then it is copied.
        let cloned = rustix::fs::ioctl_ficlone(to, &*self.disk.file);
        let next = match cloned {
            Ok(()) => Phase::Over,
            Err(_) => Phase::Copying(Clusters::new(size, !self.disk.device)?),
        };
        {
            let mut state = self.state.lock();
            let Phase::Held = state.phase else { return Err(io::ErrorKind::Interrupted.into()) };
            (state.phase, state.waiting) = (next, None);
        }
        self.waker.wake();
        if cloned.is_ok() {
            progress(Step { done: size, written: 0 })?;
            return Ok(Made::Cloned(begin.elapsed()));
        }
        to.set_len(size)?;
        let mut buffer = vec![0; (PIECE * CLUSTER) as usize];
        loop {
            let Next { range, hole } = match self.next()? {
                Some(next) => next,
                None => return Ok(Made::Copied),
            };
            let length = range.end - range.start;
            let (done, written) = if hole {
                (self.copied(&range), 0)
            } else {
                let bytes =
                    usize::try_from(length).ok().and_then(|length| buffer.get_mut(..length));
                let bytes = bytes.ok_or(io::ErrorKind::InvalidInput)?;
                self.disk.file.read_exact_at(bytes, range.start)?;
                // What it replaces lies here now: the change need not wait for the other file.
                (self.copied(&range), sparse::write(to, bytes, range.start)?)
            };
            progress(Step { done, written })?;
        }
    }

    /// What has to be read next.
    fn next(&self) -> io::Result<Option<Next>> {
        let mut state = self.state.lock();
        match &mut state.phase {
            Phase::Copying(clusters) => clusters.next(&self.disk.file),
            _ => Err(io::ErrorKind::Interrupted.into()),
        }
    }

    /// `range` is in the copy; how many bytes of it were not before.
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

    /// Let all changes pass: nothing comes of the copy unless it is complete.
    pub fn abandon(&self) {
        {
            let mut state = self.state.lock();
            (state.phase, state.waiting) = (Phase::Over, None);
        }
        // Has those asked about again that wait.
        self.disk.unobserve(self);
    }

    /// How long changes of the guest have waited while nothing was copied.
    pub fn stalled(&self) -> Option<Duration> {
        self.state.lock().waiting.map(|since| since.elapsed())
    }

    /// Make `to`, which is complete, durable, and have it known by the generation that the image had.
    /// What it is like then.
    ///
    /// # Errors
    /// When the medium does not take it.
    pub fn seal(&self, to: &File) -> io::Result<DiskMark> {
        if let Some(generation) = self.state.lock().generation
            && let Err(e) = generation::write(to, generation)
        {
            log::info!("the copy of {} keeps no generation ({e})", self.disk.path.display());
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
            Phase::Held => true,
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
    /// They are zero, and take no room.
    hole: bool,
}

/// Which clusters of an image have been copied.
struct Clusters {
    /// Bytes of the image.
    size: u64,
    /// Whether the host can tell where data is.
    sparse: bool,
    /// A bit for each.
    copied: Vec<u64>,
    /// All before this one have been copied.
    first: u64,
    /// Where data begins behind `first`, as far as that is known.
    data: u64,
    /// What changes wait for.
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
                // The whole rest of the word, whose upper bits were filled with zeros by the shift.
                64.. => at = at / 64 * 64 + 64,
                _ => return Some(at + ones).filter(|at| *at < clusters.end),
            }
        }
        None
    }

    /// Those that `bytes` touch. What lies beyond the copy has none.
    fn touched(&self, bytes: &Range<u64>) -> Range<u64> {
        bytes.start / CLUSTER..bytes.end.min(self.size).div_ceil(CLUSTER)
    }

    /// Have the clusters of `bytes` copied soon; false when they have been.
    fn want(&mut self, bytes: &Range<u64>) -> bool {
        let touched = self.touched(bytes);
        let Some(start) = self.missing(&touched) else { return false };
        let known = |range: &Range<u64>| range.start <= start && touched.end <= range.end;
        if !self.wanted.iter().any(known) {
            self.wanted.push_back(start..touched.end);
        }
        true
    }

    /// `bytes` are in the copy. How many were not before, as a hole may have such in it; and whether
    /// nothing is missing any more for some of the changes that wait.
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
            // Nothing has changed that was not copied: what is a hole now was one at that moment.
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

    /// From `cluster` on, as many as have not been copied, and are read at once.
    fn piece(&self, cluster: u64) -> Next {
        let most = cluster..(cluster + PIECE).min(self.count());
        let end = most.take_while(|next| self.missing(&(*next..*next + 1)).is_some()).last();
        let range = cluster * CLUSTER..((end.unwrap_or(cluster) + 1) * CLUSTER).min(self.size);
        Next { range, hole: false }
    }
}

/// Where data begins in `file` at `at` or behind it; `size` when there is none.
///
/// # Errors
/// When the host does not tell.
pub fn data_after(file: &File, at: u64, size: u64) -> io::Result<u64> {
    match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(data) => Ok(data.min(size)),
        Err(Errno::NXIO) => Ok(size),
        // A file system without holes.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(at),
        Err(e) => Err(e.into()),
    }
}
