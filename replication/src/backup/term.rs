//! What closes a term for a backup: its own claim, or that of another process.
use std::time::Duration;

use super::{Backup, State};
use crate::{
    interface::{Command, Event, Exit, From, Mark, Output, Why},
    message::Message,
    record::{Answer, Question, Reading, Record, Settled, Word},
    rules::Rule,
    settings::Arbiter,
    timers::Timer,
};

/// How long memory is kept as the base of a warm resync.
const KEPT: Duration = Duration::from_secs(600);
/// How long a forced take-over waits for the arbiter.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// How often an unfit backup reads the record.
const OUTCOME_INTERVAL: Duration = Duration::from_secs(1);

impl Backup {
    pub(super) fn has_witness(&self) -> bool {
        matches!(self.base.settings.agreement.arbiter, Arbiter::Witness(_))
    }

    /// It is this side's turn.
    pub(super) fn take_turn(&mut self) {
        self.turn = true;
        self.base.timers.clear(Timer::Turn);
        self.try_claim();
    }

    /// Claim, once it is this side's turn and all that can fail has been done.
    pub(super) fn try_claim(&mut self) {
        let ready = self.state == State::Suspecting && self.turn && self.prepared;
        if !ready || self.base.asked().is_some() || self.base.marking.is_some() {
            return;
        }
        if self.forced {
            self.base.timers.set(Timer::GiveUp, self.base.now + ANSWER_TIMEOUT);
        }
        let rules = self.base.rules;
        match self.base.settings.agreement.arbiter {
            _ if self.released => self.granted(),
            Arbiter::None if self.forced => {
                self.base.claimed = true;
                self.granted();
            }
            Arbiter::Witness(_) if rules.hold(Rule::Gran) && rules.hold(Rule::Wit) => {
                self.announce_claim();
                let (term, party) = (self.base.term, self.base.party());
                self.base.ask(Question::Claim { term, word: Word::Promote, party });
            }
            Arbiter::Witness(_) => self.granted(),
            Arbiter::Fence(_) => {
                self.announce_claim();
                if let Some(bond) = self.bond() {
                    self.base.mark(Mark::Fencing(bond));
                }
            }
            // Without an arbiter, only the primary's `Release` permits it.
            Arbiter::None => {}
        }
    }

    /// The term is burnt. A primary that is alive hears of it at once and claims, too; but not where a
    /// person has ordered the claim, as it would be chance then who wins.
    fn announce_claim(&mut self) {
        self.base.claimed = true;
        if !self.ordered {
            self.beat();
        }
    }

    /// Whether a claim that a person has ordered waits for its answer.
    pub(super) fn waits_by_order(&self) -> bool {
        self.ordered && self.state == State::Suspecting
    }

    /// End on purpose: this side will never claim, so a primary that is alive need not wait for it.
    pub(super) fn quit(&mut self) {
        if !self.base.claimed {
            self.base.send(self.whole, Message::Bye { end: false });
            self.end(Exit::Nothing);
        }
    }

    /// Take the guest over, as soon as everything that can fail has been done. The arbiter is asked
    /// without a suspicion; a primary that is alive and answers it wins or loses there. With `forced`
    /// the guest runs here even where nobody answers, which is unsafe: it may run there, too.
    pub(super) fn command(&mut self, command: Command, forced: bool) {
        let nobody = self.base.settings.agreement.arbiter == Arbiter::None;
        let why = match (self.state, command) {
            (State::Standby | State::Suspecting, Command::Failover) if nobody && !forced => {
                Why::NoArbiter
            }
            (State::Standby | State::Suspecting, Command::Failover) => {
                return self.take_over(forced);
            }
            (_, Command::Quit) => return self.quit(),
            _ => Why::WrongState,
        };
        self.base.tell(Event::Failed(command, why));
    }

    fn take_over(&mut self, forced: bool) {
        (self.turn, self.ordered) = (true, true);
        self.forced |= forced;
        self.base.timers.clear(Timer::Turn);
        if self.state == State::Standby {
            self.enter(State::Suspecting, Why::Command);
            self.drop_coming();
            self.prepare();
        } else if self.forced && self.base.claimed && self.base.timers.get(Timer::GiveUp).is_none()
        {
            self.base.timers.set(Timer::GiveUp, self.base.now + ANSWER_TIMEOUT);
        }
        self.try_claim();
    }

    /// Nobody has answered a forced take-over; or memory was kept for long enough.
    pub(super) fn gave_up(&mut self) {
        match self.state {
            State::Suspecting if self.forced => self.granted(),
            State::Abandoned => self.end(Exit::Nothing),
            _ => self.memory = None,
        }
    }

    /// `fencing` is durable.
    pub(super) fn fence(&mut self) {
        self.base.ask(Question::Fence { term: self.base.term });
    }

    /// The primary has given the guest away.
    pub(super) fn release_came(&mut self) {
        self.turn = true;
        self.released = !self.has_witness() || !self.base.rules.hold(Rule::Hand);
        self.base.timers.clear(Timer::Turn);
        if self.state == State::Standby {
            self.enter(State::Suspecting, Why::Command);
            self.drop_coming();
            self.prepare();
        }
        self.try_claim();
    }

    pub(super) fn answered(&mut self, question: Question, answer: Answer) {
        if self.state == State::Listening {
            return self.learnt(question, answer);
        }
        match (self.state, question, answer) {
            (State::Suspecting, Question::Fence { .. }, Answer::Down) => self.granted(),
            (_, Question::Settle { .. }, _) => self.abandon(),
            (State::Suspecting | State::Unfit, _, Answer::Record(Some(record))) => {
                self.decided(record);
            }
            (State::Suspecting | State::Unfit, _, Answer::Superseded) => self.abandon(),
            (State::Unfit, _, _) => {
                self.base.timers.set(Timer::Look, self.base.now + OUTCOME_INTERVAL)
            }
            _ => {}
        }
    }

    fn decided(&mut self, record: Record) {
        match record.reading(self.base.party(), self.base.rules) {
            Reading::Mine if self.state == State::Unfit => {
                self.enter(State::Promoting, Why::Won);
                self.give_back();
            }
            Reading::Mine => self.granted(),
            Reading::Undecided | Reading::Lost => self.abandon(),
        }
    }

    /// The term is this side's own. Its sidecar says so before the guest's first step.
    fn granted(&mut self) {
        self.enter(State::Promoting, Why::Won);
        self.base.timers.clear(Timer::GiveUp);
        let (term, me) = (self.base.term.next(), self.base.me.incarnation);
        self.base.mark(Mark::Running { term, promoted: Some(me) });
    }

    /// Everything is durable.
    pub(super) fn run(&mut self) {
        let term = self.base.term.next();
        self.state = State::Promoted;
        let (from, promoted) = (From::Epoch(self.whole), Some(self.base.me.incarnation));
        self.base.output(Output::Run { term, from, promoted });
        self.base.send(self.whole, Message::Running);
        self.base.hang_up();
    }

    /// The guest cannot run here. Before the claim that makes this side unfit; after the grant the
    /// term is given back.
    pub(super) fn cannot_run(&mut self) {
        match (self.state, self.bond()) {
            (State::Promoting, Some(bond)) if self.base.rules.hold(Rule::Yield) => {
                // If this process dies here, its successor has to give the term back, so the
                // sidecar must not say `running` any more.
                self.base.mark(Mark::Protected(bond));
            }
            (State::Promoting, _) => {}
            _ => self.become_unfit(),
        }
    }

    /// Report to the witness that the guest never ran here: it is the primary's.
    pub(super) fn give_back(&mut self) {
        if let Some(primary) = self.primary {
            let (term, winner) = (self.base.term, self.base.me.incarnation);
            self.base.ask(Question::Settle { term, winner, to: Settled::Yielded { to: primary } });
        }
    }

    pub(super) fn become_unfit(&mut self) {
        if matches!(self.state, State::Standby | State::Suspecting) && !self.base.claimed {
            self.say_unfit();
        }
    }

    /// The primary hears of it. Where it has given the guest away without a witness, that gives it
    /// back.
    pub(super) fn say_unfit(&mut self) {
        self.unfit = true;
        self.enter(State::Unfit, Why::Unfit);
        self.beat();
        self.look();
    }

    /// An unfit backup waits for others to close the term; a listening one checks whether an
    /// earlier process was granted it.
    pub(super) fn look(&mut self) {
        let past = self.past.map(|bond| bond.term);
        let term = match self.state {
            State::Unfit => self.base.term,
            State::Listening => match past {
                Some(term) => term,
                None => return,
            },
            _ => return,
        };
        if self.has_witness() {
            self.base.ask(Question::Look { term });
        }
    }

    /// The record of the term that an earlier process of this host was part of. If that process was
    /// granted the term, it never ran the guest: otherwise its images would say so.
    fn learnt(&mut self, question: Question, answer: Answer) {
        let Some(bond) = self.past else { return };
        let settling = matches!(question, Question::Settle { .. });
        match (answer, bond.unused(answer)) {
            (_, Some(settle)) if !settling && self.base.rules.hold(Rule::Yield) => {
                self.base.ask(settle);
            }
            (Answer::Record(None), _) => {
                self.base.timers.set(Timer::Look, self.base.now + OUTCOME_INTERVAL)
            }
            _ => self.past = None,
        }
    }

    /// The term is the other side's.
    fn abandon(&mut self) {
        self.memory = self.held_memory();
        self.floor = self.base.term.next();
        if std::mem::take(&mut self.ordered) {
            self.base.tell(Event::Failed(Command::Failover, Why::Lost));
        }
        self.stand_back();
        self.enter(State::Abandoned, Why::Lost);
        self.base.hang_up();
        self.base.forget_question();
        for timer in [Timer::Silence, Timer::Turn, Timer::Look] {
            self.base.timers.clear(timer);
        }
        self.keep_memory();
        self.base.mark(Mark::Outdated { term: self.base.term });
    }

    /// Keep memory for a limited time, as it takes as much as a guest.
    pub(super) fn keep_memory(&mut self) {
        if self.base.timers.get(Timer::GiveUp).is_none() {
            self.base.timers.set(Timer::GiveUp, self.base.now + KEPT);
        }
    }

    /// `Bye(end)`: leave the term for good, if no claim was sent.
    pub(super) fn leave(&mut self) {
        if !self.base.claimed && self.base.marking.is_none() {
            self.base.mark(Mark::Outdated { term: self.base.term });
        } else {
            self.suspect(Why::Bye);
        }
    }

    /// The images are durably outdated: this side never claims again.
    pub(super) fn ended(&mut self) {
        self.base.send(self.whole, Message::Ended);
        self.end(Exit::Nothing);
    }
}
