//! The reactions to the guest's power-off, reboot or crash: `-action`, and the file's `domain`.
use crate::actions::{Action, Actions};

use super::draft::Draft;
use super::fields::Fields;

/// The settings given so far.
#[derive(Debug, Default)]
pub(crate) struct Wanted {
    shutdown: Option<Action>,
    reboot: Option<Outcome>,
    panic: Option<Outcome>,
    /// The file asks to keep the machine after a crash.
    crash: bool,
}

#[derive(Debug, Clone, Copy)]
enum Follow {
    Do(Action),
    /// As after a power-off by the guest.
    Shutdown,
}

#[derive(Debug, Clone, Copy)]
enum Outcome {
    Follow(Follow),
    /// End with a failure status.
    Failure,
}

impl Wanted {
    pub(crate) fn resolve(&self) -> Actions {
        let default = Actions::default();
        let shutdown = self.shutdown.unwrap_or(default.shutdown);
        let follow = |how| match how {
            Follow::Do(action) => action,
            Follow::Shutdown => shutdown,
        };
        let outcome = |wanted, usual| match wanted {
            None => usual,
            Some(Outcome::Failure) => (Action::End, 1),
            Some(Outcome::Follow(how)) => (follow(how), 0),
        };
        let (reboot, reboot_status) = outcome(self.reboot, (default.reboot, default.reboot_status));
        let (panic, panic_status) = outcome(self.panic, (default.panic, default.panic_status));
        Actions { shutdown, reboot, reboot_status, panic, panic_status, fault_panics: self.crash }
    }
}

/// `-action`.
pub(crate) fn action(draft: &mut Draft, f: &mut Fields) {
    let a = &mut draft.actions;
    let keep = |action| Ok(Outcome::Follow(Follow::Do(action)));
    let shutdown =
        [("poweroff", Ok(Action::End)), ("pause", Ok(Action::Stay)), ("reset", Ok(Action::Reset))];
    a.shutdown = f.choice("shutdown", &shutdown).or(a.shutdown);
    let choices = [
        ("shutdown", Ok(Outcome::Follow(Follow::Shutdown))),
        ("exit-failure", Ok(Outcome::Failure)),
        ("pause", keep(Action::Stay)),
        ("reset", keep(Action::Reset)),
    ];
    a.reboot = f.choice("reboot", &choices).or(a.reboot);
    a.panic = f.choice("panic", &choices).or(a.panic);
}

/// `-no-shutdown`.
pub(crate) fn no_shutdown(draft: &mut Draft, _: &mut Fields) {
    draft.actions.shutdown = Some(Action::Stay);
}

/// `domain`.
pub(crate) fn domain(draft: &mut Draft, f: &mut Fields) {
    // Renaming the domain is up to the program that manages it.
    let choices = [
        ("destroy", Ok(Action::End)),
        ("restart", Ok(Action::Reset)),
        ("preserve", Ok(Action::Stay)),
        ("rename-restart", Ok(Action::Stay)),
    ];
    let a = &mut draft.actions;
    a.shutdown = f.choice("on_poweroff", &choices);
    a.reboot = f.choice("on_reboot", &choices).map(|action| Outcome::Follow(Follow::Do(action)));
    let crash = f.choice("on_crash", &choices);
    a.crash = crash.is_some_and(|action| action != Action::End);
    a.panic = crash.map(|action| match action {
        Action::End => Outcome::Failure,
        other => Outcome::Follow(Follow::Do(other)),
    });
}
