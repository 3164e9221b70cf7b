//! The descriptors of a connection.
use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    buffer::spare_capacity,
    event::{PollFd, PollFlags},
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
    io::Errno,
    net::{SocketAddrAny, getpeername, sockopt::set_tcp_nodelay},
};

/// A descriptor, which does not block while this exists. Others may share its file status flags:
/// they are then as they were.
struct NonBlocking {
    fd: OwnedFd,
    /// If they were changed.
    flags: Option<OFlags>,
}

impl NonBlocking {
    fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = fcntl_getfl(&fd)?;
        let blocks = !flags.contains(OFlags::NONBLOCK);
        if blocks {
            fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        }
        Ok(Self { fd, flags: blocks.then_some(flags) })
    }
}

impl Drop for NonBlocking {
    fn drop(&mut self) {
        if let Some(flags) = self.flags {
            let _ = fcntl_setfl(&self.fd, flags);
        }
    }
}

/// One descriptor for both directions, or one for each.
pub struct Descriptors {
    read: NonBlocking,
    /// If it is another one.
    write: Option<NonBlocking>,
    /// The peer's, if it is connected by TCP.
    address: Option<SocketAddr>,
    /// Bytes written.
    written: u64,
}

impl Descriptors {
    /// A connected stream socket. Small messages on it are sent at once.
    ///
    /// # Errors
    /// When the host cannot set it up, or it has no peer any more.
    pub fn socket(fd: OwnedFd) -> io::Result<Self> {
        let address = address(getpeername(&fd)?);
        if address.is_some() {
            set_tcp_nodelay(&fd, true)?;
        }
        Ok(Self { read: NonBlocking::new(fd)?, write: None, address, written: 0 })
    }

    /// A connected stream socket that does not block already, as one that was accepted, and whose
    /// peer has that address. This needs no call to the host; see [`Descriptors::listens`].
    #[must_use]
    pub fn accepted(fd: OwnedFd, peer: Option<SocketAddrAny>) -> Self {
        let read = NonBlocking { fd, flags: None };
        Self { read, write: None, address: address(peer), written: 0 }
    }

    /// Prepare a listening socket: on those that it accepts, small messages are sent at once.
    ///
    /// # Errors
    /// When the host cannot set it up.
    pub fn listens(socket: impl AsFd) -> io::Result<()> {
        Ok(set_tcp_nodelay(socket, true)?)
    }

    /// Two pipes, or other descriptors that can be read and written.
    ///
    /// # Errors
    /// When the host cannot set them up.
    pub fn pipes(read: OwnedFd, write: OwnedFd) -> io::Result<Self> {
        let write = Some(NonBlocking::new(write)?);
        Ok(Self { read: NonBlocking::new(read)?, write, address: None, written: 0 })
    }

    /// The peer's address, if it is connected by TCP.
    pub(super) const fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// Its host.
    pub(super) fn host(&self) -> Option<IpAddr> {
        self.address.map(|address| address.ip())
    }

    /// Bytes written since the beginning.
    pub(super) const fn written(&self) -> u64 {
        self.written
    }

    pub(super) fn interest(&self, wants_write: bool) -> impl Iterator<Item = PollFd<'_>> {
        let out = if wants_write { PollFlags::OUT } else { PollFlags::empty() };
        let (read, write) = match &self.write {
            None => (PollFlags::IN | out, None),
            // Without interest, one that nobody reads any more would be reported again and again.
            Some(write) => (PollFlags::IN, wants_write.then_some(write)),
        };
        let write = write.map(|write| PollFd::from_borrowed_fd(write.fd.as_fd(), out));
        [PollFd::from_borrowed_fd(self.read.fd.as_fd(), read)].into_iter().chain(write)
    }

    /// Write what fits; `None` when nothing does.
    pub(super) fn try_write(&mut self, bytes: &[u8]) -> io::Result<Option<usize>> {
        let to = self.write.as_ref().unwrap_or(&self.read);
        loop {
            match rustix::io::write(&to.fd, bytes) {
                Ok(written) => {
                    self.written += written as u64;
                    return Ok(Some(written));
                }
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Read into the spare room of `into`, which must have some; `None` when there is nothing, 0 at
    /// the end.
    pub(super) fn try_read(&mut self, into: &mut Vec<u8>) -> io::Result<Option<usize>> {
        loop {
            match rustix::io::read(&self.read.fd, spare_capacity(into)) {
                Ok(read) => return Ok(Some(read)),
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// A TCP address.
fn address(peer: Option<SocketAddrAny>) -> Option<SocketAddr> {
    peer.and_then(|peer| SocketAddr::try_from(peer).ok())
}

/// What is read from.
impl AsFd for Descriptors {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.read.fd.as_fd()
    }
}

/// As TLS needs them.
impl io::Read for Descriptors {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        rustix::io::retry_on_intr(|| rustix::io::read(&self.read.fd, &mut *into))
            .map_err(io::Error::from)
    }
}

impl io::Write for Descriptors {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.try_write(bytes)?.ok_or_else(|| io::ErrorKind::WouldBlock.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
