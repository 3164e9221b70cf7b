//! Reception: frames from the back-end to the guest.
//!
//! Chains are taken in advance into a *window* with room for the longest frame, and a frame is read
//! straight into it. Chains that it does not fill stay in the window for the next one, and go back
//! to the ring when the worker leaves its thread.
//!
//! Where the window is shorter than a frame (the driver is slow to refill, or has not negotiated
//! mergeable buffers), the rest of the frame goes into a bounce buffer, so that none is truncated.
//! It waits there, and later frames wait on the host, until the driver has refilled.
use std::io;

use super::worker::Shared;
use crate::{
    backend::net::{FRAME_MAX, HEADER, NetBackend, frame::Frame},
    virtio::{
        chain::{self, Chain},
        ring::{Broken, Popped, Ring},
    },
};

/// Frames after which a sleeping driver is interrupted although there are more, so that it works in
/// parallel.
const WAKE: u16 = 8;
/// Offset of `num_buffers` in the header.
const NUM_BUFFERS: u64 = 10;

/// A chain in the window.
struct Posted {
    head: u16,
    pieces: usize,
    bytes: usize,
}

pub(super) struct Rx {
    pub(super) ring: Ring,
    chain: Chain,
    window: Frame,
    posted: Vec<Posted>,
    /// The window cannot grow, whatever the driver adds, until part of it is used.
    full: bool,
    mergeable: bool,
    /// Room for a whole frame; each byte of a waiting frame is at its offset in the frame.
    bounce: Box<[u8]>,
    /// Bytes of the waiting frame; 0: none.
    held: usize,
    /// How many of these are in the window already; the rest is in `bounce`.
    placed: usize,
    /// Frames and malformed chains that this run may still handle.
    budget: u16,
}

enum Stop {
    Drained,
    Turn,
    /// Wait until the driver makes buffers available.
    NoBuffers,
    Wait,
}

enum Delivery {
    Done,
    NoRoom,
}

impl Rx {
    pub(super) fn new(ring: Ring, mergeable: bool) -> Self {
        Self {
            chain: Chain::with_capacity(ring.size().into()),
            window: Frame::new(ring.memory().clone()),
            posted: Vec::with_capacity(ring.size().into()),
            full: false,
            mergeable,
            bounce: vec![0; FRAME_MAX].into_boxed_slice(),
            held: 0,
            placed: 0,
            budget: 0,
            ring,
        }
    }

    /// Put chains that hold no part of a complete frame back into the ring.
    pub(super) fn give_back(&mut self) {
        // At most `FRAME_MAX`, as long as `bounce` is.
        let (placed, _) = self.bounce.split_at_mut(std::mem::take(&mut self.placed));
        chain::read(self.ring.memory(), self.window.segments(), 0, placed);
        self.ring.unpop(self.posted.len() as u16);
        self.posted.clear();
        self.window.clear();
        self.full = false;
    }

    /// Drop the waiting frame.
    pub(super) fn forget(&mut self) {
        (self.held, self.placed) = (0, 0);
    }

    /// Receive available frames, at most a queue's worth. True when there may be more. The
    /// caller decides on an interrupt.
    pub(super) fn run(&mut self, pair: usize, shared: &mut Shared) -> Result<bool, Broken> {
        let Some(backend) = shared.backend.clone() else { return Ok(false) };
        self.ring.ignore()?;
        self.budget = self.ring.size();
        loop {
            match self.batch(pair, &*backend, shared)? {
                Stop::Turn => return Ok(true),
                Stop::Drained | Stop::Wait => return Ok(false),
                Stop::NoBuffers if self.budget == 0 => return Ok(true),
                Stop::NoBuffers if self.ring.listen()? => self.ring.ignore()?,
                Stop::NoBuffers => return Ok(false),
            }
        }
    }

    fn batch(
        &mut self,
        pair: usize,
        backend: &dyn NetBackend,
        shared: &mut Shared,
    ) -> Result<Stop, Broken> {
        while self.budget > 0 {
            if self.held == 0
                && let Some(stop) = self.receive(pair, backend, shared)?
            {
                return Ok(stop);
            }
            if self.held > 0
                && let Delivery::NoRoom = self.deliver(pair, shared)?
            {
                return Ok(Stop::NoBuffers);
            }
            self.budget -= 1;
            if self.budget.is_multiple_of(WAKE) && self.ring.wants_interrupt()? {
                shared.interrupt.used(self.ring.index());
            }
        }
        Ok(Stop::Turn)
    }

    /// Read one frame into the window, and what does not fit there into `bounce`.
    fn receive(
        &mut self,
        pair: usize,
        backend: &dyn NetBackend,
        shared: &mut Shared,
    ) -> Result<Option<Stop>, Broken> {
        if shared.link {
            // Whether the limit refuses depends on what has passed already, not on the next frame.
            if shared.rx_limit.as_mut().is_some_and(|limit| !limit.take(0, 0)) {
                return Ok(Some(Stop::Wait));
            }
            self.gather(FRAME_MAX)?;
            if self.posted.is_empty() {
                return Ok(Some(Stop::NoBuffers));
            }
        }
        let direct = shared.link && backend.has_header();
        let room = if direct { self.window.bytes().min(FRAME_MAX) } else { 0 };
        let result = match direct {
            true => {
                let spill = self.bounce.get_mut(room..).ok_or(Broken)?;
                backend.read(pair, &mut self.window, spill)
            }
            false => backend.read_buffer(pair, &mut self.bounce),
        };
        match result {
            Ok(n) if !shared.link || n <= HEADER => {
                shared.stats.rx.dropped();
            }
            Ok(n) if n <= room => self.complete(n, shared)?,
            Ok(n) => (self.held, self.placed) = (n, room),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Some(Stop::Drained)),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return Ok(Some(Stop::Turn)),
            Err(e) => {
                // The interface was deleted or is down: there will be an event when that changes.
                shared.drop_rx(pair, &e);
                return Ok(Some(Stop::Drained));
            }
        }
        Ok(None)
    }

    /// Copy the waiting frame into the window, if there is room by now.
    fn deliver(&mut self, pair: usize, shared: &mut Shared) -> Result<Delivery, Broken> {
        self.gather(self.held)?;
        if self.window.bytes() < self.held {
            let all = self.posted.len() >= usize::from(self.ring.size());
            if !self.posted.is_empty() && (all || self.full || !self.mergeable) {
                shared.drop_rx(pair, &"the driver's buffers are too small for a frame");
                self.forget();
                return Ok(Delivery::Done);
            }
            return Ok(Delivery::NoRoom);
        }
        let (n, placed) = (std::mem::take(&mut self.held), std::mem::take(&mut self.placed));
        let rest = self.bounce.get(placed..n).ok_or(Broken)?;
        chain::write(self.ring.memory(), self.window.segments(), placed as u64, rest);
        self.complete(n, shared)?;
        Ok(Delivery::Done)
    }

    /// Take chains into the window until it has `want` bytes or the driver has no more.
    fn gather(&mut self, want: usize) -> Result<(), Broken> {
        while self.window.bytes() < want && !self.full {
            if !self.mergeable && !self.posted.is_empty() {
                return Ok(());
            }
            let before = self.window.bytes();
            let usable = match self.ring.pop(&mut self.chain)? {
                Popped::Nothing => return Ok(()),
                Popped::Malformed => false,
                Popped::Chain => {
                    !self.chain.writable().is_empty() && self.window.push(self.chain.writable())
                }
            };
            if usable {
                self.posted.push(Posted {
                    head: self.chain.head(),
                    pieces: self.chain.writable().len(),
                    bytes: self.window.bytes() - before,
                });
            } else if self.posted.is_empty() {
                self.ring.put_used(0, self.chain.head(), 0)?;
                self.ring.publish(1)?;
                self.budget = self.budget.saturating_sub(1);
                if self.budget == 0 {
                    return Ok(());
                }
            } else {
                // Chains are used in order, so this one waits for those before it.
                self.ring.unpop(1);
                self.full = true;
            }
        }
        Ok(())
    }

    /// The first `n` bytes of the window are a frame: hand its chains to the driver.
    fn complete(&mut self, n: usize, shared: &mut Shared) -> Result<(), Broken> {
        let (mut left, mut chains, mut pieces) = (n, 0u16, 0);
        for posted in &self.posted {
            let len = left.min(posted.bytes);
            self.ring.put_used(chains, posted.head, len as u32)?;
            (left, chains, pieces) = (left - len, chains + 1, pieces + posted.pieces);
            if left == 0 {
                break;
            }
        }
        // Section 5.1.6.4.1: 1 if buffers are not merged.
        let segments = self.window.segments();
        chain::write(self.ring.memory(), segments, NUM_BUFFERS, &chains.to_le_bytes());
        self.window.mark_written(n);
        self.ring.publish(chains)?;
        self.window.drop_front(pieces);
        self.posted.drain(..usize::from(chains).min(self.posted.len()));
        self.full = false;
        let bytes = n - HEADER;
        shared.stats.rx.passed(bytes);
        if let Some(limit) = &mut shared.rx_limit {
            limit.take(1, bytes as u64);
        }
        Ok(())
    }
}
