//! What the user decides, and what both sides have to agree on.
use std::time::Duration;

use crate::{identity::Digest, timers::Time};

/// Who decides when the two sides do not receive anything from each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Arbiter {
    /// A witness, by its identity. If there is a fence, too, it only frees what the loser holds.
    Witness(Digest),
    /// A fence, by its kind: the side that has brought its peer down has won.
    Fence(Digest),
    /// None: a backup never promotes by itself.
    None,
}

/// What both sides have to agree on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Agreement {
    /// Who decides.
    pub arbiter: Arbiter,
    /// The machine: memory, CPU, disks and taps, as one checksum.
    pub machine: Digest,
}

/// What a primary does when it has lost its backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OnLoss {
    /// Claim the term at the arbiter, and continue alone.
    Claim,
    /// Hold output until an operator decides.
    Stall,
    /// Park the guest, end the term, end.
    Stop,
    /// Continue alone without a claim: only where no backup promotes by itself.
    Continue,
}

/// All settings of one side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Settings {
    /// What both sides have to agree on.
    pub agreement: Agreement,
    /// How long nothing may arrive from the peer before it is suspected; at least 10 ms.
    pub timeout: Duration,
    /// Time from one epoch to the next.
    pub period: Duration,
    /// How long output may be held while the backup still sends.
    pub ack_limit: Duration,
    /// What a primary does when it has lost its backup.
    pub on_loss: OnLoss,
    /// Whether a primary whose output was held for `ack_limit` leaves its backup.
    pub leave_slow: bool,
}

/// Why settings are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    /// It would have two owners.
    #[error(
        "on-backup-loss=continue asks no arbiter, but this backup may promote by itself: \
         leave out the witness and the fence, or choose another on-backup-loss"
    )]
    Continue,
    /// There is no arbiter to ask.
    #[error("on-backup-loss={0} needs a witness or a fence")]
    NoArbiter(&'static str),
    /// The time-out is too short for any host.
    #[error("heartbeat-timeout is {0:?}; 10 ms is the least")]
    Timeout(Duration),
}

impl Settings {
    /// Check the settings against each other.
    ///
    /// # Errors
    /// Which of them contradict each other.
    pub fn check(&self) -> Result<(), SettingsError> {
        let nobody = self.agreement.arbiter == Arbiter::None;
        match self.on_loss {
            OnLoss::Continue if !nobody => Err(SettingsError::Continue),
            OnLoss::Claim if nobody => Err(SettingsError::NoArbiter("witness")),
            OnLoss::Stop if nobody => Err(SettingsError::NoArbiter("stop")),
            _ if self.timeout < Duration::from_millis(10) => {
                Err(SettingsError::Timeout(self.timeout))
            }
            _ => Ok(()),
        }
    }

    /// Time from one beat to the next.
    #[must_use]
    pub fn heartbeat(&self) -> Duration {
        self.timeout / 10
    }

    /// How much longer than the primary a backup waits before it claims: a living primary wins.
    #[must_use]
    pub fn grace(&self) -> Duration {
        match self.agreement.arbiter {
            // A fence does not ask first: the primary has to be done by then.
            Arbiter::Fence(_) => self.timeout,
            _ => (self.timeout / 2).max(Duration::from_millis(100)),
        }
    }

    /// Whether a timer that was due at `due` expires so late, at `now`, that this process itself
    /// was stopped: then silence says nothing about the peer.
    pub(crate) fn stood_still(&self, due: Time, now: Time) -> bool {
        now.saturating_sub(due) > self.timeout / 4
    }
}
