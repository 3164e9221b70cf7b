//! Staged pages: copies of guest memory, so that the guest can run again before they are written
//! out.
use std::{
    io,
    ops::Range,
    sync::{Arc, mpsc::channel},
};

use devices::Memory;
use parking_lot::Mutex;

use super::image::{self, PAGE_SIZE};

/// Most bytes that are staged for a save.
pub const MAX_BYTES: u64 = 256 << 20;
/// Most ranges that are staged for a save.
pub const MAX_RANGES: usize = 32 << 10;

/// Fewer bytes are not worth a second thread.
const ALONE: u64 = 64 * PAGE_SIZE;

/// Bytes that a thread copies before it looks what is left.
const SHARE: u64 = 16 * PAGE_SIZE;

/// Copies of ranges of guest memory. Their buffers are touched before the guest is stopped: their
/// first page faults would prolong the pause.
#[derive(Debug, Default)]
pub struct Staging {
    first: Part,
    /// What a second thread has copied: follows the first part.
    second: Part,
}

/// What one thread copies.
#[derive(Debug, Default)]
struct Part {
    room: Vec<u8>,
    /// Bytes in it.
    filled: usize,
    /// Each with its offset in `room`; ascending, once all are copied.
    ranges: Vec<(Range<u64>, usize)>,
}

/// Work for another thread.
pub type Job = Box<dyn FnOnce() + Send>;

impl Staging {
    /// A buffer for `bytes` of memory, at most [`MAX_BYTES`], that causes no page faults when it is
    /// filled by one thread.
    ///
    /// # Errors
    /// When the host does not have it.
    pub fn touched(bytes: u64) -> io::Result<Self> {
        let mut staging = Self::default();
        staging.first.grow(bytes.min(MAX_BYTES))?;
        Ok(staging)
    }

    /// Make room for `bytes` of memory that two threads copy, so that it causes no page faults when
    /// it is filled, unless one of them copies far more than half.
    ///
    /// # Errors
    /// When the host does not have it.
    pub fn touch(&mut self, bytes: u64) -> io::Result<()> {
        self.first.grow(bytes / 4 * 3)?;
        self.second.grow(bytes.div_ceil(2))
    }

    /// Whether `ranges` are small enough to be staged for a save.
    pub fn takes(ranges: &[Range<u64>]) -> bool {
        ranges.len() <= MAX_RANGES && bytes(ranges) <= MAX_BYTES
    }

    /// Replace the contents by `ranges` of `memory`, ascending. Bytes beyond those touched before
    /// cost page faults, but do no harm.
    ///
    /// # Errors
    /// When the host has no memory, or a range is not inside of `memory`.
    pub fn fill(&mut self, memory: &Memory, ranges: &[Range<u64>]) -> io::Result<()> {
        self.second.clear();
        self.first.clear();
        self.first.append(memory, ranges)
    }

    /// As [`Staging::fill`], with the help of another thread, which `help` gives a job to. This
    /// thread copies from the beginning and that one from the end, until they meet; so nothing is
    /// waited for when it begins late.
    ///
    /// # Errors
    /// As there; when the other thread does not end the job that it has begun.
    pub fn fill_with(
        &mut self,
        memory: &Memory,
        ranges: &[Range<u64>],
        help: impl FnOnce(Job),
    ) -> io::Result<()> {
        if bytes(ranges) < ALONE {
            return self.fill(memory, ranges);
        }
        let shared = Arc::new(Shared::new(ranges, std::mem::take(&mut self.second)));
        let (theirs, its_memory) = (Arc::clone(&shared), memory.clone());
        let (done, answer) = channel();
        help(Box::new(move || {
            // Otherwise all is copied already.
            let Some(mut part) = theirs.helper.lock().take() else { return };
            let filled = part.append_shares(&its_memory, || theirs.last());
            // They came from the end.
            part.ranges.sort_by_key(|(range, _)| range.start);
            // Nobody waits for it any more if the first thread has failed.
            let _ = done.send(filled.map(|()| part));
        }));
        self.first.clear();
        self.first.append_shares(memory, || shared.first())?;
        let unused = shared.helper.lock().take();
        self.second = match unused {
            Some(part) => part,
            None => answer.recv().map_err(io::Error::other)??,
        };
        Ok(())
    }

    /// The copied ranges, with their contents.
    ///
    /// # Errors
    /// When the copies do not have the size of their ranges, which would be a bug.
    pub fn pieces(&self) -> impl Iterator<Item = io::Result<(u64, &[u8])>> {
        let parts = [&self.first, &self.second].into_iter();
        parts.flat_map(|part| part.ranges.iter().map(|range| part.contents(range)))
    }

    /// The copied range at place `index`, with its contents; `None` after the last.
    ///
    /// # Errors
    /// As [`Staging::pieces`].
    pub fn piece(&self, index: usize) -> io::Result<Option<(u64, &[u8])>> {
        let (part, index) = match index.checked_sub(self.first.ranges.len()) {
            None => (&self.first, index),
            Some(index) => (&self.second, index),
        };
        part.ranges.get(index).map(|range| part.contents(range)).transpose()
    }

    /// The copied ranges, ascending.
    pub fn ranges(&self) -> Vec<Range<u64>> {
        let all = self.first.ranges.iter().chain(&self.second.ranges);
        all.map(|(range, _)| range.clone()).collect()
    }

    /// Bytes copied.
    pub fn bytes(&self) -> u64 {
        let all = self.first.ranges.iter().chain(&self.second.ranges);
        all.map(|(range, _)| range.end - range.start).sum()
    }
}

/// What two threads copy, in shares.
struct Shared {
    pieces: Vec<Range<u64>>,
    /// Of `pieces`.
    shares: Vec<Range<usize>>,
    /// The shares that nobody has taken yet.
    left: Mutex<Range<usize>>,
    /// The second thread's part, until it begins.
    helper: Mutex<Option<Part>>,
}

impl Shared {
    fn new(ranges: &[Range<u64>], mut helper: Part) -> Self {
        helper.clear();
        let (pieces, shares) = shares(ranges);
        let left = Mutex::new(0..shares.len());
        Self { pieces, shares, left, helper: Mutex::new(Some(helper)) }
    }

    fn first(&self) -> Option<&[Range<u64>]> {
        let share = self.left.lock().next()?;
        self.pieces.get(self.shares.get(share)?.clone())
    }

    fn last(&self) -> Option<&[Range<u64>]> {
        let share = self.left.lock().next_back()?;
        self.pieces.get(self.shares.get(share)?.clone())
    }
}

impl Part {
    fn clear(&mut self) {
        self.ranges.clear();
        self.filled = 0;
    }

    fn append_shares<'a>(
        &mut self,
        memory: &Memory,
        mut next: impl FnMut() -> Option<&'a [Range<u64>]>,
    ) -> io::Result<()> {
        while let Some(share) = next() {
            self.append(memory, share)?;
        }
        Ok(())
    }

    fn append(&mut self, memory: &Memory, ranges: &[Range<u64>]) -> io::Result<()> {
        self.grow(self.filled as u64 + bytes(ranges))?;
        let (_, mut rest) = self.room.split_at_mut_checked(self.filled).ok_or_else(short)?;
        for range in ranges {
            let len = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
            let (part, after) = rest.split_at_mut_checked(len).ok_or_else(short)?;
            image::read(memory, range.start, part)?;
            self.ranges.push((range.clone(), self.filled));
            self.filled += len;
            rest = after;
        }
        Ok(())
    }

    fn contents(&self, (range, at): &(Range<u64>, usize)) -> io::Result<(u64, &[u8])> {
        let len = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
        let end = at.checked_add(len).ok_or_else(short)?;
        Ok((range.start, self.room.get(*at..end).ok_or_else(short)?))
    }

    fn grow(&mut self, bytes: u64) -> io::Result<()> {
        let len = usize::try_from(bytes).map_err(io::Error::other)?;
        let more = len.saturating_sub(self.room.len());
        self.room.try_reserve_exact(more).map_err(|_| io::ErrorKind::OutOfMemory)?;
        self.room.resize(self.room.len() + more, 0);
        Ok(())
    }
}

/// `ranges` in pieces, and which of these are a share of [`SHARE`] bytes; the last one may be
/// smaller.
fn shares(ranges: &[Range<u64>]) -> (Vec<Range<u64>>, Vec<Range<usize>>) {
    let (mut pieces, mut shares) = (Vec::with_capacity(ranges.len()), Vec::new());
    let (mut begun, mut room) = (0, SHARE);
    for range in ranges {
        let mut start = range.start;
        while start < range.end {
            let end = range.end.min(start + room);
            pieces.push(start..end);
            room -= end - start;
            start = end;
            if room == 0 {
                shares.push(begun..pieces.len());
                (begun, room) = (pieces.len(), SHARE);
            }
        }
    }
    shares.push(begun..pieces.len());
    (pieces, shares)
}

/// Bytes in `ranges`.
pub fn bytes(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

/// How many bytes to touch when `left` bytes are left to be copied: the guest dirties more until it
/// is stopped.
pub fn room_for(left: u64) -> u64 {
    left.saturating_mul(2).max(1024 * PAGE_SIZE)
}

fn short() -> io::Error {
    io::Error::other("a copy of guest memory does not match the size of its ranges")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::allocate;
    use config::{MemoryConfig, types::MemorySize};

    #[test]
    fn what_was_copied_stays_whatever_becomes_of_the_memory() {
        let config = MemoryConfig::new(MemorySize::MIN);
        let memory = allocate(&config).unwrap();
        let page = |n: u64| n * PAGE_SIZE..(n + 1) * PAGE_SIZE;
        let ranges = [page(1), page(7).start..page(8).end, page(4095)];
        let mark = |with: u8| {
            for n in [1, 7, 8, 4095] {
                let contents = [with + u8::try_from(n % 100).unwrap(); 4096];
                image::write(&memory, page(n).start, &contents).unwrap();
            }
        };
        mark(1);
        // Once with enough room, once without.
        for mut staging in [Staging::touched(16 << 20).unwrap(), Staging::default()] {
            mark(1);
            staging.fill(&memory, &ranges).unwrap();
            mark(100);
            let copied: Vec<_> = staging.pieces().map(Result::unwrap).collect();
            assert_eq!(staging.bytes(), 4 * PAGE_SIZE);
            let seen: Vec<_> = copied
                .iter()
                .map(|(at, bytes)| (at / PAGE_SIZE, bytes.len(), bytes[0], bytes[bytes.len() - 1]))
                .collect();
            assert_eq!(seen, [(1, 4096, 2, 2), (7, 8192, 8, 9), (4095, 4096, 96, 96)]);
            staging.fill(&memory, &ranges[..1]).unwrap();
            assert_eq!(staging.pieces().count(), 1, "what it held before is gone");
        }
    }

    #[test]
    fn two_threads_copy_as_one_does() {
        let memory = allocate(&MemoryConfig::new(MemorySize::MIN)).unwrap();
        let page = |n: u64| n * PAGE_SIZE..(n + 1) * PAGE_SIZE;
        let mut state = 1u64;
        let mut random = move |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        for _ in 0..50 {
            let mut ranges = Vec::new();
            let mut at = 0;
            while at < 4000 {
                let (gap, pages) = (1 + random(200), 1 + random(90));
                ranges.push(page(at + gap).start..page((at + gap + pages).min(4095)).end);
                at += gap + pages + 1;
            }
            ranges.retain(|range| !range.is_empty() && range.end <= 16 << 20);
            for range in &ranges {
                image::write(&memory, range.start, &[u8::try_from(random(256)).unwrap(); 4096])
                    .unwrap();
            }
            let (mut alone, mut both) = (Staging::default(), Staging::default());
            both.touch(1 << 20).unwrap();
            alone.fill(&memory, &ranges).unwrap();
            both.fill_with(&memory, &ranges, |job| drop(std::thread::spawn(job))).unwrap();
            let flat = |staging: &Staging| {
                let mut pages = Vec::new();
                for piece in staging.pieces() {
                    let (at, bytes) = piece.unwrap();
                    let each = (at..).step_by(4096).zip(bytes.chunks(4096));
                    pages.extend(each.map(|(at, page)| (at, page.to_vec())));
                }
                pages
            };
            assert!(flat(&alone) == flat(&both));
            assert_eq!((alone.bytes(), bytes(&both.ranges())), (both.bytes(), both.bytes()));
            let count = both.pieces().count();
            assert!(both.piece(count - 1).unwrap().is_some());
            assert!(both.piece(count).unwrap().is_none());
        }
        let outside = std::slice::from_ref(&(15 << 20..17 << 20));
        let spawn = |job: Job| drop(std::thread::spawn(job));
        assert!(Staging::default().fill_with(&memory, outside, spawn).is_err());
        let all = std::slice::from_ref(&(0..16 << 20));
        let mut alone = Staging::default();
        alone.fill_with(&memory, all, drop).unwrap();
        assert_eq!(alone.bytes(), 16 << 20, "a helper that does not begin is not waited for");
    }

    #[test]
    fn too_much_is_refused_and_not_cut_off() {
        let config = MemoryConfig::new(MemorySize::MIN);
        let memory = allocate(&config).unwrap();
        let all = std::slice::from_ref(&(0..MAX_BYTES + PAGE_SIZE));
        assert!(!Staging::takes(all));
        let many: Vec<_> = (0..=MAX_RANGES as u64).map(|n| n * 8192..n * 8192 + 4096).collect();
        assert!(Staging::takes(&many[1..]) && !Staging::takes(&many));
        let outside = std::slice::from_ref(&(15 << 20..17 << 20));
        assert!(Staging::default().fill(&memory, outside).is_err());
    }
}
