//! Transmission: frames from the guest to the back-end.
use std::io;

use super::worker::Shared;
use crate::{
    backend::net::{HEADER, frame::Frame},
    virtio::{
        chain::{Chain, total},
        ring::{Broken, Popped, Ring},
    },
};

pub(super) struct Tx {
    pub(super) ring: Ring,
    chain: Chain,
    frame: Frame,
    /// The back-end has refused a frame and will signal when it accepts more.
    waiting: bool,
}

/// Why a batch has ended.
pub(super) enum Stop {
    /// Nothing left to do.
    Drained,
    /// There is more, but other queues get their turn first.
    Turn,
    /// Wait for a timer or the back-end.
    Wait,
}

enum Sent {
    Done,
    Refused,
}

impl Tx {
    pub(super) fn new(ring: Ring) -> Self {
        let chain = Chain::with_capacity(ring.size().into());
        let frame = Frame::new(ring.memory().clone());
        Self { ring, chain, frame, waiting: false }
    }

    /// The back-end has been replaced.
    pub(super) fn forget(&mut self) {
        self.waiting = false;
    }

    /// The back-end accepts frames again; otherwise as [`Tx::run`].
    pub(super) fn run_writable(
        &mut self,
        pair: usize,
        shared: &mut Shared,
    ) -> Result<Stop, Broken> {
        match std::mem::take(&mut self.waiting) {
            true => self.work(pair, shared, true),
            false => Ok(Stop::Wait),
        }
    }

    /// Send what the driver has made available, at most a queue's worth, with its notifications
    /// off. The caller decides on an interrupt.
    pub(super) fn run(&mut self, pair: usize, shared: &mut Shared) -> Result<Stop, Broken> {
        match self.waiting {
            true => Ok(Stop::Wait),
            false => self.work(pair, shared, false),
        }
    }

    /// `again`: the first frame has been refused before.
    fn work(&mut self, pair: usize, shared: &mut Shared, mut again: bool) -> Result<Stop, Broken> {
        self.ring.ignore()?;
        for _ in 0..self.ring.size() {
            match self.ring.pop(&mut self.chain)? {
                Popped::Nothing => return Ok(Stop::Drained),
                Popped::Malformed => shared.drop_tx(pair, &"malformed descriptor chain"),
                Popped::Chain => {
                    if let Sent::Refused = self.send(pair, shared, again) {
                        self.ring.unpop(1);
                        return Ok(Stop::Wait);
                    }
                }
            }
            again = false;
            self.ring.put_used(0, self.chain.head(), 0)?;
            self.ring.publish(1)?;
        }
        Ok(Stop::Turn)
    }

    fn send(&mut self, pair: usize, shared: &mut Shared, again: bool) -> Sent {
        if !shared.link || shared.backend.is_none() {
            shared.stats.tx.dropped();
            return Sent::Done;
        }
        self.frame.clear();
        let bytes = total(self.chain.readable());
        if bytes <= HEADER as u64 || !self.frame.push(self.chain.readable()) {
            shared.drop_tx(pair, &"no frame, or one in too many buffers");
            return Sent::Done;
        }
        let bytes = self.frame.bytes() - HEADER;
        // A resent frame has been charged already.
        if !again
            && let Some(limit) = &mut shared.tx_limit
            && !limit.take(1, bytes as u64)
        {
            return Sent::Refused;
        }
        let Some(backend) = &shared.backend else { return Sent::Done };
        // Refused again although the back-end signalled that it accepts more: drop the frame, as
        // that could repeat without end.
        match backend.write(pair, &mut self.frame) {
            Ok(_) => shared.stats.tx.passed(bytes),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && !again => {
                self.waiting = shared.wait_writable(pair);
                return if self.waiting { Sent::Refused } else { Sent::Done };
            }
            Err(e) => shared.drop_tx(pair, &e),
        }
        Sent::Done
    }
}
