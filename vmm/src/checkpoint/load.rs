//! Loading from a directory. Everything that can be checked is checked before anything is made.
use std::{
    fs::File,
    io::{self, BufReader},
    path::{Path, PathBuf},
};

use machine::{
    MachineState, Memory,
    config::{MachineConfig, limits},
    memory::{self, MemoryError},
};

use super::{
    MEMORY, NEW_MEMORY, STATE,
    content::{self, Config, Content, ContentError},
    image::{self, BLOCK, ImageError},
};

/// Why a saved state cannot be restored.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum LoadError {
    #[error("cannot open {}", path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("{} cannot be restored", path.display())]
    State { path: PathBuf, source: ContentError },
    #[error("{} cannot be restored: {what}", path.display())]
    Limits { path: PathBuf, what: String },
    #[error("{} cannot be used", path.display())]
    Image { path: PathBuf, source: ImageError },
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// A state that was read and found whole.
pub struct Loaded {
    pub config: Config,
    pub state: MachineState,
    path: PathBuf,
    file: File,
    sums: Vec<u32>,
}

/// Read the state in `directory` and find the memory that belongs to it.
///
/// # Errors
/// The first thing that is wrong.
pub fn load(directory: &Path) -> Result<Loaded, LoadError> {
    let path = directory.join(STATE);
    let Content { config, state, sums } = read(&path)?;
    check_limits(&config.machine)
        .and_then(|()| {
            let size = config.machine.memory.size;
            let (needed, found) = (size.div_ceil(BLOCK), sums.len() as u64);
            match needed == found {
                true => Ok(()),
                false => Err(format!("it has {found} checksums for {needed} blocks of memory")),
            }
        })
        .map_err(|what| LoadError::Limits { path, what })?;
    let (path, file) = find_memory(directory, &config)?;
    Ok(Loaded { config, state, path, file, sums })
}

/// Compare all that is in `directory` with its checksums.
///
/// # Errors
/// The first thing that is wrong.
pub fn check(directory: &Path) -> Result<(), LoadError> {
    let loaded = load(directory)?;
    let Loaded { config, path, file, sums, .. } = loaded;
    image::verify(&file, config.machine.memory.size, &sums, |_, _| Ok(()))
        .map_err(|source| LoadError::Image { path, source })
}

impl Loaded {
    /// The guest's memory as it was: mapped, which takes no time and trusts the file, or copied and
    /// compared with its checksums. Memory that is shared or has a file of its own is copied.
    ///
    /// # Errors
    /// When there is not enough of it, or the file is damaged.
    pub fn memory(&self, mapped: bool) -> Result<Memory, LoadError> {
        let config = &self.config.machine.memory;
        if mapped && !config.shared && config.path.is_none() {
            return Ok(memory::image::map(config, &self.file)?);
        }
        let memory = memory::allocate(config)?;
        let copy = |at, bytes: &[u8]| memory::image::write(&memory, at, bytes);
        image::verify(&self.file, config.size, &self.sums, copy)
            .map_err(|source| LoadError::Image { path: self.path.clone(), source })?;
        Ok(memory)
    }
}

fn read(path: &Path) -> Result<Content, LoadError> {
    let file = File::open(path).map_err(|source| LoadError::Open { path: path.into(), source })?;
    content::read(BufReader::new(file))
        .map_err(|source| LoadError::State { path: path.into(), source })
}

/// `memory`, or `memory.new` if the one who saved it was killed before it could rename it.
fn find_memory(directory: &Path, config: &Config) -> Result<(PathBuf, File), LoadError> {
    let try_one = |name: &str| {
        let path = directory.join(name);
        let file =
            File::open(&path).map_err(|source| LoadError::Open { path: path.clone(), source })?;
        match image::belongs(&file, config.id, config.machine.memory.size) {
            Ok(()) => Ok((path, file)),
            Err(source) => Err(LoadError::Image { path, source }),
        }
    };
    try_one(MEMORY).or_else(|why| try_one(NEW_MEMORY).map_err(|_| why))
}

/// The memory file that belongs to the state in `directory`, if there is a whole one.
pub fn memory_of(directory: &Path) -> Option<PathBuf> {
    let content = read(&directory.join(STATE)).ok()?;
    find_memory(directory, &content.config).ok().map(|(path, _)| path)
}

/// What the command line would have refused.
fn check_limits(config: &MachineConfig) -> Result<(), String> {
    fn within<T: PartialOrd + std::fmt::Display>(
        what: &str,
        value: T,
        range: std::ops::RangeInclusive<T>,
    ) -> Result<(), String> {
        match range.contains(&value) {
            true => Ok(()),
            false => Err(format!("{what} {value}, not in {}..={}", range.start(), range.end())),
        }
    }
    within("vCPUs", config.cpus, limits::CPUS)?;
    let memory = config.memory.size;
    within("bytes of memory", memory, limits::MIN_MEMORY..=limits::MAX_MEMORY)?;
    if !memory.is_multiple_of(limits::MEMORY_UNIT) {
        return Err(format!("{memory} bytes of memory, no multiple of {}", limits::MEMORY_UNIT));
    }
    let t = config.topology;
    let product: u64 =
        [t.sockets, t.dies, t.clusters, t.cores, t.threads].iter().map(|n| u64::from(*n)).product();
    let cpus = u64::from(config.cpus);
    within("vCPUs in its topology", product, cpus..=cpus)?;
    within("I/O threads", config.iothreads.len(), 0..=limits::MAX_IOTHREADS)?;
    for disk in &config.disks {
        within("queues of a disk", disk.queues, limits::DISK_QUEUES)?;
        within("queue size of a disk", disk.queue_size, limits::DISK_QUEUE_SIZE)?;
    }
    for nic in &config.nics {
        within("queue pairs of a NIC", nic.queue_pairs, limits::NIC_QUEUE_PAIRS)?;
        within("queue size of a NIC", nic.queue_size, limits::NIC_QUEUE_SIZE)?;
    }
    Ok(())
}
