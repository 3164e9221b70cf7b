//! A directory to save into: locked, and left as it was unless the save is complete.
use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, OFlags, flock};
use state::directory::{self, MEMORY, NEW_MEMORY, NEW_STATE};

use super::{SaveError, failed};

/// A directory to save into, locked against other saves.
pub struct Target {
    pub(super) path: PathBuf,
    directory: File,
    made: bool,
    pub(super) done: bool,
}

impl Target {
    /// Open the directory, and create it if it does not exist.
    ///
    /// # Errors
    /// When it cannot be created, or another process saves into it.
    pub fn open(path: &Path) -> Result<Self, SaveError> {
        let made = match DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => true,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => false,
            Err(source) => return Err(SaveError::Directory { path: path.into(), source }),
        };
        // Opening a FIFO would block.
        let flags = (OFlags::DIRECTORY | OFlags::NONBLOCK).bits().cast_signed();
        let directory = OpenOptions::new().read(true).custom_flags(flags).open(path);
        let directory = directory.map_err(|source| failed("save into", path, source))?;
        flock(&directory, FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| SaveError::Busy { path: path.into() })?;
        let this = Self { path: path.into(), directory, made, done: false };
        this.finish_earlier()?;
        Ok(this)
    }

    /// Complete what a process killed between its two renames has left undone.
    fn finish_earlier(&self) -> Result<(), SaveError> {
        let new = self.path.join(NEW_MEMORY);
        if directory::memory_of(&self.path).is_some_and(|path| path == new) {
            self.rename(NEW_MEMORY, MEMORY)?;
            self.sync()?;
        }
        Ok(())
    }

    pub(super) fn rename(&self, from: &str, to: &str) -> Result<(), SaveError> {
        let (from, to) = (self.path.join(from), self.path.join(to));
        fs::rename(&from, &to).map_err(|source| failed("rename into place", &to, source))
    }

    pub(super) fn sync(&self) -> Result<(), SaveError> {
        self.directory.sync_all().map_err(|source| failed("sync", &self.path, source))
    }

    /// Create an empty file under a temporary name.
    pub(super) fn create(&self, name: &str) -> Result<(PathBuf, File), SaveError> {
        let path = self.path.join(name);
        // Not reopened with its old contents: another process may have it mapped.
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
            // Unless the state that counts is the one that needs it.
            let new = self.path.join(NEW_MEMORY);
            if directory::memory_of(&self.path).is_none_or(|path| path != new) {
                let _ = fs::remove_file(new);
            }
            if self.made {
                let _ = fs::remove_dir(&self.path);
            }
        }
    }
}
