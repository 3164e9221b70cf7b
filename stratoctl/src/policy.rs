//! What happens to a domain when its guest powers off, reboots or crashes.
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::matrix::State;

/// What happens then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Then {
    /// The domain ends.
    Destroy,
    /// It reboots in place.
    Restart,
    /// It stays as it is, paused, for inspection.
    Preserve,
    /// It gets another name, NAME-1 or so, and stays; a new one is started under its name.
    RenameRestart,
}

/// The three together: the `domain` object of a configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// The guest powers off.
    pub on_poweroff: Then,
    /// The guest reboots.
    pub on_reboot: Then,
    /// The guest says that it has crashed.
    pub on_crash: Then,
}

impl Default for Policy {
    fn default() -> Self {
        Self { on_poweroff: Then::Destroy, on_reboot: Then::Restart, on_crash: Then::Destroy }
    }
}

impl Policy {
    /// Whether a domain kept in `state` is renamed, so that a new start can have its name.
    pub fn renames(self, state: State) -> bool {
        let then: &[Then] = match state {
            State::Off => &[self.on_poweroff, self.on_reboot],
            State::Crashed => &[self.on_crash],
            _ => &[],
        };
        then.contains(&Then::RenameRestart)
    }
}
