//! The end of a process that the kernel may not be able to end: a thread that waits for storage which
//! hangs keeps all of the process's descriptors open, and with them other disks' locks, taps and sockets.
//! So they are given up one by one.
// UNSAFETY: descriptors are replaced that other parts of the process still own.
#![expect(unsafe_code, reason = "giving up descriptors by number")]
use std::{
    fs::{self, File},
    io,
    os::fd::{AsRawFd, RawFd},
    path::{Path, PathBuf},
};

/// Descriptors of this process, apart from standard input, output and error.
#[derive(Debug, Default)]
pub struct Descriptors {
    /// Sockets, pipes, taps, KVM and the like: giving these up waits for nothing.
    pub others: Vec<RawFd>,
    /// Files and block devices: giving these up may wait for their storage. Those least likely to do so
    /// come first.
    pub storage: Vec<RawFd>,
}

impl Descriptors {
    /// Those that are open now. Requests to `busy` are in flight, so they come last.
    ///
    /// # Errors
    /// Without /proc.
    pub fn open(busy: &[PathBuf]) -> io::Result<Self> {
        let mut this = Self::default();
        let mut last = Vec::new();
        for entry in fs::read_dir("/proc/self/fd")? {
            let name = entry?.file_name();
            let Some(fd) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
            // The link is the kernel's own: reading it does not ask the file's storage.
            let Ok(target) = fs::read_link(format!("/proc/self/fd/{fd}")) else { continue };
            match fd {
                0..=2 => {}
                _ if busy.contains(&target) => last.push(fd),
                _ if is_storage(&target) => this.storage.push(fd),
                _ => this.others.push(fd),
            }
        }
        this.storage.append(&mut last);
        Ok(this)
    }
}

/// Whether a descriptor that leads to `target` is a file's or a block device's.
fn is_storage(target: &Path) -> bool {
    const DEVICES: [&str; 6] =
        ["/dev/net", "/dev/kvm", "/dev/pts", "/dev/ptmx", "/dev/userfaultfd", "/dev/null"];
    target.is_absolute()
        && !target.starts_with("/proc")
        && !target.starts_with("/memfd:")
        && !DEVICES.iter().any(|device| target.starts_with(device))
}

/// Give up `descriptors`, one after the other. Their numbers lead to /dev/null afterwards, so that a
/// thread which still uses one neither reaches a file that was opened since nor closes it.
///
/// # Errors
/// Without /dev/null.
pub fn give_up(descriptors: &[RawFd]) -> io::Result<()> {
    let null = File::open("/dev/null")?;
    for fd in descriptors {
        // SAFETY: the number stays a descriptor that is open, whoever owns it; only what it leads to
        // changes, as it may for anything that was opened from a path.
        if unsafe { libc::dup2(null.as_raw_fd(), *fd) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use rustix::fs::{FlockOperation, flock};
    use vmm_sys_util::tempfile::TempFile;

    use super::*;

    #[test]
    fn what_is_given_up_is_closed_and_its_number_stays_taken() {
        let (one, _other) = UnixStream::pair().unwrap();
        let (idle, busy) = (TempFile::new().unwrap(), TempFile::new().unwrap());
        let open = |file: &TempFile| File::open(file.as_path()).unwrap();
        let (ours, hung) = (open(&idle), open(&busy));
        flock(&ours, FlockOperation::LockExclusive).unwrap();

        let found = Descriptors::open(&[busy.as_path().to_owned()]).unwrap();
        assert!(found.others.contains(&one.as_raw_fd()));
        let place = |file: &File| found.storage.iter().position(|fd| *fd == file.as_raw_fd());
        assert!(place(&ours).unwrap() < place(&hung).unwrap());

        give_up(&[ours.as_raw_fd()]).unwrap();
        let now = fs::read_link(format!("/proc/self/fd/{}", ours.as_raw_fd())).unwrap();
        assert_eq!(now, Path::new("/dev/null"));
        let theirs = open(&idle);
        flock(&theirs, FlockOperation::NonBlockingLockExclusive).unwrap();
    }
}
