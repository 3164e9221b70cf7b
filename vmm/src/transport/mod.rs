//! A connection to a peer on another host or in another process, for a loop that polls: no call
//! waits. The descriptors were opened by somebody else: two ends of pipes, or one of a socket; on a
//! socket, TLS 1.3 may be spoken, with a certificate at either side.
//!
//! ```text
//! send() --> queue --> TLS --> descriptor      each step moves what fits, in flush()
//! receive() <--------- TLS <-- descriptor      at most 256 KiB for each call
//! ```
//! A peer is not trusted, and neither is the network: memory is limited, the handshake has a
//! deadline, and whatever arrives ends in bytes for the caller or in an error.
mod certificates;
mod descriptors;
pub mod peer;
mod session;
mod subject;
#[cfg(test)]
mod tests;

use std::{
    collections::VecDeque,
    io,
    net::IpAddr,
    time::{Duration, Instant},
};

use rustix::event::PollFd;

pub use certificates::{CertificateError, client, server};
pub use descriptors::Descriptors;
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
    /// Accepted by `send`, and given neither to TLS nor to the host.
    queue: VecDeque<u8>,
    limit: usize,
    /// What is wrong with it is reported once, then it is closed.
    is_closed: bool,
}

impl Link {
    /// A connection without TLS, which queues at most `limit` bytes. With `allow_network`, the peer
    /// of a TCP connection may be on another host.
    ///
    /// # Errors
    /// [`LinkError::NotLocal`], or when the socket has no peer any more.
    pub fn plain(
        descriptors: Descriptors,
        limit: usize,
        allow_network: bool,
    ) -> Result<Self, LinkError> {
        check_host(descriptors.host()?, allow_network)?;
        Ok(Self::new(descriptors, None, limit))
    }

    /// A connection with TLS, whose handshake has to be complete [`HANDSHAKE`] after `now`. It
    /// queues at most `limit` bytes, besides 64 KiB in TLS.
    ///
    /// # Errors
    /// [`LinkError::Tls`] when TLS cannot be set up.
    pub fn tls(
        descriptors: Descriptors,
        role: Role,
        limit: usize,
        now: Instant,
    ) -> Result<Self, LinkError> {
        let session = Session::new(role, now + HANDSHAKE).map_err(LinkError::Tls)?;
        Ok(Self::new(descriptors, Some(session), limit))
    }

    fn new(descriptors: Descriptors, session: Option<Session>, limit: usize) -> Self {
        Self { descriptors, session, queue: VecDeque::new(), limit, is_closed: false }
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

    /// Queue all of `bytes`, or nothing if there is no room. Returns whether they were queued.
    pub fn send(&mut self, bytes: &[u8]) -> bool {
        let fits = bytes.len() <= self.room();
        if fits {
            self.queue.extend(bytes);
        }
        fits
    }

    /// How many bytes can be queued.
    #[must_use]
    pub fn room(&self) -> usize {
        self.limit.saturating_sub(self.queue.len())
    }

    /// How many bytes are queued.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// Whether everything has been given to the host.
    #[must_use]
    pub fn is_flushed(&self) -> bool {
        self.queue.is_empty() && self.session.as_ref().is_none_or(|session| !session.wants_write())
    }

    /// Write what the host takes now.
    ///
    /// # Errors
    /// When the connection cannot be used any more.
    pub fn flush(&mut self) -> Result<(), LinkError> {
        self.check(|link| match &mut link.session {
            Some(session) => session.write(&mut link.queue, &mut link.descriptors),
            None => {
                while !link.queue.is_empty() {
                    match link.descriptors.try_write(link.queue.as_slices().0)? {
                        Some(written) => drop(link.queue.drain(..written)),
                        None => break,
                    }
                }
                Ok(())
            }
        })
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
