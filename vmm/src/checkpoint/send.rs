//! Saving into a stream: a socket, a pipe, an open file. Nobody answers, so that a pipe will do.
//!
//! ```text
//! Config  (Pages | Zeros)..  Config Section.. End
//! ```
//! The first Config says what the other side has to have; the second one, what the machine is made
//! of at its end. Pages that have never held anything are not sent.
use std::{
    io::{self, BufWriter, Write},
    ops::Range,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, atomic::Ordering},
};

use super::{
    content::{self, Config},
    image::{Progress, runs},
    save::{SaveError, Saved, Sink, Source, pieces},
    stream::{Kind, Writer},
    wait,
};
use machine::{MachineState, Memory, memory::image as ram};
use rustix::{
    event::{EventfdFlags, PollFlags, eventfd},
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
    io::Errno,
    net::{Shutdown, shutdown},
};

/// Most bytes of memory in one frame.
pub const PIECE: u64 = 1 << 20;

/// The other side. Writing waits for it until the save is cancelled.
pub struct Peer {
    fd: OwnedFd,
    /// As it was handed over: others may have the same open file.
    flags: OFlags,
    cancel: Cancel,
    /// It says by a byte how it has ended.
    command: bool,
}

/// Makes a [`Peer`] stop waiting, for good.
#[derive(Debug, Clone)]
pub struct Cancel(Arc<OwnedFd>);

impl Cancel {
    /// Do so. Never waits.
    pub fn cancel(&self) {
        // It cannot be full: nobody writes to it twice so often.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

impl Peer {
    /// Write to `fd`.
    ///
    /// # Errors
    /// When it cannot be set up.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        Self::make(fd, false)
    }

    /// Write to a command of [`crate::spawner`], and wait for its end.
    ///
    /// # Errors
    /// When it cannot be set up.
    pub fn command(fd: OwnedFd) -> io::Result<Self> {
        Self::make(fd, true)
    }

    fn make(fd: OwnedFd, command: bool) -> io::Result<Self> {
        let flags = fcntl_getfl(&fd)?;
        fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        let cancel = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Self { fd, flags, cancel: Cancel(Arc::new(cancel)), command })
    }

    /// What makes it stop waiting.
    pub fn cancel(&self) -> Cancel {
        self.cancel.clone()
    }

    /// There is nothing more to write.
    fn end(self) -> Result<(), SaveError> {
        if !self.command {
            return Ok(());
        }
        let mut status = [0];
        let mut read = || {
            shutdown(&self.fd, Shutdown::Write)?;
            self.wait(PollFlags::IN)?;
            Ok(rustix::io::read(&self.fd, &mut status)?)
        };
        match (read().map_err(SaveError::Stream)?, status) {
            (1, [0]) => Ok(()),
            (1, [status]) => Err(SaveError::Command { status }),
            _ => Err(SaveError::Closed(io::Error::from(io::ErrorKind::UnexpectedEof))),
        }
    }

    /// Wait until the other side can take more, or has something to say.
    fn wait(&self, flags: PollFlags) -> io::Result<()> {
        match wait::until(&self.fd, flags, &self.cancel.0)? {
            true => Ok(()),
            // Not `Interrupted`: the standard library would try again.
            false => Err(io::Error::from(io::ErrorKind::TimedOut)),
        }
    }
}

impl Write for Peer {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        loop {
            match rustix::io::write(self.fd.as_fd(), buf) {
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT)?,
                other => return Ok(other?),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = fcntl_setfl(&self.fd, self.flags);
    }
}

/// A save into a stream.
pub struct Stream {
    to: Writer<BufWriter<Peer>>,
    memory: Memory,
    buffer: Vec<u8>,
    /// Something has been sent before.
    again: bool,
}

impl Stream {
    /// Begin to send `memory` of the machine `config`.
    ///
    /// # Errors
    /// When the other side has gone, or the save is cancelled.
    pub fn begin(
        peer: Peer,
        memory: Memory,
        config: &Config,
        progress: &Progress,
    ) -> Result<Self, SaveError> {
        let begin = || {
            let mut to = Writer::begin(BufWriter::new(peer))?;
            content::write_config(&mut to, config)?;
            Ok(to)
        };
        let to = begin().map_err(|e| failed(e, progress))?;
        Ok(Self { to, memory, buffer: vec![0; PIECE as usize], again: false })
    }

    fn send(&mut self, at: u64, bytes: &[u8], progress: &Progress) -> io::Result<()> {
        for (start, bytes, zero) in runs(bytes) {
            let at = (at + start).to_le_bytes();
            let length = bytes.len() as u64;
            if !zero {
                self.to.frame(Kind::Pages, &[&at, bytes])?;
                progress.written.fetch_add(length, Ordering::Relaxed);
                continue;
            }
            progress.zero_pages.fetch_add(length / ram::PAGE_SIZE, Ordering::Relaxed);
            if self.again {
                self.to.frame(Kind::Zeros, &[&at, &length.to_le_bytes()])?;
            }
        }
        progress.done.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn send_guest(&mut self, ranges: &[Range<u64>], progress: &Progress) -> io::Result<()> {
        let mut buffer = std::mem::take(&mut self.buffer);
        for piece in pieces(ranges) {
            progress.check()?;
            let length = usize::try_from(piece.end - piece.start).map_err(io::Error::other)?;
            let buffer = buffer.get_mut(..length).ok_or(io::ErrorKind::InvalidInput)?;
            ram::read(&self.memory, piece.start, buffer)?;
            self.send(piece.start, buffer, progress)?;
        }
        self.buffer = buffer;
        Ok(())
    }
}

impl Sink for Stream {
    fn copy(&mut self, source: &Source<'_>, progress: &Progress) -> Result<(), SaveError> {
        let sent = match source {
            Source::Guest(ranges) => self.send_guest(ranges, progress),
            Source::Staged(staging) => staging.pieces().try_for_each(|piece| {
                progress.check()?;
                let (at, bytes) = piece?;
                bytes.chunks(PIECE as usize).try_fold(at, |at, part| {
                    self.send(at, part, progress)?;
                    Ok::<_, io::Error>(at + part.len() as u64)
                })?;
                Ok(())
            }),
        };
        self.again = true;
        sent.map_err(|e| failed(e, progress))
    }

    fn finish(
        self: Box<Self>,
        config: Config,
        state: MachineState,
        progress: &Progress,
    ) -> Result<Option<Saved>, SaveError> {
        let mut to = self.to;
        content::write_machine(&mut to, &config, &state)
            .and_then(|()| to.end(0))
            .and_then(|()| Ok(to.into_inner().into_inner()?))
            .map_err(|e| failed(e, progress))?
            .end()
            .map_err(|e| match progress.check() {
                Ok(()) => e,
                Err(_) => SaveError::Cancelled,
            })?;
        Ok(None)
    }
}

fn failed(error: io::Error, progress: &Progress) -> SaveError {
    match error.kind() {
        _ if progress.is_cancelled() => SaveError::Cancelled,
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => SaveError::Closed(error),
        _ => SaveError::Stream(error),
    }
}
