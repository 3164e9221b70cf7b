//! The messages between primary and backup. Pages, sections and disk writes travel between these
//! messages and are opaque here: an [`Message::End`] stands for all that came before it.
use crate::{
    identity::{Digest, Epoch, Incarnation, Lineage, Pair, Term},
    settings::Agreement,
};

/// A message with the numbers that all of them carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Frame {
    /// The sender's term. A frame of an old one changes nothing.
    pub term: Term,
    /// The last epoch that the primary has captured, or that the backup holds whole; for the
    /// messages about one epoch, that epoch.
    pub epoch: Epoch,
    /// What is said.
    pub message: Message,
}

/// A message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Message {
    /// Primary: the first frame of a connection.
    Hello(Hello),
    /// Backup: the connection is accepted.
    Accept(Accept),
    /// Backup: the connection is refused, and why.
    Refuse(Refusal),
    /// Primary, once a term, after `Accept`: memory and disks follow, up to the first `End`.
    /// Everything, or only what was written since what the backup holds.
    Sync {
        /// The backup's epoch, if that is the base.
        base: Option<Epoch>,
    },
    /// Primary: all of this epoch has been sent.
    End {
        /// Of the epoch, chained to the one before.
        digest: Digest,
    },
    /// Backup: memory and journal hold this epoch and all before.
    Ack,
    /// Backup: this epoch cannot be received over this connection, or at all.
    Nack(Fault),
    /// Primary, once a term: the backup may promote from now on.
    Armed(Pair),
    /// Both, periodically.
    Beat {
        /// A claim of this term was sent, or a fence begun.
        claimed: bool,
        /// Backup: it could not promote.
        unfit: bool,
        /// Primary: the number of its last probe. Backup: the last one that it has received.
        probe: u64,
    },
    /// Primary: the term was claimed for the backup, and the primary's vCPUs are parked.
    Release,
    /// Backup: the guest runs here.
    Running,
    /// Primary: this connection ends. With `end`, the backup is to leave the term for good.
    Bye {
        /// Whether [`Message::Ended`] is requested.
        end: bool,
    },
    /// Backup: its images are durably outdated, and it will never claim this term.
    Ended,
    /// Primary, while disks are copied: what does the backup have in this piece of a disk? Like
    /// [`Message::Piece`] this says only what is to be sent, and does not concern the state machines.
    Compare {
        /// The disk's number.
        disk: u16,
        /// The piece's number.
        piece: u64,
    },
    /// Backup: it has this.
    Piece {
        /// As in the question.
        disk: u16,
        /// As in the question.
        piece: u64,
        /// Of its contents.
        hash: [u8; 32],
    },
}

/// The primary's greeting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Hello {
    /// The domain.
    pub lineage: Lineage,
    /// The primary.
    pub incarnation: Incarnation,
    /// The backup that the term is bound to already: only that one may accept.
    pub bound: Option<Incarnation>,
    /// A claim of this term was sent, or a fence begun.
    pub claimed: bool,
    /// What both sides have to agree on.
    pub agreement: Agreement,
}

/// The backup's consent. The frame's epoch is its last whole one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Accept {
    /// The backup.
    pub incarnation: Incarnation,
    /// Of the last whole epoch.
    pub digest: Digest,
    /// In a new term: what its memory and disks hold of an earlier one.
    pub memory: Option<Memory>,
    /// What both sides have to agree on.
    pub agreement: Agreement,
}

/// A whole epoch that a backup holds of a term that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Memory {
    /// The term.
    pub term: Term,
    /// The epoch.
    pub epoch: Epoch,
    /// Of its contents.
    pub digest: Digest,
}

/// Why a connection is refused. Nothing has changed at either side, except for
/// [`Refusal::Claimed`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Refusal {
    /// The backup has another peer.
    #[error("it serves another primary")]
    Busy,
    /// The backup is of another domain.
    #[error("it holds another domain")]
    Lineage,
    /// The backup's images belong to a later term, or to this one undecided.
    #[error("its images belong to that term or a later one")]
    Term,
    /// Another process is bound to this term.
    #[error("another process is bound to this term")]
    Stranger,
    /// One of the two has sent a claim: the witness decides.
    #[error("a claim was sent: the witness decides this term")]
    Claimed,
    /// Witness, promotion policy, fence or machine differ.
    #[error("witness, policy, fence or machine differ")]
    Agreement,
}

/// Why an epoch is not held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Fault {
    /// A frame was damaged or out of order.
    #[error("a frame was damaged or out of order")]
    Frame,
    /// The journal could not be written.
    #[error("its journal could not be written")]
    Disk,
}
