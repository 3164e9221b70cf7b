//! Everything that closes a term: commands, claims, and what their answers lead to.
use std::time::Duration;

use super::{Handing, Primary, State};
use crate::{
    interface::{Command, Event, Mark, Output, Why},
    message::Message,
    record::{Answer, Question, Reading, Record, Word},
    rules::Rule,
    settings::{Arbiter, OnLoss},
    timers::Timer,
};

/// How long a command waits for the witness before it fails with nothing changed.
const WITNESS_TIMEOUT: Duration = Duration::from_secs(5);
/// How often an undecided record that concerns this guest is read.
const OUTCOME_INTERVAL: Duration = Duration::from_secs(1);
/// How often the record is checked that this primary's ownership rests on.
const RECORD_INTERVAL: Duration = Duration::from_secs(5);

impl Primary {
    pub(super) fn has_witness(&self) -> bool {
        matches!(self.base.settings.agreement.arbiter, Arbiter::Witness(_))
    }

    pub(super) fn command(&mut self, command: Command) {
        let settling = matches!(self.base.asked(), Some(Question::Settle { .. }));
        match (self.state, command) {
            (State::Off | State::Degraded, Command::Start)
                if !settling && !self.parked && self.base.marking.is_none() =>
            {
                self.connect();
            }
            (State::Connecting | State::Syncing, Command::Unprotect) => {
                self.fall_back(Why::Command);
            }
            (State::Degraded, Command::Unprotect) if !self.parked && !settling => {
                self.base.mark(Mark::Free { term: self.base.term });
            }
            (State::Off | State::Degraded | State::Connecting | State::Syncing, Command::Quit) => {
                if matches!(self.state, State::Connecting | State::Syncing) {
                    self.fall_back(Why::Command);
                }
                self.intent = Some(Command::Quit);
                self.base.mark(Mark::Free { term: self.base.term });
            }
            (State::Protected, Command::Unprotect | Command::Quit | Command::Failover)
                if self.intent.is_none() =>
            {
                self.leave(command);
            }
            (State::Stalled, Command::Unprotect | Command::Quit) => {
                self.intent = Some(command);
                self.claim(closing_word(command));
            }
            _ => self.base.tell(Event::Failed(command, Why::WrongState)),
        }
    }

    /// Leave an armed term by command. A witness first has to show that it answers: a claim that
    /// was sent cannot be taken back.
    fn leave(&mut self, command: Command) {
        if command == Command::Failover && !self.can_hand_over() {
            return self.base.tell(Event::Failed(command, Why::WrongState));
        }
        if command == Command::Unprotect && !self.base.rules.hold(Rule::Close) {
            return self.won();
        }
        self.intent = Some(command);
        if self.has_witness() {
            self.base.timers.set(Timer::GiveUp, self.base.now + WITNESS_TIMEOUT);
            self.base.ask(Question::Look { term: self.base.term });
        } else if command == Command::Failover {
            self.hand_over();
        } else if self.base.settings.on_loss == OnLoss::Continue {
            self.won();
        } else {
            // The backup's `Ended` closes the term, if it arrives.
            self.base.send(self.window.last(), Message::Bye { end: true });
            self.stall(Why::Command);
        }
    }

    /// The witness has not answered: the command fails, and nothing has changed.
    pub(super) fn command_timed_out(&mut self) {
        if self.state != State::Protected {
            return;
        }
        if let Some(command) = self.intent.take() {
            self.base.forget_question();
            self.base.tell(Event::Failed(command, Why::NoAnswer));
        }
    }

    /// The term is open, and the witness answers: carry out the command.
    fn proceed(&mut self, command: Command) {
        self.base.timers.clear(Timer::GiveUp);
        if command == Command::Failover {
            return self.hand_over();
        }
        self.stall(Why::Command);
        self.claim(closing_word(command));
    }

    /// Close the term at the arbiter. From here it is burnt: there is no way back to
    /// Protected in it, whatever the answer and however late.
    pub(super) fn claim(&mut self, word: Word) {
        let asked =
            matches!(self.base.asked(), Some(Question::Claim { .. } | Question::Fence { .. }));
        if self.state != State::Stalled || asked || self.base.marking.is_some() {
            return;
        }
        if self.base.settings.agreement.arbiter == Arbiter::None {
            return;
        }
        let term = self.base.term;
        self.base.claimed = true;
        self.base.timers.clear(Timer::Look);
        self.beat();
        match self.base.settings.agreement.arbiter {
            Arbiter::Witness(_) if self.base.rules.hold(Rule::Wit) => {
                let party = self.base.party();
                self.base.ask(Question::Claim { term, word, party });
            }
            Arbiter::Fence(_) => {
                if let Some(bond) = self.bond() {
                    self.base.mark(Mark::Fencing(bond));
                }
            }
            _ => self.won(),
        }
    }

    /// Read a record that may have changed.
    pub(super) fn look(&mut self) {
        if !self.has_witness() {
            return;
        }
        let undecided = match self.state {
            State::Fenced | State::HandingOver(Handing::Released) => true,
            State::Stalled => !self.base.claimed,
            _ => false,
        };
        if let Some(term) = self.alone.or(undecided.then_some(self.base.term)) {
            self.base.ask(Question::Look { term });
        }
    }

    pub(super) fn answered(&mut self, question: Question, answer: Answer) {
        if let Question::Settle { term, .. } = question {
            self.alone = Some(term);
            return self.watch();
        }
        if Some(question.term()) == self.alone {
            return self.watched(answer);
        }
        match (self.state, answer) {
            (_, Answer::Down) => self.won(),
            (_, Answer::Superseded) => self.lost(),
            (_, Answer::Record(Some(record))) => self.decided(record),
            (State::Protected, Answer::Record(None)) => {
                if let Some(command) = self.intent {
                    self.proceed(command);
                }
            }
            (_, Answer::Record(None)) => {
                self.base.timers.set(Timer::Look, self.base.now + OUTCOME_INTERVAL);
            }
        }
    }

    /// The term is closed.
    fn decided(&mut self, record: Record) {
        match record.reading(self.base.party(), self.base.rules) {
            Reading::Mine if record.word == Word::End => self.won_end(),
            Reading::Mine => self.won(),
            Reading::Undecided => self.wait_for_backup(record),
            Reading::Lost => self.lost(),
        }
    }

    /// The term is the backup's, which may be about to run the guest, or dead.
    fn wait_for_backup(&mut self, record: Record) {
        let granted = Some(record.winner.incarnation) == self.backup;
        match self.state {
            State::HandingOver(Handing::Claiming) if granted => self.released(),
            State::HandingOver(_) | State::Fenced => {}
            _ => self.fence_off(),
        }
        if self.base.rules.hold(Rule::Yield) || !matches!(self.state, State::Fenced) {
            self.base.timers.set(Timer::Look, self.base.now + OUTCOME_INTERVAL);
        } else {
            self.lost();
        }
    }

    /// Nothing leaves any more, and the guest is kept.
    pub(super) fn fence_off(&mut self) {
        self.base.output(Output::CloseTaps);
        self.park();
        self.base.claimed = true;
        self.base.hang_up();
        for timer in [Timer::Period, Timer::AckLimit, Timer::Dial, Timer::GiveUp] {
            self.base.timers.clear(timer);
        }
        if let Some(command) = self.intent.take() {
            self.base.tell(Event::Failed(command, Why::Lost));
        }
        self.enter(State::Fenced, Why::Lost);
    }

    /// The guest is the other side's for good.
    fn lost(&mut self) {
        if !matches!(self.state, State::Fenced | State::HandingOver(_)) {
            self.fence_off();
        }
        self.base.mark(Mark::Outdated { term: self.base.term });
    }

    /// The backup says that it runs.
    pub(super) fn runs_there(&mut self) {
        if matches!(self.state, State::Fenced | State::HandingOver(Handing::Released)) {
            self.lost();
        }
    }

    /// The backup has left the term for good.
    pub(super) fn ended(&mut self) {
        let asked = matches!(self.intent, Some(Command::Unprotect | Command::Quit));
        if self.state == State::Stalled && asked && !self.base.claimed {
            self.won();
        }
    }

    /// Rule R (b): the term is this side's alone. Nothing leaves before the sidecar says so.
    pub(super) fn won(&mut self) {
        let term = self.base.term.next();
        match self.intent {
            Some(Command::Quit) => self.won_end(),
            Some(Command::Unprotect) => {
                self.state = State::Stalled;
                self.base.mark(Mark::Free { term });
            }
            _ => self.base.mark(Mark::Running { term, promoted: None }),
        }
    }

    /// The guest runs nowhere until it is started again.
    fn won_end(&mut self) {
        self.park();
        self.intent = Some(Command::Quit);
        self.base.mark(Mark::Free { term: self.base.term.next() });
    }

    /// The won term ends here, and the guest continues alone.
    pub(super) fn degrade(&mut self, home: State) {
        if self.state != State::Degraded {
            self.base.send(self.window.last(), Message::Bye { end: false });
            self.base.hang_up();
            self.base.forget_question();
            self.alone = (home == State::Degraded && self.has_witness()).then_some(self.base.term);
            self.base.term = self.base.term.next();
            self.base.claimed = false;
            self.backup = None;
            self.window = super::Window::default();
            for timer in [Timer::Silence, Timer::Period, Timer::AckLimit, Timer::Dial] {
                self.base.timers.clear(timer);
            }
            self.base.timers.clear(Timer::Greeting);
            self.base.timers.clear(Timer::GiveUp);
        }
        if home == State::Off {
            self.alone = None;
            self.base.timers.clear(Timer::Look);
        }
        self.intent = None;
        self.enter(home, Why::Won);
        self.open_gates();
        self.unpark();
        self.watch();
    }

    /// While the guest runs on the strength of a record, check that the record stays.
    pub(super) fn watch(&mut self) {
        if self.alone.is_some() {
            self.base.timers.set(Timer::Look, self.base.now + RECORD_INTERVAL);
        }
    }

    fn watched(&mut self, answer: Answer) {
        let Answer::Record(record) = answer else {
            return self.record_changed(None);
        };
        // A promotion or a cold start was this process's own, or it would not be here: only
        // that the record is still there is of interest then.
        let gone = record.is_none();
        let other = record.is_some_and(|record| {
            record.word == Word::Solo
                && record.reading(self.base.party(), self.base.rules) != Reading::Mine
        });
        if gone || other {
            self.record_changed(record);
        } else {
            self.watch();
        }
    }

    /// A witness that was restored from an old copy may grant the term again: park.
    fn record_changed(&mut self, record: Option<Record>) {
        self.park();
        self.base.tell(Event::RecordChanged(record));
    }
}

const fn closing_word(command: Command) -> Word {
    match command {
        Command::Quit => Word::End,
        _ => Word::Solo,
    }
}
