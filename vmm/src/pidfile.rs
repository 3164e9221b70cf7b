//! `-pidfile`: the process id, decimal, without a newline; removed at the end.
use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// Removes the file when dropped.
pub struct PidFile(PathBuf);

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
    /// is replaced.
    ///
    /// # Errors
    /// When the process that it names is running, or it cannot be written.
    pub fn create(path: &Path) -> Result<Self, PidFileError> {
        let failed = |source| PidFileError::Write { path: path.into(), source };
        let open = || OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        let mut file = match open() {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                let text = fs::read_to_string(path).map_err(failed)?;
                let pid = text.trim().parse::<u32>().ok();
                match pid.filter(|pid| Path::new(&format!("/proc/{pid}")).exists()) {
                    Some(pid) if pid != std::process::id() => {
                        return Err(PidFileError::Taken { path: path.into(), pid });
                    }
                    _ => {}
                }
                fs::remove_file(path).map_err(failed)?;
                open()
            }
            other => other,
        }
        .map_err(failed)?;
        write!(file, "{}", std::process::id()).map_err(failed)?;
        Ok(Self(path.into()))
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}
