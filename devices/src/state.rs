//! Saving and restoring of device state, in the format that the crate `state` defines.
pub use ::state::Section;
use ::state::{Saved, SectionError};

use crate::{backend::disk::DiskError, worker::Lost};

/// A component whose whole run-time state is one saved struct.
pub trait Snapshot {
    /// The saved form.
    type State: Saved;

    /// Return the state of a component that is not running.
    ///
    /// # Errors
    /// When its worker is lost, and what that knew.
    fn save(&self) -> Result<Self::State, StateError>;
    /// Validate and apply a state. It is untrusted input.
    ///
    /// # Errors
    /// When the component cannot be in that state.
    fn restore(&mut self, state: Self::State) -> Result<(), StateError>;
}

/// Save `from` into a section called `id`.
///
/// # Errors
/// When its worker is lost, or it cannot be encoded as JSON.
pub fn save<S: Snapshot>(id: &str, from: &S) -> Result<Section, StateError> {
    Ok(Section::of(id, &from.save()?)?)
}

/// Restore `into` from `section`, whatever its id.
///
/// # Errors
/// When it is of another kind, or describes a state that `into` cannot be in.
pub fn restore<S: Snapshot>(section: &Section, into: &mut S) -> Result<(), StateError> {
    into.restore(section.read()?)
}

/// Why state could not be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// It belongs to another component, has an unknown version, or is malformed.
    #[error(transparent)]
    Section(#[from] SectionError),
    /// It describes a state that no device can be in.
    #[error("invalid state: {0}")]
    Invalid(&'static str),
    /// The I/O thread has ended, and with it the worker that held the state.
    #[error(
        "the I/O thread that had the device's worker has ended; the guest has to reset the device"
    )]
    WorkerLost(#[from] Lost),
    /// A disk is not the one that was saved.
    #[error(transparent)]
    Disk(#[from] DiskError),
}
