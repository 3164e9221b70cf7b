//! The first half of a restore, which needs neither KVM nor memory nor files of the host. Every
//! restore begins with it, and every save ends with it, on the bytes that were just written: a save
//! that could not be restored does not count as one.
use std::io;

use config::{Description, DescriptionError};
use machine::{BuildError, Restorable, dry_restore};
use state::{Config, FileError, Frames, Sections};

/// Why a saved machine cannot be restored on any host.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the error messages describe them")]
pub enum DryRunError {
    #[error("the saved state cannot be restored")]
    Read(#[from] FileError),
    #[error("the saved state cannot be restored")]
    Description(#[from] DescriptionError),
    #[error("the saved machine cannot be restored")]
    Build(#[from] BuildError),
    #[error("the memory that was saved does not belong to the state")]
    Memory(#[source] state::memory_file::MemoryFileError),
    #[error("the written data does not read back the same")]
    Changed,
    #[error("cannot read back what was saved")]
    Io(#[source] io::Error),
}

/// Check limits, and load the state into every device, without back-ends.
///
/// # Errors
/// The first error found.
pub fn dry_run(config: &Config, sections: Sections) -> Result<Restorable, DryRunError> {
    Ok(dry_restore(Description::try_from(config)?, sections)?)
}

/// The same for the frames at the end of a stream, from its last configuration on.
///
/// # Errors
/// The first error found.
pub fn dry_run_frames(bytes: &[u8]) -> Result<(), DryRunError> {
    let mut frames = Frames::begin(bytes).map_err(FileError::from)?;
    let config = frames.config()?;
    let sections = frames.sections()?;
    frames.end()?;
    dry_run(&config, sections).map(drop)
}
