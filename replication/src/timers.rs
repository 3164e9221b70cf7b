//! Points in time at which a state machine wants to be stepped, by name.
use std::time::Duration;

/// Time since any fixed moment, on a monotonic clock of this host. Never compared with a peer's.
pub type Time = Duration;

/// What a machine may wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Timer {
    /// The peer has been silent for the time-out.
    Silence,
    /// It is this side's turn to claim.
    Turn,
    /// A beat is to be sent.
    Beat,
    /// The peer is to be dialled again.
    Dial,
    /// `Hello` was not answered.
    Greeting,
    /// A question is to be asked again.
    Ask,
    /// The record is to be read again.
    Look,
    /// An epoch is to begin.
    Period,
    /// Output has been held for too long.
    AckLimit,
    /// A command has waited too long, or memory was kept long enough.
    GiveUp,
}

const COUNT: usize = 10;

/// All timers, most urgent meaning first.
const ALL: [Timer; COUNT] = [
    Timer::Silence,
    Timer::Turn,
    Timer::Beat,
    Timer::Dial,
    Timer::Greeting,
    Timer::Ask,
    Timer::Look,
    Timer::Period,
    Timer::AckLimit,
    Timer::GiveUp,
];

/// The timers of one machine.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub(crate) struct Timers([Option<Time>; COUNT]);

impl Timers {
    fn slot(&mut self, timer: Timer) -> Option<&mut Option<Time>> {
        self.0.get_mut(timer as usize)
    }

    pub fn set(&mut self, timer: Timer, at: Time) {
        if let Some(slot) = self.slot(timer) {
            *slot = Some(at);
        }
    }

    pub fn clear(&mut self, timer: Timer) {
        if let Some(slot) = self.slot(timer) {
            *slot = None;
        }
    }

    pub fn get(&self, timer: Timer) -> Option<Time> {
        self.0.get(timer as usize).copied().flatten()
    }

    /// The earliest of all.
    pub fn next(&self) -> Option<Time> {
        self.0.iter().flatten().min().copied()
    }

    /// Take the one that was due first, if one is due at `now`.
    pub fn take_due(&mut self, now: Time) -> Option<(Timer, Time)> {
        let due = |timer: &Timer| self.get(*timer).filter(|at| *at <= now).map(|at| (*timer, at));
        let first = ALL.iter().filter_map(due).min_by_key(|(_, at)| *at)?;
        self.clear(first.0);
        Some(first)
    }

    /// Which ones are set.
    #[cfg(feature = "controls")]
    pub fn armed(&self) -> Vec<Timer> {
        ALL.into_iter().filter(|timer| self.get(*timer).is_some()).collect()
    }

    /// Postpone every timer that is set to one distant moment.
    #[cfg(feature = "controls")]
    pub fn forget(&mut self) {
        const FAR: Time = Time::from_secs(1 << 40);
        self.0.iter_mut().flatten().for_each(|at| *at = FAR);
    }
}
