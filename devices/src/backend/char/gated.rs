//! A character back-end whose output passes a [gate](crate::backend::gate).
use std::{io, os::fd::OwnedFd, sync::Arc};

use super::{CharSink, output::BACKLOG};
use crate::backend::gate::{Backlog, Gate, Keeper, Marker, Room};

/// Output held for one back-end: as much as the backlog for a slow reader.
const ROOM: Room = Room { bytes: BACKLOG, pieces: BACKLOG };

/// The outer side of the gate, which sends to the back-end. Dropping it sends what is held and
/// removes the gate.
pub struct CharKeeper {
    keeper: Keeper,
    sink: CharSink,
}

impl CharKeeper {
    /// Put an open gate in front of the output end `sink`.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn new(sink: CharSink) -> io::Result<Self> {
        let (gate, keeper) = Gate::new(ROOM)?;
        sink.set_gate(Some(gate))?;
        Ok(Self { keeper, sink })
    }

    /// As [`Keeper::marker`]. It is used while the device's worker is off its thread.
    pub fn marker(&self) -> Marker {
        self.keeper.marker()
    }

    /// As [`Keeper::release`], to the reader.
    pub fn release(&mut self, epoch: u64) {
        self.keeper.release(epoch, |bytes| self.sink.pass(bytes));
    }

    /// As [`Keeper::open`], to the reader.
    pub fn open(&mut self) {
        self.keeper.open(|bytes| self.sink.pass(bytes));
    }

    /// As [`Keeper::discard`].
    pub fn discard(&mut self) {
        self.keeper.discard();
    }

    /// A copy of the output that is held and covered by checkpoints up to and including `epoch`.
    pub fn held(&self, epoch: u64) -> Vec<u8> {
        self.keeper.gate().covered(epoch)
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
}

impl Drop for CharKeeper {
    fn drop(&mut self) {
        self.open();
        // Fails only if its descriptor is not being watched, which is the goal.
        let _ = self.sink.set_gate(None);
    }
}
