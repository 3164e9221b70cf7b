//! Character back-ends: the host's end of a serial port or console.
//!
//! Each has two ends. The [`CharSink`] takes output from any thread and never waits: what the peer
//! does not accept is kept in a bounded backlog; what exceeds the backlog is dropped and counted.
//! The [`CharSource`] belongs to a worker on an I/O thread; it passes input on as fast as the guest
//! takes it, and flushes the backlog.
mod escape;
pub mod gated;
mod output;
mod socket;
#[cfg(test)]
mod tests;

use std::{
    fs::OpenOptions,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, epoll, poll},
    fs::{Mode, OFlags},
    pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, ptsname, unlockpt},
    termios::{OptionalActions, tcgetattr, tcsetattr},
};

pub use self::output::CharSink;
use self::{escape::Escape, output::Output, socket::Listener};
use crate::{log_limit::log_seldom, threads::ThreadStart};

/// Most bytes of input kept from disconnected clients while the guest is not reading.
const LEFT: usize = 64 << 10;

/// A character back-end.
pub struct Char {
    /// Input, for the worker.
    pub source: CharSource,
    /// Output, for any thread.
    pub sink: CharSink,
    /// What `query-chardev` calls it, such as `pty:/dev/pts/3`.
    pub name: String,
}

/// Why a back-end could not be made.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "shown by the message")]
pub enum CharError {
    #[error("cannot open {what}")]
    Open { what: String, source: io::Error },
    #[error("{path} exists and is not a socket; choose another path or remove it: rm {path}")]
    NotASocket { path: PathBuf },
    #[error("another process listens on {path}; choose another path or kill it: fuser -k {path}")]
    InUse { path: PathBuf },
}

impl CharError {
    fn open(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Open { what, source }
    }
}

impl Char {
    /// A null back-end: output is discarded, input never arrives.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn null() -> Result<Self, CharError> {
        Self::assemble("null", None, None, None).map_err(CharError::open("nothing"))
    }

    /// This process's standard input and output. `Ctrl-a x` calls `quit` (on the I/O thread);
    /// `Ctrl-a` twice, or `Ctrl-a a`, is one `Ctrl-a` for the guest. Output to a regular file is
    /// written as by [`Char::file`].
    ///
    /// # Errors
    /// When they are closed, or the process has no descriptor left.
    pub fn stdio(quit: impl Fn() + Send + 'static, start: &ThreadStart) -> Result<Self, CharError> {
        let open = || {
            let input = own(io::stdin().as_fd(), OFlags::RDONLY)?;
            let output = Output::inherited(io::stdout().as_fd(), start)?;
            let mut this = Self::assemble("stdio", Some(input), Some(output), None)?;
            this.source.escape = Some(Escape::new(Box::new(quit)));
            Ok(this)
        };
        open().map_err(CharError::open("standard input and output"))
    }

    /// A new pseudo-terminal in raw mode; its path is in `name`.
    ///
    /// # Errors
    /// When the host has no pseudo-terminal left.
    pub fn pty() -> Result<Self, CharError> {
        let open = || {
            let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
            let master = openpt(flags)?;
            rustix::fs::fcntl_setfl(&master, OFlags::RDWR | OFlags::NONBLOCK)?;
            grantpt(&master)?;
            unlockpt(&master)?;
            let name = ptsname(&master, Vec::new())?;
            let name = format!("pty:{}", name.to_string_lossy());
            // Held open, so that a terminal program that exits does not hang the pseudo-terminal
            // up.
            let peer = ioctl_tiocgptpeer(&master, flags)?;
            let mut settings = tcgetattr(&peer)?;
            settings.make_raw();
            tcsetattr(&peer, OptionalActions::Now, &settings)?;
            let output = Output::non_blocking(master.try_clone()?);
            let mut this = Self::assemble(&name, Some(master), Some(output), None)?;
            this.source.peer = Some(peer);
            Ok(this)
        };
        open().map_err(CharError::open("a pseudo-terminal"))
    }

    /// A file, created (mode 0600) if missing and appended to. Output only. A regular file is
    /// written by a thread of its own, started by `start`: its storage may hang. Output that
    /// exceeds the backlog is then dropped.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn file(path: &Path, start: &ThreadStart) -> Result<Self, CharError> {
        let open = || {
            let file = OpenOptions::new()
                .append(true)
                .create(true)
                .mode(0o600)
                // A FIFO without a reader is an error instead of a wait.
                .custom_flags((OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32)
                .open(path)?;
            let output = Output::file(file, start)?;
            Self::assemble(&format!("file:{}", path.display()), None, Some(output), None)
        };
        open().map_err(CharError::open(path.display().to_string()))
    }

    /// A Unix socket to listen on, mode 0600. It serves one connection at a time; the next one
    /// waits. Output while no client is connected is discarded, except that each new connection is
    /// first sent the last `replay` bytes of all output. The path is removed when the back-end is
    /// dropped.
    ///
    /// # Errors
    /// When the path is taken (a dead socket is replaced) or cannot be bound.
    pub fn socket(path: &Path, replay: usize) -> Result<Self, CharError> {
        let (listener, socket) = Listener::bind(path)?;
        let name = format!("unix:{},server=on", path.display());
        let this = Self::assemble(&name, None, None, Some(listener))
            .map_err(CharError::open(path.display().to_string()))?;
        this.sink.replay(replay);
        this.sink.listens_at(socket);
        Ok(this)
    }

    fn assemble(
        name: &str,
        input: Option<OwnedFd>,
        output: Option<Output>,
        listener: Option<Listener>,
    ) -> io::Result<Self> {
        let epoll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC)?);
        if let Some(input) = &input {
            // A regular file or /dev/null cannot be waited on (EPERM) and need not be.
            let _ = watch(&epoll, input);
        }
        if let Some(listener) = &listener {
            watch(&epoll, listener)?;
        }
        let sink = CharSink::new(epoll.clone(), output);
        let source = CharSource {
            epoll,
            sink: sink.clone(),
            input,
            listener,
            left: Vec::new(),
            escape: None,
            peer: None,
        };
        Ok(Self { source, sink, name: name.into() })
    }
}

/// The input end.
pub struct CharSource {
    epoll: Arc<OwnedFd>,
    sink: CharSink,
    input: Option<OwnedFd>,
    listener: Option<Listener>,
    /// Input of disconnected clients that the guest has not read yet.
    left: Vec<u8>,
    escape: Option<Escape>,
    peer: Option<OwnedFd>,
}

impl CharSource {
    /// Read available input into `buffer`, without waiting; 0 when there is none (or `buffer` is
    /// empty). Call it until it returns 0 whenever the descriptor fires, and when the guest has
    /// room again.
    pub fn read(&mut self, buffer: &mut [u8]) -> usize {
        self.sink.flush();
        loop {
            if self.input.is_none() {
                self.accept();
            }
            if !self.left.is_empty() && !buffer.is_empty() {
                let n = self.left.len().min(buffer.len());
                buffer.iter_mut().zip(self.left.drain(..n)).for_each(|(to, from)| *to = from);
                return n;
            }
            let Some(input) = &self.input else { return 0 };
            if buffer.is_empty() && self.listener.is_none() {
                return 0;
            }
            let there = events(input.as_fd());
            let gone = there.intersects(PollFlags::HUP | PollFlags::ERR);
            if buffer.is_empty() && gone {
                // A guest that reads nothing must not block the next client.
                self.keep_rest();
                self.hang_up();
                continue;
            }
            if buffer.is_empty() || there.is_empty() {
                return 0;
            }
            match rustix::io::read(input, &mut *buffer) {
                Ok(n @ 1..) => {
                    let n = match &mut self.escape {
                        Some(escape) => escape.filter(buffer, n),
                        None => n,
                    };
                    if n > 0 {
                        return n;
                    }
                }
                Err(rustix::io::Errno::AGAIN) => return 0,
                Err(rustix::io::Errno::INTR) => {}
                Ok(_) | Err(_) => self.hang_up(),
            }
        }
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        let Some(stream) = listener.accept() else { return };
        let connected = || -> io::Result<OwnedFd> {
            let output = Output::non_blocking(stream.try_clone()?.into());
            let input = OwnedFd::from(stream);
            watch(&self.epoll, &input)?;
            self.sink.connect(output);
            Ok(input)
        };
        match connected() {
            Ok(input) => self.input = Some(input),
            Err(error) => log_seldom!(warn, "console connection refused: {error}"),
        }
    }

    /// Keep the unread input of a disconnected client, up to [`LEFT`] bytes.
    fn keep_rest(&mut self) {
        let Some(input) = &self.input else { return };
        let mut chunk = [0; 1024];
        while let Some(room @ 1..) = LEFT.checked_sub(self.left.len()) {
            let chunk = chunk.get_mut(..room.min(1024)).unwrap_or_default();
            match rustix::io::read(input, &mut *chunk) {
                Ok(n @ 1..) => self.left.extend(chunk.iter().take(n)),
                Err(rustix::io::Errno::INTR) => {}
                Ok(_) | Err(_) => return,
            }
        }
    }

    /// End of input: a socket waits for the next connection, any other back-end has no more input.
    fn hang_up(&mut self) {
        if let Some(input) = self.input.take() {
            // It may never have been watched: see `assemble`.
            let _ = epoll::delete(&*self.epoll, &input);
        }
        if self.listener.is_some() {
            self.sink.disconnect();
        }
    }
}

impl AsRawFd for CharSource {
    /// Poll it for reading; it is also readable when output can continue.
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

fn watch(epoll: &OwnedFd, fd: impl AsFd) -> rustix::io::Result<()> {
    epoll::add(epoll, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)
}

/// Events pending on `fd`: input, a hang-up, or nothing.
fn events(fd: BorrowedFd) -> PollFlags {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    // An error counts as no event; it is tried again the next time.
    let _ = poll(&mut fds, Some(&Timespec::default()));
    fds.first().map_or(PollFlags::empty(), PollFd::revents)
}

/// A descriptor for the same file as `fd` that can be made non-blocking without affecting other
/// processes, such as the shell, that share it: a new open file description where the kernel gives
/// one, else a duplicate.
fn own(fd: BorrowedFd, access: OFlags) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    match rustix::fs::fstat(fd).map(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode))? {
        rustix::fs::FileType::Fifo | rustix::fs::FileType::CharacterDevice => {
            match rustix::fs::open(path, flags, Mode::empty()) {
                Ok(own) => Ok(own),
                Err(_) => fd.try_clone_to_owned(),
            }
        }
        _ => fd.try_clone_to_owned(),
    }
}
