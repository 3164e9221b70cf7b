//! What a primary says of itself.
use super::{Handing, Primary, State};
use crate::{
    identity::Side,
    record::Question,
    status::{Status, Waiting},
    timers::Timer,
};

impl State {
    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Connecting => "connecting",
            Self::Syncing => "syncing",
            Self::Protected => "protected",
            Self::Stalled => "stalled",
            Self::Degraded => "degraded",
            Self::Fenced => "fenced",
            Self::HandingOver(_) => "handing-over",
            Self::Over => "over",
        }
    }
}

impl Primary {
    /// What it says of itself. Until it is known that the backup is armed, `protected` is called
    /// `arming`.
    #[must_use]
    pub fn status(&self) -> Status {
        let arming = self.state == State::Protected && !self.is_protected();
        Status {
            role: Side::Primary,
            state: if arming { "arming" } else { self.state.name() },
            peer: self.backup,
            term: self.base.term,
            epoch: self.window.last(),
            acked: self.window.acked(),
            armed: self.window.is_armed(),
            claimed: self.base.claimed,
            waiting: self.waiting(),
            throttle: self.throttle,
            stalls: self.base.stalls,
            missed_beats: self.base.hearing.missed(),
            largest_gap: self.base.hearing.largest_gap(),
        }
    }

    /// What it waits for, if its work depends on it.
    #[must_use]
    pub fn waiting(&self) -> Option<Waiting> {
        if self.state == State::Over {
            return None;
        }
        if self.base.marking.is_some() {
            return Some(Waiting::Sidecar);
        }
        match (self.state, self.base.asked()) {
            (State::Off | State::Over, _) => None,
            (State::Connecting, _) => Some(self.waiting_for_connection()),
            (_, Some(Question::Fence { .. })) => Some(Waiting::Fence),
            (_, Some(Question::Claim { .. } | Question::Settle { .. })) => Some(Waiting::Witness),
            (State::Degraded, _) => self.parked.then_some(Waiting::Operator),
            (State::Syncing, _) if self.window.is_capturing() => Some(Waiting::Copy),
            (State::Syncing, _) => Some(Waiting::Acknowledgement),
            (State::Protected, Some(_)) => Some(Waiting::Witness),
            (State::Protected, None) if self.full => Some(Waiting::Room),
            (State::Protected, None) if self.owed => Some(Waiting::Beat),
            (State::Protected, None) => {
                (!self.window.is_clear()).then_some(Waiting::Acknowledgement)
            }
            (State::Stalled, _) if self.intent.is_some() => Some(Waiting::Ended),
            (State::Stalled, _) => Some(self.waiting_for_connection()),
            (State::HandingOver(Handing::Parked | Handing::Last(_)), _) => {
                Some(Waiting::Acknowledgement)
            }
            (State::Fenced | State::HandingOver(_), None) if !self.has_witness() => {
                let reports = self.state != State::Fenced && self.base.connection.is_some();
                Some(if reports { Waiting::Outcome } else { Waiting::Operator })
            }
            (State::Fenced | State::HandingOver(_), _) => Some(Waiting::Outcome),
        }
    }

    fn waiting_for_connection(&self) -> Waiting {
        if self.base.timers.get(Timer::Greeting).is_some() && self.base.connection.is_some() {
            Waiting::Greeting
        } else if self.base.timers.get(Timer::Dial).is_some() {
            Waiting::Connection
        } else {
            Waiting::Operator
        }
    }
}
