//! The epoch loop, and the planned failover that ends it.
use super::{Handing, Primary, State};
use crate::{
    identity::{Digest, Epoch, Party, Side},
    interface::{Command, Output, Why},
    message::Message,
    pace::{LONGEST, Pace},
    record::{Question, Word},
    rules::Rule,
    timers::{Time, Timer},
};

impl Primary {
    /// Begin the next epoch, if it is time and there is room. With the first one of a term the
    /// gates shut, before its `End` is sent (rule `arm`). It was to begin when it is `due`.
    pub(super) fn begin_epoch(&mut self, due: Time) {
        let first = self.state == State::Syncing;
        if !first && self.state != State::Protected {
            return;
        }
        if let Some(epoch) = self.window.begin() {
            if let Some(pace) = &mut self.pace {
                pace.begins(self.base.now);
            }
            let shut = !first || self.base.rules.hold(Rule::Arm);
            self.shut |= shut;
            self.base.output(Output::Capture { epoch, shut });
        } else {
            let late = self.strict && !self.window.is_capturing();
            self.due = self.pace.is_some() || late;
            self.is_late(late);
            if !self.window.is_capturing() {
                self.base.output(Output::Harvest);
            }
        }
        if !first {
            self.base.timers.set(Timer::Period, self.next_epoch(due));
        }
    }

    /// When the epoch after the one that was `due` begins, as far as is known now. Fixed periods
    /// keep in step, so that a late timer does not make epochs rarer.
    fn next_epoch(&self, due: Time) -> Time {
        let (now, period) = (self.base.now, self.base.settings.period);
        match &self.pace {
            // It is due, and begins with the next acknowledgement.
            Some(_) if self.due => now + LONGEST,
            Some(pace) => pace.due(),
            None if now.saturating_sub(due) < period / 2 => due + period,
            None => now + period,
        }
    }

    /// Something has changed that the pace depends on.
    pub(super) fn pace_on(&mut self, change: impl FnOnce(&mut Pace)) {
        let Some(pace) = &mut self.pace else { return };
        change(pace);
        if self.state == State::Protected && !self.due {
            self.base.timers.set(Timer::Period, self.next_epoch(self.base.now));
        }
    }

    /// Steps 1 to 4 of an epoch are done.
    pub(super) fn captured(&mut self, epoch: Epoch, digest: Digest) {
        if !self.window.captured(epoch, digest) {
            return;
        }
        self.limit_acks();
        // Output is held from here on.
        self.base.set_patient(false);
        match self.state {
            State::Syncing | State::Protected | State::HandingOver(_) => {
                self.base.send(epoch, Message::End { digest });
            }
            // In staging, until the backup is back.
            _ => return,
        }
        if self.state != State::Syncing && !self.base.rules.hold(Rule::Ack) {
            self.base.output(Output::ReleaseThrough(epoch));
        }
        self.hand_on();
    }

    /// Output may be held for `ack_limit` from here on, if none was held before.
    pub(super) fn limit_acks(&mut self) {
        if self.base.timers.get(Timer::AckLimit).is_none() {
            self.base.timers.set(Timer::AckLimit, self.base.now + self.base.settings.ack_limit);
        }
    }

    /// The backup acknowledges `epoch`. Returns whether that is possible.
    pub(super) fn acknowledged(&mut self, epoch: Epoch) -> bool {
        let before = self.window.acked();
        if !self.window.ack(epoch) {
            return false;
        }
        if epoch > before || self.window.is_clear() {
            self.base.timers.clear(Timer::AckLimit);
        }
        if !self.window.is_clear() {
            self.limit_acks();
        }
        match self.state {
            State::Syncing if self.base.marking.is_none() => {
                if let (Some(bond), true) = (self.bond(), self.base.rules.hold(Rule::Arm)) {
                    self.base.mark(crate::interface::Mark::Protected(bond));
                } else {
                    self.protect();
                }
            }
            State::Protected | State::HandingOver(_) => {
                self.release();
                if std::mem::take(&mut self.due) {
                    self.begin_epoch(self.base.now);
                    self.is_late(false);
                }
            }
            // A suspected backup may have said that long ago: see `resume`.
            _ => {}
        }
        self.hand_on();
        true
    }

    /// Rule R (a): what the backup has acknowledged may leave. If that word may be old, the backup
    /// first has to show that it is still there: where it runs the guest by now, late frames of
    /// this side would be harmless to TCP, but move the guest's address back in every switch.
    fn release(&mut self) {
        let fresh = self.base.hearing.is_fresh(self.base.now, &self.base.settings);
        self.owed = !fresh;
        if fresh {
            self.base.output(Output::ReleaseThrough(self.window.acked()));
        } else {
            if !self.base.hearing.is_doubtful() {
                self.base.hearing.doubt();
            }
            self.beat();
        }
    }

    /// The backup has answered a probe.
    pub(super) fn echoed(&mut self, probe: u64) {
        self.base.hearing.echo(probe);
        let releases = matches!(self.state, State::Protected | State::HandingOver(_));
        if self.owed && releases && !self.base.hearing.is_doubtful() {
            self.release();
        }
    }

    /// The sidecar says `protected`: from here the term is left only by a claim.
    pub(super) fn arm(&mut self) {
        if let Some(bond) = self.bond() {
            self.window.arm();
            self.base.send(self.window.last(), Message::Armed(bond.pair));
        }
        self.protect();
    }

    fn protect(&mut self) {
        self.enter(State::Protected, Why::Paired);
        self.alone = None;
        self.base.forget_question();
        self.shut = true;
        self.release();
        self.base.timers.clear(Timer::Look);
        self.due = false;
        self.is_late(false);
        self.base.timers.set(Timer::Period, self.next_epoch(self.base.now));
    }

    /// The backup is back with its last whole epoch, and neither side has claimed.
    pub(super) fn resume(&mut self) {
        self.fail(Why::NoAnswer);
        self.protect();
        for (epoch, digest) in self.window.staged().collect::<Vec<_>>() {
            self.base.send(epoch, Message::End { digest });
        }
    }

    /// Output has waited for `ack-limit` although the backup is heard.
    pub(super) fn too_slow(&mut self) {
        let leaves = self.base.settings.leave_slow;
        match self.state {
            // Nothing is protected yet, and output is held.
            State::Syncing if leaves => self.fall_back(Why::AckLimit),
            // The guest is parked for an acknowledgement that does not come.
            State::HandingOver(Handing::Parked | Handing::Last(_)) => {
                self.disturbed(Why::AckLimit);
            }
            State::Protected if leaves => {
                self.stall(Why::AckLimit);
                self.backup_lost();
            }
            State::Stalled if leaves => self.backup_lost(),
            _ => {}
        }
    }

    /// Begin a planned failover: nothing runs from here on until it has ended one way or another.
    pub(super) fn hand_over(&mut self) {
        self.intent = None;
        self.enter(State::HandingOver(Handing::Parked), Why::Command);
        self.park();
        self.hand_on();
    }

    /// The next step of a planned failover, if it can be taken.
    fn hand_on(&mut self) {
        match self.state {
            State::HandingOver(Handing::Parked) => {
                if let Some(epoch) = self.window.begin() {
                    self.state = State::HandingOver(Handing::Last(epoch));
                    self.base.output(Output::Capture { epoch, shut: true });
                }
            }
            State::HandingOver(Handing::Last(epoch)) if self.window.acked() == epoch => {
                self.give_away();
            }
            _ => {}
        }
    }

    /// The backup has the last epoch. The term is claimed for it before the backup is informed
    /// (rule `hand`).
    fn give_away(&mut self) {
        let Some(backup) = self.backup else { return };
        if self.has_witness() && self.base.rules.hold(Rule::Hand) {
            self.state = State::HandingOver(Handing::Claiming);
            self.base.claimed = true;
            let party = Party { side: Side::Backup, incarnation: backup };
            let term = self.base.term;
            self.base.ask(Question::Claim { term, word: Word::Promote, party });
        } else {
            // Without a witness, `Release` itself is the grant.
            self.base.claimed = true;
            self.released();
        }
    }

    /// The guest is the backup's.
    pub(super) fn released(&mut self) {
        self.state = State::HandingOver(Handing::Released);
        self.base.send(self.window.acked(), Message::Release);
    }

    /// Whether a planned failover may begin.
    pub(super) fn can_hand_over(&self) -> bool {
        self.is_protected() && self.intent.is_none_or(|intent| intent == Command::Failover)
    }
}
