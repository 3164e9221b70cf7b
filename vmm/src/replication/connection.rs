//! A connection between the two sides, for threads that wait in poll(2).
use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    event::PollFlags,
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
    io::Errno,
};

use crate::checkpoint::connected;

/// Bytes read in one call.
const PIECE: usize = 256 << 10;

/// A connection: what is to be sent waits in a queue, and nothing blocks.
pub struct Connection {
    fd: OwnedFd,
    queue: VecDeque<Vec<u8>>,
    /// Bytes of the first of them that were sent.
    sent: usize,
    queued: usize,
    /// Bytes sent since it began.
    total: u64,
    piece: Vec<u8>,
}

impl Connection {
    /// A connection over `fd`.
    ///
    /// # Errors
    /// When the descriptor cannot be made nonblocking.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
        Ok(Self::accepted(fd))
    }

    /// A connection over `fd`, which does not block already.
    pub fn accepted(fd: OwnedFd) -> Self {
        let (queue, piece) = (VecDeque::new(), vec![0; PIECE]);
        Self { fd, queue, sent: 0, queued: 0, total: 0, piece }
    }

    /// A connection to the socket at `path`. Does not wait for a listener whose queue is full.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn to(path: &Path) -> io::Result<Self> {
        connected(path).map(Self::accepted)
    }

    /// Send `bytes`, after everything that waits already.
    pub fn send(&mut self, bytes: Vec<u8>) {
        self.queued += bytes.len();
        self.queue.push_back(bytes);
    }

    /// Bytes that wait to be sent.
    pub fn queued(&self) -> usize {
        self.queued
    }

    /// Bytes sent so far.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Send what the peer takes at the moment.
    ///
    /// # Errors
    /// When the connection has ended.
    pub fn flush(&mut self) -> io::Result<()> {
        while let Some(first) = self.queue.front() {
            let rest = first.get(self.sent..).unwrap_or_default();
            match rustix::io::write(&self.fd, rest) {
                Ok(count) => {
                    (self.sent, self.queued) = (self.sent + count, self.queued - count);
                    self.total += count as u64;
                    if count == rest.len() {
                        self.queue.pop_front();
                        self.sent = 0;
                    }
                }
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Up to 256 KiB of what has arrived; nothing if nothing has.
    ///
    /// # Errors
    /// When the connection has ended.
    pub fn receive(&mut self) -> io::Result<&[u8]> {
        loop {
            match rustix::io::read(&self.fd, &mut self.piece[..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => return Ok(self.piece.get(..count).unwrap_or_default()),
                Err(Errno::AGAIN) => return Ok(&[]),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// What to wait for.
    pub fn interest(&self) -> PollFlags {
        match self.queued {
            0 => PollFlags::IN,
            _ => PollFlags::IN | PollFlags::OUT,
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
