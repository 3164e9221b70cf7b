//! Sources of streams: `-incoming unix:`, `fd:` and `exec:`.
use std::{
    io::{self, Read},
    net::SocketAddr,
    os::fd::OwnedFd,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use config::incoming::StreamSource;
use machine::inherited;
use parking_lot::Mutex;
use qmp::server::{BindError, SocketFile, claim};
use rustix::{
    event::PollFlags,
    io::Errno,
    net::{SocketFlags, accept_with},
};

use super::send::Cancel;
use transport::CertificateError;

/// Why there is no stream to read.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the error messages describe them")]
pub enum IncomingError {
    #[error("cannot listen for the stream")]
    Bind(#[from] BindError),
    #[error("cannot listen at {address} for the primary")]
    Listen { address: String, source: io::Error },
    #[error(
        "{0} can be reached from other hosts, and connections would not be encrypted: give a \
         directory with certificates (tls=DIR), or allow that with tls=off"
    )]
    Unencrypted(SocketAddr),
    #[error("the certificates of the backup cannot be used")]
    Certificates(#[from] CertificateError),
    #[error("cannot accept the stream")]
    Fd(#[source] io::Error),
    #[error("cannot start /bin/sh -c {command:?}")]
    Exec { command: String, source: io::Error },
    #[error("cannot wait for the stream")]
    Wait(#[from] io::Error),
}

/// Where a stream is to arrive.
pub enum Door {
    /// A socket: the first client to connect sends the stream. The socket file is removed
    /// afterwards.
    Socket(OwnedFd, SocketFile),
    /// A descriptor that is open already.
    Open(OwnedFd),
}

impl Door {
    /// Open what `from` names; start the command that produces the stream, if it is one.
    ///
    /// # Errors
    /// When it cannot be opened or started.
    pub fn open(from: &StreamSource) -> Result<(Self, Option<Child>), IncomingError> {
        match from {
            StreamSource::Unix(path) => {
                let (listener, file) = claim(path)?;
                Ok((Self::Socket(listener, file), None))
            }
            StreamSource::Fd(number) => {
                let fd = inherited::take(*number).map_err(IncomingError::Fd)?;
                Ok((Self::Open(fd), None))
            }
            StreamSource::Exec(command) => {
                let failed = |source| IncomingError::Exec { command: command.clone(), source };
                let mut shell = Command::new("/bin/sh");
                shell.arg("-c").arg(command).stdin(Stdio::null()).stdout(Stdio::piped());
                let mut child = shell.spawn().map_err(failed)?;
                let out = child.stdout.take().map(OwnedFd::from);
                let out = out.ok_or_else(|| failed(io::Error::from(io::ErrorKind::BrokenPipe)))?;
                Ok((Self::Open(out), Some(child)))
            }
        }
    }

    /// Wait for a peer, until `cancel` is used.
    ///
    /// # Errors
    /// When no peer has connected.
    pub fn wait(self, cancel: &Cancel) -> Result<Peer, IncomingError> {
        let peer = |fd| Peer { fd, cancel: cancel.clone(), deadline: Deadline::default() };
        let (listener, _file) = match self {
            Self::Open(fd) => return Ok(peer(fd)),
            Self::Socket(listener, file) => (listener, file),
        };
        loop {
            cancel.wait_beside(&listener, PollFlags::IN)?;
            match accept_with(&listener, SocketFlags::CLOEXEC) {
                // The peer has disconnected again.
                Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
                other => return Ok(peer(other.map_err(io::Error::from)?)),
            }
        }
    }
}

/// The process that sends a machine. Reading waits for it until that is cancelled, or until the
/// deadline if there is one.
pub struct Peer {
    fd: OwnedFd,
    cancel: Cancel,
    deadline: Deadline,
}

/// Until when a [`Peer`] is waited for; at first there is no limit. Locked, because the reader that
/// checks it is inside another reader.
#[derive(Debug, Clone, Default)]
pub struct Deadline(Arc<Mutex<Option<Instant>>>);

impl Deadline {
    /// Set the deadline to `limit` from now.
    pub fn set(&self, limit: Duration) {
        *self.0.lock() = Some(Instant::now() + limit);
    }

    fn left(&self) -> Option<Duration> {
        self.0.lock().map(|at| at.saturating_duration_since(Instant::now()))
    }
}

impl Peer {
    /// A descriptor for answers to the peer.
    ///
    /// # Errors
    /// When the host has no free descriptor.
    pub fn way_back(&self) -> io::Result<OwnedFd> {
        self.fd.try_clone()
    }

    /// The deadline by which reads of this peer are limited.
    pub fn deadline(&self) -> Deadline {
        self.deadline.clone()
    }
}

impl Read for Peer {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            self.cancel.wait_for(&self.fd, PollFlags::IN, self.deadline.left())?;
            match rustix::io::read(&self.fd, &mut *buf) {
                // The peer has made the socket nonblocking, and another reader was quicker.
                Err(Errno::AGAIN | Errno::INTR) => {}
                other => return Ok(other?),
            }
        }
    }
}
