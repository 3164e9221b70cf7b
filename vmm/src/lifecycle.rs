//! The life of a VM, as a function without side effects.
//!
//! ```text
//!   Prelaunch --Resume--> Running <--Resume-- Paused
//!       |                  |   \----Pause-----^  |
//!       |                  |                     |
//!       +------------------+------Shutdown-------+--> Shutdown
//! ```
//! From each of the three, Save leads to Saving, and Saved from there to Paused: nobody may run the
//! guest while its memory is copied. Migrated leads from Saving to PostMigrate, where the machine
//! stands still as in Paused: another process goes on with it. A reset leads back to where it came from: a paused machine that is reset stays paused.

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
    /// Paused, and must stay so until the state has been saved.
    Saving,
    /// Paused, and handed over to another process; may go on here if that one does not.
    PostMigrate,
    /// Over; the process is about to end.
    Shutdown,
}

impl State {
    /// All of them, for tests and tables.
    pub const ALL: [Self; 6] = [
        Self::Prelaunch,
        Self::Running,
        Self::Paused,
        Self::Saving,
        Self::PostMigrate,
        Self::Shutdown,
    ];

    /// Where `event` leads from here.
    ///
    /// # Errors
    /// When it makes no sense in this state.
    pub const fn on(self, event: Event) -> Result<Self, Denied> {
        use {Event as E, State as S};
        Ok(match (self, event) {
            (S::Prelaunch | S::Running | S::Paused | S::PostMigrate, E::Resume) => S::Running,
            (S::Running | S::Paused, E::Pause) => S::Paused,
            (S::Prelaunch | S::Saving | S::PostMigrate, E::Pause) => self,
            (S::Prelaunch | S::Running | S::Paused | S::PostMigrate, E::Reset) => self,
            (S::Prelaunch | S::Running | S::Paused | S::PostMigrate, E::Save) => S::Saving,
            (S::Saving, E::Saved) => S::Paused,
            (S::Saving, E::Migrated) => S::PostMigrate,
            (S::Prelaunch | S::Running | S::Paused | S::Saving | S::PostMigrate, E::Shutdown) => {
                S::Shutdown
            }
            (S::Saving | S::Shutdown, _) | (_, E::Saved | E::Migrated) => {
                return Err(Denied { state: self, event });
            }
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
    /// Stand still while the state is saved.
    Save,
    /// The save is over.
    Saved,
    /// The save is over, and somebody else goes on from it.
    Migrated,
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

    /// [`States::ALIVE`], and after it was handed over.
    pub const OR_MIGRATED: Self =
        Self::of(&[State::Prelaunch, State::Running, State::Paused, State::PostMigrate]);

    /// [`States::OR_MIGRATED`], and while its state is being saved.
    pub const OR_SAVING: Self = Self(Self::OR_MIGRATED.0 | Self::of(&[State::Saving]).0);

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

    const EVENTS: [Event; 7] = [
        Event::Resume,
        Event::Pause,
        Event::Reset,
        Event::Save,
        Event::Saved,
        Event::Migrated,
        Event::Shutdown,
    ];

    #[test]
    fn every_state_answers_every_event() {
        use State::{Paused, PostMigrate, Prelaunch, Running, Saving, Shutdown};
        let (run, pause, pre) = (Some(Running), Some(Paused), Some(Prelaunch));
        let (save, away, off) = (Some(Saving), Some(PostMigrate), Some(Shutdown));
        let expected = [
            (Prelaunch, [run, pre, pre, save, None, None, off]),
            (Running, [run, pause, run, save, None, None, off]),
            (Paused, [run, pause, pause, save, None, None, off]),
            (Saving, [None, save, None, None, pause, away, off]),
            (PostMigrate, [run, away, away, save, None, None, off]),
            (Shutdown, [None; 7]),
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
            let over = state == State::Shutdown;
            let still = [State::Saving, State::PostMigrate].contains(&state);
            assert_eq!(States::ALIVE.contains(state), !over && !still);
            assert_eq!(States::OR_MIGRATED.contains(state), !over && state != State::Saving);
            assert_eq!(States::OR_SAVING.contains(state), !over);
        }
    }
}
