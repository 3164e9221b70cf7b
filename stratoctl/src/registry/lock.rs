//! One lock for each name, held by the process and released when that ends. The file serves only
//! for locking, and lies outside the directory that a rename moves.
use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};
use state::regular_file::open_regular;

/// While this exists, no other process acts on what is locked. The file is removed with the lock.
#[derive(Debug)]
pub struct Lock {
    _file: File,
    path: PathBuf,
}

impl Lock {
    /// Wait until `path` is locked.
    pub fn wait(path: &Path) -> io::Result<Self> {
        loop {
            if let Some(lock) = Self::attempt(path, FlockOperation::LockExclusive)? {
                return Ok(lock);
            }
        }
    }

    /// Lock `path`, unless it is locked already.
    pub fn attempt_once(path: &Path) -> io::Result<Option<Self>> {
        match Self::attempt(path, FlockOperation::NonBlockingLockExclusive) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            other => other,
        }
    }

    /// Whether `path` is locked.
    pub fn is_held(path: &Path) -> bool {
        open_regular(path, File::options().read(true)).is_ok_and(|file| {
            flock(&file, FlockOperation::NonBlockingLockShared) == Err(Errno::WOULDBLOCK)
        })
    }

    fn attempt(path: &Path, operation: FlockOperation) -> io::Result<Option<Self>> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).mode(0o600);
        let file = open_regular(path, &mut options)?;
        loop {
            match flock(&file, operation) {
                Err(Errno::INTR) => {}
                other => break other?,
            }
        }
        // The previous owner may have removed the file since it was opened.
        let ours = file.metadata()?;
        let there = fs::metadata(path);
        let same = there.is_ok_and(|m| (m.dev(), m.ino()) == (ours.dev(), ours.ino()));
        Ok(same.then(|| Self { _file: file, path: path.into() }))
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // While it is still locked: a process that has opened it sees that it is gone, and creates
        // another.
        let _ = fs::remove_file(&self.path);
    }
}
