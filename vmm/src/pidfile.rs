//! `-pidfile`: the process id, decimal, without a newline; removed at the end.
use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// Longest content of a pid file, in bytes: a number and the end of its line.
const LONGEST: u64 = 12;

/// Removes the file when dropped.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
    /// Device and inode, to leave alone what somebody else may have put in its place.
    identity: (u64, u64),
}

/// Why there is no pid file.
#[derive(Debug, thiserror::Error)]
pub enum PidFileError {
    /// It names a process that lives.
    #[error("pid file {} belongs to process {pid}, which is running; choose another with -pidfile", path.display())]
    Taken {
        /// The file.
        path: PathBuf,
        /// The process.
        pid: u32,
    },
    /// Something else has the name.
    #[error("{} exists and is no pid file; remove it or choose another with -pidfile", path.display())]
    NotOne {
        /// What is there.
        path: PathBuf,
    },
    /// The host refuses.
    #[error("cannot write pid file {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl PidFile {
    /// Write this process's id to `path`, mode 0600. A file left behind by a process that has gone
    /// is replaced; so is an empty one.
    ///
    /// # Errors
    /// When the process that it names is running, it is no pid file, or it cannot be written.
    pub fn create(path: &Path) -> Result<Self, PidFileError> {
        let failed = |source| PidFileError::Write { path: path.into(), source };
        let open = || OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        let mut file = match open() {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                let not_one = || PidFileError::NotOne { path: path.into() };
                let there = fs::symlink_metadata(path).map_err(failed)?;
                // Not opened before: a FIFO would keep us waiting.
                if !there.is_file() || there.len() > LONGEST {
                    return Err(not_one());
                }
                let text = fs::read(path).map_err(failed)?;
                let text = str::from_utf8(&text).map_err(|_| not_one())?.trim();
                if !text.bytes().all(|b| b.is_ascii_digit()) {
                    return Err(not_one());
                }
                let pid = text.parse::<u32>().ok().filter(|pid| *pid != std::process::id());
                if let Some(pid) = pid.filter(|pid| Path::new(&format!("/proc/{pid}")).exists()) {
                    return Err(PidFileError::Taken { path: path.into(), pid });
                }
                fs::remove_file(path).map_err(failed)?;
                open()
            }
            other => other,
        }
        .map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        let this = Self { path: path.into(), identity: (metadata.dev(), metadata.ino()) };
        write!(file, "{}", std::process::id()).map_err(failed)?;
        Ok(this)
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        let ours = |m: &fs::Metadata| (m.dev(), m.ino()) == self.identity;
        if fs::symlink_metadata(&self.path).is_ok_and(|m| ours(&m)) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_process_has_left_behind_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        // No process has the last number.
        for stale in ["", "\n", "4294967295\n"] {
            fs::write(&path, stale).unwrap();
            let file = PidFile::create(&path).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), std::process::id().to_string());
            drop(file);
            assert!(!path.exists());
        }
        for precious in ["text", "12 apples", "1234567890123", "\u{fffd}"] {
            fs::write(&path, precious).unwrap();
            assert!(matches!(PidFile::create(&path), Err(PidFileError::NotOne { .. })));
            assert_eq!(fs::read_to_string(&path).unwrap(), precious);
        }
        fs::write(&path, "1").unwrap();
        assert!(matches!(PidFile::create(&path), Err(PidFileError::Taken { pid: 1, .. })));
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path().join("nowhere"), &link).unwrap();
        assert!(matches!(PidFile::create(&link), Err(PidFileError::NotOne { .. })));
    }

    #[test]
    fn what_somebody_else_has_put_there_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        let file = PidFile::create(&path).unwrap();
        fs::rename(&path, dir.path().join("moved")).unwrap();
        fs::write(&path, "another").unwrap();
        drop(file);
        assert_eq!(fs::read_to_string(&path).unwrap(), "another");
    }
}
