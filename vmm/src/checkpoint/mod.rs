//! Checkpoints: a machine's whole state outside of its process.
//!
//! ```text
//! rehearse  the first half of a restore; before a save counts, too
//! job       the thread that writes, and the steps that the machine must stand still for
//! image     guest memory in a file, with a checksum for each block of 2 MiB
//! save      both into a directory: all of it or nothing
//! send      all of it into a socket, a pipe or a file
//! load      out of a directory, checked before anything is touched
//! layers    memory in several files: one that is whole, and what has changed since
//! lazy      memory that is read while the guest runs
//! incoming  where a stream comes from
//! receive   out of a stream
//! arrival   the thread that takes a machine in, and the one that reads it from a stream
//! assembly  what has come, made into a machine
//! disks     copies of disks that a save keeps beside the memory
//! children  copies of those for a restored machine
//! dialogue  what is said beside the machine where a stream goes both ways
//! wait      for one descriptor until another one says to stop
//! adapt     what a restored machine may have in other places: images, taps, sockets
//! ```
mod adapt;
mod arrival;
mod assembly;
mod children;
mod dialogue;
mod disks;
mod image;
mod incoming;
pub mod job;
mod layers;
mod lazy;
mod load;
mod receive;
mod rehearse;
mod save;
mod send;
#[cfg(test)]
mod tests;
mod wait;

pub use adapt::AdaptError;
pub use arrival::{Arrival, Step as ArrivalStep};
pub use assembly::Arrived;
pub use children::{ChildError, Children};
pub use dialogue::{Hello, Voice};
pub use image::{ImageError, Progress};
pub use incoming::IncomingError;
pub use load::{LoadError, check, load};
pub use receive::{ReceiveError, Received, receive};
pub use rehearse::RehearseError;
pub use save::{Directory, SaveError, Saved, Sink};
pub use send::{Cancel, Peer, Stream, To};

use std::path::PathBuf;

use machine::{BuildError, memory::MemoryError};

use crate::cli::{Incoming, Mapped, Source};

/// Why a machine could not be restored.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each says it itself")]
pub enum RestoreError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Incoming(#[from] IncomingError),
    #[error(transparent)]
    Receive(#[from] ReceiveError),
    #[error(transparent)]
    Adapt(#[from] AdaptError),
    #[error(transparent)]
    Child(#[from] ChildError),
    #[error(transparent)]
    Rehearse(#[from] RehearseError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error("the machine was not taken in: that was cancelled")]
    Cancelled,
    #[error("the saved machine cannot go on here")]
    Build(#[from] BuildError),
}

/// The file that the memory of a machine restored in this way is mapped from, if it is.
pub fn mapped(incoming: &Incoming) -> Option<PathBuf> {
    match &incoming.source {
        Source::Directory { path, mapped: Mapped::On, .. } => Some(path.join(MEMORY)),
        _ => None,
    }
}

/// The file of everything but memory.
const STATE: &str = "state";
/// The file of guest memory.
const MEMORY: &str = "memory";
/// [`STATE`] in the making.
const NEW_STATE: &str = "state.new";
/// [`MEMORY`] in the making; also the memory of a state that was put in its place a moment before
/// the process was killed.
const NEW_MEMORY: &str = "memory.new";
