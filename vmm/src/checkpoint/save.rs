//! Saving into a directory: both files, or the old ones as they were.
//!
//! ```text
//! memory.new, state.new written and synced
//! state.new  -> state      from here on the new state counts; it names its memory by an id
//! memory.new -> memory     a process killed in between leaves memory.new, which restoring finds
//! ```
use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, BufWriter, Write},
    ops::Range,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use machine::{MachineState, Memory};
use rustix::fs::{FlockOperation, flock};

use super::{
    MEMORY, NEW_MEMORY, NEW_STATE, STATE,
    content::{self, Config, Content},
    image::{Progress, Writer},
    load,
};

/// Why a state could not be saved. What was there before is as it was.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum SaveError {
    #[error("cannot make the directory {}: the one above it must exist", path.display())]
    Directory { path: PathBuf, source: io::Error },
    #[error("another save into {} is under way", path.display())]
    Busy { path: PathBuf },
    #[error("cannot {what} {}", path.display())]
    File { what: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot write {}: up to {needed} MiB must be free there", path.display())]
    Full { path: PathBuf, needed: u64, source: io::Error },
    #[error("cannot find out which memory the guest uses (/proc/self/pagemap)")]
    Memory(#[source] io::Error),
    #[error("cancelled")]
    Cancelled,
}

/// A directory to save into, locked against other saves.
pub struct Target {
    path: PathBuf,
    directory: File,
    made: bool,
    done: bool,
}

impl Target {
    /// Make the directory, if it is not there.
    ///
    /// # Errors
    /// When it cannot be made, or somebody else saves into it.
    pub fn open(path: &Path) -> Result<Self, SaveError> {
        let made = match DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => true,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => false,
            Err(source) => return Err(SaveError::Directory { path: path.into(), source }),
        };
        let directory =
            File::open(path).map_err(|source| failed("open the directory", path, source))?;
        if !directory.metadata().is_ok_and(|m| m.is_dir()) {
            let source = io::Error::from(io::ErrorKind::NotADirectory);
            return Err(failed("save into", path, source));
        }
        flock(&directory, FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| SaveError::Busy { path: path.into() })?;
        let this = Self { path: path.into(), directory, made, done: false };
        this.finish_earlier()?;
        Ok(this)
    }

    /// What a process killed between its two renames has left undone.
    fn finish_earlier(&self) -> Result<(), SaveError> {
        let new = self.path.join(NEW_MEMORY);
        if load::memory_of(&self.path).is_some_and(|path| path == new) {
            self.rename(NEW_MEMORY, MEMORY)?;
            self.sync()?;
        }
        Ok(())
    }

    fn rename(&self, from: &str, to: &str) -> Result<(), SaveError> {
        let (from, to) = (self.path.join(from), self.path.join(to));
        fs::rename(&from, &to).map_err(|source| failed("put in its place", &to, source))
    }

    fn sync(&self) -> Result<(), SaveError> {
        self.directory.sync_all().map_err(|source| failed("sync", &self.path, source))
    }

    /// An empty file, with a name that means nothing yet.
    fn create(&self, name: &str) -> Result<(PathBuf, File), SaveError> {
        let path = self.path.join(name);
        // Not opened anew with its old contents: another process may have it mapped.
        let _ = fs::remove_file(&path);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(&path).map_err(|source| failed("create", &path, source))?;
        Ok((path, file))
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if !self.done {
            let _ = fs::remove_file(self.path.join(NEW_STATE));
            // Unless the state in place is the one that needs it.
            let new = self.path.join(NEW_MEMORY);
            if load::memory_of(&self.path).is_none_or(|path| path != new) {
                let _ = fs::remove_file(new);
            }
            if self.made {
                let _ = fs::remove_dir(&self.path);
            }
        }
    }
}

/// The memory file while it is being written.
pub struct MemoryFile {
    path: PathBuf,
    file: File,
    size: u64,
}

impl MemoryFile {
    /// A new one for `size` bytes of guest memory.
    ///
    /// # Errors
    /// When it cannot be created.
    pub fn create(target: &Target, size: u64) -> Result<Self, SaveError> {
        let (path, file) = target.create(NEW_MEMORY)?;
        Ok(Self { path, file, size })
    }

    /// What copies `memory` into it.
    ///
    /// # Errors
    /// When the file cannot be made as long.
    pub fn writer<'a>(&'a self, memory: &'a Memory) -> Result<Writer<'a>, SaveError> {
        Writer::new(memory, self.size, &self.file).map_err(|e| self.failed(e))
    }

    /// Copy `ranges`.
    ///
    /// # Errors
    /// When the file does not take them.
    pub fn copy(
        &self,
        writer: &mut Writer<'_>,
        ranges: &[Range<u64>],
        progress: &Progress,
    ) -> Result<(), SaveError> {
        writer.write(ranges, progress).map_err(|e| self.failed(e))
    }

    fn failed(&self, source: io::Error) -> SaveError {
        match source.kind() {
            io::ErrorKind::Interrupted => SaveError::Cancelled,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                SaveError::Full { path: self.path.clone(), needed: self.size >> 20, source }
            }
            _ => failed("write", &self.path, source),
        }
    }
}

/// Write the rest, sync both files and put them in their places.
///
/// # Errors
/// When the host does not take them; what was there before is as it was.
pub fn finish(
    mut target: Target,
    memory: &MemoryFile,
    writer: Writer<'_>,
    config: Config,
    state: MachineState,
) -> Result<(), SaveError> {
    let sums = writer.finish(config.id).map_err(|e| memory.failed(e))?;
    let (path, file) = target.create(NEW_STATE)?;
    let mut to = BufWriter::new(&file);
    content::write(&mut to, &Content { config, state, sums })
        .and_then(|()| to.flush())
        .map_err(|source| failed("write", &path, source))?;
    drop(to);
    for (file, path) in [(&memory.file, &memory.path), (&file, &path)] {
        file.sync_all().map_err(|source| failed("sync", path, source))?;
    }
    // The names of the new files before the one that replaces the old state.
    target.sync()?;
    target.rename(NEW_STATE, STATE)?;
    target.done = true;
    target.rename(NEW_MEMORY, MEMORY)?;
    target.sync()
}

fn failed(what: &'static str, path: &Path, source: io::Error) -> SaveError {
    SaveError::File { what, path: path.into(), source }
}
