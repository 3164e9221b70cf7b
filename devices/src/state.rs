//! State that leaves the process: plain, versioned, separate from runtime types.
use serde::{Serialize, de::DeserializeOwned};

use crate::backend::disk::DiskError;

/// A component whose whole run-time state is one plain struct.
pub trait Snapshot {
    /// Names the format in the stream; never reused for something else.
    const KIND: &'static str;
    /// Raised on every incompatible change of `State`.
    const VERSION: u32;
    /// The saved form. Not the runtime type, even when the fields are equal today.
    type State: Serialize + DeserializeOwned;

    /// Read the state of a quiet component.
    fn save(&self) -> Self::State;
    /// Validate and take over a state. The bytes are untrusted.
    fn restore(&mut self, state: Self::State) -> Result<(), StateError>;
}

/// One component's state in a stream.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Section {
    /// `Snapshot::KIND` of the writer.
    pub kind: String,
    /// `Snapshot::VERSION` of the writer.
    pub version: u32,
    /// The encoded `Snapshot::State`.
    pub body: Vec<u8>,
}

impl Section {
    /// Save `from` into a section.
    pub fn of<S: Snapshot>(from: &S) -> Result<Self, StateError> {
        let body = serde_json::to_vec(&from.save())?;
        Ok(Self { kind: S::KIND.into(), version: S::VERSION, body })
    }

    /// Restore `into` from this section, if it is of the right kind and version.
    pub fn pour<S: Snapshot>(&self, into: &mut S) -> Result<(), StateError> {
        if self.kind != S::KIND || self.version != S::VERSION {
            return Err(StateError::Unexpected { kind: self.kind.clone(), version: self.version });
        }
        into.restore(serde_json::from_slice(&self.body)?)
    }
}

/// Why state could not be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another component's section, or another version of it.
    #[error("unexpected section {kind} v{version}")]
    #[expect(missing_docs, reason = "shown by the message")]
    Unexpected { kind: String, version: u32 },
    /// The bytes do not decode.
    #[error("malformed section")]
    Malformed(#[from] serde_json::Error),
    /// The bytes decode to something no device can be in.
    #[error("invalid state: {0}")]
    Invalid(&'static str),
    /// A disk is not the one that was saved.
    #[error(transparent)]
    Disk(#[from] DiskError),
}
