//! Where a stream comes from: `-incoming unix:`, `fd:` and `exec:`.
use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    process::{Child, Command, Stdio},
};

use machine::inherited;
use qmp::server::{BindError, claim};
use rustix::{
    event::PollFlags,
    io::Errno,
    net::{SocketFlags, accept_with},
};
use signal_hook::{
    SigId,
    low_level::{pipe, unregister},
};

use super::wait;
use crate::{
    cli::Stream,
    event_loop::{ENDING, EventLoop},
};

/// Why there is no stream to read.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum IncomingError {
    #[error("cannot listen for the stream")]
    Bind(#[from] BindError),
    #[error("cannot take the stream")]
    Fd(#[source] io::Error),
    #[error("cannot start /bin/sh -c {command:?}")]
    Exec { command: String, source: io::Error },
    #[error("cannot wait for the stream")]
    Wait(#[from] io::Error),
}

/// A stream that comes in. Signals that end the monitor end the waiting for it.
pub struct Incoming {
    fd: OwnedFd,
    signals: Signals,
    /// Where it comes from, when that is a command of its own.
    child: Option<Child>,
}

impl Incoming {
    /// Take up the stream that `from` names; for a socket, wait for somebody to connect.
    ///
    /// # Errors
    /// When there is none to be had.
    pub fn open(from: &Stream) -> Result<Self, IncomingError> {
        let signals = Signals::watch()?;
        let mut child = None;
        let fd = match from {
            Stream::Unix(path) => accept(path, &signals)?,
            Stream::Fd(number) => inherited::take(*number).map_err(IncomingError::Fd)?,
            Stream::Exec(command) => {
                let failed = |source| IncomingError::Exec { command: command.clone(), source };
                let mut shell = Command::new("/bin/sh");
                shell.arg("-c").arg(command).stdin(Stdio::null()).stdout(Stdio::piped());
                let mut started = shell.spawn().map_err(failed)?;
                let out = started.stdout.take().map(OwnedFd::from);
                child = Some(started);
                out.ok_or_else(|| failed(io::Error::from(io::ErrorKind::BrokenPipe)))?
            }
        };
        Ok(Self { fd, signals, child })
    }
}

impl Read for Incoming {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            self.signals.wait_beside(self.fd.as_fd())?;
            match rustix::io::read(&self.fd, &mut *buf) {
                // Nonblocking on the other side's wish, and somebody else was quicker.
                Err(Errno::AGAIN | Errno::INTR) => {}
                other => return Ok(other?),
            }
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // It has said all, or it is of no use.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The first one to connect to `path`. The name is gone afterwards.
fn accept(path: &Path, signals: &Signals) -> Result<OwnedFd, IncomingError> {
    let (listener, _file) = claim(path)?;
    loop {
        signals.wait_beside(listener.as_fd())?;
        match accept_with(&listener, SocketFlags::CLOEXEC) {
            // It has gone again.
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
            other => return Ok(other.map_err(io::Error::from)?),
        }
    }
}

/// The signals that end the monitor, to be waited for beside something else.
struct Signals {
    came: UnixStream,
    registered: Vec<SigId>,
}

impl Signals {
    fn watch() -> io::Result<Self> {
        let (came, write) = UnixStream::pair()?;
        let mut this = Self { came, registered: Vec::new() };
        for signal in ENDING {
            this.registered.push(pipe::register(signal, write.try_clone()?)?);
        }
        if EventLoop::has_been_told_to_end() {
            (&write).write_all(&[0])?;
        }
        Ok(this)
    }

    /// Wait until there is something to read from `fd`.
    fn wait_beside(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        match wait::until(fd, PollFlags::IN, &self.came)? {
            true => Ok(()),
            false => Err(io::Error::other("ended by a signal")),
        }
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        self.registered.drain(..).for_each(|id| {
            unregister(id);
        });
    }
}
