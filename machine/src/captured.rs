//! A machine that is stopped for a moment, so that its state can be copied: an epoch of
//! replication.
//!
//! Unlike for a [`Quiesced`](crate::Quiesced) machine, no request of a disk is waited for, so the
//! pause takes no longer when a disk is slow or hangs. The requests go on while the machine stands
//! still and are answered after it; the saved state lists them, and the monitor that restores it carries them
//! out again. So this machine can only be read, and runs on as soon as that is done.
use std::ops::Range;

use devices::{Memory, worker::Park};

use crate::{
    DirtyError, Machine, MachineState, RunError, SaveError,
    memory::{image, staging::Staging},
};

/// Why an epoch was not captured.
#[derive(Debug, thiserror::Error)]
pub enum EpochError {
    /// It is not known what was written.
    #[error(transparent)]
    Dirty(#[from] DirtyError),
    /// The state could not be read.
    #[error(transparent)]
    State(#[from] SaveError),
}

/// Proof that all vCPUs and all device workers are parked, with requests of disks possibly in
/// flight. When it is dropped, a machine that was running runs on; the guest's clocks have advanced
/// meanwhile.
pub struct Captured<'m> {
    machine: &'m mut Machine,
    was_running: bool,
}

impl Machine {
    /// Stop everything, without waiting for requests of disks. A machine that is paused already
    /// stays so, and has none in flight.
    ///
    /// # Errors
    /// As [`Machine::pause`]; also while a [`Machine::pause`] is pending, which has to be tried
    /// again or given up first.
    pub fn captured(&mut self) -> Result<Captured<'_>, RunError> {
        let was_running = self.running;
        self.park(Park::Keep)?;
        Ok(Captured { machine: self, was_running })
    }
}

impl Captured<'_> {
    /// Read the whole state but memory.
    ///
    /// # Errors
    /// When a device or KVM cannot report its state.
    pub fn save(&self) -> Result<MachineState, SaveError> {
        self.machine.read_state()
    }

    /// An epoch: what was written to memory since the last one, and `left`, are copied into
    /// `staging`; the rest is the state.
    ///
    /// # Errors
    /// When a part of it cannot be read, or memory does not fit into the copy.
    pub fn epoch(
        &mut self,
        left: &[Range<u64>],
        mut staging: Staging,
    ) -> Result<(MachineState, Staging), EpochError> {
        let dirty = image::union(left, &self.dirty_memory()?);
        staging.fill(&self.machine.memory, &dirty).map_err(SaveError::Staging)?;
        Ok((self.save()?, staging))
    }

    /// The machine that is stopped.
    pub(crate) fn machine(&mut self) -> &mut Machine {
        self.machine
    }

    /// As [`Machine::dirty_memory`]. A page that a disk is still being read into is dirty when the
    /// request is complete, so it is part of a later result.
    ///
    /// # Errors
    /// As [`Machine::dirty_memory`].
    pub fn dirty_memory(&mut self) -> Result<Vec<Range<u64>>, DirtyError> {
        self.machine.dirty_memory()
    }

    /// The machine's memory.
    pub fn memory(&self) -> &Memory {
        &self.machine.memory
    }
}

impl Drop for Captured<'_> {
    fn drop(&mut self) {
        if self.was_running {
            self.machine.parked = None;
            self.machine.run(0);
        }
    }
}
