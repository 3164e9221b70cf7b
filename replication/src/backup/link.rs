//! The connection to the primary, and the epochs that arrive over it.
use super::{Backup, State};
use crate::{
    identity::{Digest, Epoch},
    interface::{Event, Exit, Mark, Output, Why},
    message::{Fault, Frame, Message},
    primary::UNACKNOWLEDGED,
    settings::Arbiter,
    timers::Timer,
};

impl Backup {
    pub(super) fn beat(&mut self) {
        let paired = matches!(self.state, State::Ready | State::Standby | State::Suspecting);
        let claimed = self.base.claimed && !self.waits_by_order();
        let beside = paired && !self.base.claimed;
        self.base.beat(self.whole, (claimed, self.unfit), self.echo, beside);
    }

    /// A beat of the primary. A new probe is answered at once: the primary holds output until then.
    fn beat_came(&mut self, captured: Epoch, probe: u64) {
        if std::mem::replace(&mut self.echo, probe) != probe {
            self.beat();
        }
        let (now, limit) = (self.base.now, self.base.settings.ack_limit);
        if let Some(stands) = self.base.hearing.captured(captured, now, limit) {
            self.base.tell(Event::EpochsStandStill(stands));
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
            (State::Syncing, Message::End { .. }) if !self.filling => self.bad_frame(),
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
            (_, Message::Beat { probe, .. }) => self.beat_came(frame.epoch, probe),
            (State::Syncing, Message::Sync { base }) => self.fill(base),
            // There is nothing left to exchange.
            (State::Promoting | State::Unfit | State::Abandoned, _) => {}
            _ => self.bad_frame(),
        }
    }

    pub(super) fn bad_frame(&mut self) {
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
            State::Syncing if self.memory.is_some() => {
                if let Some(memory) = self.memory {
                    self.fall_back(memory, why);
                }
            }
            State::Syncing | State::Ready if !self.may_promote() => self.end(Exit::Nothing),
            State::Standby | State::Ready => {
                self.base.stalls += 1;
                self.enter(State::Suspecting, why);
                self.drop_coming();
                self.prepare();
                let waited = self.base.timers.get(Timer::Silence).unwrap_or(self.base.now);
                self.base.timers.set(Timer::Turn, waited + self.base.settings.grace());
                self.base.timers.clear(Timer::Silence);
                if self.gone {
                    self.take_turn();
                }
            }
            State::Unfit => self.look(),
            _ => {}
        }
    }

    /// The primary's process has ended: nobody else would claim first.
    pub(super) fn primary_gone(&mut self) {
        self.gone = true;
        match self.state {
            State::Standby => self.suspect(Why::Gone),
            State::Suspecting => self.take_turn(),
            _ => {}
        }
    }

    /// A byte has arrived from a suspected primary: it is alive, but what it sends over this
    /// connection is already being dropped. It has to connect again, and has a whole time-out to do
    /// so; as long as it likes where this side never claims by itself.
    pub(super) fn back_again(&mut self) {
        let nobody = self.base.settings.agreement.arbiter == Arbiter::None;
        let decided = self.turn && !nobody || self.ordered || self.released || self.base.claimed;
        let waits = self.state == State::Suspecting && !decided;
        if waits && self.base.connection.is_some() && self.base.marking.is_none() {
            self.base.hang_up();
            self.base.timers.clear(Timer::Silence);
            let settings = self.base.settings;
            let turn = self.base.now + settings.timeout + settings.grace();
            self.base.timers.set(Timer::Turn, turn);
        }
    }

    /// A beat on the second path: the primary is alive, and may be back.
    pub(super) fn heard_beside(&mut self) {
        match self.state {
            State::Ready | State::Standby => self.base.heard(),
            State::Suspecting if !self.turn && !self.base.claimed => {
                let settings = self.base.settings;
                let turn = self.base.now + settings.timeout + settings.grace();
                self.base.timers.set(Timer::Turn, turn);
            }
            _ => {}
        }
    }

    pub(super) fn prepare(&mut self) {
        self.prepared = false;
        self.base.output(Output::Prepare(self.whole));
    }
}
