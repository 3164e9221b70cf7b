//! The end of a process that the kernel may not be able to end: a thread that waits for storage which
//! hangs keeps all of the process's descriptors open, and with them other disks' locks, taps and sockets.
//! So they are given up one by one.
// UNSAFETY: descriptors are replaced that other parts of the process still own.
#![expect(unsafe_code, reason = "giving up descriptors by number")]
use std::{
    fs::{self, File},
    io,
    os::fd::{AsRawFd, RawFd},
    path::Path,
};

/// Give up all descriptors that are no file's or block device's: sockets, pipes, taps, KVM and the like.
/// That waits for nothing. Standard input, output and error stay.
///
/// # Errors
/// Without /proc or /dev/null.
pub fn everything_but_storage() -> io::Result<()> {
    give_up(&open_ones(|target| !is_storage(target))?)
}

/// The numbers of descriptors that lead to what is `wanted`.
fn open_ones(wanted: impl Fn(&Path) -> bool) -> io::Result<Vec<RawFd>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc/self/fd")? {
        let name = entry?.file_name();
        let fd = name.to_str().and_then(|name| name.parse().ok()).filter(|fd: &RawFd| *fd > 2);
        // The link is the kernel's own: reading it does not ask the file's storage.
        let target = fd.and_then(|fd| fs::read_link(format!("/proc/self/fd/{fd}")).ok());
        found.extend(fd.filter(|_| target.is_some_and(|target| wanted(&target))));
    }
    Ok(found)
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
        // SAFETY: the number stays an open descriptor of its owner; only what it leads to
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
        let (socket, _other) = UnixStream::pair().unwrap();
        let file = TempFile::new().unwrap();
        let open = || File::open(file.as_path()).unwrap();
        let ours = open();
        flock(&ours, FlockOperation::LockExclusive).unwrap();
        let found = open_ones(|target| !is_storage(target)).unwrap();
        assert!(found.contains(&socket.as_raw_fd()) && !found.contains(&ours.as_raw_fd()));

        give_up(&[ours.as_raw_fd()]).unwrap();
        let now = fs::read_link(format!("/proc/self/fd/{}", ours.as_raw_fd())).unwrap();
        assert_eq!(now, Path::new("/dev/null"));
        flock(open(), FlockOperation::NonBlockingLockExclusive).unwrap();
    }
}
