//! A machine that is stopped for a moment, so that its state can be copied: an epoch of
//! replication.
//!
//! Unlike for a [`Quiesced`](crate::Quiesced) machine, no request of a disk is waited for, so the
//! pause takes no longer when a disk is slow or hangs. The requests go on while the machine stands
//! still and are answered after it; the saved state lists them, and the monitor that restores it carries them
//! out again. So this machine can only be read, and runs on as soon as that is done.
use std::{
    ops::Range,
    time::{Duration, Instant},
};

use devices::{Memory, worker::Park};

use crate::{
    DirtyError, Machine, MachineState, RunError, SaveError,
    memory::{
        image,
        staging::{self, Staging},
    },
    quiesced::Pages,
    vcpu,
};

/// Why an epoch was not captured.
#[derive(Debug, thiserror::Error)]
pub enum EpochError {
    /// It is not known what was written.
    #[error(transparent)]
    Dirty(#[from] DirtyError),
    /// So much was written, in these ranges, that the machine has to be paused until it is sent.
    #[error("more memory has changed than can be copied aside")]
    TooLarge(Vec<Range<u64>>),
    /// The state could not be read.
    #[error(transparent)]
    State(#[from] SaveError),
}

/// An epoch, and how long its parts took.
pub struct Taken {
    /// The whole state but memory.
    pub state: MachineState,
    /// What was written to memory.
    pub pages: Pages,
    /// Finding out what that is.
    pub harvest: Duration,
    /// Copying it.
    pub copy: Duration,
    /// Reading the state, as far as that took longer.
    pub state_time: Duration,
    /// How long the kernel has worked for the vCPUs so far.
    pub system: Duration,
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
    /// `staging`; the rest is the state. Each vCPU's thread reads its registers meanwhile.
    ///
    /// More than `most` bytes are not copied: they stay where they are if the machine was paused
    /// before, and has to stay so until they are no longer needed.
    ///
    /// # Errors
    /// When a part of it cannot be read. [`EpochError::TooLarge`] when more than `most` bytes have
    /// changed in a machine that is to run on.
    pub fn epoch(
        &mut self,
        left: &[Range<u64>],
        mut staging: Staging,
        most: u64,
    ) -> Result<Taken, EpochError> {
        let began = Instant::now();
        let asked = std::mem::take(&mut self.machine.rest.states);
        let asked = self.machine.ask_state(asked)?;
        let asking = began.elapsed();
        let mut dirty = self.dirty_memory()?;
        if !left.is_empty() {
            dirty = image::union(left, &dirty);
        }
        let harvested = began.elapsed();
        let pages = if staging::bytes(&dirty) <= most {
            // The first vCPU's thread, which has nothing else to do, copies a half.
            let filled = match self.machine.vcpus.first() {
                Some(vcpu) => {
                    let help = |job| vcpu.work(job);
                    staging.fill_with(&self.machine.memory, &dirty, help)
                }
                None => staging.fill(&self.machine.memory, &dirty),
            };
            filled.map_err(SaveError::Staging)?;
            Pages::Staged(staging)
        } else if self.was_running {
            return Err(EpochError::TooLarge(dirty));
        } else {
            Pages::InPlace(dirty)
        };
        let copied = began.elapsed();
        let state = self.machine.answered_state(asked)?;
        Ok(Taken {
            state,
            pages,
            harvest: harvested.saturating_sub(asking),
            copy: copied.saturating_sub(harvested),
            state_time: asking + began.elapsed().saturating_sub(copied),
            system: self.machine.vcpus.iter().map(vcpu::Handle::system_time).sum(),
        })
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
