//! The first frame of a connection: whether it is accepted, and what that begins.
use super::{Backup, State};
use crate::{
    identity::{Connection, Digest, Epoch},
    interface::{Mark, Output, Why},
    message::{Accept, Frame, Hello, Memory, Message, Refusal},
    rules::Rule,
    settings::Arbiter,
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
                let message = Message::Refuse(refusal);
                let refuse = Frame { term: self.base.term, epoch: self.whole, message };
                self.base.output(Output::Send(connection, refuse));
                if self.has_witness() && self.is_left_by(frame, hello) {
                    self.turn = true;
                    self.suspect(Why::HigherTerm);
                    self.try_claim();
                } else if refusal == Refusal::Claimed {
                    self.suspect(Why::PeerClaimed);
                }
            }
        }
    }

    /// Whether this side's own primary greets it in a later term: it can only have won this one.
    fn is_left_by(&self, frame: Frame, hello: Hello) -> bool {
        matches!(self.state, State::Standby | State::Suspecting | State::Unfit)
            && self.primary == Some(hello.incarnation)
            && frame.term > self.base.term
            && hello.lineage == self.base.me.lineage
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
        let nobody = self.base.settings.agreement.arbiter == Arbiter::None;
        match self.state {
            State::Listening | State::Abandoned if frame.term < self.floor => Err(Refusal::Term),
            State::Listening | State::Abandoned
                if hello.bound.is_some() && self.base.rules.hold(Rule::Pair) =>
            {
                Err(Refusal::Stranger)
            }
            State::Listening | State::Abandoned => Ok(false),
            // Where this side does not promote by itself, its primary's word closes the term.
            State::Standby | State::Suspecting | State::Unfit
                if nobody && self.is_left_by(frame, hello) && !self.base.claimed =>
            {
                Ok(false)
            }
            State::Standby | State::Suspecting if !own => Err(Refusal::Busy),
            State::Standby | State::Suspecting if burnt && self.base.rules.hold(Rule::Burn) => {
                Err(Refusal::Claimed)
            }
            State::Standby | State::Suspecting
                if self.base.asked().is_some() || self.base.marking.is_some() || self.ordered =>
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
        self.base.hearing.restart(self.base.now);
        self.base.heard();
        self.base.timers.set(Timer::Beat, self.base.now + self.base.heartbeat());
        (self.echo, self.gone) = (0, false);
        if matches!(self.state, State::Standby | State::Suspecting | State::Unfit) {
            self.stand_back();
        }
        if again {
            self.enter(State::Standby, Why::Paired);
        } else {
            self.begin_term(frame, hello);
        }
        let accept = Accept {
            incarnation: self.base.me.incarnation,
            digest: self.digest,
            memory: self.memory,
            agreement: self.base.settings.agreement,
        };
        self.base.send(self.whole, Message::Accept(accept));
    }

    /// Undo what was prepared for a promotion.
    pub(super) fn stand_back(&mut self) {
        self.drop_coming();
        if self.state == State::Suspecting {
            self.base.output(Output::Unprepare);
            (self.prepared, self.turn) = (false, false);
            self.base.timers.clear(Timer::Turn);
        }
    }

    /// A whole epoch in memory that no later one has begun to overwrite.
    pub(super) fn held_memory(&self) -> Option<Memory> {
        let (term, epoch, digest) = (self.base.term, self.whole, self.digest);
        let whole = self.may_promote() && !self.unfit;
        (whole && epoch > Epoch::default()).then_some(Memory { term, epoch, digest })
    }

    /// A primary of a new term. Of the old one only what memory and disks hold is of interest.
    fn begin_term(&mut self, frame: Frame, hello: Hello) {
        if let Some(memory) = self.held_memory() {
            self.memory = Some(memory);
            self.floor = memory.term.next();
        }
        self.base.term = frame.term;
        self.base.claimed = false;
        self.base.forget_question();
        self.base.timers.clear(Timer::Look);
        self.past = None;
        self.primary = Some(hello.incarnation);
        (self.whole, self.digest) = (frame.epoch, Digest::default());
        self.coming.clear();
        (self.prepared, self.turn, self.released, self.unfit) = (false, false, false, false);
        (self.filling, self.ordered, self.forced) = (false, false, false);
        self.base.marking = None;
        self.enter(State::Syncing, Why::Paired);
    }

    /// What the primary sends from here on changes memory and disks.
    pub(super) fn fill(&mut self, base: Option<Epoch>) {
        let known = base.is_none() || base == self.memory.map(|memory| memory.epoch);
        if self.filling || !known {
            return self.bad_frame();
        }
        self.filling = true;
        self.memory = None;
        self.base.timers.clear(Timer::GiveUp);
        self.base.output(Output::Mark(Mark::Inconsistent { term: self.base.term }));
        self.base.output(Output::Fill { base });
    }

    /// The primary is gone before it has changed anything: what memory holds is still the base of
    /// another attempt.
    pub(super) fn fall_back(&mut self, memory: Memory, why: Why) {
        self.base.hang_up();
        self.base.timers.clear(Timer::Silence);
        self.enter(State::Abandoned, why);
        self.keep_memory();
        self.base.mark(Mark::Outdated { term: memory.term });
    }
}
