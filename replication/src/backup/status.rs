//! What a backup says of itself.
use super::{Backup, State};
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
            Self::Listening => "listening",
            Self::Syncing => "syncing",
            Self::Ready => "ready",
            Self::Standby => "standby",
            Self::Suspecting => "suspecting",
            Self::Promoting => "promoting",
            Self::Unfit => "unfit",
            Self::Abandoned => "abandoned",
            Self::Promoted => "promoted",
            Self::Over => "over",
        }
    }
}

impl Backup {
    /// What it says of itself.
    #[must_use]
    pub fn status(&self) -> Status {
        Status {
            role: Side::Backup,
            state: self.state.name(),
            peer: self.primary,
            term: self.base.term,
            epoch: self.whole,
            acked: self.whole,
            armed: matches!(self.state, State::Standby | State::Suspecting | State::Unfit),
            claimed: self.base.claimed,
            waiting: self.waiting(),
            throttle: 0,
            stalls: self.base.stalls,
            missed_beats: self.base.hearing.missed(),
            largest_gap: self.base.hearing.largest_gap(),
        }
    }

    /// What it waits for, if its work depends on it.
    #[must_use]
    pub fn waiting(&self) -> Option<Waiting> {
        let asked = match self.base.asked() {
            Some(Question::Fence { .. }) => Some(Waiting::Fence),
            Some(_) => Some(Waiting::Witness),
            None => None,
        };
        let marking = self.base.marking.map(|_| Waiting::Sidecar);
        match self.state {
            State::Over | State::Promoted => None,
            State::Listening | State::Syncing => marking.or(Some(Waiting::Primary)),
            State::Ready => marking.or(Some(Waiting::Primary)),
            State::Standby => marking,
            State::Suspecting if !self.prepared => Some(Waiting::Preparation),
            State::Suspecting if asked.or(marking).is_some() => asked.or(marking),
            State::Suspecting if self.base.timers.get(Timer::Turn).is_some() => Some(Waiting::Turn),
            State::Suspecting => Some(Waiting::Operator),
            State::Promoting => marking.or(asked),
            State::Unfit if asked.is_none() && !self.has_witness() => Some(Waiting::Operator),
            State::Unfit => Some(Waiting::Witness),
            State::Abandoned => marking.or(Some(Waiting::Primary)),
        }
    }
}
