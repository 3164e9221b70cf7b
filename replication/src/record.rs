//! The record that a witness keeps of a term, the questions about it, and how it is read.
//!
//! ```text
//!          claim                         settle (by the winner's side)
//!   open --------> solo | cold | end
//!        `-------> promote ------------> running | yielded
//! ```
//! A record only grows along these arrows. So the answer to every question is the record itself:
//! it stays true however late it arrives, and a second query gets the same answer.
use crate::{
    identity::{Incarnation, Party, Term},
    rules::{Rule, Rules},
};

/// By which word a term is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Word {
    /// The primary continues without a backup.
    Solo,
    /// The backup runs the guest from its last whole epoch.
    Promote,
    /// A later process of either side starts the guest from its disk.
    Cold,
    /// The guest runs nowhere until it is started again.
    End,
}

/// What became of a promotion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Settled {
    /// The guest runs at the backup.
    Running,
    /// It never ran there and never will in this term: the primary owns it alone.
    Yielded {
        /// The primary.
        to: Incarnation,
    },
}

/// The decision of one term.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Record {
    /// How the term was closed.
    pub word: Word,
    /// Who closed it, or for whom it was closed.
    pub winner: Party,
    /// For [`Word::Promote`]: what became of it.
    pub settled: Option<Settled>,
}

/// What a record means to a process of the term.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reading {
    /// The term is this party's.
    Mine,
    /// A backup was granted it and has not reported yet whether it runs: the guest's last copy may
    /// be the reader's.
    Undecided,
    /// It is the other side's for good.
    Lost,
}

impl Record {
    /// What it means to `party`.
    #[must_use]
    pub fn reading(&self, party: Party, rules: Rules) -> Reading {
        let own = match self.settled {
            Some(Settled::Yielded { to }) => to == party.incarnation,
            _ if rules.hold(Rule::Pair) => self.winner.incarnation == party.incarnation,
            _ => self.winner.side == party.side,
        };
        match (own, self.word, self.settled) {
            (true, ..) => Reading::Mine,
            (false, Word::Promote, None) => Reading::Undecided,
            _ => Reading::Lost,
        }
    }
}

/// A question to the agent, which asks the witness or the other host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Question {
    /// What does the record of this term say?
    Look {
        /// The term.
        term: Term,
    },
    /// Close the term, if it is open.
    Claim {
        /// The term.
        term: Term,
        /// How.
        word: Word,
        /// For whom. The primary may claim [`Word::Promote`] for its backup.
        party: Party,
    },
    /// Record what became of a promotion.
    Settle {
        /// The term.
        term: Term,
        /// Who had won it.
        winner: Incarnation,
        /// What became of it.
        to: Settled,
    },
    /// Where there is no witness: make sure that the peer of this term does not run any more. Where
    /// the fence refuses, or cannot know, there is no answer, and a person has to decide.
    Fence {
        /// The term.
        term: Term,
    },
}

impl Question {
    /// The term that it is about.
    #[must_use]
    pub const fn term(&self) -> Term {
        match *self {
            Self::Look { term }
            | Self::Claim { term, .. }
            | Self::Settle { term, .. }
            | Self::Fence { term } => term,
        }
    }
}

/// The answer to a [`Question`]. `Unknown` is not an answer: the question is repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Answer {
    /// To a question to the witness: the record as it is now, durable; `None` while it is open.
    Record(Option<Record>),
    /// A higher term is decided: this one no longer matters.
    Superseded,
    /// To [`Question::Fence`]: the peer certainly does not run.
    Down,
}
