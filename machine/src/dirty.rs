//! Dirty page tracking: writes by vCPUs, as KVM logs them; by devices, in the bitmap of guest
//! memory; and by other processes, in their own logs.
use std::{io, ops::Range, sync::Arc};

use devices::backend::dirty_log::DirtyLog;

use crate::{Machine, kvm::KvmError, memory::image};

/// Why the dirty pages could not be found. A save must then not continue.
#[derive(Debug, thiserror::Error)]
pub enum DirtyError {
    /// KVM did not report them.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A log does not belong to this machine's memory.
    #[error("cannot find out which pages of guest memory were written")]
    Log(#[source] io::Error),
}

impl Machine {
    /// Start or stop logging dirty pages.
    ///
    /// # Errors
    /// When KVM refuses, or the log of another process cannot be reached.
    pub fn log_dirty(&mut self, on: bool) -> Result<(), DirtyError> {
        self.vm.log_dirty(on)?;
        self.logging = on;
        self.cleared.clear();
        self.dirty_logs.forget().map_err(DirtyError::Log)?;
        image::forget_dirty(&self.memory);
        Ok(())
    }

    /// The ranges of guest memory, as offsets in the memory file, that were written since
    /// [`Machine::log_dirty`] or the last call. A write during the call is in this result or in the
    /// next one.
    ///
    /// # Errors
    /// When KVM does not report them, or the log of another process cannot be read.
    pub fn dirty_memory(&mut self) -> Result<Vec<Range<u64>>, DirtyError> {
        let mut written = self.vm.dirty()?;
        self.dirty_logs.move_into(&self.memory, &mut written).map_err(DirtyError::Log)?;
        let dirty = image::dirty(&self.memory, &written).map_err(DirtyError::Log)?;
        Ok(image::union(&std::mem::take(&mut self.cleared), &dirty))
    }

    /// Include `log`, in which another process logs what it writes to this machine's memory.
    pub fn add_dirty_log(&mut self, log: Arc<DirtyLog>) {
        self.dirty_logs.add(log);
    }

    /// Remove the log of a process that has ended or no longer writes to memory: what is in it
    /// still counts, later entries do not.
    ///
    /// # Errors
    /// When the log cannot be read, or was not made for this machine's memory.
    pub fn remove_dirty_log(&mut self, log: &Arc<DirtyLog>) -> Result<(), DirtyError> {
        self.dirty_logs.remove(log, &self.memory).map_err(DirtyError::Log)
    }
}
