//! Devices that have a slot of their own, which no other device can use: at most one of each kind.
//! Each kind has a file with everything that a configuration needs: its type, its syntax in file
//! and command line, its saved form, and which settings may change when it is restored.
//!
//! A new kind is a file here, a variant of [`DeviceConfig`], its place in [`DeviceConfig::facts`]
//! and [`DeviceConfig::restored`], and a row of the table in `cli/kinds.rs`.
use std::path::Path;

use state::config as saved;

use crate::{CharBackend, Part, saved::DescriptionError, types::Id};

pub mod balloon;
pub mod console;
pub mod rng;

pub use balloon::BalloonConfig;
pub use console::ConsoleConfig;
pub use rng::RngConfig;

/// A device, in the order of their slots.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "named as their kinds")]
pub enum DeviceConfig {
    Console(ConsoleConfig),
    Rng(RngConfig),
    Balloon(BalloonConfig),
}

/// Properties of a device of any kind.
pub trait Facts {
    /// Name of its kind, in messages, and id of its slot in saved states.
    fn slot(&self) -> &'static str;
    /// The flag that overrides it for a restored machine.
    fn flag(&self) -> &'static str;
    /// Its id, unique among all devices.
    fn id(&self) -> &Id;
    /// Its I/O thread; `None`: the default one.
    fn iothread(&self) -> Option<&Id> {
        None
    }
    /// The host file that it needs at the start, if any.
    fn path(&self) -> Option<&Path> {
        None
    }
    /// Its character back-end, if any.
    fn chars(&self) -> Option<&CharBackend> {
        None
    }
    /// Its saved form.
    fn saved(&self) -> saved::Contents;
}

/// A restored device cannot be changed as requested: its guest would notice.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the saved machine has {saved} {what}, and {flag} asks for {asked}: leave {flag} out")]
pub struct Differs {
    /// The setting.
    pub what: &'static str,
    /// The flag that requests the change.
    pub flag: &'static str,
    /// The saved value.
    pub saved: String,
    /// The requested value.
    pub asked: String,
}

impl DeviceConfig {
    /// Its properties.
    pub fn facts(&self) -> &dyn Facts {
        match self {
            Self::Console(console) => console,
            Self::Rng(rng) => rng,
            Self::Balloon(balloon) => balloon,
        }
    }

    /// The device that was saved as `contents` in a slot on `iothread`; `None` for the contents of
    /// a slot for disks or NICs.
    ///
    /// # Errors
    /// When it is outside of its limits.
    pub(crate) fn restored(
        contents: &saved::Contents,
        iothread: Option<&Id>,
    ) -> Result<Option<Self>, DescriptionError> {
        Ok(Some(match contents {
            saved::Contents::Disk(_) | saved::Contents::Nic(_) => return Ok(None),
            saved::Contents::Console(saved) => {
                Self::Console(ConsoleConfig::restored(saved, iothread)?)
            }
            saved::Contents::Rng(saved) => Self::Rng(RngConfig::restored(saved)?),
            saved::Contents::Balloon(saved) => Self::Balloon(BalloonConfig::restored(saved)?),
        }))
    }

    /// Take from `wanted` the settings that may differ for a restored device; `None` when `wanted`
    /// is of another kind, an error when the guest would notice the change.
    pub fn replace(&mut self, wanted: &Self) -> Option<Result<(), Differs>> {
        match (self, wanted) {
            (Self::Console(saved), Self::Console(wanted)) => saved.replace(wanted),
            (Self::Rng(saved), Self::Rng(wanted)) => saved.replace(wanted),
            (Self::Balloon(saved), Self::Balloon(wanted)) => return Some(saved.replace(wanted)),
            _ => return None,
        }
        Some(Ok(()))
    }

    /// Give it this id.
    pub(crate) fn set_id(&mut self, id: Id) {
        match self {
            Self::Console(console) => console.id = id,
            Self::Rng(rng) => rng.id = id,
            Self::Balloon(balloon) => balloon.id = id,
        }
    }

    /// Its position among the slots, after those for disks and NICs.
    pub(crate) fn order(&self) -> u8 {
        match self {
            Self::Console(_) => 0,
            Self::Rng(_) => 1,
            Self::Balloon(_) => 2,
        }
    }

    /// The part of a configuration that it is.
    pub fn part(&self) -> Part {
        Part::Device(self.facts().slot())
    }
}
