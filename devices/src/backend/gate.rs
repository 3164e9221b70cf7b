//! Holds a machine's output back until the checkpoint that covers it is acknowledged.
//!
//! A replicated machine must not show output to the outside before its backup has the state that
//! produced it. A gate buffers that output in order, and knows which checkpoint covers which part:
//!
//! ```text
//!   guest --hold--> [ filling ] --mark(e)--> [ epoch e ] .. [ oldest ] --release(e)--> the outside
//! ```
//!
//! It works on pieces of bytes; what these are (frames of a NIC, output of a console) and how they
//! are written is up to its callers, the decorators around back-ends. Devices do not know of it.
use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use rustix::event::{EventfdFlags, eventfd};

// `tests/gate_orders.rs` has its own, to try every order of threads.
use crate::sync::{AtomicBool, Mutex};

/// The capacity of a gate.
#[derive(Debug, Clone, Copy)]
pub struct Room {
    /// Bytes of all pieces.
    pub bytes: usize,
    /// Pieces.
    pub pieces: usize,
}

/// Capacity that an emptied buffer keeps for later checkpoints, in bytes.
const SPARE: usize = 1 << 20;

/// What [`Gate::hold`] did with a piece of output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    /// Nothing: the gate is open, and the caller writes the piece itself.
    Open,
    /// It was copied into the gate.
    Kept,
    /// Nothing: there is no room. The gate's descriptor becomes readable when there is.
    Full,
}

/// What a gate holds at the moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Backlog {
    /// Bytes of all pieces.
    pub bytes: usize,
    /// Pieces.
    pub pieces: usize,
    /// How long the oldest piece has waited.
    pub oldest: Duration,
}

/// The outer side of a gate, which releases and opens. There is only one, so that pieces are
/// written in order.
pub struct Keeper(Arc<Gate>);

/// Shuts a gate and marks its epochs. Apart from the [`Keeper`], as the thread that stops the guest
/// for a checkpoint must not wait while another one writes what is released.
pub struct Marker(Arc<Gate>);

/// The inner side of a gate, where the output of one back-end arrives. Its descriptor becomes
/// readable when there may be room again; [`Gate::take_room`] clears it.
pub struct Gate {
    /// Whether output is held. Changed only under the lock; read without it for every piece.
    shut: AtomicBool,
    kept: Mutex<Kept>,
    room: Room,
    has_room: OwnedFd,
}

#[derive(Default)]
struct Kept {
    /// Output since the last mark.
    filling: Batch,
    /// Marked output, oldest first. Epochs ascend.
    marked: VecDeque<(u64, Batch)>,
    /// An emptied buffer, so that a gate in steady use allocates nothing.
    spare: Option<Batch>,
    bytes: usize,
    pieces: usize,
    /// [`Gate::hold`] has returned [`Held::Full`] since room was last announced.
    refused: bool,
    /// An eventfd that is signalled when a first piece is held that no mark covers.
    waits: Option<Arc<OwnedFd>>,
}

/// Pieces of output, one after the other.
#[derive(Default)]
struct Batch {
    bytes: Vec<u8>,
    /// Where each piece ends.
    ends: Vec<usize>,
    /// When the first one was added.
    since: Option<Instant>,
}

impl Batch {
    fn push(
        &mut self,
        length: usize,
        copy: impl FnOnce(&mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let (begin, end) = (self.bytes.len(), self.bytes.len() + length);
        self.bytes.resize(end, 0);
        let copied = self.bytes.get_mut(begin..).map_or(Ok(()), copy);
        if copied.is_err() {
            self.bytes.truncate(begin);
            return copied;
        }
        self.ends.push(end);
        self.since.get_or_insert_with(Instant::now);
        Ok(())
    }

    fn pieces(&self) -> impl Iterator<Item = &[u8]> {
        let begins = std::iter::once(0).chain(self.ends.iter().copied());
        begins.zip(&self.ends).filter_map(|(from, to)| self.bytes.get(from..*to))
    }

    /// Remove all pieces, and keep at most [`SPARE`] bytes of capacity.
    fn clear(&mut self) {
        self.bytes.clear();
        self.bytes.shrink_to(SPARE);
        self.ends.clear();
        self.ends.shrink_to(SPARE / size_of::<usize>());
        self.since = None;
    }
}

impl Gate {
    /// An open gate, and its only keeper.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn new(room: Room) -> io::Result<(Arc<Self>, Keeper)> {
        let has_room = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        let shut = AtomicBool::new(false);
        let gate = Arc::new(Self { shut, kept: Mutex::default(), room, has_room });
        Ok((gate.clone(), Keeper(gate)))
    }

    /// Hold a piece of output of `length` bytes, which `copy` writes into the buffer, if the gate
    /// is shut.
    ///
    /// # Errors
    /// Those of `copy`; then nothing is held.
    pub fn hold(
        &self,
        length: usize,
        copy: impl FnOnce(&mut [u8]) -> io::Result<()>,
    ) -> io::Result<Held> {
        if !self.shut.load(Ordering::Acquire) {
            return Ok(Held::Open);
        }
        let kept = &mut *self.kept.lock();
        // It may have been opened meanwhile.
        if !self.shut.load(Ordering::Acquire) {
            return Ok(Held::Open);
        }
        // A piece larger than the capacity is accepted when the gate is empty; otherwise it would
        // never pass.
        let fits = kept.bytes + length <= self.room.bytes && kept.pieces < self.room.pieces;
        if !fits && kept.pieces > 0 {
            kept.refused = true;
            return Ok(Held::Full);
        }
        kept.filling.push(length, copy)?;
        kept.bytes += length;
        kept.pieces += 1;
        if let ([_], Some(waits)) = (&kept.filling.ends[..], &kept.waits) {
            // Fails only when it is signalled already.
            let _ = rustix::io::write(waits, &1u64.to_ne_bytes());
        }
        Ok(Held::Kept)
    }

    /// What is held now.
    pub fn backlog(&self) -> Backlog {
        let kept = self.kept.lock();
        let oldest = kept.marked.iter().map(|(_, batch)| batch).chain([&kept.filling]);
        let since = oldest.filter_map(|batch| batch.since).next();
        let oldest = since.map_or(Duration::ZERO, |since| since.elapsed());
        Backlog { bytes: kept.bytes, pieces: kept.pieces, oldest }
    }

    /// A copy of the output covered by checkpoints up to and including `epoch`.
    pub fn covered(&self, epoch: u64) -> Vec<u8> {
        let kept = self.kept.lock();
        let covered = kept.marked.iter().take_while(|(of, _)| *of <= epoch);
        covered.flat_map(|(_, batch)| batch.bytes.iter().copied()).collect()
    }

    /// Bytes of free capacity, if it is shut. 0 counts as a [`Held::Full`].
    pub fn room_left(&self) -> Option<usize> {
        let mut kept = self.kept.lock();
        let full = kept.pieces >= self.room.pieces;
        let left = if full { 0 } else { self.room.bytes.saturating_sub(kept.bytes) };
        kept.refused |= left == 0;
        self.is_shut().then_some(left)
    }

    /// Whether output is held.
    pub fn is_shut(&self) -> bool {
        self.shut.load(Ordering::Acquire)
    }

    /// Clear the readiness of its descriptor.
    pub fn take_room(&self) {
        // Fails only when it is clear already.
        let _ = rustix::io::read(&self.has_room, &mut [0; 8]);
    }

    /// Remove the oldest output, if `chosen` accepts the epoch that covers it.
    fn oldest(&self, chosen: impl Fn(u64) -> bool) -> Option<Batch> {
        self.kept.lock().marked.pop_front_if(|(epoch, _)| chosen(*epoch)).map(|(_, batch)| batch)
    }

    /// Call when `batch` has been written or discarded.
    fn done_with(&self, mut batch: Batch) {
        let mut kept = self.kept.lock();
        kept.bytes -= batch.bytes.len();
        kept.pieces -= batch.ends.len();
        batch.clear();
        kept.spare.get_or_insert(batch);
        if std::mem::take(&mut kept.refused) {
            // Fails only when it is readable already.
            let _ = rustix::io::write(&self.has_room, &1u64.to_ne_bytes());
        }
    }
}

impl AsRawFd for Gate {
    fn as_raw_fd(&self) -> RawFd {
        self.has_room.as_raw_fd()
    }
}

impl AsFd for Gate {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.has_room.as_fd()
    }
}

impl Keeper {
    /// Its gate.
    pub fn gate(&self) -> &Gate {
        &self.0
    }

    /// The handle that marks its epochs.
    pub fn marker(&self) -> Marker {
        Marker(self.0.clone())
    }

    /// Signal this eventfd whenever the first piece is held that no checkpoint covers.
    pub fn signal(&self, waits: Arc<OwnedFd>) {
        self.0.kept.lock().waits = Some(waits);
    }

    /// Whether output is held that no checkpoint covers.
    pub fn waits(&self) -> bool {
        !self.0.kept.lock().filling.ends.is_empty()
    }

    /// Pass the output covered by checkpoints up to and including `epoch` to `write`, piece by
    /// piece and in order. `write` may wait: output produced meanwhile is held as before.
    pub fn release(&mut self, epoch: u64, mut write: impl FnMut(&[u8])) {
        while let Some(batch) = self.0.oldest(|of| of <= epoch) {
            batch.pieces().for_each(&mut write);
            self.0.done_with(batch);
        }
    }

    /// Pass everything to `write`, covered or not, and open the gate.
    pub fn open(&mut self, mut write: impl FnMut(&[u8])) {
        while let Some(batch) = self.last() {
            batch.pieces().for_each(&mut write);
            self.0.done_with(batch);
        }
    }

    /// Discard what is held. The gate stays as it is, shut or open.
    pub fn discard(&mut self) {
        let (marked, filling) = {
            let mut kept = self.0.kept.lock();
            (std::mem::take(&mut kept.marked), std::mem::take(&mut kept.filling))
        };
        let marked = marked.into_iter().map(|(_, batch)| batch);
        marked.chain([filling]).for_each(|batch| self.0.done_with(batch));
    }

    /// The oldest output, marked or not: a mark may come at any time. If there is none, opens the
    /// gate, under the same lock, so that new output cannot overtake held output.
    fn last(&self) -> Option<Batch> {
        let mut kept = self.0.kept.lock();
        if let Some((_, batch)) = kept.marked.pop_front() {
            return Some(batch);
        }
        if kept.filling.ends.is_empty() {
            self.0.shut.store(false, Ordering::Release);
            return None;
        }
        Some(std::mem::take(&mut kept.filling))
    }
}

impl Marker {
    /// Hold output from now on. Call while nothing produces any.
    pub fn shut(&self) {
        let _kept = self.0.kept.lock();
        self.0.shut.store(true, Ordering::Release);
    }

    /// The checkpoint `epoch` covers all output so far. Epochs ascend; nothing may produce output
    /// meanwhile.
    pub fn mark(&self, epoch: u64) {
        let kept = &mut *self.0.kept.lock();
        if !kept.filling.ends.is_empty() {
            let next = kept.spare.take().unwrap_or_default();
            kept.marked.push_back((epoch, std::mem::replace(&mut kept.filling, next)));
        }
    }
}
