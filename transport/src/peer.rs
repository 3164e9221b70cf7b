//! Which process is at the other end of a Unix socket: as the kernel says, not as the peer says.
use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{getsockopt, sockopt},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    process::{Pid, PidfdFlags, pidfd_open},
};

/// A process, as it was when it connected or, for a pair of sockets, when these were made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    /// Its number here; `None` for a process of another PID namespace, which has none.
    pub pid: Option<i32>,
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

/// The process at the other end (`SO_PEERCRED`, unix(7)).
///
/// # Errors
/// When this is no connected Unix socket.
pub fn process(socket: impl AsFd) -> io::Result<Process> {
    let peer = getsockopt(&socket, sockopt::PeerCredentials)?;
    let pid = Some(peer.pid()).filter(|pid| *pid > 0);
    Ok(Process { pid, uid: peer.uid(), gid: peer.gid() })
}

/// A descriptor of that process (`SO_PEERPIDFD`): unlike its number, it never means another one. It
/// becomes readable when the process ends.
///
/// # Errors
/// When this is no connected Unix socket, or the process has ended and was waited for,
/// or is of another PID namespace.
pub fn pidfd(socket: impl AsFd) -> io::Result<OwnedFd> {
    match getsockopt(&socket, sockopt::PeerPidfd) {
        Err(Errno::ENOPROTOOPT) => by_number(socket),
        other => Ok(other?),
    }
}

/// The same before Linux 6.5: by the process's number, which could be another process's once that
/// one has ended; but then its socket is closed.
fn by_number(socket: impl AsFd) -> io::Result<OwnedFd> {
    let pid = process(&socket)?.pid.and_then(Pid::from_raw).ok_or(io::ErrorKind::NotFound)?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let mut fds = [PollFd::new(&socket, PollFlags::empty())];
    rustix::event::poll(&mut fds, Some(&Timespec::default()))?;
    match fds.iter().all(|fd| fd.revents().is_empty()) {
        true => Ok(pidfd),
        false => Err(io::ErrorKind::NotConnected.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_process_is_found_by_its_number_while_it_is_connected() {
        let (near, far) = UnixStream::pair().unwrap();
        by_number(&near).unwrap();
        drop(far);
        let ended = by_number(&near).unwrap_err();
        assert_eq!(ended.kind(), io::ErrorKind::NotConnected, "its number may be another's");
    }
}
