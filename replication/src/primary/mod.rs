//! The primary: runs the guest, and holds its output until the backup could continue from there.
//!
//! ```text
//!              Start             Accept              Ack(first), sidecar, Armed
//!   Off ----------------> Connecting -----> Syncing ------------------------> Protected <--.
//!    ^  <--- Refuse, 5 s -----' <--- any failure ---'       suspicion, Nack, |     |       |
//!    | Unprotect                                            Unfit, ack-limit |     |       |
//!    |                                  Solo                                 v     |  reconnected,
//!   Degraded <--------------------------------------------------------- Stalled ---+- neither has
//!    |   ^                                                       Denied      |     |  claimed
//!    |   |  yielded          running, solo, cold, end                        v     |
//!    |   '-----------------  Over <---------------------------------- Fenced       | Failover
//!    |                        ^                                              |     v
//!    `-> Connecting, term+1   '----------------------------------------- HandingOver
//! ```
//! `link` has the connection, `epochs` the epoch loop, `room` its limits, `command` the commands,
//! `term` everything that closes a term, `resync` what is kept of the one before.
mod command;
mod epochs;
mod link;
mod resync;
mod room;
mod status;
mod term;
#[cfg(test)]
mod tests;
mod window;

pub use window::UNACKNOWLEDGED;

use resync::Past;
use window::Window;

use std::time::Duration;

use crate::{
    base::{Base, Identity},
    identity::{Epoch, Incarnation, Pair, Side, Term},
    interface::{Bond, Command, Event, Exit, Input, Mark, Output, Why},
    pace::Pace,
    record::{Question, Settled},
    rules::Rules,
    settings::Settings,
    timers::{Time, Timer},
};

/// The state of a primary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// Nothing is protected; the gates are open.
    Off,
    /// Dialling, greeting.
    Connecting,
    /// Memory and disks are being copied.
    Syncing,
    /// Every output is held until its epoch is acknowledged.
    Protected,
    /// The backup is suspected: output is held, the guest runs.
    Stalled,
    /// The last term was won alone; the gates are open.
    Degraded,
    /// The term was granted to the backup, and it is not known whether the guest runs there: taps
    /// closed, vCPUs parked, the guest kept.
    Fenced,
    /// The guest is being given away.
    HandingOver(Handing),
    /// Nothing more happens here.
    Over,
}

/// How far a planned failover is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Handing {
    /// The vCPUs are parked; the last epoch has not begun.
    Parked,
    /// The last epoch is being captured and acknowledged.
    Last(Epoch),
    /// The term is being claimed for the backup.
    Claiming,
    /// It was claimed: the guest is the backup's, if it can run it.
    Released,
}

/// The machine of a primary.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Primary {
    base: Base,
    state: State,
    /// The term that this side has won alone, while a witness may be asked about it.
    alone: Option<Term>,
    /// The backup that this term is bound to.
    backup: Option<Incarnation>,
    window: Window,
    /// What the backup of the term before may hold, while the changes since are kept.
    past: Option<Past>,
    shut: bool,
    /// What was acknowledged is released once the backup is known to be still there.
    owed: bool,
    /// The protocol keeps the guest parked.
    parked: bool,
    /// A cap is reached.
    full: bool,
    /// For how many percent of the time each vCPU is parked.
    throttle: u8,
    /// When epochs begin, where the period is not fixed.
    pace: Option<Pace>,
    /// The guest does not run longer than a period beyond its last epoch.
    strict: bool,
    /// An epoch was to begin while the window was full, and the guest is parked for that.
    due: bool,
    late: bool,
    /// The command that is being carried out, and whether it was given with `--force`.
    intent: Option<Command>,
    forced: bool,
}

impl Primary {
    /// A primary whose guest is unprotected and has never been part of `term` or a later one.
    #[must_use]
    pub fn new(me: Identity, term: Term, settings: Settings, rules: Rules) -> Self {
        Self {
            base: Base::new(me, Side::Primary, term, settings, rules),
            state: State::Off,
            alone: None,
            backup: None,
            window: Window::default(),
            past: None,
            shut: false,
            owed: false,
            parked: false,
            full: false,
            throttle: 0,
            pace: None,
            strict: false,
            due: false,
            late: false,
            intent: None,
            forced: false,
        }
    }

    /// Begin epochs at this pace from now on, instead of in a fixed period. If it is `strict`, the
    /// guest is parked when an epoch is to begin, but the two before are not acknowledged: it never
    /// runs longer than a period beyond its last epoch.
    pub fn pace(&mut self, pace: Option<Pace>, strict: bool) {
        (self.pace, self.strict) = (pace, strict);
    }

    /// The primary of `term`, whose guest was promoted or started from its disk.
    /// `promoted` is the incarnation whose promotion is to be settled at the witness: the
    /// primary of the term before keeps the guest until it is.
    #[must_use]
    pub fn owner(
        me: Identity,
        term: Term,
        promoted: Option<Incarnation>,
        settings: Settings,
        rules: Rules,
    ) -> (Self, Vec<Output>) {
        let mut this = Self::new(me, term, settings, rules);
        this.state = State::Degraded;
        if let (Some(winner), Some(closed), true) =
            (promoted, term.0.checked_sub(1), this.has_witness())
        {
            let term = Term(closed);
            this.base.ask(Question::Settle { term, winner, to: Settled::Running });
        }
        let outputs = this.base.take_outputs();
        (this, outputs)
    }

    /// Follow other settings from now on, as the guest is to be protected again. A record of another
    /// witness is not looked at any more.
    pub fn set(&mut self, settings: Settings) {
        if settings.agreement.arbiter != self.base.settings.agreement.arbiter {
            self.alone = None;
            self.base.forget_question();
            self.base.timers.clear(Timer::Look);
        }
        self.base.settings = settings;
    }

    /// Send a beat every `heartbeat` from now on, instead of as often as the time-out suggests.
    pub fn set_heartbeat(&mut self, heartbeat: Option<Duration>) {
        self.base.heartbeat = heartbeat;
    }

    /// This process.
    #[must_use]
    pub fn me(&self) -> Identity {
        self.base.me
    }

    /// Its state.
    #[must_use]
    pub fn state(&self) -> State {
        self.state
    }

    /// The term that it is in, or that its next protection will use.
    #[must_use]
    pub fn term(&self) -> Term {
        self.base.term
    }

    /// Whether one more fault loses nothing, as far as this side can know.
    #[must_use]
    pub fn is_protected(&self) -> bool {
        self.state == State::Protected && self.window.is_proven() && !self.base.claimed
    }

    /// When it wants an [`Input::Tick`].
    #[must_use]
    pub fn deadline(&self) -> Option<Time> {
        self.base.timers.next()
    }

    /// Take one input, and return what is to be done.
    pub fn step(&mut self, now: Time, input: Input) -> Vec<Output> {
        if self.base.stood_still(now) {
            self.base.hearing.doubt();
        }
        self.base.now = self.base.now.max(now);
        if self.state != State::Over {
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
            Input::Connected(connection) => self.connected(connection),
            Input::Received(connection, frame) if Some(connection) == self.base.connection => {
                self.heard();
                self.received(frame);
            }
            Input::Heard(connection) if Some(connection) == self.base.connection => self.heard(),
            Input::HeardBeside if matches!(self.state, State::Protected | State::Stalled) => {
                self.base.heard();
            }
            Input::Closed(connection) if Some(connection) == self.base.connection => {
                self.base.connection = None;
                self.disturbed(Why::Closed);
            }
            Input::PeerGone => self.given_up(Why::Gone),
            Input::Answered { nonce, question, answer }
                if self.base.answered(nonce, question, answer) =>
            {
                self.answered(question, answer);
            }
            Input::Marked(mark) if self.base.marked(mark) => self.marked(mark),
            Input::Captured { epoch, digest } => self.captured(epoch, digest),
            Input::Room(room) => self.room(room),
            Input::Cost(cost) => self.pace_on(|pace| pace.paid(&cost)),
            Input::OutputWaits(waits) => self.pace_on(|pace| pace.set_output_waits(waits)),
            Input::Untracked => self.past = None,
            Input::Command(command) => self.command(command),
            Input::Forced(command) => self.force(command),
            // An old connection, an old word, or an input for a backup.
            _ => {}
        }
    }

    /// A byte has arrived. Its sender is known once the greeting is answered.
    fn heard(&mut self) {
        if self.base.timers.get(Timer::Greeting).is_none() {
            self.base.heard();
        }
    }

    fn expired(&mut self, timer: Timer, due: Time) {
        match timer {
            Timer::Silence if self.base.settings.stood_still(due, self.base.now) => {
                self.base.heard();
            }
            Timer::Silence => self.silent(),
            Timer::Beat => self.beat(),
            Timer::Dial => self.redial(),
            Timer::Greeting => self.not_greeted(),
            Timer::Ask => self.base.ask_again(),
            Timer::Look => self.look(),
            Timer::Period => self.begin_epoch(due),
            Timer::AckLimit => self.too_slow(),
            Timer::GiveUp => self.gave_up(),
            Timer::Turn => {}
        }
    }

    /// A sidecar word is durable: what waited for it may happen.
    fn marked(&mut self, mark: Mark) {
        match (self.state, mark) {
            (State::Syncing, Mark::Protected(_)) => self.arm(),
            (State::Over, _) => {}
            (_, Mark::Fencing(_)) => {
                self.base.ask(Question::Fence { term: self.base.term });
            }
            (_, Mark::Running { .. }) => self.degrade(State::Degraded),
            (State::Fenced | State::HandingOver(_), Mark::Outdated { .. }) => {
                self.end(Exit::Fenced);
            }
            (_, Mark::Free { .. }) if self.intent == Some(Command::Quit) => {
                self.bye(true);
                self.end(Exit::Done);
            }
            (State::Stalled | State::Degraded, Mark::Free { .. }) => self.degrade(State::Off),
            _ => {}
        }
    }

    fn end(&mut self, exit: Exit) {
        self.base.hang_up();
        self.base.forget_question();
        self.state = State::Over;
        self.base.output(Output::Exit(exit));
    }

    fn enter(&mut self, state: State, why: Why) {
        self.state = state;
        self.base.set_patient(state == State::Syncing);
        self.base.tell(Event::State(why));
    }

    fn open_gates(&mut self) {
        if std::mem::take(&mut self.shut) {
            self.base.output(Output::OpenGates);
        }
    }

    /// What the sidecar says of the term that is armed, or about to be.
    fn bond(&self) -> Option<Bond> {
        let pair = Pair { primary: self.base.me.incarnation, backup: self.backup? };
        Some(Bond { term: self.base.term, pair, side: Side::Primary })
    }
}

#[cfg(feature = "controls")]
impl crate::Searched for Primary {
    fn base(&self) -> &Base {
        &self.base
    }

    fn base_mut(&mut self) -> &mut Base {
        &mut self.base
    }

    /// What memory holds decides only how much is sent.
    fn normalise(&mut self, connection: impl Fn(crate::Connection) -> crate::Connection) {
        self.base.normalise(connection);
        if self.past.take().is_some() {
            self.base.timers.clear(Timer::GiveUp);
        }
    }
}

/// For searches: see [`Rules`].
#[cfg(feature = "controls")]
impl Primary {
    /// The last epoch that was begun.
    #[must_use]
    pub fn begun(&self) -> Epoch {
        self.window.begun()
    }

    /// The backup that this term is bound to.
    #[must_use]
    pub fn bound(&self) -> Option<Incarnation> {
        self.backup
    }
}
