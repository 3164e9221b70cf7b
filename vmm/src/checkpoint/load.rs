//! Loading from a directory. Everything that can be checked is checked before anything is made.
use std::{
    fs::File,
    io::{self, BufReader, Read},
    path::{Path, PathBuf},
};

use machine::{Description, DescriptionError, memory::MemoryError, open_regular};
use state::{Config, FileError, State};

use super::{
    ChildError, MEMORY, NEW_MEMORY, STATE, children,
    image::{self, BLOCK, ImageError},
    layers::{Layer, Layers},
    lazy::LazyError,
};

/// Most saves that build on each other, the whole one at the end included.
pub const DEEPEST: usize = 64;

/// Why a saved state cannot be restored.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum LoadError {
    #[error("cannot open {}", path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("{} cannot be restored", path.display())]
    State { path: PathBuf, source: FileError },
    #[error("{} cannot be restored", path.display())]
    Description { path: PathBuf, source: DescriptionError },
    #[error("{} cannot be restored: it has {found} checksums for {needed} blocks of memory", path.display())]
    Sums { path: PathBuf, found: u64, needed: u64 },
    #[error("{} cannot be used", path.display())]
    Image { path: PathBuf, source: ImageError },
    #[error("{} holds changes only, and what it builds on cannot be used", path.display())]
    Base { path: PathBuf, source: Box<LoadError> },
    #[error("{} has been saved anew since", path.display())]
    BaseChanged { path: PathBuf },
    #[error("{} has another amount of memory", path.display())]
    BaseSize { path: PathBuf },
    #[error("{} builds on itself", path.display())]
    Loop { path: PathBuf },
    #[error("more than {DEEPEST} saves build on each other, down to {}", path.display())]
    TooDeep { path: PathBuf },
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Lazy(#[from] LazyError),
    #[error(transparent)]
    Child(#[from] ChildError),
}

/// A state that was read and found whole.
pub struct Loaded {
    pub state: State,
    /// What it is made of.
    pub description: Description,
    pub layers: Layers,
}

/// Read the state in `directory` and find the memory that belongs to it.
///
/// # Errors
/// The first thing that is wrong.
pub fn load(directory: &Path) -> Result<Loaded, LoadError> {
    let path = directory.join(STATE);
    let (mut state, _) = read(&path)?;
    let description = Description::try_from(&state.config)
        .map_err(|source| LoadError::Description { path: path.clone(), source })?;
    let size = state.config.machine.memory.size;
    let (needed, found) = (size.div_ceil(BLOCK), state.sums.len() as u64);
    if needed != found {
        return Err(LoadError::Sums { path, found, needed });
    }
    let (changed, sums) = (std::mem::take(&mut state.changed), std::mem::take(&mut state.sums));
    let layers = chain(directory, &state.config, changed)?;
    Ok(Loaded { state, description, layers: Layers { size, layers, sums } })
}

/// The memory files of `config`, saved in `directory`, and of all that it builds on; the lowest
/// first.
fn chain(
    directory: &Path,
    config: &Config,
    changed: Vec<std::ops::Range<u64>>,
) -> Result<Vec<Layer>, LoadError> {
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
        let under = |source| LoadError::Base { path: directory.clone(), source: Box::new(source) };
        if seen.contains(&base.id) {
            return Err(under(LoadError::Loop { path: below }));
        }
        if seen.len() >= DEEPEST {
            return Err(under(LoadError::TooDeep { path: below }));
        }
        seen.push(base.id);
        let (content, sum) = read(&below.join(STATE)).map_err(under)?;
        if content.config.id != base.id || sum != base.state.0 {
            return Err(under(LoadError::BaseChanged { path: below }));
        }
        if content.config.machine.memory.size != size {
            return Err(under(LoadError::BaseSize { path: below }));
        }
        (config, changed, directory) = (content.config, content.changed, below);
    }
}

/// Compare all that is in `directory`, and in those that it builds on, with its checksums.
///
/// # Errors
/// The first thing that is wrong.
pub fn check(directory: &Path) -> Result<(), LoadError> {
    let image = |(path, source)| LoadError::Image { path, source };
    let Loaded { state, layers, .. } = load(directory)?;
    children::check(directory, &state.config)?;
    layers.open().map_err(image)?.verify(|_, _| Ok(())).map_err(image)
}

/// The state in the file `path`, and its CRC-32.
///
/// # Errors
/// When it is none.
pub fn read(path: &Path) -> Result<(State, u32), LoadError> {
    let file = open(path)?;
    let mut summed = Summed(file, crc32fast::Hasher::new());
    let state = State::read(BufReader::new(&mut summed))
        .map_err(|source| LoadError::State { path: path.into(), source })?;
    // The reader has seen its end.
    Ok((state, summed.1.finalize()))
}

/// The regular file `path`. Anything else that has got there, such as a FIFO, would make its reader
/// wait.
fn open(path: &Path) -> Result<File, LoadError> {
    open_regular(path, File::options().read(true))
        .map_err(|source| LoadError::Open { path: path.into(), source })
}

/// Adds up what is read.
struct Summed(File, crc32fast::Hasher);

impl Read for Summed {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let length = self.0.read(buf)?;
        self.1.update(buf.get(..length).unwrap_or_default());
        Ok(length)
    }
}

/// `memory`, or `memory.new` if the one who saved it was killed before it could rename it.
fn find_memory(directory: &Path, config: &Config) -> Result<(PathBuf, File), LoadError> {
    let try_one = |name: &str| {
        let path = directory.join(name);
        let file = open(&path)?;
        match image::belongs(&file, config.id.into(), config.machine.memory.size) {
            Ok(()) => Ok((path, file)),
            Err(source) => Err(LoadError::Image { path, source }),
        }
    };
    try_one(MEMORY).or_else(|why| try_one(NEW_MEMORY).map_err(|_| why))
}

/// The memory file that belongs to the state in `directory`, if there is a whole one.
pub fn memory_of(directory: &Path) -> Option<PathBuf> {
    let (content, _) = read(&directory.join(STATE)).ok()?;
    find_memory(directory, &content.config).ok().map(|(path, _)| path)
}
