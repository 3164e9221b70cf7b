//! Devices that have a slot of their own which nothing else can take: one at most of each kind. Each
//! kind has a file with all that a configuration knows of it: its type, how file and command line spell
//! it, its saved form, and what may be another one where it is restored.
//!
//! A new kind is a file here, a variant of [`DeviceConfig`] with its place in [`DeviceConfig::facts`]
//! and [`DeviceConfig::restored`], and a row of the table in `cli/kinds.rs`.
use std::path::Path;

use state::config as saved;

use crate::{
    CharBackend, Part,
    saved::{DescriptionError, check_ids},
};

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

/// What is asked of a device of any kind.
pub trait Facts {
    /// Its kind, in messages, and the id of its slot in saved states.
    fn slot(&self) -> &'static str;
    /// The flag that tells a restored machine of another one.
    fn flag(&self) -> &'static str;
    /// Its id, unique among all devices.
    fn id(&self) -> &str;
    /// Which I/O thread carries it; `None`: the default one.
    fn iothread(&self) -> Option<&str> {
        None
    }
    /// The file of the host that it begins with, if it needs one.
    fn path(&self) -> Option<&Path> {
        None
    }
    /// Where its characters go to and come from, if it has any.
    fn chars(&self) -> Option<&CharBackend> {
        None
    }
    /// Its saved form.
    fn saved(&self) -> saved::Contents;
}

/// A restored device cannot be as it was asked for: its guest would notice.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the saved machine has {saved} {what}, and {flag} asks for {asked}: leave {flag} out")]
pub struct Differs {
    /// What.
    pub what: &'static str,
    /// The flag that asks for it.
    pub flag: &'static str,
    /// As it was saved.
    pub saved: String,
    /// As it was asked for.
    pub asked: String,
}

impl DeviceConfig {
    /// What is asked of all kinds.
    pub fn facts(&self) -> &dyn Facts {
        match self {
            Self::Console(console) => console,
            Self::Rng(rng) => rng,
            Self::Balloon(balloon) => balloon,
        }
    }

    /// The one that was saved as `contents` in a slot on `iothread`; `None` for what is in a slot for
    /// disks or NICs.
    ///
    /// # Errors
    /// When it is outside of its limits.
    pub(crate) fn restored(
        contents: &saved::Contents,
        iothread: Option<&str>,
    ) -> Result<Option<Self>, DescriptionError> {
        let device = match contents {
            saved::Contents::Disk(_) | saved::Contents::Nic(_) => return Ok(None),
            saved::Contents::Console(saved) => {
                Self::Console(ConsoleConfig::restored(saved, iothread))
            }
            saved::Contents::Rng(saved) => Self::Rng(RngConfig::restored(saved)?),
            saved::Contents::Balloon(saved) => Self::Balloon(BalloonConfig::restored(saved)),
        };
        check_ids(device.facts().slot(), [device.facts().id()])?;
        Ok(Some(device))
    }

    /// Take over what a restored device may have in another place than the saved one, from `wanted`;
    /// `None` when that is of another kind.
    ///
    /// # Errors
    /// When the guest would notice.
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
    pub(crate) fn set_id(&mut self, id: String) {
        match self {
            Self::Console(console) => console.id = id,
            Self::Rng(rng) => rng.id = id,
            Self::Balloon(balloon) => balloon.id = id,
        }
    }

    /// Its place among the slots, behind those for disks and NICs.
    pub(crate) fn order(&self) -> u8 {
        match self {
            Self::Console(_) => 0,
            Self::Rng(_) => 1,
            Self::Balloon(_) => 2,
        }
    }

    /// What of a configuration it is.
    pub fn part(&self) -> Part {
        Part::Device(self.facts().slot())
    }
}
