//! Tracking what the guest changes: during a live save, and from one save to the next.
use std::ops::Range;

use machine::{DirtyError, memory::image::union};
use qmp::Error;

use super::Failed;
use crate::{
    checkpoint::{Saved, job::First},
    vmm::Vmm,
};

/// Whether the dirty log is on, and what for.
pub(super) enum DirtyLog {
    /// It is off.
    Off,
    /// For the save under way.
    On,
    /// Also for the next save, which can build on the last one.
    Since {
        /// The last save.
        base: Saved,
        /// Changes since then that have been taken out of the log.
        changed: Vec<Range<u64>>,
    },
}

impl DirtyLog {
    pub(super) fn is_on(&self) -> bool {
        !matches!(self, Self::Off)
    }

    /// The save that an incremental one would build on.
    pub(super) fn base(&self) -> Option<&Saved> {
        match self {
            Self::Since { base, .. } => Some(base),
            Self::Off | Self::On => None,
        }
    }

    /// Changes since that save, without those that are still in the log.
    pub(super) fn since_base(&self) -> Option<&[Range<u64>]> {
        match self {
            Self::Since { changed, .. } => Some(changed),
            Self::Off | Self::On => None,
        }
    }

    /// A save has succeeded; the next one can build on `saved`, if it is given.
    pub(super) fn saved(&mut self, saved: Option<Saved>) {
        *self = match (saved, self.is_on()) {
            (Some(base), _) => Self::Since { base, changed: Vec::new() },
            (None, true) => Self::On,
            (None, false) => Self::Off,
        };
    }
}

impl Vmm {
    /// Turn the log on, and have memory copied while the guest runs.
    pub(super) fn log_and_copy(&mut self) -> Result<(), Failed> {
        self.log_changes()?;
        let Some(save) = self.saving.under_way() else { return Ok(()) };
        save.job.copy(match self.saving.log.since_base() {
            Some(since) if save.how.incremental => First::These(since.to_vec()),
            _ => First::All(self.machine.filled()),
        });
        Ok(())
    }

    /// Give the thread the changes so far.
    pub(super) fn harvest(&mut self) -> Result<(), Failed> {
        let changed = self.collect()?;
        if let Some(save) = self.saving.under_way() {
            save.job.changed(changed);
        }
        Ok(())
    }

    /// Start logging changes.
    pub(super) fn log_changes(&mut self) -> Result<(), DirtyError> {
        if self.saving.log.is_on() {
            return self.collect().map(drop);
        }
        self.machine.log_dirty(true)?;
        self.saving.log = DirtyLog::On;
        Ok(())
    }

    /// Changes since the last call of this or of [`Self::log_changes`].
    pub(super) fn collect(&mut self) -> Result<Vec<Range<u64>>, DirtyError> {
        let dirty = match self.machine.dirty_memory() {
            Ok(dirty) => dirty,
            Err(e) => {
                // Some changes may be lost: no later save can build on the last one.
                if self.saving.log.is_on() {
                    self.saving.log = DirtyLog::On;
                }
                return Err(e);
            }
        };
        // A save that fails must not lose them.
        if let DirtyLog::Since { changed, .. } = &mut self.saving.log {
            *changed = union(changed, &dirty);
        }
        Ok(dirty)
    }

    /// Stop logging changes, unless the next save may need them.
    pub(super) fn end_log(&mut self) {
        let DirtyLog::On = self.saving.log else { return };
        self.saving.log = DirtyLog::Off;
        if let Err(e) = self.machine.log_dirty(false) {
            log::warn!("{}", Error::generic(&e));
        }
    }
}
