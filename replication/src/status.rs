//! What a machine says of itself to those who ask: for `query-replication`.
use std::time::Duration;

use crate::identity::{Epoch, Incarnation, Side, Term};

/// What a machine says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// Its side.
    pub role: Side,
    /// The name of its state.
    pub state: &'static str,
    /// The process that this term binds it to.
    pub peer: Option<Incarnation>,
    /// The term that it is in, or that its next protection will use.
    pub term: Term,
    /// The last epoch that the primary has captured, or that the backup holds whole.
    pub epoch: Epoch,
    /// The last epoch that the backup has acknowledged.
    pub acked: Epoch,
    /// The term is left only by a claim: the backup may promote.
    pub armed: bool,
    /// A claim of this term was sent, or a fence begun.
    pub claimed: bool,
    /// What it waits for, if its work depends on it.
    pub waiting: Option<Waiting>,
    /// For how many percent of the time each vCPU is parked.
    pub throttle: u8,
    /// How often the primary has suspected its backup, or the backup its primary.
    pub stalls: u64,
    /// Beats of the peer that did not arrive in time.
    pub missed_beats: u64,
    /// The longest silence of the peer in the last one to two minutes.
    pub largest_gap: Duration,
}

/// What a machine waits for. Each wait ends at a time-out, or is repeated without end, or is a
/// person's to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Waiting {
    /// A connection to the backup.
    Connection,
    /// The backup's answer to the greeting.
    Greeting,
    /// Memory and disks are being copied.
    Copy,
    /// The backup's acknowledgement.
    Acknowledgement,
    /// An answer of the backup's that cannot be old, before output is released.
    Beat,
    /// Room for held output and dirty pages: the guest is parked until then.
    Room,
    /// The backup's word that it has left the term.
    Ended,
    /// The witness.
    Witness,
    /// The fence.
    Fence,
    /// That the guest is known to run at the backup, or to have never run there.
    Outcome,
    /// The disks: a word is being written into their sidecars.
    Sidecar,
    /// Backup: everything that can fail is being done before a claim.
    Preparation,
    /// Backup: its turn to claim, which comes after the primary's.
    Turn,
    /// Backup: the primary.
    Primary,
    /// A command: nobody else can decide.
    Operator,
}

impl Waiting {
    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Connection => "connection",
            Self::Greeting => "greeting",
            Self::Copy => "copy",
            Self::Acknowledgement => "acknowledgement",
            Self::Beat => "beat",
            Self::Room => "room",
            Self::Ended => "ended",
            Self::Witness => "witness",
            Self::Fence => "fence",
            Self::Outcome => "outcome",
            Self::Sidecar => "sidecar",
            Self::Preparation => "preparation",
            Self::Turn => "turn",
            Self::Primary => "primary",
            Self::Operator => "operator",
        }
    }
}
