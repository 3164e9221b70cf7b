//! Saving into a stream: a socket, a pipe, an open file. Without a return path there are no
//! answers, so that a pipe can be used; with one, the stream is a [dialogue](super::dialogue).
//!
//! ```text
//! Config  (Pages | Zeros)..  Config Section.. End
//! ```
//! The first Config says what the receiver needs to have; the second one is the configuration of
//! the machine at the end of the stream. Pages that have never been used are not sent.
use std::{
    io::{self, BufWriter, Write},
    ops::Range,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::atomic::Ordering,
    time::Duration,
};

use super::{
    cancellable_poll::{self, Waited},
    dialogue::{ACCEPT_LIMIT, ANSWER_LIMIT, Answers, HandOver, Hello, Said},
    dry_run::dry_run_frames,
    memory_file::Progress,
    save::{Finished, SaveError, Sink, Source, pieces},
};
use machine::{MachineState, Memory, memory::image as ram, sparse};
use rustix::{
    event::PollFlags,
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
    io::Errno,
    net::{
        AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, connect, shutdown,
        socket_with,
    },
};
use state::{
    Config, Frames,
    file::{write_config, write_sections},
    frame::{Kind, Writer},
};

use crate::wake::Wake;

/// Most bytes of memory in one frame.
pub const PIECE: u64 = 1 << 20;

/// The receiving process. Writing waits for it until the save is cancelled.
pub struct Peer {
    fd: OwnedFd,
    /// The file status flags as they were: others may share the open file description.
    flags: OFlags,
    cancel: Cancel,
    /// The peer is a command, which reports its exit status in one byte.
    command: bool,
}

/// Makes a [`Peer`] stop waiting, permanently.
#[derive(Debug, Clone)]
pub struct Cancel(Wake);

impl Cancel {
    /// A handle that has not been used.
    ///
    /// # Errors
    /// When the host has no free descriptor.
    pub fn new() -> io::Result<Self> {
        Wake::new().map(Self)
    }

    /// Wait until `fd` is ready for `flags`.
    ///
    /// # Errors
    /// When this was cancelled, or the host cannot wait.
    pub fn wait_beside(&self, fd: impl AsFd, flags: PollFlags) -> io::Result<()> {
        self.wait_for(fd, flags, None)
    }

    /// Like [`Cancel::wait_beside`], for at most `at_most`.
    ///
    /// # Errors
    /// Also when that time is over: an error of the kind `TimedOut`, as when this was cancelled.
    pub fn wait_for(
        &self,
        fd: impl AsFd,
        flags: PollFlags,
        at_most: Option<Duration>,
    ) -> io::Result<()> {
        // Not `Interrupted`: the standard library would retry.
        let over = |why| Err(io::Error::new(io::ErrorKind::TimedOut, why));
        match cancellable_poll::until(fd, flags, &self.0, at_most)? {
            Waited::Ready => Ok(()),
            Waited::Stop => over("cancelled"),
            Waited::Nothing => over("there is no answer"),
        }
    }

    /// Cancel. Never blocks.
    pub fn cancel(&self) {
        self.0.wake();
    }
}

/// The process that a stream goes to, and how it is reached.
pub enum To {
    /// The process that listens at this socket.
    Socket(PathBuf),
    /// The process at the other end of this descriptor.
    Fd(OwnedFd),
    /// A command of [`crate::spawner`], which reports its exit status.
    Command(OwnedFd),
}

impl Peer {
    /// Connect to the peer. Looking up a socket's path may take as long as its file system takes.
    ///
    /// # Errors
    /// When the peer cannot be reached.
    pub fn reach(to: To, cancel: Cancel) -> Result<Self, SaveError> {
        let command = matches!(to, To::Command(_));
        let fd = match to {
            To::Fd(fd) | To::Command(fd) => fd,
            To::Socket(path) => {
                connected(&path).map_err(|source| SaveError::Connect { path, source })?
            }
        };
        let set_up = || {
            let flags = fcntl_getfl(&fd)?;
            fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
            Ok(flags)
        };
        let flags = set_up().map_err(SaveError::Stream)?;
        Ok(Self { fd, flags, cancel, command })
    }

    /// Close the stream: nothing more is written.
    fn end(self) -> Result<(), SaveError> {
        if !self.command {
            return Ok(());
        }
        let mut status = [0];
        let mut read = || {
            shutdown(&self.fd, Shutdown::Write)?;
            self.cancel.wait_beside(&self.fd, PollFlags::IN)?;
            Ok(rustix::io::read(&self.fd, &mut status)?)
        };
        match (read().map_err(SaveError::Stream)?, status) {
            (1, [0]) => Ok(()),
            (1, [status]) => Err(SaveError::Command { status }),
            _ => Err(SaveError::Closed(io::Error::from(io::ErrorKind::UnexpectedEof))),
        }
    }
}

impl Write for Peer {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        loop {
            match rustix::io::write(self.fd.as_fd(), buf) {
                Err(Errno::AGAIN) => self.cancel.wait_beside(&self.fd, PollFlags::OUT)?,
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

/// A connection to the socket at `path`, which does not block. Does not wait for a listener whose
/// queue is full.
///
/// # Errors
/// When nobody listens there.
pub fn connected(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// A save into a stream.
pub struct Stream {
    to: Writer<BufWriter<Peer>>,
    memory: Memory,
    buffer: Vec<u8>,
    /// Whether memory has been sent before.
    again: bool,
    /// The peer's answers, if it sends any.
    answers: Option<Answers>,
}

impl Stream {
    /// Begin to send `memory` of the machine `config`. With a greeting, the peer has to accept it
    /// before a page is sent.
    ///
    /// # Errors
    /// When the peer has gone or refuses, or the save is cancelled.
    pub fn begin(
        peer: Peer,
        memory: Memory,
        config: &Config,
        hello: Option<&Hello>,
        progress: &Progress,
    ) -> Result<Self, SaveError> {
        let mut answers = None;
        let begin = || {
            if hello.is_some() {
                answers = Some(Answers::new(peer.fd.try_clone()?, peer.cancel.clone()));
            }
            let mut to = Writer::begin(BufWriter::new(peer))?;
            if let Some(hello) = hello {
                to.frame(Kind::Hello, &[&serde_json::to_vec(hello)?])?;
            }
            write_config(&mut to, config)?;
            to.flush()?;
            Ok(to)
        };
        let to = begin().map_err(|e| failed(e, progress))?;
        if let Some(answers) = &mut answers {
            hear(answers, ACCEPT_LIMIT, Kind::Accept, progress)?;
        }
        Ok(Self { to, memory, buffer: vec![0; PIECE as usize], again: false, answers })
    }

    fn send(&mut self, at: u64, bytes: &[u8], progress: &Progress) -> io::Result<()> {
        for (start, bytes, zero) in sparse::runs(bytes) {
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
    ) -> Result<Finished, SaveError> {
        let mut to = self.to;
        let last = last_frames(&config, state).map_err(SaveError::Stream)?;
        // If this fails, the end of the stream is not sent: the receiver does not start the
        // machine, which continues here.
        dry_run_frames(&last).map_err(|why| SaveError::DryRun(Box::new(why)))?;
        forward(&last, &mut to).and_then(|()| to.end(0)).map_err(|e| failed(e, progress))?;
        if let Some(mut answers) = self.answers {
            hear(&mut answers, ANSWER_LIMIT, Kind::Ready, progress)?;
            let say = Box::new(move |kind| to.frame(kind, &[]).and_then(|()| to.flush()));
            return Ok(Finished::HandOver(HandOver { say, answers }));
        }
        let peer = to.into_inner().into_inner().map_err(|e| failed(e.into_error(), progress))?;
        peer.end().map_err(|e| if progress.is_cancelled() { SaveError::Cancelled } else { e })?;
        Ok(Finished::Over(None))
    }
}

/// Wait for the answer `wanted`.
fn hear(
    answers: &mut Answers,
    limit: Duration,
    wanted: Kind,
    progress: &Progress,
) -> Result<(), SaveError> {
    match answers.next(limit) {
        Ok(said) if said.kind == wanted => Ok(()),
        Ok(Said { kind: Kind::Refuse | Kind::Failed, text }) => {
            Err(SaveError::Refused { why: text })
        }
        Ok(said) => {
            let why = format!("it answered with {}", said.kind.name());
            Err(SaveError::Stream(io::Error::other(why)))
        }
        Err(_) if progress.is_cancelled() => Err(SaveError::Cancelled),
        Err(e) if e.kind() == io::ErrorKind::TimedOut => Err(SaveError::NoAnswer),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Err(SaveError::Closed(e)),
        Err(e) => Err(failed(e, progress)),
    }
}

/// The frames that follow all memory, as a stream of its own.
///
/// # Errors
/// When a part of the state has no saved form.
pub fn last_frames(config: &Config, state: MachineState) -> io::Result<Vec<u8>> {
    let mut to = Writer::begin(Vec::new())?;
    write_config(&mut to, config)?;
    write_sections(&mut to, &state.into())?;
    to.end(0)?;
    Ok(to.into_inner())
}

/// Send the frames of `stream`, except for its end.
fn forward(stream: &[u8], to: &mut Writer<impl Write>) -> io::Result<()> {
    let mut frames = Frames::begin(stream).map_err(io::Error::other)?;
    let mut body = Vec::new();
    loop {
        match frames.take(&mut body).map_err(io::Error::other)? {
            Kind::End => return Ok(()),
            kind => to.frame(kind, &[&body])?,
        }
    }
}

fn failed(error: io::Error, progress: &Progress) -> SaveError {
    match error.kind() {
        _ if progress.is_cancelled() => SaveError::Cancelled,
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => SaveError::Closed(error),
        _ => SaveError::Stream(error),
    }
}
