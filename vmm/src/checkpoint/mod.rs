//! Checkpoints: a machine's whole state outside its process.
//!
//! ```text
//! job               the thread that writes, and the steps that the machine must be stopped for
//! save              into a directory: all of it or nothing
//! memory_file       writing guest memory, with a checksum for each block of 2 MiB
//! send              all of it into a socket, a pipe or a file
//! dry_run           the first half of a restore; also before a save counts
//! disks             copies of disks that a save keeps beside the memory
//!
//! load              out of a directory, checked before anything is touched
//! backing_memory    guest memory from the files of a save
//! demand_paging     memory that is read while the guest runs
//! children          copies of the disks of a save for a restored machine
//! overrides         what a restored machine may have in other places: images, taps, sockets
//!
//! incoming          opening the source of a stream
//! receive           out of a stream
//! arrival           the thread that takes a machine in, and the one that reads it from a stream
//! assembly          building a machine from what was received or read
//! dialogue          messages beside the machine where a stream has a return path
//! cancellable_poll  waiting for one descriptor, cancellable by another one
//! ```
//! Files in a directory are read by the crate `state`.
mod arrival;
mod assembly;
mod backing_memory;
mod cancellable_poll;
mod children;
mod demand_paging;
mod dialogue;
mod disks;
mod dry_run;
mod incoming;
pub mod job;
mod load;
mod memory_file;
mod overrides;
mod receive;
mod save;
mod send;
#[cfg(test)]
mod tests;

pub use arrival::{Arrival, Step as ArrivalStep};
pub use assembly::Arrived;
pub(crate) use assembly::{Assembly, take};
pub use children::{ChildError, Children};
pub use dialogue::{Hello, Voice};
pub use dry_run::DryRunError;
pub use incoming::IncomingError;
pub use load::{LoadError, load};
pub use memory_file::Progress;
pub use overrides::OverrideError;
pub use receive::{ReceiveError, Received, receive};
pub use save::{Directory, SaveError, Saved, Sink};
pub use send::{Cancel, Peer, Stream, To, connected, last_frames};

use std::path::PathBuf;

use config::incoming::{Incoming, Mapping, Source};
use machine::{BuildError, memory::MemoryError};
use state::directory::MEMORY;

/// Why a machine could not be restored.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each describes itself")]
pub enum RestoreError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Incoming(#[from] IncomingError),
    #[error(transparent)]
    Receive(#[from] ReceiveError),
    #[error(transparent)]
    Override(#[from] OverrideError),
    #[error(transparent)]
    Child(#[from] ChildError),
    #[error(transparent)]
    DryRun(#[from] DryRunError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error("the restore was cancelled")]
    Cancelled,
    #[error("the saved machine cannot run here")]
    Build(#[from] BuildError),
}

/// The file that the memory of a machine restored like this is mapped from, if it is mapped.
pub fn mapped(incoming: &Incoming) -> Option<PathBuf> {
    match &incoming.source {
        Source::Directory { path, mapping: Mapping::On, .. } => Some(path.join(MEMORY)),
        _ => None,
    }
}
