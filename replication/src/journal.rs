//! The order in which a backup may write its journal and its images.
//!
//! ```text
//!   append(e) -> journal sync -> apply(e) to the images -> image sync -> trim(e)
//! ```
//! Epochs wait in the journal until the images hold them durably, so a power cut at any point
//! leaves images that, after a replay, are crash-consistent at one epoch:
//!
//! 1. no epoch is applied before its journal is durable (rule `durable`),
//! 2. none is trimmed before a sync of the images that covers it (rule `sync`),
//! 3. before the guest's first write after a promotion the journal is void (rule `void`).
use crate::{
    identity::Epoch,
    rules::{Rule, Rules},
};

/// How far each epoch is. Appending, syncing and applying are the caller's work; this says what
/// may be done next.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Journal {
    rules: Rules,
    /// The last epoch that was appended.
    appended: Epoch,
    /// The last one that is durable.
    durable: Epoch,
    /// The last one that the images hold in the page cache.
    applied: Epoch,
    /// The last one that they hold durably.
    synced: Epoch,
    /// The last one that is no longer in the journal.
    trimmed: Epoch,
}

impl Journal {
    /// An empty journal over images that hold `epoch` durably.
    #[must_use]
    pub fn new(epoch: Epoch, rules: Rules) -> Self {
        Self {
            rules,
            appended: epoch,
            durable: epoch,
            applied: epoch,
            synced: epoch,
            trimmed: epoch,
        }
    }

    /// The next epoch was appended.
    pub fn appended(&mut self) {
        self.appended = self.appended.next();
    }

    /// The last epoch that a sync of the journal makes durable if it begins now. Pass it to
    /// [`journal_synced`](Self::journal_synced) when that sync has ended.
    #[must_use]
    pub fn last(&self) -> Epoch {
        self.appended
    }

    /// A sync of the journal has ended that covers everything through `epoch`.
    pub fn journal_synced(&mut self, epoch: Epoch) {
        self.durable = self.durable.max(epoch.min(self.appended));
    }

    /// Epochs after `epoch` were dropped, of which none was applied: they will come again, or never.
    pub fn dropped_after(&mut self, epoch: Epoch) {
        self.appended = self.appended.min(epoch.max(self.applied));
        self.durable = self.durable.min(self.appended);
    }

    /// The last epoch that may be acknowledged.
    #[must_use]
    pub fn durable(&self) -> Epoch {
        self.durable
    }

    /// The epoch to be written to the images next; `None` while none may be written.
    #[must_use]
    pub fn to_apply(&self) -> Option<Epoch> {
        let bound = if self.rules.hold(Rule::Durable) { self.durable } else { self.appended };
        let next = self.applied.next();
        (next <= bound).then_some(next)
    }

    /// The epoch of [`to_apply`](Self::to_apply) was written to all images.
    pub fn applied(&mut self) {
        if let Some(epoch) = self.to_apply() {
            self.applied = epoch;
        }
    }

    /// The last epoch that a sync of the images covers if it begins now.
    #[must_use]
    pub fn last_applied(&self) -> Epoch {
        self.applied
    }

    /// A sync of all images has ended that covers everything through `epoch`.
    pub fn images_synced(&mut self, epoch: Epoch) {
        self.synced = self.synced.max(epoch.min(self.applied));
    }

    /// The last epoch that may be cut off the beginning of the journal; `None` while none may be
    /// cut off.
    #[must_use]
    pub fn to_trim(&self) -> Option<Epoch> {
        let bound = if self.rules.hold(Rule::Sync) { self.synced } else { self.applied };
        // What is not durable in the journal may become so after the cut.
        let bound = bound.min(self.durable);
        (self.trimmed < bound).then_some(bound)
    }

    /// The journal was cut through `epoch`.
    pub fn trimmed(&mut self, epoch: Epoch) {
        if let Some(bound) = self.to_trim() {
            self.trimmed = self.trimmed.max(epoch.min(bound));
        }
    }

    /// Whether the guest may write to the images itself: everything is in them durably, and
    /// nothing is left that a replay would write over its writes.
    #[must_use]
    pub fn may_run(&self) -> bool {
        let empty = self.trimmed == self.appended && self.synced == self.appended;
        self.applied == self.appended && (empty || !self.rules.hold(Rule::Void))
    }
}
