//! Commands, and what becomes of those that are not answered in time.
use std::time::Duration;

use super::{Handing, Primary, State};
use crate::{
    interface::{Command, Event, Exit, Mark, Why},
    message::Message,
    record::{Question, Word},
    rules::Rule,
    settings::{Arbiter, OnLoss},
    timers::Timer,
};

/// How long a command waits for the witness, or for the backup's `Ended`.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

impl Primary {
    pub(super) fn command(&mut self, command: Command) {
        let settling =
            matches!(self.base.asked(), Some(Question::Settle { .. } | Question::Claim { .. }));
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
                if settling {
                    // Its former primary waits to hear that the guest runs here. The next start from
                    // this disk reports that, as the mark on it says so.
                    return self.end(Exit::Done);
                }
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
            (State::Stalled, Command::Unprotect | Command::Quit) => self.close(command),
            _ => self.base.tell(Event::Failed(command, Why::WrongState)),
        }
    }

    /// A command that is carried out even if that may lead to two owners.
    pub(super) fn force(&mut self, command: Command) {
        match (self.state, command) {
            // Who is impatient and repeats it is not kept waiting for longer.
            (State::Stalled | State::HandingOver(_), _)
                if self.forced && self.intent == Some(command) => {}
            (State::Protected | State::Stalled, Command::Unprotect | Command::Quit) => {
                if self.state == State::Protected {
                    self.base.forget_question();
                    self.stall(Why::Command);
                }
                self.forced = true;
                self.close(command);
                self.wait_for_answer();
            }
            // Nobody is left whom this side could ask.
            (State::Fenced | State::HandingOver(Handing::Released), Command::Unprotect)
                if !self.has_witness() =>
            {
                self.intent = Some(command);
                self.won();
            }
            (State::HandingOver(Handing::Claiming), Command::Unprotect) => {
                (self.intent, self.forced) = (Some(command), true);
                self.wait_for_answer();
            }
            (State::Fenced | State::HandingOver(Handing::Released), Command::Unprotect) => {
                self.base.tell(Event::Failed(command, Why::Lost));
            }
            (State::Fenced | State::HandingOver(_), Command::Quit) => self.end(Exit::Done),
            _ => self.command(command),
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
            self.wait_for_answer();
            self.base.ask(Question::Look { term: self.base.term });
        } else if command == Command::Failover {
            self.hand_over();
        } else if self.base.settings.on_loss == OnLoss::Continue {
            self.won();
        } else {
            self.part();
        }
    }

    /// Close a term that is stalled.
    fn close(&mut self, command: Command) {
        self.intent = Some(command);
        match self.base.settings.agreement.arbiter {
            Arbiter::None if self.base.settings.on_loss == OnLoss::Continue => self.won(),
            Arbiter::None => self.part(),
            _ => self.claim(closing_word(command)),
        }
    }

    /// Without an answer of the witness, the backup's `Ended` closes the term, if it arrives.
    fn part(&mut self) {
        self.base.send(self.window.last(), Message::Bye { end: true });
        if self.state == State::Protected {
            self.stall(Why::Command);
        }
        self.wait_for_answer();
    }

    fn wait_for_answer(&mut self) {
        self.base.timers.set(Timer::GiveUp, self.base.now + ANSWER_TIMEOUT);
    }

    /// What was waited for has not come.
    pub(super) fn gave_up(&mut self) {
        match (self.state, self.intent) {
            (State::Degraded | State::Connecting, _) => self.untrack(),
            (State::Protected, Some(Command::Failover)) => {
                self.base.forget_question();
                self.fail(Why::NoAnswer);
            }
            (State::Protected, Some(_)) => {
                self.base.forget_question();
                self.part();
            }
            (State::Stalled | State::HandingOver(Handing::Claiming), Some(command))
                if self.forced =>
            {
                self.go_by_force(command);
            }
            (State::Stalled, Some(command)) if !self.base.claimed => {
                if matches!(self.base.settings.agreement.arbiter, Arbiter::Fence(_)) {
                    return self.claim(closing_word(command));
                }
                self.fail(Why::NoAnswer);
                self.disturbed(Why::NoAnswer);
            }
            _ => {}
        }
    }

    /// Nobody has answered. A guest that ends leaves its sidecars as they are: what starts from
    /// them asks.
    fn go_by_force(&mut self, command: Command) {
        if command == Command::Quit {
            self.park();
            self.end(Exit::Done);
        } else {
            self.won();
        }
    }

    /// The command in progress fails.
    pub(super) fn fail(&mut self, why: Why) {
        self.forced = false;
        self.base.timers.clear(Timer::GiveUp);
        if let Some(command) = self.intent.take() {
            self.base.tell(Event::Failed(command, why));
        }
    }

    /// The term is open, and the witness answers: carry out the command.
    pub(super) fn proceed(&mut self, command: Command) {
        self.base.timers.clear(Timer::GiveUp);
        if command == Command::Failover {
            return self.hand_over();
        }
        self.stall(Why::Command);
        self.claim(closing_word(command));
    }
}

const fn closing_word(command: Command) -> Word {
    match command {
        Command::Quit => Word::End,
        _ => Word::Solo,
    }
}
