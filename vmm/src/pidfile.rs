//! `-pidfile`: the process id, decimal, without a newline; removed at the end.
use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// Longest content of a pid file, in bytes: a number and the end of its line.
const MAX_BYTES: u64 = 12;

/// Removes the file when dropped.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
    /// Device and inode, so that a file that another process has put in its place is left alone.
    identity: (u64, u64),
}

/// Why there is no pid file.
#[derive(Debug, thiserror::Error)]
pub enum PidFileError {
    /// It names a monitor that is running.
    #[error("pid file {} belongs to process {pid}, which is running; choose another with -pidfile", path.display())]
    Taken {
        /// The file.
        path: PathBuf,
        /// The process.
        pid: u32,
    },
    /// Something that is no pid file has the name.
    #[error("{} exists and is not a pid file; remove it or choose another with \
             -pidfile", path.display())]
    NotOne {
        /// Its path.
        path: PathBuf,
    },
    /// The host does not permit it.
    #[error("cannot write pid file {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

impl PidFile {
    /// Write this process's id to `path`, mode 0600; the file appears there complete. A file left
    /// behind by a monitor that has gone is replaced, and so is an empty one.
    ///
    /// # Errors
    /// When the monitor that it names is running, the file is no pid file, or it cannot be written.
    pub fn create(path: &Path) -> Result<Self, PidFileError> {
        let failed = |source| PidFileError::Write { path: path.into(), source };
        let mut aside = path.as_os_str().to_owned();
        aside.push(format!(".{}", std::process::id()));
        let aside = PathBuf::from(aside);
        // A monitor that ended half-way may have had the same process id.
        make_room(&aside)?;
        let linked = || match fs::hard_link(&aside, path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                make_room(path)?;
                fs::hard_link(&aside, path).map_err(failed)
            }
            other => other.map_err(failed),
        };
        let made = write(&aside).map_err(failed).and_then(|identity| {
            linked()?;
            Ok(Self { path: path.into(), identity })
        });
        let removed = fs::remove_file(&aside);
        let this = made?;
        removed.map_err(failed)?;
        Ok(this)
    }
}

/// Write the process id into a new file at `path`; returns its device and inode.
fn write(path: &Path) -> io::Result<(u64, u64)> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    write!(file, "{}", std::process::id())?;
    let metadata = file.metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Remove the pid file at `path` if no running monitor needs it; a missing file is no error.
fn make_room(path: &Path) -> Result<(), PidFileError> {
    let failed = |source| PidFileError::Write { path: path.into(), source };
    let not_one = || PidFileError::NotOne { path: path.into() };
    let there = match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(failed)?,
    };
    // Not opened before: opening a FIFO would block.
    if !there.is_file() || there.len() > MAX_BYTES {
        return Err(not_one());
    }
    let text = fs::read(path).map_err(failed)?;
    let text = str::from_utf8(&text).map_err(|_| not_one())?.trim();
    if !text.bytes().all(|b| b.is_ascii_digit()) {
        return Err(not_one());
    }
    let pid = text.parse::<u32>().ok().filter(|pid| *pid != std::process::id());
    if let Some(pid) = pid.filter(|pid| is_monitor(*pid)) {
        return Err(PidFileError::Taken { path: path.into(), pid });
    }
    fs::remove_file(path).map_err(failed)
}

/// Whether `pid` is a process that runs this program: the id of a monitor that has gone may have
/// become another program's, or a thread's.
fn is_monitor(pid: u32) -> bool {
    let of = |what: &str| PathBuf::from(format!("/proc/{pid}/{what}"));
    let status = fs::read_to_string(of("status")).unwrap_or_default();
    let leads = |line: &str| line.strip_prefix("Tgid:").map(str::trim) == Some(&pid.to_string());
    let name = |exe: PathBuf| {
        let name = exe.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // The suffix is there if the program file has been replaced by a newer one.
        name.trim_end_matches(" (deleted)").to_owned()
    };
    status.lines().any(leads)
        && match fs::read_link(of("exe")) {
            Ok(exe) => fs::read_link("/proc/self/exe").is_ok_and(|own| name(own) == name(exe)),
            // It belongs to another user, and may be a monitor.
            Err(e) => e.kind() == io::ErrorKind::PermissionDenied,
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
    use std::{
        env,
        io::Read,
        process::{Command, Stdio},
        sync::{
            atomic::{AtomicBool, Ordering},
            mpsc,
        },
        thread,
    };

    use super::*;

    /// Set in the environment of a process that only waits.
    const WAITS: &str = "PIDFILE_TEST_WAITS";

    #[test]
    fn only_what_a_monitor_has_left_behind_is_replaced() {
        if env::var_os(WAITS).is_some() {
            io::stdin().read_to_end(&mut Vec::new()).unwrap();
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        let (sender, receiver) = mpsc::channel();
        let (end, ended) = mpsc::channel::<()>();
        let thread = thread::spawn(move || {
            let this = fs::read_link("/proc/thread-self").unwrap();
            sender.send(this.file_name().unwrap().to_str().unwrap().to_owned()).unwrap();
            let _ = ended.recv();
        });
        let thread_id = receiver.recv().unwrap();
        let cat = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn();
        let mut cat = cat.unwrap();
        // No process has the last id; another program is no monitor, and a thread is no process.
        for stale in ["", "\n", "4294967295\n", &cat.id().to_string(), &thread_id] {
            fs::write(&path, stale).unwrap();
            let file = PidFile::create(&path).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), std::process::id().to_string());
            assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
            drop(file);
            assert!(!path.exists());
        }
        drop((end, cat.stdin.take()));
        thread.join().unwrap();
        cat.wait().unwrap();
        for precious in ["text", "12 apples", "1234567890123", "\u{fffd}"] {
            fs::write(&path, precious).unwrap();
            assert!(matches!(PidFile::create(&path), Err(PidFileError::NotOne { .. })));
            assert_eq!(fs::read_to_string(&path).unwrap(), precious);
        }
        let this = "pidfile::tests::only_what_a_monitor_has_left_behind_is_replaced";
        let mut other = Command::new(env::current_exe().unwrap());
        other.args([this, "--exact"]).env(WAITS, "1");
        let mut other = other.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        fs::write(&path, other.id().to_string()).unwrap();
        let taken = PidFile::create(&path);
        assert!(matches!(taken, Err(PidFileError::Taken { pid, .. }) if pid == other.id()));
        drop(other.stdin.take());
        assert!(other.wait().unwrap().success());
        drop(PidFile::create(&path).unwrap());
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path().join("nowhere"), &link).unwrap();
        assert!(matches!(PidFile::create(&link), Err(PidFileError::NotOne { .. })));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn whoever_reads_it_finds_its_content() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..2000 {
                    drop(PidFile::create(&path).unwrap());
                }
                over.store(true, Ordering::Relaxed);
            });
            while !over.load(Ordering::Relaxed) {
                if let Ok(text) = fs::read_to_string(&path) {
                    assert_eq!(text, std::process::id().to_string());
                }
            }
        });
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
