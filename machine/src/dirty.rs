//! Which memory is written: by vCPUs, as KVM notes it; by devices, in the bitmap of guest memory;
//! and by processes beside this one, in logs of theirs.
use std::{io, ops::Range, sync::Arc};

use devices::backend::dirty_log::DirtyLog;

use crate::{Machine, kvm::KvmError, memory::image};

/// Why it is not known what was written. A save must not go on then.
#[derive(Debug, thiserror::Error)]
pub enum DirtyError {
    /// KVM does not tell.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A log does not belong to this machine's memory.
    #[error("cannot tell which pages of guest memory were written")]
    Log(#[source] io::Error),
}

impl Machine {
    /// Begin to note which pages are written, or end it.
    ///
    /// # Errors
    /// When KVM refuses, or a log of another process cannot be reached.
    pub fn log_dirty(&mut self, on: bool) -> Result<(), DirtyError> {
        self.vm.log_dirty(on)?;
        self.logging = on;
        self.cleared.clear();
        self.dirty_logs.forget().map_err(DirtyError::Log)?;
        image::forget_dirty(&self.memory);
        Ok(())
    }

    /// The ranges of the memory's image that have been written since [`Machine::log_dirty`] or the
    /// last call. What is written meanwhile may be in it or in the next one.
    ///
    /// # Errors
    /// When KVM does not tell, or a log of another process cannot be read.
    pub fn dirty_memory(&mut self) -> Result<Vec<Range<u64>>, DirtyError> {
        let mut written = self.vm.dirty()?;
        self.dirty_logs.move_into(&self.memory, &mut written).map_err(DirtyError::Log)?;
        let dirty = image::dirty(&self.memory, &written).map_err(DirtyError::Log)?;
        Ok(image::union(&std::mem::take(&mut self.cleared), &dirty))
    }

    /// Have `log` count, in which another process notes what it writes to this machine's memory.
    pub fn add_dirty_log(&mut self, log: Arc<DirtyLog>) {
        self.dirty_logs.add(log);
    }

    /// The other process has gone, or writes to memory no more: what is in its log counts, and what
    /// comes does not.
    ///
    /// # Errors
    /// When the log cannot be read, or was not made for this machine's memory.
    pub fn remove_dirty_log(&mut self, log: &Arc<DirtyLog>) -> Result<(), DirtyError> {
        self.dirty_logs.remove(log, &self.memory).map_err(DirtyError::Log)
    }
}
