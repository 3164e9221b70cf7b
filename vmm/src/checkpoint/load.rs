//! Loading from a directory. Everything that can be checked is checked before anything is built.
use std::path::{Path, PathBuf};

use config::{Description, DescriptionError};
use machine::memory::MemoryError;
use state::{
    State,
    backing_chain::BackingChain,
    directory::{self, DirectoryError, STATE},
};

use super::{ChildError, demand_paging::DemandPagingError};

/// Why a saved state cannot be restored.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the error messages describe them")]
pub enum LoadError {
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    #[error("{} cannot be restored", path.display())]
    Description { path: PathBuf, source: DescriptionError },
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    DemandPaging(#[from] DemandPagingError),
    #[error(transparent)]
    Child(#[from] ChildError),
}

/// A state that was read and is complete.
pub struct Loaded {
    pub state: State,
    /// The configuration of the machine.
    pub description: Description,
    pub memory: BackingChain,
}

/// Read the state in `directory`, and find the memory file that belongs to it.
///
/// # Errors
/// The first error found.
pub fn load(directory: &Path) -> Result<Loaded, LoadError> {
    let path = directory.join(STATE);
    let (mut state, _) = directory::read(&path)?;
    let description = Description::try_from(&state.config)
        .map_err(|source| LoadError::Description { path, source })?;
    let memory = directory::memory(directory, &mut state)?;
    Ok(Loaded { state, description, memory })
}
