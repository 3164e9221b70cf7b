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
        self.stop(self.parked, room == Room::None);
    }

    /// Nothing is held any more, or the guest does not run.
    pub(super) fn relieve(&mut self) {
        self.throttle(0);
        self.stop(self.parked, false);
    }

    fn throttle(&mut self, percent: u8) {
        if std::mem::replace(&mut self.throttle, percent) != percent {
            self.base.output(Output::Throttle(percent));
        }
    }

    pub(super) fn park(&mut self) {
        self.stop(true, self.full);
    }

    pub(super) fn unpark(&mut self) {
        self.stop(false, self.full);
    }

    /// The guest is parked by the protocol, for lack of room, or both.
    fn stop(&mut self, parked: bool, full: bool) {
        let before = self.parked || self.full;
        (self.parked, self.full) = (parked, full);
        match (before, parked || full) {
            (false, true) => self.base.output(Output::Park),
            (true, false) => self.base.output(Output::Unpark),
            _ => {}
        }
    }
}
