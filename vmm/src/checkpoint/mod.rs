//! Checkpoints: a machine's whole state outside of its process.
//!
//! ```text
//! stream   frames, each with its length and checksum: Config | Section.. | Sums | End
//! content  what is in those frames
//! image    guest memory in a file, with a checksum for each block of 2 MiB
//! save     both into a directory: all of it or nothing
//! load     both out of a directory, checked before anything is touched
//! adapt    what a restored machine may have in other places: images, taps, sockets
//! job      the thread that writes, and the steps that the machine must stand still for
//! ```
mod adapt;
mod content;
mod image;
pub mod job;
mod load;
mod save;
mod stream;
#[cfg(test)]
mod tests;

pub use adapt::AdaptError;
pub use content::ContentError;
pub use load::{LoadError, check, load};
pub use save::SaveError;
pub use stream::StreamError;

use std::path::PathBuf;

use machine::{BuildError, Machine, Report, Saved, config::MachineConfig};

use crate::{cli::Incoming, lifecycle::Halt};

/// Why a machine could not be restored.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each says it itself")]
pub enum RestoreError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Adapt(#[from] AdaptError),
    #[error("the saved machine cannot go on here")]
    Build(#[from] BuildError),
}

/// The machine saved in a directory, with the disks, NICs and character devices of `flags` in place
/// of its own. It stands still; the second part says why its guest cannot go on, if it cannot.
///
/// # Errors
/// The first thing that is wrong, before a device of the host is touched.
pub fn restore(
    incoming: &Incoming,
    flags: &MachineConfig,
    report: Report,
) -> Result<(Machine, Option<Halt>), RestoreError> {
    let mut loaded = load(&incoming.directory)?;
    adapt::adapt(&mut loaded.config, &incoming.asked, flags)?;
    adapt::check_disks(&loaded.config)?;
    let memory = loaded.memory(incoming.mapped)?;
    let (config, occupied) = (&loaded.config.machine, &loaded.config.occupied);
    let saved = Saved { config, occupied, memory, state: loaded.state };
    Ok((Machine::restored(saved, report)?, loaded.config.halted))
}

/// The file that the memory of a machine restored in this way is mapped from, if it is.
pub fn mapped(incoming: &Incoming) -> Option<PathBuf> {
    incoming.mapped.then(|| incoming.directory.join(MEMORY))
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
