//! The connection to the backup: greeting, frames, and what a disturbance leads to.
use std::time::Duration;

use super::{Handing, Primary, State};
use crate::{
    identity::{Connection, Incarnation},
    interface::{Command, Event, Mark, Output, Why},
    message::{Accept, Frame, Hello, Memory, Message, Refusal},
    rules::Rule,
    settings::OnLoss,
    timers::Timer,
};

/// How long the backup may take to answer `Hello`.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);

impl Primary {
    /// Begin to protect the guest.
    pub(super) fn connect(&mut self) {
        self.enter(State::Connecting, Why::Command);
        self.base.dial_again(true);
        self.base.timers.set(Timer::Greeting, self.base.now + GREETING_TIMEOUT);
    }

    /// There is a connection. An old one is closed before the new one is read.
    pub(super) fn connected(&mut self, connection: Connection) {
        let wanted = self.state == State::Connecting || self.may_reconnect();
        if !wanted || self.base.connection.is_some_and(|old| old >= connection) {
            self.base.output(Output::Close(connection));
            return;
        }
        self.base.hang_up();
        self.base.connection = Some(connection);
        self.base.timers.clear(Timer::Dial);
        self.base.timers.set(Timer::Greeting, self.base.now + GREETING_TIMEOUT);
        let hello = Hello {
            lineage: self.base.me.lineage,
            incarnation: self.base.me.incarnation,
            bound: self.backup,
            claimed: self.base.claimed,
            agreement: self.base.settings.agreement,
        };
        // The first `End` of a new backup is the one after this; attempts that have failed leave
        // gaps.
        let epoch = match self.state {
            State::Connecting => self.window.begun(),
            _ => self.window.last(),
        };
        self.base.send(epoch, Message::Hello(hello));
    }

    /// Whether this term may continue over a new connection (rule `burn`).
    fn may_reconnect(&self) -> bool {
        let burnt = self.base.claimed && self.base.rules.hold(Rule::Burn);
        self.state == State::Stalled && !burnt && self.base.marking.is_none()
    }

    pub(super) fn redial(&mut self) {
        if self.state == State::Connecting || self.may_reconnect() {
            self.base.output(Output::Dial);
            self.base.dial_again(false);
        }
    }

    pub(super) fn not_greeted(&mut self) {
        match self.state {
            State::Connecting => self.fall_back(Why::NoAnswer),
            State::Stalled => self.disturbed(Why::NoAnswer),
            _ => {}
        }
    }

    pub(super) fn beat(&mut self) {
        // A primary that has claimed does not come back: that it is alive is no reason to wait.
        let paired = matches!(
            self.state,
            State::Syncing | State::Protected | State::Stalled | State::HandingOver(_)
        );
        let beside = paired && !self.base.claimed;
        let (claimed, probe) = (self.base.claimed, self.base.hearing.probe());
        self.base.beat(self.window.last(), (claimed, false), probe, beside);
    }

    /// A frame of the connection in use.
    pub(super) fn received(&mut self, frame: Frame) {
        if let Message::Refuse(refusal) = frame.message {
            return self.refused(refusal);
        }
        if frame.term > self.base.term {
            return self.later_term();
        }
        if frame.term < self.base.term {
            return;
        }
        match frame.message {
            Message::Accept(accept) if self.base.timers.get(Timer::Greeting).is_some() => {
                self.accepted(frame, accept);
            }
            Message::Ack => {
                if !self.acknowledged(frame.epoch) {
                    self.disturbed(Why::BadFrame);
                }
            }
            Message::Nack(_) => self.disturbed(Why::Nack),
            Message::Beat { claimed: true, .. } => self.may_run_there(Why::PeerClaimed),
            Message::Beat { unfit: true, .. } => self.given_up(Why::Unfit),
            Message::Beat { probe, .. } => self.echoed(probe),
            Message::Running => self.runs_there(),
            Message::Ended => self.ended(),
            Message::Bye { .. } if self.state == State::Connecting => self.disturbed(Why::Bye),
            Message::Bye { .. } => self.given_up(Why::Bye),
            _ => self.disturbed(Why::BadFrame),
        }
    }

    fn refused(&mut self, refusal: Refusal) {
        self.base.tell(Event::Refused(refusal));
        match self.state {
            State::Connecting => self.fall_back(Why::Closed),
            State::Stalled => {
                self.disturbed(Why::Closed);
                if refusal != Refusal::Busy {
                    self.backup_lost();
                }
            }
            _ => self.disturbed(Why::BadFrame),
        }
    }

    fn accepted(&mut self, frame: Frame, accept: Accept) {
        let Accept { incarnation, digest, memory, agreement } = accept;
        self.base.timers.clear(Timer::Greeting);
        if agreement != self.base.settings.agreement {
            return self.refused(Refusal::Agreement);
        }
        if self.state == State::Stalled && !self.may_reconnect() {
            // Claimed since `Hello` was sent.
            return self.disturbed(Why::Closed);
        }
        self.base.hearing.restart(self.base.now);
        self.base.heard();
        self.base.timers.set(Timer::Beat, self.base.now + self.base.heartbeat());
        match self.state {
            State::Connecting => self.sync(incarnation, memory),
            State::Stalled if self.backup == Some(incarnation) => {
                if self.window.holds(frame.epoch, digest) && self.acknowledged(frame.epoch) {
                    self.resume();
                } else {
                    self.refused(Refusal::Stranger);
                }
            }
            State::Stalled if self.base.rules.hold(Rule::Pair) => self.refused(Refusal::Stranger),
            State::Stalled => {
                self.window.abandon();
                self.sync(incarnation, None);
            }
            _ => {}
        }
    }

    /// Bind the term to this backup, and copy to it what it does not have.
    fn sync(&mut self, backup: Incarnation, memory: Option<Memory>) {
        let base = self.base(backup, memory);
        self.backup = Some(backup);
        self.enter(State::Syncing, Why::Paired);
        self.base.send(self.window.begun(), Message::Sync { base });
        self.base.output(Output::Sync { base });
        self.begin_epoch(self.base.now);
    }

    /// Nothing was received for the time-out.
    pub(super) fn silent(&mut self) {
        match self.state {
            State::Syncing => self.fall_back(Why::Silence),
            State::Protected | State::Stalled | State::HandingOver(_) => {
                self.given_up(Why::Silence);
            }
            _ => {}
        }
    }

    /// The connection cannot be used any more. That proves nothing about the backup: while the
    /// term is not burnt, another connection is tried.
    pub(super) fn disturbed(&mut self, why: Why) {
        self.base.timers.clear(Timer::Greeting);
        match self.state {
            State::Connecting | State::Syncing => self.fall_back(why),
            State::Protected | State::HandingOver(Handing::Parked | Handing::Last(_)) => {
                self.base.hang_up();
                self.stall(why);
                self.base.dial_again(true);
            }
            State::Stalled => {
                self.base.hang_up();
                self.base.dial_again(false);
            }
            _ => self.base.hang_up(),
        }
    }

    /// The backup will not serve in this term, or no longer sends anything.
    pub(super) fn given_up(&mut self, why: Why) {
        match self.state {
            State::Syncing => return self.fall_back(why),
            State::Protected | State::HandingOver(Handing::Parked | Handing::Last(_)) => {
                self.stall(why);
            }
            State::Stalled => {}
            // The guest never ran there, and never will in this term.
            State::HandingOver(Handing::Released) if why == Why::Unfit && !self.has_witness() => {
                return self.won();
            }
            _ => return,
        }
        self.backup_lost();
        // Where neither side claims, the term continues as soon as the backup is back: over a new
        // connection, since the backup has dropped what came over this one.
        if self.may_reconnect() && self.base.timers.get(Timer::Dial).is_none() {
            self.base.dial_again(true);
        }
    }

    /// A frame of a later term: the guest is parked at once.
    fn later_term(&mut self) {
        match self.state {
            State::Protected | State::Stalled | State::HandingOver(_) => {
                let handing = self.state;
                self.may_run_there(Why::HigherTerm);
                if self.state != handing || handing == State::Stalled {
                    self.park();
                }
            }
            _ => self.disturbed(Why::HigherTerm),
        }
    }

    /// The backup may be running the guest. A primary that would continue without asking keeps the
    /// guest parked instead, as there is no arbiter that could say which of the two it is.
    fn may_run_there(&mut self, why: Why) {
        let continues = self.base.settings.on_loss == OnLoss::Continue;
        match self.state {
            State::Protected | State::Stalled | State::HandingOver(_) if continues => {
                self.fence_off();
            }
            _ => self.given_up(why),
        }
    }

    /// The backup is suspected: output is held, the guest runs.
    pub(super) fn stall(&mut self, why: Why) {
        if matches!(self.state, State::HandingOver(_)) {
            self.base.tell(Event::Failed(Command::Failover, why));
        }
        self.enter(State::Stalled, why);
        self.base.stalls += 1;
        self.unpark();
        self.base.timers.clear(Timer::Period);
        self.limit_acks();
    }

    /// Do what [`OnLoss`] says.
    pub(super) fn backup_lost(&mut self) {
        match self.base.settings.on_loss {
            OnLoss::Claim => self.claim(crate::record::Word::Solo),
            OnLoss::Stop => {
                self.park();
                self.claim(crate::record::Word::End);
            }
            OnLoss::Continue => self.won(),
            OnLoss::Stall => self.look(),
        }
    }

    /// An attempt has failed before `Armed`: the term stays unused, and the guest unharmed.
    pub(super) fn fall_back(&mut self, why: Why) {
        self.base.hang_up();
        for timer in [Timer::Silence, Timer::Dial, Timer::Greeting, Timer::AckLimit] {
            self.base.timers.clear(timer);
        }
        if matches!(self.base.marking, Some(Mark::Protected(_))) {
            self.base.mark(Mark::Free { term: self.base.term });
        }
        self.backup = None;
        self.owed = false;
        self.window.abandon();
        self.relieve();
        let home = if self.alone.is_some() { State::Degraded } else { State::Off };
        self.enter(home, why);
        self.open_gates();
        self.watch();
    }
}
