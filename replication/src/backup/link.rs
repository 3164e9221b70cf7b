//! The connection to the primary, and the epochs that arrive over it.
use super::{Backup, State};
use crate::{
    identity::{Connection, Digest, Epoch},
    interface::{Exit, Mark, Output, Why},
    message::{Accept, Fault, Frame, Hello, Message, Refusal},
    primary::UNACKNOWLEDGED,
    rules::Rule,
    timers::Timer,
};

impl Backup {
    /// The first frame of a connection that is not in use.
    pub(super) fn greeted(&mut self, connection: Connection, frame: Frame) {
        let (Message::Hello(hello), true) =
            (frame.message, Some(connection) > self.base.connection)
        else {
            // Left over from an old connection, or no greeting.
            return self.base.output(Output::Close(connection));
        };
        match self.judge(frame, hello) {
            Ok(again) => self.accept(connection, frame, hello, again),
            Err(refusal) => {
                let frame = Frame {
                    term: self.base.term,
                    epoch: self.whole,
                    message: Message::Refuse(refusal),
                };
                self.base.output(Output::Send(connection, frame));
                if refusal == Refusal::Claimed {
                    self.suspect(Why::PeerClaimed);
                }
            }
        }
    }

    /// Whether this greeting is accepted: `true` if it continues the current term.
    fn judge(&self, frame: Frame, hello: Hello) -> Result<bool, Refusal> {
        if hello.lineage != self.base.me.lineage {
            return Err(Refusal::Lineage);
        }
        if hello.agreement != self.base.settings.agreement {
            return Err(Refusal::Agreement);
        }
        let own = self.primary == Some(hello.incarnation) && frame.term == self.base.term;
        let burnt = self.base.claimed || hello.claimed;
        match self.state {
            State::Listening if frame.term < self.base.term => Err(Refusal::Term),
            State::Abandoned if frame.term <= self.base.term => Err(Refusal::Term),
            State::Listening | State::Abandoned
                if hello.bound.is_some() && self.base.rules.hold(Rule::Pair) =>
            {
                Err(Refusal::Stranger)
            }
            State::Listening | State::Abandoned => Ok(false),
            State::Standby | State::Suspecting if !own => Err(Refusal::Busy),
            State::Standby | State::Suspecting if burnt && self.base.rules.hold(Rule::Burn) => {
                Err(Refusal::Claimed)
            }
            State::Standby | State::Suspecting
                if self.base.asked().is_some() || self.base.marking.is_some() =>
            {
                Err(Refusal::Claimed)
            }
            State::Standby | State::Suspecting => Ok(true),
            _ => Err(Refusal::Busy),
        }
    }

    /// The connection is taken; an old one ends.
    fn accept(&mut self, connection: Connection, frame: Frame, hello: Hello, again: bool) {
        self.base.hang_up();
        self.base.connection = Some(connection);
        self.base.heard();
        self.base.timers.set(Timer::Beat, self.base.now + self.base.settings.heartbeat());
        if again {
            self.drop_coming();
            if self.state == State::Suspecting {
                self.base.output(Output::Unprepare);
                (self.prepared, self.turn) = (false, false);
                self.base.timers.clear(Timer::Turn);
            }
            self.enter(State::Standby, Why::Paired);
        } else {
            self.begin_term(frame, hello);
        }
        let accept = Accept {
            incarnation: self.base.me.incarnation,
            digest: self.digest,
            agreement: self.base.settings.agreement,
        };
        self.base.send(self.whole, Message::Accept(accept));
    }

    /// A primary of a new term: everything of the old one is forgotten.
    fn begin_term(&mut self, frame: Frame, hello: Hello) {
        self.base.term = frame.term;
        self.base.claimed = false;
        self.base.forget_question();
        self.base.timers.clear(Timer::GiveUp);
        self.base.timers.clear(Timer::Look);
        self.past = None;
        self.primary = Some(hello.incarnation);
        (self.whole, self.digest) = (frame.epoch, Digest::default());
        self.coming.clear();
        (self.prepared, self.turn, self.released, self.unfit) = (false, false, false, false);
        self.enter(State::Syncing, Why::Paired);
        self.base.marking = None;
        self.base.output(Output::Mark(Mark::Inconsistent { term: frame.term }));
    }

    pub(super) fn beat(&mut self) {
        self.base.send(self.whole, Message::Beat { claimed: self.base.claimed, unfit: self.unfit });
        if self.base.connection.is_some() {
            self.base.timers.set(Timer::Beat, self.base.now + self.base.settings.heartbeat());
        }
    }

    /// A frame of the connection in use.
    pub(super) fn received(&mut self, frame: Frame) {
        if frame.term < self.base.term {
            return;
        }
        if frame.term > self.base.term {
            return self.bad_frame();
        }
        match (self.state, frame.message) {
            // An epoch that arrives over a suspected connection must not be promoted from.
            (State::Suspecting, Message::End { .. }) => {}
            (State::Syncing | State::Ready | State::Standby, Message::End { digest }) => {
                self.end_came(frame.epoch, digest);
            }
            (State::Ready, Message::Armed(pair)) => {
                let bond = self.bond().filter(|bond| bond.pair == pair);
                match bond {
                    Some(bond) => self.base.mark(Mark::Protected(bond)),
                    None => self.bad_frame(),
                }
            }
            (State::Standby | State::Suspecting, Message::Release) => self.release_came(),
            (State::Standby | State::Suspecting, Message::Bye { end: true }) => self.leave(),
            (_, Message::Bye { .. }) => self.suspect(Why::Bye),
            (State::Standby, Message::Beat { claimed: true, .. }) => {
                self.suspect(Why::PeerClaimed);
            }
            (_, Message::Beat { .. }) => {}
            // There is nothing left to exchange.
            (State::Promoting | State::Unfit | State::Abandoned, _) => {}
            _ => self.bad_frame(),
        }
    }

    fn bad_frame(&mut self) {
        self.base.send(self.whole, Message::Nack(Fault::Frame));
        self.base.hang_up();
        self.suspect(Why::BadFrame);
    }

    fn end_came(&mut self, epoch: Epoch, digest: Digest) {
        let last = self.coming.back().map_or(self.whole, |(epoch, _)| *epoch);
        if epoch != last.next() || self.coming.len() >= UNACKNOWLEDGED {
            return self.bad_frame();
        }
        self.coming.push_back((epoch, digest));
        self.base.output(Output::Hold(epoch));
    }

    /// Memory and journal hold an epoch. Ignored unless it is the next one that is awaited.
    pub(super) fn held(&mut self, epoch: Epoch) {
        let Some((_, digest)) = self.coming.pop_front_if(|(coming, _)| *coming == epoch) else {
            return;
        };
        (self.whole, self.digest) = (epoch, digest);
        if self.state == State::Syncing {
            self.base.mark(Mark::Outdated { term: self.base.term });
        } else {
            self.base.send(epoch, Message::Ack);
        }
    }

    /// The first epoch is held, and the sidecar no longer says `inconsistent`.
    pub(super) fn acknowledge_first(&mut self) {
        self.enter(State::Ready, Why::Paired);
        self.base.send(self.whole, Message::Ack);
    }

    pub(super) fn not_held(&mut self, epoch: Epoch, fault: Fault) {
        if self.coming.iter().any(|(coming, _)| *coming == epoch) {
            self.base.send(epoch, Message::Nack(fault));
            self.base.hang_up();
            self.suspect(Why::Nack);
        }
    }

    /// Drop what is not yet a whole epoch.
    pub(super) fn drop_coming(&mut self) {
        self.coming.clear();
        self.base.output(Output::DropAfter(self.whole));
    }

    /// `Armed` is durable: from here the term may be this side's.
    pub(super) fn stand_by(&mut self) {
        self.enter(State::Standby, Why::Paired);
        if self.base.connection.is_none() {
            self.suspect(Why::Closed);
        }
    }

    /// The primary is suspected, which proves nothing.
    pub(super) fn suspect(&mut self, why: Why) {
        let arming = matches!(self.base.marking, Some(Mark::Protected(_)));
        match self.state {
            State::Ready if arming => {}
            State::Syncing | State::Ready if !self.may_promote() => self.end(Exit::Nothing),
            State::Standby | State::Ready => {
                self.enter(State::Suspecting, why);
                self.drop_coming();
                self.prepare();
                let waited = self.base.timers.get(Timer::Silence).unwrap_or(self.base.now);
                self.base.timers.set(Timer::Turn, waited + self.base.settings.grace());
                self.base.timers.clear(Timer::Silence);
            }
            State::Unfit => self.look(),
            _ => {}
        }
    }

    /// A byte has arrived from a suspected primary: it is alive, but what it sends over this
    /// connection is already being dropped. It has to connect again, and has a whole time-out to do
    /// so.
    pub(super) fn back_again(&mut self) {
        let waits = self.state == State::Suspecting && !self.turn && !self.base.claimed;
        if waits && self.base.connection.is_some() && self.base.marking.is_none() {
            self.base.hang_up();
            self.base.timers.clear(Timer::Silence);
            let settings = self.base.settings;
            let turn = self.base.now + settings.timeout + settings.grace();
            self.base.timers.set(Timer::Turn, turn);
        }
    }

    pub(super) fn prepare(&mut self) {
        self.prepared = false;
        self.base.output(Output::Prepare(self.whole));
    }
}
