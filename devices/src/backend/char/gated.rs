//! A character back-end whose output passes a [gate](crate::backend::gate).
use std::io;

use super::{CharSink, output::BACKLOG};
use crate::backend::gate::{Backlog, Gate, Keeper, Room};

/// Output kept for one back-end: as much as for a reader that is slow.
const ROOM: Room = Room { bytes: BACKLOG, pieces: BACKLOG };

/// The outer side of the gate, which sends to the back-end. When it is dropped, what is kept is
/// sent, and there is no gate any more.
pub struct CharKeeper {
    keeper: Keeper,
    sink: CharSink,
}

impl CharKeeper {
    /// Put a gate, which is open, before the output end `sink`.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn new(sink: CharSink) -> io::Result<Self> {
        let (gate, keeper) = Gate::new(ROOM)?;
        sink.set_gate(Some(gate))?;
        Ok(Self { keeper, sink })
    }

    /// As [`Keeper::shut`].
    pub fn shut(&mut self) {
        self.keeper.shut();
    }

    /// As [`Keeper::mark`].
    pub fn mark(&mut self, epoch: u64) {
        self.keeper.mark(epoch);
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

    /// What is kept now.
    pub fn backlog(&self) -> Backlog {
        self.keeper.gate().backlog()
    }
}

impl Drop for CharKeeper {
    fn drop(&mut self) {
        self.open();
        // Fails only when its descriptor is not waited for, which is what is wanted.
        let _ = self.sink.set_gate(None);
    }
}
