//! The requests on a disk. All of them pass through here, so this is where its observers are asked
//! and notified, and its changes logged, however the engine carries a request out.
#[cfg(test)]
mod tests;

use std::{io, os::fd::RawFd, sync::Arc, time::Duration};

use super::{
    Change, ChangeKind, Disk, Op,
    engine::Engine,
    observer::Permit,
    write_log::{Entry, Pending},
};
use crate::{Memory, virtio::chain::Segment};

/// The outcome of starting a request.
#[derive(Debug)]
pub enum Outcome {
    /// It is complete.
    Done(io::Result<()>),
    /// [`Storage::finished`] will return it.
    Pending,
    /// An observer of the disk, or its log, delays it: nothing has been started. Start it again when
    /// [`Storage::wake_source`] is readable.
    Delayed,
}

/// What the log has to hear of a request when it ends.
enum Logged {
    Nothing,
    /// It was started without a log.
    Without,
    In(Pending),
}

/// The requests of one guest on a disk. `T` is the caller's tag for a request.
pub struct Storage<T> {
    engine: Engine<(T, Permit, Logged)>,
}

impl<T> Storage<T> {
    /// For about `depth` requests at a time.
    pub fn new(disk: Arc<Disk>, memory: Memory, depth: usize) -> Self {
        Self { engine: Engine::new(disk, memory, depth) }
    }

    /// The disk.
    pub fn disk(&self) -> &Disk {
        self.engine.disk()
    }

    /// Readable when [`Storage::finished`] has something to return; `None` when nothing is ever
    /// pending.
    pub fn completion_source(&self) -> Option<RawFd> {
        self.engine.source()
    }

    /// Readable when delayed requests may be started; [`Storage::woken`] consumes the signal.
    pub fn wake_source(&self) -> RawFd {
        self.disk().observers.source()
    }

    /// Call before delayed requests are started again.
    pub fn woken(&self) {
        self.disk().observers.heard();
    }

    /// Whether another request may be started now.
    pub fn has_room(&self) -> bool {
        self.engine.has_room()
    }

    /// Requests that are pending.
    pub fn in_flight(&self) -> usize {
        self.engine.in_flight()
    }

    /// The tags of the requests that are pending, in no particular order.
    pub fn pending(&self) -> impl Iterator<Item = &T> {
        self.engine.pending().map(|(tag, ..)| tag)
    }

    /// Carry out a request at `offset` bytes. Call only if [`Storage::has_room`]; the caller has
    /// checked the range against the disk's size. Pending requests are passed to the kernel by
    /// [`Storage::submit`].
    pub fn start(&mut self, op: Op, offset: u64, segments: &[Segment], tag: T) -> Outcome {
        let permit = match kind(op) {
            Some(kind) => self.disk().observers.before(|| {
                let end = offset.saturating_add(op.bytes(segments));
                Change { kind, range: offset..end }
            }),
            None => Ok(Some(Permit::UNOBSERVED)),
        };
        let permit = match permit {
            Ok(Some(permit)) => permit,
            Ok(None) => return Outcome::Delayed,
            Err(refused) => return Outcome::Done(Err(refused)),
        };
        let (logged, copied) =
            match self.disk().logging.begin(op, offset, segments, self.engine.memory()) {
                Entry::None => (Logged::Nothing, None),
                Entry::Unlogged => (Logged::Without, None),
                Entry::Room(entry) => {
                    let copied = entry.copied();
                    (Logged::In(entry), copied)
                }
                Entry::Full => return Outcome::Delayed,
            };
        let tag = (tag, permit, logged);
        let started = match copied {
            Some(copied) => self.engine.start_copied(op, offset, copied, tag),
            None => self.engine.start(op, offset, segments, tag),
        };
        match started {
            Some(((_, permit, logged), result)) => {
                self.ended(permit, logged, &result);
                Outcome::Done(result)
            }
            None => Outcome::Pending,
        }
    }

    /// Whether this thread may have waited for the medium to carry `op` out at once.
    pub fn may_wait(&self, op: Op) -> bool {
        self.engine.may_wait(op)
    }

    /// Hand pending requests to the kernel.
    pub fn submit(&mut self) {
        self.engine.submit();
    }

    /// The next pending request that is complete.
    pub fn finished(&mut self) -> Option<(T, io::Result<()>)> {
        let ((tag, permit, logged), result) = self.engine.finished()?;
        self.ended(permit, logged, &result);
        Some((tag, result))
    }

    /// A request has ended, and the guest has not been notified yet.
    fn ended(&self, permit: Permit, logged: Logged, result: &io::Result<()>) {
        permit.after(result);
        match (logged, result) {
            (Logged::In(entry), Ok(())) => entry.complete(),
            (Logged::Without, _) => self.disk().logging.ended(),
            (Logged::Nothing | Logged::In(_), _) => {}
        }
    }

    /// Wait until [`Storage::finished`] has something to return, for `patience` at most; false when
    /// that does not happen.
    pub fn wait(&mut self, patience: Option<Duration>) -> bool {
        self.engine.wait(patience)
    }
}

impl<T> Drop for Storage<T> {
    fn drop(&mut self) {
        // Observers are notified of every change, even if the guest no longer is.
        loop {
            while self.finished().is_some() {}
            if self.in_flight() == 0 || !self.wait(None) {
                return;
            }
        }
    }
}

fn kind(op: Op) -> Option<ChangeKind> {
    match op {
        Op::Read | Op::Flush => None,
        Op::Write { .. } => Some(ChangeKind::Write),
        Op::Discard { .. } => Some(ChangeKind::Discard),
        Op::WriteZeroes { .. } => Some(ChangeKind::WriteZeroes),
    }
}
