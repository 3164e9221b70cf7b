//! What is kept of a term that this side has won alone: the backup that is left behind holds an
//! epoch of it, and needs only what was written since.
use std::time::Duration;

use super::{Primary, Window};
use crate::{
    identity::{Epoch, Incarnation, Term},
    interface::Output,
    message::Memory,
    timers::Timer,
};

/// How long the changes are kept.
const KEPT: Duration = Duration::from_secs(600);

/// The term before.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Past {
    term: Term,
    backup: Incarnation,
    window: Window,
}

impl Past {
    /// The epoch that a backup holds, if its changes since then are known: it is the last one that
    /// was acknowledged, or a later one that was captured.
    fn base(&self, backup: Incarnation, memory: Option<Memory>) -> Option<Epoch> {
        let Memory { term, epoch, digest } = memory?;
        let known = self.backup == backup && self.term == term;
        (known && self.window.holds(epoch, digest)).then_some(epoch)
    }
}

impl Primary {
    /// The term ends here: keep the changes since the last epoch that the backup has for certain.
    pub(super) fn track(&mut self, window: Window) {
        let since = window.acked();
        if let (Some(backup), true) = (self.backup, since > Epoch::default()) {
            self.past = Some(Past { term: self.base.term, backup, window });
            self.base.timers.set(Timer::GiveUp, self.base.now + KEPT);
            self.base.output(Output::Track { since });
        }
    }

    pub(super) fn untrack(&mut self) {
        self.base.timers.clear(Timer::GiveUp);
        if self.past.take().is_some() {
            self.base.output(Output::Untrack);
        }
    }

    /// The epoch that this backup holds, if only what was written since has to be sent. The changes
    /// are not kept any longer: the backup is a mix of two epochs from here on.
    pub(super) fn base(&mut self, backup: Incarnation, memory: Option<Memory>) -> Option<Epoch> {
        self.base.timers.clear(Timer::GiveUp);
        self.past.take().and_then(|past| past.base(backup, memory))
    }
}
