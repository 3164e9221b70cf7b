//! The life of a VM, as a function without side effects.
//!
//! ```text
//!   Prelaunch --Resume--> Running <--Resume-- Paused
//!       |                  |   \----Pause-----^  |
//!       |                  |                     |
//!       +------------------+------Shutdown-------+--> Shutdown
//! ```
//! A reset leads back to where it came from: a paused machine that is reset stays paused.

/// Where a VM can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// Built, never started (`-S`).
    Prelaunch,
    /// The vCPUs run.
    Running,
    /// The vCPUs are parked and the devices quiet.
    Paused,
    /// Over; the process is about to end.
    Shutdown,
}

impl State {
    /// All of them, for tests and tables.
    pub const ALL: [Self; 4] = [Self::Prelaunch, Self::Running, Self::Paused, Self::Shutdown];

    /// Where `event` leads from here.
    ///
    /// # Errors
    /// When it makes no sense in this state.
    pub const fn on(self, event: Event) -> Result<Self, Denied> {
        use {Event as E, State as S};
        Ok(match (self, event) {
            (S::Prelaunch | S::Running | S::Paused, E::Resume) => S::Running,
            (S::Running | S::Paused, E::Pause) => S::Paused,
            (S::Prelaunch, E::Pause) => S::Prelaunch,
            (S::Prelaunch | S::Running | S::Paused, E::Reset) => self,
            (S::Prelaunch | S::Running | S::Paused, E::Shutdown) => S::Shutdown,
            (S::Shutdown, _) => return Err(Denied { state: self, event }),
        })
    }
}

/// What can happen to a VM, whether a client or the guest caused it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Run, or go on running.
    Resume,
    /// Stand still.
    Pause,
    /// Boot anew.
    Reset,
    /// End.
    Shutdown,
}

/// The event makes no sense in that state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("cannot {event:?} while the VM is {state:?}")]
pub struct Denied {
    state: State,
    event: Event,
}

/// A set of states.
#[derive(Debug, Clone, Copy)]
pub struct States(u8);

impl States {
    /// Whatever the state.
    pub const ANY: Self = Self(u8::MAX);
    /// While there is a VM to act on.
    pub const ALIVE: Self = Self::of(&[State::Prelaunch, State::Running, State::Paused]);

    /// The set of `states`.
    pub const fn of(states: &[State]) -> Self {
        let mut bits = 0;
        let mut rest = states;
        while let [first, others @ ..] = rest {
            bits |= 1 << *first as u8;
            rest = others;
        }
        Self(bits)
    }

    /// Membership.
    pub const fn contains(self, state: State) -> bool {
        self.0 & (1 << state as u8) != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVENTS: [Event; 4] = [Event::Resume, Event::Pause, Event::Reset, Event::Shutdown];

    #[test]
    fn every_state_answers_every_event() {
        use State::{Paused, Prelaunch, Running, Shutdown};
        let expected = [
            (Prelaunch, [Some(Running), Some(Prelaunch), Some(Prelaunch), Some(Shutdown)]),
            (Running, [Some(Running), Some(Paused), Some(Running), Some(Shutdown)]),
            (Paused, [Some(Running), Some(Paused), Some(Paused), Some(Shutdown)]),
            (Shutdown, [None, None, None, None]),
        ];
        for (state, leads_to) in expected {
            for (event, next) in EVENTS.into_iter().zip(leads_to) {
                assert_eq!(state.on(event).ok(), next, "{state:?} on {event:?}");
            }
        }
    }

    #[test]
    fn sets_hold_what_they_were_made_of() {
        for state in State::ALL {
            assert!(States::ANY.contains(state));
            assert_eq!(States::ALIVE.contains(state), state != State::Shutdown);
        }
    }
}
