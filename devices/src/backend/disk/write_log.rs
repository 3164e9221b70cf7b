//! What guests change on disks, in the order in which they hear that it is done: the disk's part of
//! the epochs that a primary sends to its backup.
//!
//! ```text
//!   write popped -> copied -> written from the copy -> complete: in the log -> the guest hears of it
//!                                                        |
//!        mark(e): what is in the log by now belongs to epoch e -> take(e): for the backup
//! ```
//! The disk is written from the copy, and not from the guest's buffer, which the guest may change
//! meanwhile: so the backup's image gets the same bytes. A request is in the log in the same step of
//! the device's worker that answers it, so an epoch has either both or neither.
//!
//! The log is attached while the guest runs, and keeps nothing before [`WriteLog::record`]: what is
//! under way then was copied already, and so can be kept when it is complete.
//!
//! The log is bounded. While it is full, changes stay in the guest's queues, as if an
//! [`Observer`](super::Observer) delayed them, until what was taken from it is dropped.
use std::{
    collections::VecDeque,
    fmt, mem,
    ops::Deref,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use parking_lot::Mutex;

use super::{Disk, Op, Waker};
use crate::{
    Memory,
    virtio::chain::{self, Segment},
};

/// What an entry is charged for besides its data, in bytes.
const ENTRY: u64 = 128;
/// Alignment of copies, enough for `O_DIRECT` anywhere.
const ALIGN: usize = 4096;

/// A copy of what was written, aligned for `O_DIRECT`.
pub struct Copied {
    room: Vec<u8>,
    start: usize,
    len: usize,
}

impl Copied {
    /// Copy `segments` of guest memory, which the caller has checked.
    fn of(segments: &[Segment], memory: &Memory) -> Self {
        let len = usize::try_from(chain::total(segments)).unwrap_or(usize::MAX);
        let mut room = vec![0; len.saturating_add(ALIGN - 1)];
        let start = room.as_ptr().align_offset(ALIGN).min(ALIGN - 1);
        if let Some(to) = room.get_mut(start..start + len) {
            chain::read(memory, segments, 0, to);
        }
        Self { room, start, len }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        self.room.get(self.start..self.start + self.len).unwrap_or_default()
    }
}

impl fmt::Debug for Copied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.len)
    }
}

/// A change that is complete.
#[derive(Debug, Clone)]
pub struct Logged {
    /// The disk's number, as given to [`Disk::log_writes`].
    pub disk: u16,
    /// First byte.
    pub offset: u64,
    /// What is there now.
    pub contents: Contents,
}

/// What a change has left on the disk.
#[derive(Debug, Clone)]
pub enum Contents {
    /// These bytes.
    Bytes(Arc<Copied>),
    /// So many zeroes, or, after a discard, so many bytes that the guest no longer needs.
    Zeroes(u64),
}

/// The changes of all disks of a guest.
#[derive(Debug)]
pub struct WriteLog {
    /// Most bytes of entries, and of requests that will become entries.
    limit: u64,
    /// A lock, because an I/O thread for each disk adds to it and another one takes; it is held only
    /// to move entries.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    entries: VecDeque<Logged>,
    /// Bytes of `entries`, and of requests under way.
    used: u64,
    /// How many of `entries` belong to which epoch, ascending; the rest is not marked yet.
    marks: VecDeque<(u64, usize)>,
    marked: usize,
    /// Changes that are complete are kept.
    recording: bool,
    /// A change had to wait.
    refused: bool,
    wakers: Vec<(u16, Waker)>,
}

impl WriteLog {
    /// An empty log of `limit` bytes. A single request may exceed it when nothing else is in it: one
    /// write has at most 256 MiB.
    pub fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self { limit, state: Mutex::default() })
    }

    /// Keep what is completed from now on. Call it while the workers of all disks are parked.
    pub fn record(&self) {
        self.state.lock().recording = true;
    }

    /// What is complete by now, and is in no earlier epoch, belongs to `epoch`. Call it while the
    /// workers of all disks are parked.
    pub fn mark(&self, epoch: u64) {
        let mut state = self.state.lock();
        let count = state.entries.len() - state.marked;
        state.marked += count;
        state.marks.push_back((epoch, count));
    }

    /// Take the changes of all epochs up to `epoch`, in order.
    pub fn take(self: &Arc<Self>, epoch: u64) -> Taken {
        let mut state = self.state.lock();
        let mut count = 0;
        while let Some(&(marked, n)) = state.marks.front()
            && marked <= epoch
        {
            count += n;
            state.marks.pop_front();
        }
        state.marked -= count;
        let entries = state.entries.drain(..count).collect();
        Taken { log: self.clone(), entries }
    }

    /// Bytes in it, and of requests under way.
    pub fn used(&self) -> u64 {
        self.state.lock().used
    }
}

/// Changes that were taken from a log; they still count for its limit until they are dropped.
#[derive(Debug)]
pub struct Taken {
    log: Arc<WriteLog>,
    entries: Vec<Logged>,
}

impl Deref for Taken {
    type Target = [Logged];

    fn deref(&self) -> &[Logged] {
        &self.entries
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let bytes = self.entries.iter().map(|logged| cost(logged.contents.len())).sum();
        self.log.state.lock().release(bytes);
    }
}

impl Contents {
    /// Bytes that it occupies here.
    fn len(&self) -> u64 {
        match self {
            Self::Bytes(copied) => copied.len as u64,
            Self::Zeroes(_) => 0,
        }
    }
}

fn cost(bytes: u64) -> u64 {
    bytes.saturating_add(ENTRY)
}

impl State {
    fn release(&mut self, bytes: u64) {
        self.used = self.used.saturating_sub(bytes);
        if bytes > 0 && mem::take(&mut self.refused) {
            self.wakers.iter().for_each(|(_, waker)| waker.wake());
        }
    }
}

/// The log of one disk.
#[derive(Debug)]
pub(super) struct DiskLog {
    log: Arc<WriteLog>,
    disk: u16,
}

/// The place of a request in the log, until it is complete. Dropped, it is free again: the request
/// was not started, or has failed, and nothing is known of the disk's contents there, as the guest
/// has been told.
pub(super) struct Pending {
    log: Arc<DiskLog>,
    cost: u64,
    logged: Option<Logged>,
}

impl Pending {
    /// What is to be written, instead of the guest's buffers; `None` for other changes.
    pub fn copied(&self) -> Option<Arc<Copied>> {
        match &self.logged.as_ref()?.contents {
            Contents::Bytes(copied) => Some(copied.clone()),
            Contents::Zeroes(_) => None,
        }
    }

    /// The change is made.
    pub fn complete(mut self) {
        let mut state = self.log.log.state.lock();
        if let Some(logged) = self.logged.take_if(|_| state.recording) {
            state.entries.push_back(logged);
            self.cost = 0;
        }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.log.log.state.lock().release(self.cost);
    }
}

/// The log of a disk, if there is one at the moment.
#[derive(Debug, Default)]
pub(super) struct Logging {
    /// Whether there is one. If not, this check is all that a request costs.
    any: AtomicBool,
    /// Changes under way that were started without one.
    unlogged: AtomicUsize,
    /// A lock, as it is attached on another thread than the one that changes the disk.
    log: Mutex<Option<Arc<DiskLog>>>,
}

/// What the log says about a request.
pub(super) enum Entry {
    /// It changes nothing.
    None,
    /// There is no log. To be reported by [`Logging::ended`].
    Unlogged,
    /// It may start.
    Room(Pending),
    /// It has to wait.
    Full,
}

impl Logging {
    /// Make room for a request.
    pub fn begin(&self, op: Op, offset: u64, segments: &[Segment], memory: &Memory) -> Entry {
        if matches!(op, Op::Read | Op::Flush) {
            return Entry::None;
        }
        // Before the log is looked for: who has attached it then either sees this change, or this
        // change sees the log. Both orders hold in all threads, hence SeqCst.
        self.unlogged.fetch_add(1, Ordering::SeqCst);
        let log = if self.any.load(Ordering::SeqCst) { self.log.lock().clone() } else { None };
        let Some(log) = log else { return Entry::Unlogged };
        self.ended();
        let write = matches!(op, Op::Write { .. });
        let cost = cost(if write { op.bytes(segments) } else { 0 });
        {
            let mut state = log.log.state.lock();
            if state.used > 0 && state.used.saturating_add(cost) > log.log.limit {
                state.refused = true;
                return Entry::Full;
            }
            state.used = state.used.saturating_add(cost);
        }
        let contents = match write {
            true => Contents::Bytes(Arc::new(Copied::of(segments, memory))),
            false => Contents::Zeroes(op.bytes(segments)),
        };
        let logged = Some(Logged { disk: log.disk, offset, contents });
        Entry::Room(Pending { log, cost, logged })
    }

    /// A change without a log has ended.
    pub fn ended(&self) {
        self.unlogged.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Disk {
    /// From now on, the disk's changes go into `log` under this number, but for those of
    /// [`Disk::has_unlogged`].
    pub fn log_writes(&self, log: &Arc<WriteLog>, number: u16) {
        self.stop_logging();
        log.state.lock().wakers.push((number, self.waker()));
        *self.logging.log.lock() = Some(Arc::new(DiskLog { log: log.clone(), disk: number }));
        self.logging.any.store(true, Ordering::SeqCst);
    }

    /// Whether changes are under way that were started before the log was attached.
    pub fn has_unlogged(&self) -> bool {
        self.logging.unlogged.load(Ordering::SeqCst) > 0
    }

    /// Log no further change. Those under way still go into the log.
    pub fn stop_logging(&self) {
        self.logging.any.store(false, Ordering::SeqCst);
        if let Some(old) = self.logging.log.lock().take() {
            old.log.state.lock().wakers.retain(|(number, _)| *number != old.disk);
            // Changes that waited for room need none.
            self.waker().wake();
        }
    }
}

#[cfg(test)]
mod tests;
