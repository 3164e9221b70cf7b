//! What closes a term: claims, and what their answers lead to.
use std::time::Duration;

use super::{Handing, Primary, State};
use crate::{
    identity::{Party, Side},
    interface::{Command, Event, Mark, Output, Why},
    message::Message,
    record::{Answer, Question, Reading, Record, Settled, Word},
    rules::Rule,
    settings::Arbiter,
    timers::Timer,
};

/// How often an undecided record that concerns this guest is read.
const OUTCOME_INTERVAL: Duration = Duration::from_secs(1);
/// How often the record is checked that this primary's ownership rests on.
const RECORD_INTERVAL: Duration = Duration::from_secs(5);

impl Primary {
    pub(super) fn has_witness(&self) -> bool {
        matches!(self.base.settings.agreement.arbiter, Arbiter::Witness(_))
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
        if self.state == State::Degraded && !matches!(question, Question::Look { .. }) {
            return self.settled(question, answer);
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

    /// The outcome of the promotion that this ownership rests on. Where it was forced, or the
    /// witness has forgotten it, the claim comes late.
    fn settled(&mut self, question: Question, answer: Answer) {
        match (question, answer) {
            (Question::Settle { term, winner, .. }, Answer::Record(None)) => {
                let party = Party { side: Side::Backup, incarnation: winner };
                self.base.ask(Question::Claim { term, word: Word::Promote, party });
            }
            (Question::Settle { term, winner, .. }, Answer::Record(Some(record)))
                if record.winner.incarnation == winner =>
            {
                self.alone = Some(term);
                self.watch();
            }
            (Question::Claim { term, party, .. }, Answer::Record(Some(record)))
                if record.winner == party =>
            {
                let (winner, to) = (party.incarnation, Settled::Running);
                self.base.ask(Question::Settle { term, winner, to });
            }
            (_, Answer::Record(record)) => self.record_changed(record),
            _ => self.record_changed(None),
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
        self.relieve();
        self.owed = false;
        for timer in [Timer::Period, Timer::AckLimit, Timer::Dial] {
            self.base.timers.clear(timer);
        }
        self.fail(Why::Lost);
        self.enter(State::Fenced, Why::Lost);
    }

    /// The guest is the other side's for good.
    fn lost(&mut self) {
        if !matches!(self.state, State::Fenced | State::HandingOver(_)) {
            self.fence_off();
        }
        self.base.mark(Mark::Outdated { term: self.base.term });
    }

    /// The backup says that it runs. It does so only once the term is its own, or by force: unless
    /// this side has won, nothing more leaves.
    pub(super) fn runs_there(&mut self) {
        let won = matches!(self.base.marking, Some(Mark::Running { .. } | Mark::Free { .. }));
        let paired = matches!(
            self.state,
            State::Protected | State::Stalled | State::Fenced | State::HandingOver(_)
        );
        if paired && !won {
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
                if self.state != State::Stalled {
                    self.enter(State::Stalled, Why::Command);
                }
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
            self.bye(home == State::Off);
            self.base.hang_up();
            self.base.forget_question();
            self.alone = (home == State::Degraded && self.has_witness()).then_some(self.base.term);
            for timer in [Timer::Silence, Timer::Period, Timer::AckLimit, Timer::Dial] {
                self.base.timers.clear(timer);
            }
            self.base.timers.clear(Timer::Greeting);
            self.base.timers.clear(Timer::GiveUp);
            let window = std::mem::take(&mut self.window);
            self.track(window);
            self.base.term = self.base.term.next();
            self.base.claimed = false;
            self.backup = None;
        }
        if home == State::Off {
            self.alone = None;
            self.base.timers.clear(Timer::Look);
            self.untrack();
        }
        (self.intent, self.forced, self.owed) = (None, false, false);
        self.enter(home, Why::Won);
        self.open_gates();
        self.unpark();
        self.relieve();
        self.watch();
    }

    /// The connection ends, and the term is over. If that is `for_good`, and nobody could tell it to the
    /// backup later, it leaves the term now.
    pub(super) fn bye(&mut self, for_good: bool) {
        let nobody = self.base.settings.agreement.arbiter == Arbiter::None;
        self.base.send(self.window.last(), Message::Bye { end: for_good && nobody });
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
