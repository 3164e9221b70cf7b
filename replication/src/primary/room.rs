//! How full staging, held output and dirty memory are, and what that does to the guest.
use super::{Primary, State};
use crate::interface::{Output, Room};

/// By how many percent of the time the guest is slowed down or let go at once, and at most.
const STEP: u8 = 10;
const MOST: u8 = 90;

impl Primary {
    /// Slow the guest down near a cap, and park it at one. What is held can only be released by the
    /// backup's acknowledgement, and must not be dropped.
    pub(super) fn room(&mut self, room: Room) {
        if !matches!(self.state, State::Syncing | State::Protected | State::Stalled) {
            return;
        }
        self.throttle(match room {
            Room::Ample => self.throttle.saturating_sub(STEP),
            Room::Scarce => (self.throttle + STEP).min(MOST),
            Room::None => self.throttle,
        });
        self.stop(|this| this.full = room == Room::None);
    }

    /// An epoch is to begin, and the window is full.
    pub(super) fn is_late(&mut self, late: bool) {
        self.stop(|this| this.late = late);
    }

    /// Nothing is held any more, or the guest does not run.
    pub(super) fn relieve(&mut self) {
        self.throttle(0);
        self.stop(|this| (this.full, this.late) = (false, false));
    }

    fn throttle(&mut self, percent: u8) {
        if std::mem::replace(&mut self.throttle, percent) != percent {
            self.base.output(Output::Throttle(percent));
        }
    }

    pub(super) fn park(&mut self) {
        self.stop(|this| this.parked = true);
    }

    pub(super) fn unpark(&mut self) {
        self.stop(|this| (this.parked, this.late) = (false, false));
    }

    /// The guest is parked by the protocol, for lack of room, or because an epoch is late.
    fn stop(&mut self, change: impl FnOnce(&mut Self)) {
        let is_stopped = |this: &Self| this.parked || this.full || this.late;
        let before = is_stopped(self);
        change(self);
        match (before, is_stopped(self)) {
            (false, true) => self.base.output(Output::Park),
            (true, false) => self.base.output(Output::Unpark),
            _ => {}
        }
    }
}
