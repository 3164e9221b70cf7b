//! A start from an image on disk, when nothing of the guest is in memory (a cold start).
//!
//! ```text
//!                    protected               Granted, sidecar
//!   what does the   ------------> Claiming ------------------> Run, as primary of term+1
//!   sidecar say?                     |  `--> Settling (gives back what its predecessor was
//!      |  free, running              |           |     granted and never ran)
//!      v                      Denied v           v
//!     Run                           Exit(Refused)
//! ```
//! The process that starts the guest holds the locks of the images: no earlier one of this side is
//! alive, and a term that the one which the sidecar names has won, or got back, is this one's.
use crate::{
    base::{Base, Identity},
    identity::{Incarnation, Side, Term},
    interface::{Bond, Denial, Exit, From, Input, Mark, Output},
    record::{Answer, Question, Reading, Record, Settled, Word},
    rules::{Rule, Rules},
    settings::{Arbiter, Settings},
    timers::{Time, Timer},
};

/// The machine of a cold start.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Start {
    base: Base,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum State {
    Claiming(Bond),
    /// The predecessor's promotion is being given back.
    Settling(Bond),
    /// The term is won.
    Marking(Bond),
    /// The start was refused; the word that says so is being written.
    Refusing(Denial),
    Over,
}

impl Start {
    /// Begin a start from an image whose sidecar says `word`.
    #[must_use]
    pub fn new(me: Identity, word: Mark, settings: Settings, rules: Rules) -> (Self, Vec<Output>) {
        let base = Base::new(me, Side::Primary, Term(0), settings, rules);
        let mut this = Self { base, state: State::Over };
        match word {
            Mark::Free { term } => this.run(term, None),
            Mark::Running { term, promoted } => this.run(term, promoted),
            Mark::Protected(bond) | Mark::Fencing(bond) => {
                this.base.side = bond.side;
                this.base.term = bond.term;
                this.state = State::Claiming(bond);
                this.claim(bond);
            }
            Mark::Outdated { .. } | Mark::Fenced { .. } => this.refuse(Denial::Outdated),
            Mark::Inconsistent { .. } => this.refuse(Denial::Inconsistent),
        }
        let outputs = this.base.take_outputs();
        (this, outputs)
    }

    /// When it wants an [`Input::Tick`].
    #[must_use]
    pub fn deadline(&self) -> Option<Time> {
        self.base.timers.next()
    }

    /// Whether it has ended.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.state == State::Over
    }

    /// Take one input, and return what is to be done.
    pub fn step(&mut self, now: Time, input: Input) -> Vec<Output> {
        self.base.now = self.base.now.max(now);
        match input {
            Input::Tick => {
                while let Some((timer, _)) = self.base.timers.take_due(self.base.now) {
                    if timer == Timer::Ask {
                        self.base.ask_again();
                    }
                }
            }
            Input::Answered { nonce, question, answer }
                if self.base.answered(nonce, question, answer) =>
            {
                self.answered(answer);
            }
            Input::Marked(mark) if self.base.marked(mark) => match self.state {
                State::Marking(bond) if matches!(mark, Mark::Fencing(_)) => {
                    self.state = State::Claiming(bond);
                    self.base.ask(Question::Fence { term: bond.term });
                }
                State::Marking(bond) => self.run(bond.term.next(), None),
                State::Refusing(denial) => self.refuse(denial),
                _ => {}
            },
            _ => {}
        }
        self.base.take_outputs()
    }

    /// Rule `cold`.
    fn claim(&mut self, bond: Bond) {
        match self.base.settings.agreement.arbiter {
            _ if !self.base.rules.hold(Rule::Cold) => self.won(bond),
            Arbiter::Witness(_) => {
                let party = self.base.party();
                self.base.ask(Question::Claim { term: bond.term, word: Word::Cold, party });
            }
            Arbiter::Fence(_) => {
                self.state = State::Marking(bond);
                self.base.mark(Mark::Fencing(bond));
            }
            Arbiter::None => self.refuse(Denial::NoArbiter),
        }
    }

    fn answered(&mut self, answer: Answer) {
        match (self.state, answer) {
            (State::Claiming(bond), Answer::Down) => self.won(bond),
            (State::Claiming(bond), Answer::Record(Some(record))) => self.decided(bond, record),
            (State::Claiming(_), Answer::Superseded) => self.outdated(Denial::Outdated),
            (State::Settling(_), _) => self.outdated(Denial::Yielded),
            _ => {}
        }
    }

    fn decided(&mut self, bond: Bond, record: Record) {
        // The predecessor was granted the term and died before its sidecar said `running`: the
        // guest never ran here, and its primary still has it. That comes first, as this process may
        // have its predecessor's number.
        let settle = bond.unused(Answer::Record(Some(record)));
        if let (Some(settle), true) = (settle, self.base.rules.hold(Rule::Yield)) {
            self.state = State::Settling(bond);
            return self.base.ask(settle);
        }
        // The process that this image was bound to is dead, as its locks are free. What it owned alone is
        // in the image, and it has let nothing out of that: the image would say so.
        let alone = matches!(record.word, Word::Solo | Word::End)
            || matches!(record.settled, Some(Settled::Yielded { .. }));
        let mine = |party| record.reading(party, self.base.rules) == Reading::Mine;
        if mine(self.base.party()) || alone && mine(bond.own()) {
            return self.won(bond);
        }
        let owner = match record.settled {
            Some(Settled::Yielded { .. }) => Side::Primary,
            _ => record.winner.side,
        };
        let reading = record.reading(self.base.party(), self.base.rules);
        if owner == bond.side {
            self.refuse(Denial::Earlier);
        } else if reading == Reading::Undecided {
            // The other side may give it back yet.
            self.refuse(Denial::Outdated);
        } else {
            self.outdated(Denial::Outdated);
        }
    }

    fn won(&mut self, bond: Bond) {
        self.state = State::Marking(bond);
        self.base.mark(Mark::Running { term: bond.term.next(), promoted: None });
    }

    fn run(&mut self, term: Term, promoted: Option<Incarnation>) {
        self.state = State::Over;
        self.base.output(Output::Run { term, from: From::Disk, promoted });
    }

    fn outdated(&mut self, denial: Denial) {
        self.state = State::Refusing(denial);
        self.base.mark(Mark::Outdated { term: self.base.term });
    }

    fn refuse(&mut self, denial: Denial) {
        self.state = State::Over;
        self.base.output(Output::Exit(Exit::Refused(denial)));
    }
}

#[cfg(feature = "controls")]
impl crate::Searched for Start {
    fn base(&self) -> &Base {
        &self.base
    }

    fn base_mut(&mut self) -> &mut Base {
        &mut self.base
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        identity::{Digest, Lineage, Pair, Party},
        settings::{Agreement, OnLoss},
    };

    const PRIMARY: Incarnation = Incarnation(1);
    const BACKUP: Incarnation = Incarnation(2);

    #[test]
    fn what_the_predecessor_was_granted_and_never_ran_is_given_back_also_under_its_number() {
        let pair = Pair { primary: PRIMARY, backup: BACKUP };
        let bond = Bond { term: Term(1), pair, side: Side::Backup };
        let settings = Settings {
            agreement: Agreement { arbiter: Arbiter::Witness(Digest(1)), machine: Digest(0) },
            timeout: Duration::from_secs(1),
            period: Duration::from_millis(25),
            ack_limit: Duration::from_secs(10),
            on_loss: OnLoss::Claim,
            leave_slow: true,
        };
        let winner = Party { side: Side::Backup, incarnation: BACKUP };
        let record = Record { word: Word::Promote, winner, settled: None };
        for incarnation in [BACKUP, Incarnation(3)] {
            let me = Identity { lineage: Lineage(7), incarnation };
            let (mut start, outputs) = Start::new(me, Mark::Protected(bond), settings, Rules::ALL);
            let [Output::Ask { nonce, question }] = outputs[..] else { panic!("{outputs:?}") };
            let answer = Answer::Record(Some(record));
            let outputs = start.step(Duration::ZERO, Input::Answered { nonce, question, answer });
            let to = Settled::Yielded { to: PRIMARY };
            let settle = Question::Settle { term: Term(1), winner: BACKUP, to };
            let asks = matches!(outputs[..], [Output::Ask { question, .. }] if question == settle);
            assert!(asks, "{incarnation:?}: {outputs:?}");
        }
    }
}
