//! A connection to a peer on another host or in another process, for a loop that polls: no call
//! waits. The descriptors were opened by somebody else: two ends of pipes, or one of a socket; on a
//! socket, TLS 1.3 may be spoken, with a certificate at either side.
//!
//! ```text
//! send() --> queue --> TLS --> descriptor      each step moves what fits, in flush()
//! receive() <--------- TLS <-- descriptor      at most 256 KiB for each call
//! ```
//! A peer is not trusted, and neither is the network: the handshake has a deadline, and whatever
//! arrives ends in bytes for the caller or in an error. What waits to be sent is for the caller to
//! limit, by [`Link::queued`].
#![forbid(unsafe_code)]
mod certificates;
mod descriptors;
pub mod peer;
mod queue;
mod security;
mod session;
mod subject;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;

use std::{
    io,
    net::IpAddr,
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use rustix::event::PollFd;

pub use certificates::{CertificateError, client, server};
pub use descriptors::Descriptors;
use queue::Queue;
pub use security::{Names, Security};
pub use session::Role;
use session::Session;

/// How long the handshake of TLS may take.
pub const HANDSHAKE: Duration = Duration::from_secs(5);
/// Most bytes that one call of [`Link::receive`] returns, except for one record of TLS (16 KiB):
/// others wait for the same thread.
pub const MOST_AT_ONCE: usize = 256 << 10;

/// Why a connection cannot be used any more.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The peer has closed it, or has ended.
    #[error("the peer has closed the connection")]
    Closed,
    /// The host reports an error.
    #[error("the connection fails")]
    Io(#[source] io::Error),
    /// The peer does not speak TLS 1.3, has no valid certificate, or sends something else.
    #[error("the connection fails in TLS")]
    Tls(#[source] rustls::Error),
    /// The handshake was not complete in time.
    #[error("the peer did not complete the TLS handshake within {} seconds", HANDSHAKE.as_secs())]
    Handshake,
    /// The peer is on another host, and the connection would not be encrypted.
    #[error(
        "{0} is not on this host: give a directory with certificates (tls=DIR), or allow an \
         unencrypted connection with tls=off"
    )]
    NotLocal(IpAddr),
    /// It is not known which host's certificate the peer has to have.
    #[error(
        "the peer has no address, so it is not known which name its certificate has to be for: \
         give tls-hostname"
    )]
    NoName,
}

impl From<io::Error> for LinkError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::UnexpectedEof => Self::Closed,
            _ => Self::Io(error),
        }
    }
}

/// A connection.
pub struct Link {
    descriptors: Descriptors,
    session: Option<Session>,
    /// Given neither to TLS nor to the host.
    queue: Queue,
    /// What is wrong with it is reported once, then it is closed.
    is_closed: bool,
    /// Nothing can be written any more: what the peer has said before its end can still be read.
    cannot_write: bool,
}

impl Link {
    /// A connection without TLS. With `allow_network`, the peer of a TCP connection may be on another
    /// host.
    ///
    /// # Errors
    /// [`LinkError::NotLocal`].
    pub fn plain(descriptors: Descriptors, allow_network: bool) -> Result<Self, LinkError> {
        check_host(descriptors.host(), allow_network)?;
        Ok(Self::new(descriptors, None))
    }

    /// A connection with TLS, whose handshake has to be complete [`HANDSHAKE`] after `now`. TLS
    /// keeps up to 64 KiB besides what is [`queued`](Self::queued).
    ///
    /// # Errors
    /// [`LinkError::Tls`] when TLS cannot be set up.
    pub fn tls(descriptors: Descriptors, role: Role, now: Instant) -> Result<Self, LinkError> {
        let session = Session::new(role, now + HANDSHAKE).map_err(LinkError::Tls)?;
        Ok(Self::new(descriptors, Some(session)))
    }

    fn new(descriptors: Descriptors, session: Option<Session>) -> Self {
        let (queue, is_closed, cannot_write) = (Queue::default(), false, false);
        Self { descriptors, session, queue, is_closed, cannot_write }
    }

    /// What to wait for, on one or two descriptors: call [`Link::flush`] and [`Link::receive`] when
    /// any of it happens.
    pub fn interest(&self) -> impl Iterator<Item = PollFd<'_>> {
        self.descriptors.interest(!self.is_flushed())
    }

    /// When to call [`Link::receive`] even if nothing has happened: the end of the handshake's time.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.session.as_ref().and_then(Session::deadline)
    }

    /// Whether the handshake is complete. A client's may be although the server is about to refuse
    /// its certificate; it then hears so by an error of `receive`.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.session.as_ref().is_none_or(|session| session.deadline().is_none())
    }

    /// The subject of the peer's certificate, which was verified, once the handshake is complete.
    /// For messages.
    #[must_use]
    pub fn subject(&self) -> Option<String> {
        self.session.as_ref().and_then(Session::subject)
    }

    /// Who is at the other end, for messages: the address, as far as there is one, and the subject
    /// of the certificate.
    #[must_use]
    pub fn peer(&self) -> String {
        let address = self.descriptors.address();
        let address = address.map_or_else(|| "the peer".to_owned(), |address| address.to_string());
        match self.subject() {
            Some(subject) => format!("{address} ({subject})"),
            None => address,
        }
    }

    /// The process at the other end of a Unix socket, and a descriptor of it.
    ///
    /// # Errors
    /// Those of [`peer::process`] and [`peer::pidfd`].
    pub fn process(&self) -> io::Result<(peer::Process, OwnedFd)> {
        let socket = self.descriptors.as_fd();
        Ok((peer::process(socket)?, peer::pidfd(socket)?))
    }

    /// Send `bytes`, after everything that is queued already.
    pub fn send(&mut self, bytes: Vec<u8>) {
        self.queue.push(bytes);
    }

    /// How many bytes are queued.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// How many bytes were given to the host since the beginning, with those of TLS.
    #[must_use]
    pub const fn written(&self) -> u64 {
        self.descriptors.written()
    }

    /// Whether everything has been given to the host.
    #[must_use]
    pub fn is_flushed(&self) -> bool {
        self.queue.is_empty() && self.session.as_ref().is_none_or(|session| !session.wants_write())
    }

    /// Write what the host takes now.
    ///
    /// # Errors
    /// When nothing can be written any more. What has come from the peer can still be received.
    pub fn flush(&mut self) -> Result<(), LinkError> {
        if self.is_closed || self.cannot_write {
            return Err(LinkError::Closed);
        }
        let written = self.write();
        self.cannot_write = written.is_err();
        written
    }

    fn write(&mut self) -> Result<(), LinkError> {
        if let Some(session) = &mut self.session {
            return session.write(&mut self.queue, &mut self.descriptors);
        }
        while !self.queue.is_empty() {
            match self.descriptors.try_write(self.queue.front())? {
                Some(written) => self.queue.take(written),
                None => break,
            }
        }
        Ok(())
    }

    /// Append what has arrived to `into`; how many bytes that were. Also carries on the handshake.
    ///
    /// # Errors
    /// When the connection cannot be used any more: [`LinkError::Closed`] once everything that
    /// arrived before has been returned.
    pub fn receive(&mut self, now: Instant, into: &mut Vec<u8>) -> Result<usize, LinkError> {
        let before = into.len();
        self.check(|link| match &mut link.session {
            Some(session) => {
                let read = session.read(now, &mut link.descriptors, into);
                // An alert says why; if it cannot be written at once, the peer sees the end.
                let written = session.write(&mut link.queue, &mut link.descriptors);
                read.and(written)
            }
            None => {
                while into.len() - before < MOST_AT_ONCE {
                    into.reserve(64 << 10);
                    match link.descriptors.try_read(into)? {
                        Some(0) => return Err(LinkError::Closed),
                        Some(_) => {}
                        None => break,
                    }
                }
                Ok(())
            }
        })
        .or_else(|error| if into.len() > before { Ok(()) } else { Err(error) })?;
        Ok(into.len() - before)
    }

    /// Whether it can still be used.
    #[must_use]
    pub const fn is_closed(&self) -> bool {
        self.is_closed
    }

    /// End it. What is queued is given to the host as far as that takes it now, and TLS says that
    /// this is the end.
    pub fn close(mut self) {
        let _ = self.flush();
        if let Some(session) = &mut self.session {
            session.end();
        }
        let _ = self.flush();
    }

    fn check(
        &mut self,
        step: impl FnOnce(&mut Self) -> Result<(), LinkError>,
    ) -> Result<(), LinkError> {
        if self.is_closed {
            return Err(LinkError::Closed);
        }
        let result = step(self);
        self.is_closed = result.is_err();
        result
    }
}

/// Whether a connection to a peer at this address, if it has one, may be unencrypted.
fn check_host(host: Option<IpAddr>, allow_network: bool) -> Result<(), LinkError> {
    match host.map(|host| host.to_canonical()) {
        Some(host) if !allow_network && !host.is_loopback() => Err(LinkError::NotLocal(host)),
        _ => Ok(()),
    }
}
