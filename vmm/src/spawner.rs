//! Programs that are started while the guest runs: `migrate` to `exec:COMMAND`.
//!
//! Behind the system-call filter no program can be started, and one that could be would run behind
//! the filter itself. So a second process, which runs this same program, is started at the
//! beginning and starts programs for the monitor; but only where `-sandbox` allows it.
//!
//! ```text
//! monitor --command, one end of a socket--> second process --stdin--> /bin/sh -c COMMAND
//!         <----------- exit status, at the end, through that socket
//! ```
use std::{
    env,
    io::{self, IoSlice, IoSliceMut, Write},
    mem::MaybeUninit,
    os::{fd::OwnedFd, unix::net::UnixStream},
    process::{Command, Stdio},
    thread,
};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

use crate::daemon;

/// Set in the environment of the second process.
const MARK: &str = "STRATOVIRT_SPAWNER";
/// Longest command, in bytes.
const MAX_COMMAND: usize = 32 << 10;

/// Why a program could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// `-sandbox` does not allow it.
    #[error(
        "exec: starts a program, which the system-call filter does not allow: start the monitor with \
         -sandbox on,spawn=allow (or -sandbox off), or save to fd: or unix:, which need no program"
    )]
    Forbidden,
    /// The command is too long.
    #[error("the command is longer than {MAX_COMMAND} bytes")]
    TooLong,
    /// The process that starts programs has gone.
    #[error("the process that starts programs has ended")]
    Gone(#[source] io::Error),
}

/// How programs are started.
pub enum Spawner {
    /// Not at all.
    Forbidden,
    /// By a process that is started when it is needed: there is no filter.
    AtNeed,
    /// By a process that is running already.
    Ready(OwnedFd),
}

impl Spawner {
    /// Start the process that starts programs. Not possible behind the system-call filter. The
    /// programs' standard error is that of this process; with `quiet` it is discarded, because
    /// programs must not hold a terminal that is let go of.
    ///
    /// # Errors
    /// When the host does not permit it.
    pub fn start(quiet: bool) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC;
        let (near, far) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        Command::new("/proc/self/exe")
            .env(MARK, "1")
            .stdin(Stdio::from(far))
            .stdout(Stdio::null())
            .stderr(if quiet { Stdio::null() } else { Stdio::inherit() })
            .spawn()?;
        Ok(Self::Ready(near))
    }

    /// Start `/bin/sh -c command`. Returns its standard input, from which its exit status can be
    /// read as one byte when it has ended.
    ///
    /// # Errors
    /// When programs are forbidden, or this one cannot be started.
    pub fn run(&mut self, command: &str) -> Result<OwnedFd, SpawnError> {
        if let Self::AtNeed = self {
            *self = Self::start(false).map_err(SpawnError::Gone)?;
        }
        let Self::Ready(to) = self else { return Err(SpawnError::Forbidden) };
        if command.len() > MAX_COMMAND {
            return Err(SpawnError::TooLong);
        }
        let (near, far) = UnixStream::pair().map_err(SpawnError::Gone)?;
        let fds = [std::os::fd::AsFd::as_fd(&far)];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        // Never blocks: the socket has room for it, or refuses it.
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        sendmsg(to, &[IoSlice::new(command.as_bytes())], &mut control, flags)
            .map_err(|e| SpawnError::Gone(e.into()))?;
        Ok(near.into())
    }
}

/// Whether this is the process that starts programs.
pub fn is_this() -> bool {
    env::var_os(MARK).is_some()
}

/// Serve as that process, until the monitor has gone.
///
/// # Errors
/// When a system call fails.
pub fn serve() -> io::Result<()> {
    let from = io::stdin();
    let mut text = vec![0; MAX_COMMAND];
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let slices = &mut [IoSliceMut::new(&mut text)];
        let length = match recvmsg(&from, slices, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other?.bytes,
        };
        let fd = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        // The monitor has gone.
        let Some(fd) = fd else { return Ok(()) };
        let command = String::from_utf8_lossy(text.get(..length).unwrap_or_default()).into_owned();
        let mut answer = UnixStream::from(fd);
        let started = Command::new("/bin/sh")
            .arg("-c")
            .arg(command)
            .env_remove(MARK)
            .env_remove(daemon::MARK)
            .stdin(Stdio::from(OwnedFd::from(answer.try_clone()?)))
            .stdout(Stdio::null())
            .spawn();
        thread::Builder::new().spawn(move || {
            let status = started.and_then(|mut child| child.wait()).ok();
            let status = status.and_then(|status| status.code());
            // The monitor may have closed its end; then the status is dropped.
            let _ = answer.write_all(&[status.and_then(|n| u8::try_from(n).ok()).unwrap_or(255)]);
        })?;
    }
}
