//! The epochs of a term that the backup may not have yet.
use std::collections::VecDeque;

use crate::identity::{Digest, Epoch};

/// Most epochs without an acknowledgement. At the bound the guest continues and the epoch grows.
pub const UNACKNOWLEDGED: usize = 2;

/// What was captured, what is in staging, and what was acknowledged.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub(super) struct Window {
    /// The last epoch that was begun. Never goes back, so that no number is used twice.
    begun: Epoch,
    capturing: bool,
    /// Captured and not acknowledged, in order.
    staged: VecDeque<(Epoch, Digest)>,
    acked: Epoch,
    acked_digest: Digest,
    /// The last epoch begun before `Armed` was sent.
    armed_at: Option<Epoch>,
}

impl Window {
    /// Begin the next epoch, if there is room.
    pub fn begin(&mut self) -> Option<Epoch> {
        if self.capturing || self.staged.len() >= UNACKNOWLEDGED {
            return None;
        }
        self.begun = self.begun.next();
        self.capturing = true;
        Some(self.begun)
    }

    /// The epoch in progress was captured. Returns whether it was that one.
    pub fn captured(&mut self, epoch: Epoch, digest: Digest) -> bool {
        if !self.capturing || epoch != self.begun {
            return false;
        }
        self.capturing = false;
        self.staged.push_back((epoch, digest));
        true
    }

    /// The backup holds `epoch` and all before. Returns whether that is possible: it was captured,
    /// and not overtaken by a later acknowledgement.
    pub fn ack(&mut self, epoch: Epoch) -> bool {
        if epoch == self.acked {
            return true;
        }
        let Some(&(_, digest)) = self.staged.iter().find(|(staged, _)| *staged == epoch) else {
            return false;
        };
        self.staged.retain(|(staged, _)| *staged > epoch);
        (self.acked, self.acked_digest) = (epoch, digest);
        true
    }

    /// Whether `epoch` with this digest is the acknowledged one or one in staging.
    pub fn holds(&self, epoch: Epoch, digest: Digest) -> bool {
        (epoch, digest) == (self.acked, self.acked_digest) || self.staged.contains(&(epoch, digest))
    }

    /// What a backup lacks whose last acknowledgement is the one known here.
    pub fn staged(&self) -> impl Iterator<Item = (Epoch, Digest)> {
        self.staged.iter().copied()
    }

    /// The last epoch that was acknowledged.
    pub fn acked(&self) -> Epoch {
        self.acked
    }

    /// The last epoch that was captured.
    pub fn last(&self) -> Epoch {
        self.staged.back().map_or(self.acked, |(epoch, _)| *epoch)
    }

    /// The last epoch that was begun.
    pub fn begun(&self) -> Epoch {
        self.begun
    }

    /// Whether nothing waits for an acknowledgement.
    pub fn is_clear(&self) -> bool {
        self.staged.is_empty()
    }

    /// Whether an epoch is being captured.
    pub fn is_capturing(&self) -> bool {
        self.capturing
    }

    /// Whether `Armed` was sent.
    pub fn is_armed(&self) -> bool {
        self.armed_at.is_some()
    }

    /// `Armed` is sent.
    pub fn arm(&mut self) {
        self.armed_at = Some(self.begun);
    }

    /// Whether an epoch begun after `Armed` was acknowledged: only then is it known that the
    /// backup is armed.
    pub fn is_proven(&self) -> bool {
        self.armed_at.is_some_and(|at| self.acked > at)
    }

    /// Forget an attempt that has failed, but not its numbers.
    pub fn abandon(&mut self) {
        *self = Self { begun: self.begun, ..Self::default() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(captured: u64) -> Window {
        let mut window = Window::default();
        for _ in 0..captured {
            let epoch = window.begin().unwrap();
            assert!(window.captured(epoch, Digest(epoch.0)));
        }
        window
    }

    #[test]
    fn two_epochs_may_wait_and_no_third() {
        let mut window = window(2);
        assert_eq!(window.begin(), None);
        assert!(window.ack(Epoch(1)));
        assert_eq!(window.begin(), Some(Epoch(3)));
        assert_eq!(window.begin(), None, "one at a time");
    }

    #[test]
    fn an_ack_implies_all_before_and_cannot_be_of_what_was_never_captured() {
        let mut window = window(2);
        assert!(!window.ack(Epoch(3)));
        assert!(window.ack(Epoch(2)));
        assert!(window.ack(Epoch(2)), "said twice");
        assert!(!window.ack(Epoch(1)), "goes back");
        assert!(window.is_clear());
    }

    #[test]
    fn no_number_is_used_twice_and_late_captures_are_dropped() {
        let mut window = Window::default();
        let late = window.begin().unwrap();
        window.abandon();
        assert!(!window.captured(late, Digest(1)));
        assert_eq!(window.begin(), Some(Epoch(2)));
    }
}
