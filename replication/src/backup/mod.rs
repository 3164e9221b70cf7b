//! The backup: holds the guest's last whole epoch, and runs it when the term is its own.
//!
//! ```text
//!             Hello            End(first) held           Armed, sidecar
//!   Listening -----> Syncing ----------------> Ready ------------------> Standby <---------.
//!                       |  silence, EOF          |  silence, EOF            |              |
//!                       v                        v                suspicion |   reconnected|
//!                      Over  (nothing runs)     Over                Release v   unclaimed  |
//!                                                                      Suspecting ---------'
//!            higher term, from the owner           Denied              |    |
//!   Syncing <--------------------------- Abandoned <-------------------'    | Granted
//!                                          ^    yielded                     v
//!   Unfit: claims nothing -- term closed --+---------------------------- Promoting --> Promoted
//! ```
//! `greeting` begins a connection, `link` has the epochs that arrive over it, `term` what closes a
//! term.
mod greeting;
mod link;
mod status;
mod term;
#[cfg(test)]
mod tests;

use std::{collections::VecDeque, time::Duration};

use crate::{
    base::{Base, Identity},
    identity::{Digest, Epoch, Incarnation, Pair, Side, Term},
    interface::{Bond, Event, Exit, Input, Mark, Output, Why},
    message::Memory,
    rules::{Rule, Rules},
    settings::Settings,
    timers::{Time, Timer},
};

/// The state of a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// Waits for a primary.
    Listening,
    /// Is being filled.
    Syncing,
    /// Holds a whole epoch, and may not promote.
    Ready,
    /// May promote, and has no reason to.
    Standby,
    /// Prepares to run the guest, and asks the arbiter.
    Suspecting,
    /// The term is its own, and it is about to run the guest.
    Promoting,
    /// Could not run the guest, and reports that.
    Unfit,
    /// The term is the other side's; its memory is the base of the next one.
    Abandoned,
    /// The guest runs here: see [`Primary::owner`](crate::Primary::owner).
    Promoted,
    /// Nothing more happens here.
    Over,
}

/// The machine of a backup.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Backup {
    base: Base,
    state: State,
    /// The term that an earlier process of this host was part of, while it may have been granted to
    /// that process.
    past: Option<Bond>,
    /// The first term that it accepts.
    floor: Term,
    /// What memory and disks hold of a term that has ended, untouched so far.
    memory: Option<Memory>,
    /// Memory and disks are being filled, or were: they hold nothing older.
    filling: bool,
    /// The primary that fills it.
    primary: Option<Incarnation>,
    /// The last epoch that memory and journal hold.
    whole: Epoch,
    digest: Digest,
    /// Epochs whose `End` has arrived, and which are not yet held.
    coming: VecDeque<(Epoch, Digest)>,
    /// Everything that can fail was done.
    prepared: bool,
    /// It has waited its turn, or need not.
    turn: bool,
    /// The primary's process has ended: there is nobody to wait for.
    gone: bool,
    /// Without a witness: `Release` has arrived, which is the grant.
    released: bool,
    /// The guest could not run here.
    unfit: bool,
    /// A command has ordered it to take over: there is no way back to Standby. With `--force`, also
    /// without an answer.
    ordered: bool,
    forced: bool,
    /// The last probe that was received.
    echo: u64,
}

impl Backup {
    /// A backup over images whose sidecar says `word`, and whose locks it holds: no earlier process
    /// of this host is alive. It accepts a primary of any term that the word leaves possible. If an
    /// earlier process may have been granted a term in which it never ran the guest, that term is
    /// given back.
    #[must_use]
    pub fn new(me: Identity, word: Mark, settings: Settings, rules: Rules) -> (Self, Vec<Output>) {
        let (floor, past) = match word {
            Mark::Protected(bond) | Mark::Fencing(bond) => (bond.term.next(), Some(bond)),
            Mark::Fenced { term } => (term.next(), None),
            Mark::Free { term }
            | Mark::Running { term, .. }
            | Mark::Outdated { term }
            | Mark::Inconsistent { term } => (term, None),
        };
        let mut this = Self {
            base: Base::new(me, Side::Backup, floor, settings, rules),
            state: State::Listening,
            past: past.filter(|bond| bond.side == Side::Backup),
            floor,
            memory: None,
            filling: false,
            primary: None,
            whole: Epoch::default(),
            digest: Digest::default(),
            coming: VecDeque::new(),
            prepared: false,
            turn: false,
            gone: false,
            released: false,
            unfit: false,
            ordered: false,
            forced: false,
            echo: 0,
        };
        this.look();
        let outputs = this.base.take_outputs();
        (this, outputs)
    }

    /// Send a beat every `heartbeat` from now on, instead of as often as the time-out suggests.
    pub fn set_heartbeat(&mut self, heartbeat: Option<Duration>) {
        self.base.heartbeat = heartbeat;
    }

    /// Its state.
    #[must_use]
    pub fn state(&self) -> State {
        self.state
    }

    /// The term that it is in, or the first that it would accept.
    #[must_use]
    pub fn term(&self) -> Term {
        self.base.term
    }

    /// The last whole epoch.
    #[must_use]
    pub fn whole(&self) -> Epoch {
        self.whole
    }

    /// When it wants an [`Input::Tick`].
    #[must_use]
    pub fn deadline(&self) -> Option<Time> {
        self.base.timers.next()
    }

    /// Take one input, and return what is to be done.
    pub fn step(&mut self, now: Time, input: Input) -> Vec<Output> {
        self.base.now = self.base.now.max(now);
        if !matches!(self.state, State::Over | State::Promoted) {
            self.take(input);
        }
        self.base.take_outputs()
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Tick => {
                while let Some((timer, due)) = self.base.timers.take_due(self.base.now) {
                    self.expired(timer, due);
                }
            }
            Input::Received(connection, frame) if Some(connection) == self.base.connection => {
                self.base.heard();
                self.received(frame);
                self.back_again();
            }
            Input::Received(connection, frame) => self.greeted(connection, frame),
            Input::Heard(connection) if Some(connection) == self.base.connection => {
                self.base.heard();
                self.back_again();
            }
            Input::HeardBeside => self.heard_beside(),
            Input::Closed(connection) if Some(connection) == self.base.connection => {
                self.base.connection = None;
                self.suspect(Why::Closed);
            }
            Input::PeerGone => self.primary_gone(),
            Input::Answered { nonce, question, answer }
                if self.base.answered(nonce, question, answer) =>
            {
                self.answered(question, answer);
            }
            Input::Marked(mark) if self.base.marked(mark) => self.marked(mark),
            Input::Held(epoch) => self.held(epoch),
            Input::NotHeld(epoch, fault) => self.not_held(epoch, fault),
            Input::NotApplied => {
                self.memory = None;
                self.become_unfit();
            }
            Input::Prepared if self.state == State::Suspecting && !self.prepared => {
                self.prepared = true;
                self.try_claim();
            }
            Input::CannotRun => self.cannot_run(),
            Input::Command(command) => self.command(command, false),
            Input::Forced(command) => self.command(command, true),
            _ => {}
        }
    }

    fn expired(&mut self, timer: Timer, due: Time) {
        match timer {
            Timer::Silence if self.base.settings.stood_still(due, self.base.now) => {
                self.base.heard();
            }
            Timer::Silence => self.suspect(Why::Silence),
            // This process was stopped: what has arrived in its sockets meanwhile comes first.
            Timer::Turn if self.base.settings.stood_still(due, self.base.now) => {
                self.base.timers.set(Timer::Turn, self.base.now + self.base.settings.grace());
            }
            Timer::Turn => self.take_turn(),
            Timer::Beat => self.beat(),
            Timer::Ask => self.base.ask_again(),
            Timer::Look => self.look(),
            Timer::GiveUp => self.gave_up(),
            _ => {}
        }
    }

    /// A sidecar word is durable: what waited for it may happen.
    fn marked(&mut self, mark: Mark) {
        match (self.state, mark) {
            (State::Syncing, Mark::Outdated { .. }) => self.acknowledge_first(),
            (State::Ready, Mark::Protected(_)) => self.stand_by(),
            (State::Suspecting, Mark::Fencing(_)) => self.fence(),
            (State::Promoting, Mark::Running { .. }) => self.run(),
            (State::Promoting, Mark::Protected(_)) if self.has_witness() => self.give_back(),
            (State::Promoting, Mark::Protected(_)) => self.say_unfit(),
            (State::Standby | State::Suspecting, Mark::Outdated { .. }) => self.ended(),
            _ => {}
        }
    }

    fn enter(&mut self, state: State, why: Why) {
        self.state = state;
        self.base.set_patient(matches!(state, State::Syncing | State::Ready));
        self.base.tell(Event::State(why));
    }

    fn end(&mut self, exit: Exit) {
        self.base.hang_up();
        self.base.forget_question();
        self.state = State::Over;
        self.base.output(Output::Exit(exit));
    }

    fn bond(&self) -> Option<Bond> {
        let pair = Pair { primary: self.primary?, backup: self.base.me.incarnation };
        Some(Bond { term: self.base.term, pair, side: Side::Backup })
    }

    /// Rule `arm`: a backup that is only Ready may neither promote nor fence.
    fn may_promote(&self) -> bool {
        match self.state {
            State::Standby | State::Suspecting => true,
            State::Ready => !self.base.rules.hold(Rule::Arm),
            _ => false,
        }
    }
}

#[cfg(feature = "controls")]
impl crate::Searched for Backup {
    fn base(&self) -> &Base {
        &self.base
    }

    fn base_mut(&mut self) -> &mut Base {
        &mut self.base
    }

    /// As if nothing were left of an earlier term: what memory holds decides how much is sent, and
    /// that an attempt which has changed nothing can be repeated by the same process.
    fn normalise(&mut self, connection: impl Fn(crate::Connection) -> crate::Connection) {
        self.base.normalise(connection);
        if self.memory.take().is_some() && self.state == State::Syncing {
            self.base.timers.clear(Timer::GiveUp);
        }
    }
}
