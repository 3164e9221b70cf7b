//! A saved machine in a directory: the state file, the memory file, and those of the saves that it
//! builds on. Reading changes nothing.
use std::{
    fs::File,
    io::{self, BufReader, Read},
    ops::Range,
    path::{Path, PathBuf},
};

use crate::{
    Config, FileError, State,
    backing_chain::{BackingChain, Layer},
    memory_file::{self, BLOCK, MemoryFileError},
    regular_file::open_regular,
};

/// The state file, which holds everything but memory.
pub const STATE: &str = "state";
/// The memory file.
pub const MEMORY: &str = "memory";
/// [`STATE`] while it is being written.
pub const NEW_STATE: &str = "state.new";
/// [`MEMORY`] while it is being written; also the complete memory of a state that was renamed just
/// before the process was killed.
pub const NEW_MEMORY: &str = "memory.new";
/// Most saves that may build on each other, including the full one at the end.
pub const MAX_CHAIN: usize = 64;

/// Why a saved state cannot be used.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the error messages describe them")]
pub enum DirectoryError {
    #[error("cannot open {}", path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("{} cannot be restored", path.display())]
    State { path: PathBuf, source: FileError },
    #[error("{} cannot be restored: it has {found} checksums for {needed} blocks of memory", path.display())]
    Sums { path: PathBuf, found: u64, needed: u64 },
    #[error("{} cannot be used", path.display())]
    Memory { path: PathBuf, source: MemoryFileError },
    #[error("{} is incremental, and the save that it builds on cannot be used", path.display())]
    Base { path: PathBuf, source: Box<Self> },
    #[error("{} has been replaced by a later save", path.display())]
    BaseChanged { path: PathBuf },
    #[error("{} has a different memory size", path.display())]
    BaseSize { path: PathBuf },
    #[error("{} builds on itself", path.display())]
    Loop { path: PathBuf },
    #[error("more than {MAX_CHAIN} saves build on each other, down to {}", path.display())]
    TooDeep { path: PathBuf },
}

impl From<(PathBuf, MemoryFileError)> for DirectoryError {
    fn from((path, source): (PathBuf, MemoryFileError)) -> Self {
        Self::Memory { path, source }
    }
}

/// Read the state in the file `path`, and its CRC-32.
///
/// # Errors
/// When it is not a valid state.
pub fn read(path: &Path) -> Result<(State, u32), DirectoryError> {
    let file = open(path)?;
    let mut summed = Summed(file, crc32fast::Hasher::new());
    let state = State::read(BufReader::new(&mut summed))
        .map_err(|source| DirectoryError::State { path: path.into(), source })?;
    // The whole file has been read.
    Ok((state, summed.1.finalize()))
}

/// The memory that belongs to `state`, saved in `directory`. Its checksums and changed ranges are
/// moved out of `state`.
///
/// # Errors
/// The first error found.
pub fn memory(directory: &Path, state: &mut State) -> Result<BackingChain, DirectoryError> {
    let size = state.config.machine.memory.size;
    let (needed, found) = (size.div_ceil(BLOCK), state.sums.len() as u64);
    if needed != found {
        return Err(DirectoryError::Sums { path: directory.join(STATE), found, needed });
    }
    let (changed, sums) = (std::mem::take(&mut state.changed), std::mem::take(&mut state.sums));
    let layers = layers(directory, &state.config, changed)?;
    Ok(BackingChain { size, layers, sums })
}

/// The memory files of `config`, saved in `directory`, and of all saves that it builds on; the
/// lowest first.
fn layers(
    directory: &Path,
    config: &Config,
    changed: Vec<Range<u64>>,
) -> Result<Vec<Layer>, DirectoryError> {
    let size = config.machine.memory.size;
    let mut directory = directory.to_owned();
    let (mut config, mut changed) = (config.clone(), changed);
    let mut seen = vec![config.id];
    let mut layers = Vec::new();
    loop {
        let (path, file) = find_memory(&directory, &config)?;
        let Some(base) = config.base.take() else {
            layers.push(Layer { path, file, ranges: std::iter::once(0..size).collect() });
            layers.reverse();
            return Ok(layers);
        };
        layers.push(Layer { path, file, ranges: std::mem::take(&mut changed) });
        let below = directory.join(&base.path);
        let under =
            |source| DirectoryError::Base { path: directory.clone(), source: Box::new(source) };
        if seen.contains(&base.id) {
            return Err(under(DirectoryError::Loop { path: below }));
        }
        if seen.len() >= MAX_CHAIN {
            return Err(under(DirectoryError::TooDeep { path: below }));
        }
        seen.push(base.id);
        let (state, sum) = read(&below.join(STATE)).map_err(under)?;
        if state.config.id != base.id || sum != base.state.0 {
            return Err(under(DirectoryError::BaseChanged { path: below }));
        }
        if state.config.machine.memory.size != size {
            return Err(under(DirectoryError::BaseSize { path: below }));
        }
        (config, changed, directory) = (state.config, state.changed, below);
    }
}

/// Open the regular file `path`. Opening another kind of file put in its place, such as a FIFO,
/// could block.
fn open(path: &Path) -> Result<File, DirectoryError> {
    open_regular(path, File::options().read(true))
        .map_err(|source| DirectoryError::Open { path: path.into(), source })
}

/// A reader that computes the checksum of what is read.
struct Summed(File, crc32fast::Hasher);

impl Read for Summed {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let length = self.0.read(buf)?;
        self.1.update(buf.get(..length).ok_or(io::ErrorKind::InvalidData)?);
        Ok(length)
    }
}

/// `memory`, or `memory.new` if the saving process was killed before it could rename it.
fn find_memory(directory: &Path, config: &Config) -> Result<(PathBuf, File), DirectoryError> {
    let try_one = |name: &str| {
        let path = directory.join(name);
        let file = open(&path)?;
        match memory_file::belongs(&file, config.id.into(), config.machine.memory.size) {
            Ok(()) => Ok((path, file)),
            Err(source) => Err(DirectoryError::Memory { path, source }),
        }
    };
    try_one(MEMORY).or_else(|why| try_one(NEW_MEMORY).map_err(|_| why))
}

/// The memory file that belongs to the state in `directory`, if there is a complete one.
pub fn memory_of(directory: &Path) -> Option<PathBuf> {
    let (state, _) = read(&directory.join(STATE)).ok()?;
    find_memory(directory, &state.config).ok().map(|(path, _)| path)
}
