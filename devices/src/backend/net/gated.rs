//! A network back-end whose output passes a [gate](crate::backend::gate).
use std::{
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
    sync::Arc,
    time::{Duration, Instant},
};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::{NetBackend, Offloads, frame::Frame};
use crate::backend::gate::{Backlog, Gate, Held, Keeper, Marker, Room};

/// Frames held for one back-end: 50 ms of output at 10 Gbit/s.
const ROOM: Room = Room { bytes: 64 << 20, pieces: 65_536 };
/// How long a release waits, in all, for an interface that accepts no more frames. It then drops
/// the rest, as any network may.
const INTERFACE_STALL_LIMIT: Duration = Duration::from_millis(20);

/// A back-end behind a gate. Received frames are not held: peers retransmit what is lost.
pub struct Gated {
    inner: Arc<dyn NetBackend>,
    gate: Arc<Gate>,
}

/// The outer side of the gate, which writes to the back-end behind it. Dropping it opens the gate,
/// which nobody else could do.
pub struct NetKeeper {
    keeper: Keeper,
    out: Outside,
}

struct Outside {
    inner: Arc<dyn NetBackend>,
    /// Ready when the back-end accepts frames.
    writable: Epoll,
    dropped: u64,
}

impl Gated {
    /// Put `inner` behind a gate, which is open.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn new(inner: Arc<dyn NetBackend>) -> io::Result<(Self, NetKeeper)> {
        Self::with_room(inner, ROOM)
    }

    pub(crate) fn with_room(
        inner: Arc<dyn NetBackend>,
        room: Room,
    ) -> io::Result<(Self, NetKeeper)> {
        let (gate, keeper) = Gate::new(room)?;
        let writable = Epoll::new()?;
        let event = EpollEvent::new(EventSet::OUT, 0);
        writable.ctl(ControlOperation::Add, inner.fd(0), event)?;
        let out = Outside { inner: inner.clone(), writable, dropped: 0 };
        Ok((Self { inner, gate }, NetKeeper { keeper, out }))
    }

    /// Hold a frame if the gate is shut; false if it is open.
    fn hold(&self, length: usize, copy: impl Fn(&mut [u8]) -> io::Result<()>) -> io::Result<bool> {
        let mut held = self.gate.hold(length, &copy)?;
        if held == Held::Full {
            // Clear earlier signals of room, which must not end the next wait.
            self.gate.take_room();
            held = self.gate.hold(length, &copy)?;
        }
        match held {
            Held::Open => Ok(false),
            Held::Kept => Ok(true),
            Held::Full => Err(io::ErrorKind::WouldBlock.into()),
        }
    }
}

impl NetKeeper {
    /// As [`Keeper::marker`]. It is used while the device's worker is off its thread.
    pub fn marker(&self) -> Marker {
        self.keeper.marker()
    }

    /// As [`Keeper::release`], to the interface.
    pub fn release(&mut self, epoch: u64) {
        let mut write = self.out.begin();
        self.keeper.release(epoch, |frame| write(frame));
    }

    /// As [`Keeper::open`], to the interface.
    pub fn open(&mut self) {
        let mut write = self.out.begin();
        self.keeper.open(|frame| write(frame));
    }

    /// As [`Keeper::discard`].
    pub fn discard(&mut self) {
        self.keeper.discard();
    }

    /// As [`Keeper::signal`].
    pub fn signal(&self, waits: Arc<OwnedFd>) {
        self.keeper.signal(waits);
    }

    /// As [`Keeper::waits`].
    pub fn waits(&self) -> bool {
        self.keeper.waits()
    }

    /// What is held now.
    pub fn backlog(&self) -> Backlog {
        self.keeper.gate().backlog()
    }

    /// Frames dropped because the interface did not accept them when they were released.
    pub fn dropped(&self) -> u64 {
        self.out.dropped
    }
}

impl Drop for NetKeeper {
    fn drop(&mut self) {
        self.open();
    }
}

impl Outside {
    /// Writes the frames of one release, and waits for the interface within the limit.
    fn begin(&mut self) -> impl FnMut(&[u8]) {
        let refused = |sent: &io::Result<usize>| matches!(sent, Err(e) if e.kind() == io::ErrorKind::WouldBlock);
        let mut waited = Duration::ZERO;
        move |frame| {
            let mut sent = self.inner.write_buffer(frame);
            if refused(&sent) && waited < INTERFACE_STALL_LIMIT {
                let began = Instant::now();
                let left = (INTERFACE_STALL_LIMIT - waited).as_millis();
                let mut event = [EpollEvent::default()];
                // The next write shows whether it is ready.
                let _ = self.writable.wait(i32::try_from(left).unwrap_or(0), &mut event);
                sent = self.inner.write_buffer(frame);
                // An interface that is ready but accepts nothing counts as stalled.
                waited =
                    if refused(&sent) { INTERFACE_STALL_LIMIT } else { waited + began.elapsed() };
            }
            self.dropped += u64::from(sent.is_err());
        }
    }
}

impl NetBackend for Gated {
    fn write(&self, queue: usize, frame: &mut Frame) -> io::Result<usize> {
        let bytes = frame.bytes();
        match self.hold(bytes, |to| frame.copy_to(to))? {
            true => Ok(bytes),
            false => self.inner.write(queue, frame),
        }
    }

    fn write_buffer(&self, frame: &[u8]) -> io::Result<usize> {
        let copy = |to: &mut [u8]| {
            to.copy_from_slice(frame);
            Ok(())
        };
        match self.hold(frame.len(), copy)? {
            true => Ok(frame.len()),
            false => self.inner.write_buffer(frame),
        }
    }

    fn room(&self, queue: usize) -> (RawFd, EventSet) {
        match self.gate.is_shut() {
            true => (self.gate.as_raw_fd(), EventSet::IN),
            false => self.inner.room(queue),
        }
    }

    fn queues(&self) -> usize {
        self.inner.queues()
    }

    fn fd(&self, queue: usize) -> RawFd {
        self.inner.fd(queue)
    }

    fn has_header(&self) -> bool {
        self.inner.has_header()
    }

    fn has_uso(&self) -> bool {
        self.inner.has_uso()
    }

    fn read(&self, queue: usize, into: &mut Frame, spill: &mut [u8]) -> io::Result<usize> {
        self.inner.read(queue, into, spill)
    }

    fn read_buffer(&self, queue: usize, into: &mut [u8]) -> io::Result<usize> {
        self.inner.read_buffer(queue, into)
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        self.inner.set_offloads(offloads)
    }

    fn set_active_queues(&self, queues: usize) -> io::Result<()> {
        self.inner.set_active_queues(queues)
    }
}
