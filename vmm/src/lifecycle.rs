//! The life cycle of a VM, as a function without side effects.
//!
//! ```text
//!   Prelaunch --Resume--> Running <--Resume-- Paused
//!     ^  |                 |   \----Pause-----^  |
//!     |  |                 |                     |
//!     |  +-----------------+-------Halt----------+--> Halted
//!     +-----------------------Reset--------------------/
//! ```
//! Save leads from each of them to Saving, and Saved from there to Paused: the guest must not run
//! while its memory is copied. Migrated leads from Saving to PostMigrate, where the machine is
//! stopped as in Paused, because another process continues it. A reset leads back to where it came
//! from: a paused machine that is reset stays paused, and a halted one is as if it had never run.
//! Shutdown ends the VM from any state.
use state::config::Halted;

/// State of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Built, never started (`-S`).
    Prelaunch,
    /// The vCPUs run.
    Running,
    /// The vCPUs are parked and the devices quiet.
    Paused,
    /// Paused, and must stay so until the state has been saved.
    Saving,
    /// Paused, and handed over to another process; may be resumed here if that process does not
    /// continue it.
    PostMigrate,
    /// The guest cannot run on, and its machine is kept to be inspected, saved or reset.
    Halted(Halt),
    /// Over; the process is about to end.
    Shutdown,
}

/// Why a guest cannot run on. The names are those of the protocol's run states.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Halt {
    /// It powered off or rebooted.
    #[error("the guest has shut down")]
    Shutdown,
    /// It reported a crash.
    #[error("the guest has crashed")]
    GuestPanicked,
    /// KVM could not run it.
    #[error("KVM cannot run the guest any further")]
    InternalError,
}

impl From<Halt> for Halted {
    fn from(halt: Halt) -> Self {
        match halt {
            Halt::Shutdown => Self::Shutdown,
            Halt::GuestPanicked => Self::GuestPanicked,
            Halt::InternalError => Self::InternalError,
        }
    }
}

impl From<Halted> for Halt {
    fn from(halted: Halted) -> Self {
        match halted {
            Halted::Shutdown => Self::Shutdown,
            Halted::GuestPanicked => Self::GuestPanicked,
            Halted::InternalError => Self::InternalError,
        }
    }
}

impl State {
    /// All states, for tests and tables.
    pub const ALL: [Self; 9] = [
        Self::Prelaunch,
        Self::Running,
        Self::Paused,
        Self::Saving,
        Self::PostMigrate,
        Self::Halted(Halt::Shutdown),
        Self::Halted(Halt::GuestPanicked),
        Self::Halted(Halt::InternalError),
        Self::Shutdown,
    ];

    /// The state that `event` leads to from here.
    ///
    /// # Errors
    /// When the event is not possible in this state.
    pub const fn on(self, event: Event) -> Result<Self, Denied> {
        use {Event as E, State as S};
        Ok(match (self, event) {
            (S::Prelaunch | S::Running | S::Paused | S::PostMigrate, E::Resume) => S::Running,
            (S::Running | S::Paused, E::Pause) => S::Paused,
            (S::Prelaunch | S::Saving | S::PostMigrate | S::Halted(_), E::Pause) => self,
            (S::Prelaunch | S::Running | S::Paused | S::PostMigrate, E::Reset) => self,
            (S::Halted(_), E::Reset) => S::Prelaunch,
            (S::Prelaunch | S::Running | S::Paused, E::Halt(why)) => S::Halted(why),
            (S::Prelaunch | S::Running | S::Paused | S::PostMigrate | S::Halted(_), E::Save) => {
                S::Saving
            }
            (S::Saving, E::Saved) => S::Paused,
            (S::Saving, E::Migrated) => S::PostMigrate,
            (
                S::Prelaunch | S::Running | S::Paused | S::Saving | S::PostMigrate | S::Halted(_),
                E::Shutdown,
            ) => S::Shutdown,
            (S::Saving | S::Shutdown | S::Halted(_), _)
            | (S::PostMigrate, E::Halt(_))
            | (_, E::Saved | E::Migrated) => {
                return Err(Denied { state: self, event });
            }
        })
    }

    /// The bit for this state in a set of states.
    const fn bit(self) -> u16 {
        1 << match self {
            Self::Prelaunch => 0,
            Self::Running => 1,
            Self::Paused => 2,
            Self::Saving => 3,
            Self::Halted(Halt::Shutdown) => 4,
            Self::Halted(Halt::GuestPanicked) => 5,
            Self::Halted(Halt::InternalError) => 6,
            Self::Shutdown => 7,
            Self::PostMigrate => 8,
        }
    }

    /// Why nothing can be done to the guest now, and what can be done instead.
    pub fn hint(self) -> String {
        match self {
            Self::Halted(why) => {
                format!("{why}; system_reset resets the machine, quit ends it")
            }
            _ => format!("the VM is {self:?}"),
        }
    }
}

/// What can happen to a VM, whether a client or the guest caused it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Start or resume.
    Resume,
    /// Stop the vCPUs.
    Pause,
    /// Reboot.
    Reset,
    /// Stop the vCPUs for good: the guest cannot run on.
    Halt(Halt),
    /// Stop the vCPUs while the state is saved.
    Save,
    /// The save is over.
    Saved,
    /// The save is over, and another process continues the machine.
    Migrated,
    /// End.
    Shutdown,
}

/// The event is not possible in that state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("cannot {event:?}: {}", state.hint())]
pub struct Denied {
    state: State,
    event: Event,
}

/// A set of states.
#[derive(Debug, Clone, Copy)]
pub struct States(u16);

impl States {
    /// Whatever the state.
    pub const ANY: Self = Self(u16::MAX);
    /// While there is a guest that can run.
    pub const GUEST: Self = Self::of(&[State::Prelaunch, State::Running, State::Paused]);
    /// While there is a machine to act on: [`States::GUEST`], and a halted one.
    pub const ALIVE: Self = Self(Self::GUEST.0 | Self::HALTED.0);
    /// [`States::GUEST`], and after it was handed over.
    pub const GUEST_OR_MIGRATED: Self = Self(Self::GUEST.0 | State::PostMigrate.bit());
    /// [`States::ALIVE`], and after it was handed over.
    pub const OR_MIGRATED: Self = Self(Self::ALIVE.0 | State::PostMigrate.bit());
    /// [`States::OR_MIGRATED`], and while its state is being saved.
    pub const OR_SAVING: Self = Self(Self::OR_MIGRATED.0 | State::Saving.bit());

    const HALTED: Self = Self::of(&[
        State::Halted(Halt::Shutdown),
        State::Halted(Halt::GuestPanicked),
        State::Halted(Halt::InternalError),
    ]);

    /// The set of `states`.
    pub const fn of(states: &[State]) -> Self {
        let mut bits = 0;
        let mut rest = states;
        while let [first, others @ ..] = rest {
            bits |= first.bit();
            rest = others;
        }
        Self(bits)
    }

    /// Whether the set contains `state`.
    pub const fn contains(self, state: State) -> bool {
        self.0 & state.bit() != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OFF: Halt = Halt::Shutdown;
    const PANIC: Halt = Halt::GuestPanicked;
    const KVM: Halt = Halt::InternalError;
    const EVENTS: [Event; 10] = [
        Event::Resume,
        Event::Pause,
        Event::Reset,
        Event::Save,
        Event::Saved,
        Event::Migrated,
        Event::Shutdown,
        Event::Halt(OFF),
        Event::Halt(PANIC),
        Event::Halt(KVM),
    ];

    #[test]
    fn every_state_answers_every_event() {
        use State::{Halted, Paused, PostMigrate, Prelaunch, Running, Saving, Shutdown};
        let (run, pause, pre) = (Some(Running), Some(Paused), Some(Prelaunch));
        let (save, away, over) = (Some(Saving), Some(PostMigrate), Some(Shutdown));
        let (off, panic, kvm) = (Some(Halted(OFF)), Some(Halted(PANIC)), Some(Halted(KVM)));
        // resume, pause, reset, save, saved, migrated, shutdown, and the three ways to halt
        let expected = [
            (Prelaunch, [run, pre, pre, save, None, None, over, off, panic, kvm]),
            (Running, [run, pause, run, save, None, None, over, off, panic, kvm]),
            (Paused, [run, pause, pause, save, None, None, over, off, panic, kvm]),
            (Saving, [None, save, None, None, pause, away, over, None, None, None]),
            (PostMigrate, [run, away, away, save, None, None, over, None, None, None]),
            (Halted(OFF), [None, off, pre, save, None, None, over, None, None, None]),
            (Halted(PANIC), [None, panic, pre, save, None, None, over, None, None, None]),
            (Halted(KVM), [None, kvm, pre, save, None, None, over, None, None, None]),
            (Shutdown, [None; 10]),
        ];
        assert_eq!(expected.map(|(state, _)| state), State::ALL);
        for (state, leads_to) in expected {
            for (event, next) in EVENTS.into_iter().zip(leads_to) {
                assert_eq!(state.on(event).ok(), next, "{state:?} on {event:?}");
            }
        }
    }

    #[test]
    fn a_refusal_says_what_is_possible() {
        let denied = State::Halted(PANIC).on(Event::Resume).unwrap_err().to_string();
        assert!(denied.contains("crashed") && denied.contains("system_reset"), "{denied}");
    }

    #[test]
    fn sets_hold_what_they_were_made_of() {
        for state in State::ALL {
            assert!(States::ANY.contains(state));
            assert!(States::of(&[state]).contains(state));
            let (over, saving) = (state == State::Shutdown, state == State::Saving);
            let (halted, away) = (matches!(state, State::Halted(_)), state == State::PostMigrate);
            assert_eq!(States::GUEST.contains(state), !over && !saving && !halted && !away);
            assert_eq!(States::ALIVE.contains(state), !over && !saving && !away);
            assert_eq!(States::OR_MIGRATED.contains(state), !over && !saving);
            assert_eq!(States::OR_SAVING.contains(state), !over);
        }
    }
}
