//! What goes into a state machine and what comes out of it.
//!
//! The caller of a machine carries out its outputs one after another, in order; what takes time
//! (a durable write, a question, the capture of an epoch) is begun in order and reported by an
//! input. It may stop at any point: what was not carried out is as if the process had died there.
use std::time::Duration;

use crate::{
    identity::{Connection, Digest, Epoch, Incarnation, Pair, Party, Side, Term},
    message::{Fault, Frame, Refusal},
    pace::Cost,
    record::{Answer, Question, Record, Settled, Word},
};

/// What happens to a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Input {
    /// The time that [`deadline`](crate::Primary::deadline) named has come; an earlier tick is
    /// harmless. Sockets are drained before: what has arrived is given to the machine first.
    Tick,
    /// Primary: the connection requested by [`Output::Dial`] is established.
    Connected(Connection),
    /// A whole frame has arrived. A backup is given the first frame of any connection.
    Received(Connection, Frame),
    /// Bytes of a frame have arrived.
    Heard(Connection),
    /// A beat of the peer's has arrived on the second path, authenticated as one of this session.
    HeardBeside,
    /// A connection has ended, or has carried something that is not a frame.
    Closed(Connection),
    /// The process that the term is bound to has ended, as the kernel of this host says of it. All
    /// that it has sent was given to the machine before. This decides nothing: it only saves waiting
    /// for that process.
    PeerGone,
    /// The answer to an [`Output::Ask`]. It names its question: a process that was a backup and is
    /// a primary now may still get the answer to an earlier question, under the same nonce.
    Answered {
        /// Of the question.
        nonce: u64,
        /// The question.
        question: Question,
        /// The answer.
        answer: Answer,
    },
    /// This sidecar word is durable on every disk.
    Marked(Mark),
    /// Primary: steps 1 to 4 of the epoch are done, and its pages wait in staging.
    Captured {
        /// As in [`Output::Capture`].
        epoch: Epoch,
        /// Of its contents, chained to the one before.
        digest: Digest,
    },
    /// Primary with a [`Pace`](crate::pace::Pace): what the epoch that was just captured has cost
    /// the guest.
    Cost(Cost),
    /// Primary with a pace: whether output is held that no epoch covers yet. Given after each
    /// capture, and whenever such output comes.
    OutputWaits(bool),
    /// Primary: how full the fullest is of staging, held output and memory that is dirty. Given
    /// after each capture and each release, and whenever a cap is reached.
    Room(Room),
    /// Primary: what [`Output::Track`] asks for has grown too large to be worth it, and was dropped.
    Untracked,
    /// Backup: memory and journal hold the epoch of [`Output::Hold`].
    Held(Epoch),
    /// Backup: memory and journal cannot hold it.
    NotHeld(Epoch, Fault),
    /// Backup: an epoch that is acknowledged cannot be applied, or is lost by what
    /// [`Output::Unprepare`] could not put back.
    NotApplied,
    /// Backup: all that can fail has been done, as [`Output::Prepare`] asks.
    Prepared,
    /// Backup: preparing has failed, before the guest's first step.
    CannotRun,
    /// A command of a client.
    Command(Command),
    /// A command of a client with `--force`: it is carried out even where it may lead to two
    /// owners, unless the witness is known to name the other side.
    Forced(Command),
}

/// How much room is left for what cannot be dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Room {
    /// Enough.
    Ample,
    /// A cap is near: the guest has to be slowed down.
    Scarce,
    /// A cap is reached: the guest must not run.
    None,
}

/// A client's command. A backup knows [`Failover`](Self::Failover) and [`Quit`](Self::Quit).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Command {
    /// Protect the guest.
    Start,
    /// Stop protecting it.
    Unprotect,
    /// End the process, or the guest has ended: it must not run anywhere. To a backup: only it ends.
    Quit,
    /// To a primary: move the guest to the backup. To a backup: take it over, without the
    /// primary's help.
    Failover,
}

/// What a machine wants done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Output {
    /// Send a frame. Before an `End`, send all of its epoch that this connection has not carried
    /// yet.
    Send(Connection, Frame),
    /// Send a beat on the second path, if there is one. It says only that this process is alive.
    BeatBeside,
    /// Open a connection to the backup.
    Dial,
    /// Close a connection.
    Close(Connection),
    /// Ask; the answer, whenever it comes, is an [`Input::Answered`] with the same nonce.
    Ask {
        /// Of the question. A repeated question has the same nonce.
        nonce: u64,
        /// The question.
        question: Question,
    },
    /// Write a word into the sidecar of every disk, durably; then [`Input::Marked`].
    Mark(Mark),
    /// Primary: send memory and disks before the first capture of the term: everything, or with a
    /// `base` only what was written since that epoch of the term before. Ends [`Output::Track`].
    Sync {
        /// What the backup holds.
        base: Option<Epoch>,
    },
    /// Primary: keep what was written since this epoch of the term that has just ended: what its
    /// staged epochs have carried, the dirty log, and the pieces of disks.
    Track {
        /// The last epoch that the backup has acknowledged.
        since: Epoch,
    },
    /// Primary: stop that.
    Untrack,
    /// Primary: do steps 1 to 4 of this epoch; then [`Input::Captured`]. For the first epoch of a
    /// term, after the rounds of memory and disks.
    Capture {
        /// Its number.
        epoch: Epoch,
        /// Whether the gates shut at its end: output of later epochs is held.
        shut: bool,
    },
    /// Primary: no epoch can begin, as two are not acknowledged yet. Find out how much has changed in
    /// memory; then [`Input::Room`].
    Harvest,
    /// Primary: release what the gates hold of epochs up to this one, in order.
    ReleaseThrough(Epoch),
    /// Primary: release everything, in order, and leave the gates open.
    OpenGates,
    /// Primary: close the taps and throw away held frames of the network.
    CloseTaps,
    /// Keep each vCPU parked for so many percent of the time, from 0 to 90.
    Throttle(u8),
    /// Park the vCPUs. Nothing is lost.
    Park,
    /// Let them run again.
    Unpark,
    /// Backup: memory and disks are being filled from here on. With a `base` what they hold is kept
    /// where nothing arrives, else forgotten.
    Fill {
        /// The epoch that they hold.
        base: Option<Epoch>,
    },
    /// Backup: make sure that memory and journal hold this epoch, whose `End` has arrived; then
    /// [`Input::Held`].
    Hold(Epoch),
    /// Backup: drop what has arrived of epochs after this one. An earlier [`Output::Hold`] of them is
    /// not answered any more: they may come again.
    DropAfter(Epoch),
    /// Backup: do everything that can fail, to run from this epoch; then [`Input::Prepared`].
    Prepare(Epoch),
    /// Backup: put back what [`Output::Prepare`] has touched.
    Unprepare,
    /// The guest runs here from now on, in this term, from this epoch (or from its disk).
    Run {
        /// The first term that this process may protect it in.
        term: Term,
        /// From where.
        from: From,
        /// The incarnation whose promotion it rests on, for
        /// [`Primary::owner`](crate::Primary::owner).
        promoted: Option<Incarnation>,
    },
    /// Report to clients and in the log.
    Tell(Event),
    /// End the process.
    Exit(Exit),
}

/// From where a guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum From {
    /// From memory: the last whole epoch.
    Epoch(Epoch),
    /// From its disk.
    Disk,
}

/// The word in the sidecar of an image: whether a guest starts from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mark {
    /// Starts.
    Free {
        /// The first term that may be used.
        term: Term,
    },
    /// Starts only after a won claim.
    Protected(Bond),
    /// As `Protected`: a fence of the peer was begun.
    Fencing(Bond),
    /// Does not start: the peer's fence has brought this side down in this term.
    Fenced {
        /// The term.
        term: Term,
    },
    /// Starts, as primary of `term`.
    Running {
        /// The term.
        term: Term,
        /// The promotion that it rests on, to be settled at the witness.
        promoted: Option<Incarnation>,
    },
    /// Does not start.
    Outdated {
        /// The term that was lost, or is being filled.
        term: Term,
    },
    /// Does not start: it is being filled.
    Inconsistent {
        /// The term.
        term: Term,
    },
}

impl Mark {
    /// The term that it is about, or the first one that may follow.
    #[must_use]
    pub const fn term(&self) -> Term {
        match *self {
            Self::Protected(bond) | Self::Fencing(bond) => bond.term,
            Self::Free { term }
            | Self::Fenced { term }
            | Self::Running { term, .. }
            | Self::Outdated { term }
            | Self::Inconsistent { term } => term,
        }
    }
}

/// What a sidecar says of the armed term that its image is part of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Bond {
    /// The term.
    pub term: Term,
    /// Who is bound. The backup's later process needs the primary's name, to give the term back.
    pub pair: Pair,
    /// Whose image it is.
    pub side: Side,
}

impl Bond {
    /// The one of the pair whose image this is.
    #[must_use]
    pub fn own(&self) -> Party {
        let incarnation = match self.side {
            Side::Primary => self.pair.primary,
            Side::Backup => self.pair.backup,
        };
        Party { side: self.side, incarnation }
    }

    /// If this image's process was granted the term and its outcome is not recorded yet: how
    /// a later process gives it back.
    pub(crate) fn unused(&self, answer: Answer) -> Option<Question> {
        let Answer::Record(Some(record)) = answer else { return None };
        let open = record.word == Word::Promote && record.settled.is_none();
        let to = Settled::Yielded { to: self.pair.primary };
        (open && record.winner.incarnation == self.own().incarnation).then_some(Question::Settle {
            term: self.term,
            winner: record.winner.incarnation,
            to,
        })
    }
}

/// What is reported to clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// The state has changed, and why.
    State(Why),
    /// The peer refuses.
    Refused(Refusal),
    /// A command could not be carried out; nothing has changed.
    Failed(Command, Why),
    /// The record of the term that this side owns alone has changed.
    RecordChanged(Option<Record>),
    /// A question has had no answer for a while.
    NoAnswer,
    /// The peer was silent for so long, over a third of the time-out: false suspicions are near.
    /// Told once a minute.
    Gap(Duration),
    /// Backup: the primary sends beats, but has captured no epoch for this long.
    EpochsStandStill(Duration),
}

/// Why something happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Why {
    /// The connection has ended.
    #[error("the connection has ended")]
    Closed,
    /// Nothing was received for the time-out.
    #[error("nothing was heard for the time-out")]
    Silence,
    /// The peer's process has ended.
    #[error("the other side's process has ended")]
    Gone,
    /// A frame was refused.
    #[error("a frame was damaged or out of order")]
    BadFrame,
    /// An epoch was refused.
    #[error("the backup could not hold an epoch")]
    Nack,
    /// The backup could not run the guest.
    #[error("the backup is not fit to run the guest")]
    Unfit,
    /// The peer has claimed the term.
    #[error("the peer has claimed the term")]
    PeerClaimed,
    /// The peer speaks of a later term.
    #[error("the peer speaks of a later term")]
    HigherTerm,
    /// Output was held for too long.
    #[error("output was held for longer than ack-limit")]
    AckLimit,
    /// The peer has sent `Bye`.
    #[error("the other side has left on purpose")]
    Bye,
    /// A command requested it.
    #[error("a command requested it")]
    Command,
    /// Not possible in this state.
    #[error("not possible in this state")]
    WrongState,
    /// Nobody could tell which side has the guest.
    #[error("there is neither witness nor fence: only --force does this")]
    NoArbiter,
    /// There was no answer.
    #[error("there was no answer in time")]
    NoAnswer,
    /// The term was won.
    #[error("the term was won")]
    Won,
    /// The term was lost.
    #[error("the term was lost")]
    Lost,
    /// Both sides are ready.
    #[error("both sides are ready")]
    Paired,
}

/// How a process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Exit {
    /// As a command requested.
    Done,
    /// Nothing ran here.
    Nothing,
    /// The guest runs elsewhere; status 3.
    Fenced,
    /// A start was refused.
    Refused(Denial),
}

/// Why a start from an image is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Denial {
    /// The other side has the guest, or had it last.
    #[error("the other side owns the guest: start it there, or resync this image")]
    Outdated,
    /// An earlier process of this side has it, and its memory may still be somewhere.
    #[error("an earlier process of this side has won the term, and has its memory")]
    Earlier,
    /// The image was part of a protected term, and there is no arbiter to ask.
    #[error("it was protected, and there is neither a witness nor a fence to ask")]
    NoArbiter,
    /// It was being filled.
    #[error("the image was being filled and cannot be used")]
    Inconsistent,
    /// It was given back: the primary continues.
    #[error("the guest was given back to its primary")]
    Yielded,
}
