//! Which process is at the other end of a Unix socket: as the kernel says, not as the peer says.
use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use nix::sys::socket::{getsockopt, sockopt};

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
/// When this is no connected Unix socket, the process has ended and was waited for, is of another
/// PID namespace, or the host is older than Linux 6.5.
pub fn pidfd(socket: impl AsFd) -> io::Result<OwnedFd> {
    Ok(getsockopt(&socket, sockopt::PeerPidfd)?)
}
