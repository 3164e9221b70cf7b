//! Output that never waits.
use std::{
    collections::VecDeque,
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use rustix::{
    event::{PollFd, PollFlags, Timespec, epoll, poll},
    fs::{FileType, OFlags},
    io::Errno,
    net::SendFlags,
};

use super::socket::SocketName;
use crate::{
    backend::{
        gate::{Gate, Held},
        writer::Writer,
    },
    log_limit::log_seldom,
    threads::ThreadStart,
};

/// Bytes kept for a slow reader; more than that is dropped.
pub(super) const BACKLOG: usize = 256 << 10;
/// How long dropping a back-end waits for its output to reach a file.
const AT_THE_END: Duration = Duration::from_secs(1);
/// Bytes written at once where poll only says that some can be written.
const CAREFUL: usize = 256;

/// The output end of a character back-end; clones write to the same place.
///
/// The lock is needed because a vCPU writes while the worker on the I/O thread flushes and
/// connects; no thread blocks while holding it.
#[derive(Clone)]
pub struct CharSink {
    epoll: Arc<OwnedFd>,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    output: Option<Output>,
    /// Holds output back before it is written here.
    gate: Option<Arc<Gate>>,
    backlog: VecDeque<u8>,
    replay: Option<Replay>,
    dropped: u64,
    /// Of those, how many have not been reported yet.
    unreported: u64,
    /// What to remove at the end.
    name: Option<SocketName>,
    /// The output is in the epoll: the worker flushes when it becomes writable.
    watched: bool,
}

/// The last bytes of output, for the next client that connects.
struct Replay {
    last: VecDeque<u8>,
    size: usize,
}

/// Where bytes are written, and how to do so without waiting.
pub(super) enum Output {
    /// The descriptor is this process's own and non-blocking.
    Plain(OwnedFd),
    /// A socket shared with other processes: MSG_DONTWAIT on each call.
    Socket(OwnedFd),
    /// Anything else shared with other processes: poll first.
    Ask(OwnedFd),
    /// A regular file, whose storage may hang.
    File(Writer),
}

impl Output {
    /// A descriptor that is non-blocking already.
    pub fn non_blocking(fd: OwnedFd) -> Self {
        Self::Plain(fd)
    }

    /// A file that this process has opened, non-blocking. A regular file gets a thread, started by
    /// `start`.
    pub fn file(file: File, start: &ThreadStart) -> io::Result<Self> {
        if !file.metadata()?.is_file() {
            return Ok(Self::Plain(file.into()));
        }
        let failed = |error: &io::Error, bytes| {
            log_seldom!(warn, "console output: {bytes} bytes were lost: {error}");
        };
        Ok(Self::File(Writer::spawn("output", file, start, failed)?))
    }

    /// A descriptor that other processes share; a regular file as in [`Output::file`].
    pub fn inherited(fd: BorrowedFd, start: &ThreadStart) -> io::Result<Self> {
        let stat = rustix::fs::fstat(fd)?;
        let shared = FileType::from_raw_mode(stat.st_mode);
        let fd = super::own(fd, OFlags::WRONLY)?;
        let own = rustix::fs::fcntl_getfl(&fd)?.contains(OFlags::NONBLOCK);
        Ok(match shared {
            FileType::Socket => Self::Socket(fd),
            FileType::RegularFile => Self::file(fd.into(), start)?,
            _ if own => Self::Plain(fd),
            _ => Self::Ask(fd),
        })
    }

    fn write(&self, bytes: &[u8]) -> rustix::io::Result<usize> {
        match self {
            Self::Plain(fd) => rustix::io::write(fd, bytes),
            Self::File(writer) => rustix::io::write(writer, bytes),
            Self::Socket(fd) => {
                rustix::net::send(fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
            }
            Self::Ask(fd) => match self.is_writable_within(Duration::ZERO)? {
                false => Err(Errno::AGAIN),
                true => rustix::io::write(fd, bytes.get(..CAREFUL).unwrap_or(bytes)),
            },
        }
    }

    fn is_writable_within(&self, patience: Duration) -> rustix::io::Result<bool> {
        let patience = Timespec::try_from(patience).ok();
        poll(&mut [PollFd::new(self, PollFlags::OUT)], patience.as_ref()).map(|ready| ready > 0)
    }
}

impl AsFd for Output {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Plain(fd) | Self::Socket(fd) | Self::Ask(fd) => fd.as_fd(),
            Self::File(writer) => writer.as_fd(),
        }
    }
}

impl CharSink {
    pub(super) fn new(epoll: Arc<OwnedFd>, output: Option<Output>) -> Self {
        let mut state = State::default();
        state.output = output;
        Self { epoll, state: Arc::new(Mutex::new(state)) }
    }

    /// Keep the last `size` bytes of output from now on, and send them first to each new client.
    pub(super) fn replay(&self, size: usize) {
        let last = VecDeque::new();
        self.state.lock().replay = (size > 0).then_some(Replay { last, size });
    }

    /// Send `bytes`; returns at once.
    pub fn send(&self, bytes: &[u8]) {
        let copy = |to: &mut [u8]| {
            to.copy_from_slice(bytes);
            Ok(())
        };
        let gate = self.state.lock().gate.clone();
        match gate.map_or(Ok(Held::Open), |gate| gate.hold(bytes.len(), copy)) {
            Ok(Held::Open) => self.pass(bytes),
            Ok(Held::Kept) => {}
            Ok(Held::Full) | Err(_) => self.drop_bytes(bytes.len()),
        }
    }

    /// Send `bytes`, bypassing any gate; returns at once.
    pub(super) fn pass(&self, bytes: &[u8]) {
        let mut state = self.state.lock();
        if let Some(replay) = &mut state.replay {
            replay.keep(bytes);
        }
        if state.output.is_none() {
            return;
        }
        // Written directly while the backlog is empty; otherwise queued behind it, in order.
        let mut rest = bytes;
        if state.backlog.is_empty() {
            let taken = state.write(rest);
            rest = rest.get(taken..).unwrap_or_default();
        }
        if state.output.is_some() && !rest.is_empty() {
            let room = state.room().min(rest.len());
            state.backlog.extend(rest.iter().take(room));
            state.drop_bytes(rest.len() - room);
            state.flush();
        }
        state.watch(&self.epoll);
    }

    /// How many bytes [`CharSink::send`] would pass on or keep; a sink that discards always has
    /// room. The source's descriptor fires when there is more room.
    pub fn room(&self) -> usize {
        let state = self.state.lock();
        if let Some(room) = state.gate.as_ref().and_then(|gate| gate.room_left()) {
            return room;
        }
        match &state.output {
            Some(_) => state.room(),
            None => usize::MAX,
        }
    }

    /// Bytes dropped because the peer did not accept them.
    pub fn dropped(&self) -> u64 {
        self.state.lock().dropped
    }

    /// Count `bytes` that were not sent because there was no room for them.
    pub fn drop_bytes(&self, bytes: usize) {
        self.state.lock().drop_bytes(bytes);
    }

    /// Shut down: wait at most `patience` for output to reach its file, and remove the name of a
    /// socket. Output sent afterwards is discarded.
    pub fn finish(&self, patience: Duration) {
        let mut state = self.state.lock();
        state.finish(patience);
        state.name = None;
    }

    /// Put a gate in front of everything that is sent from now on; `None` removes it. Senders that
    /// wait for room are woken when the gate has some.
    pub(super) fn set_gate(&self, gate: Option<Arc<Gate>>) -> io::Result<()> {
        let mut state = self.state.lock();
        if let Some(new) = &gate {
            let data = epoll::EventData::new_u64(2);
            epoll::add(&*self.epoll, &**new, data, epoll::EventFlags::IN)?;
        }
        if let Some(old) = std::mem::replace(&mut state.gate, gate) {
            epoll::delete(&*self.epoll, &*old)?;
        }
        Ok(())
    }

    /// Set the name of the socket that clients connect to.
    pub(super) fn listens_at(&self, name: SocketName) {
        self.state.lock().name = Some(name);
    }

    pub(super) fn flush(&self) {
        let mut state = self.state.lock();
        // Before the caller asks how much room there is.
        state.gate.iter().for_each(|gate| gate.take_room());
        state.flush();
        state.watch(&self.epoll);
    }

    pub(super) fn connect(&self, output: Output) {
        self.disconnect();
        let mut state = self.state.lock();
        state.output = Some(output);
        if let Some(replay) = state.replay.take() {
            state.backlog.extend(&replay.last);
            state.replay = Some(replay);
            state.flush();
            state.watch(&self.epoll);
        }
    }

    pub(super) fn disconnect(&self) {
        let mut state = self.state.lock();
        state.backlog.clear();
        state.backlog.shrink_to(BACKLOG);
        state.watch(&self.epoll);
        state.output = None;
    }
}

impl Replay {
    fn keep(&mut self, bytes: &[u8]) {
        let bytes = bytes.get(bytes.len().saturating_sub(self.size)..).unwrap_or_default();
        let much = (self.last.len() + bytes.len()).saturating_sub(self.size);
        self.last.drain(..much.min(self.last.len()));
        self.last.extend(bytes);
    }
}

impl State {
    /// How many more bytes may be queued. A pending replay does not count against the backlog.
    fn room(&self) -> usize {
        let replay = self.replay.as_ref().map_or(0, |replay| replay.size);
        (BACKLOG + replay).saturating_sub(self.backlog.len())
    }

    fn flush(&mut self) {
        while !self.backlog.is_empty() {
            let (front, _) = self.backlog.as_slices();
            // Moved out, because `self` cannot be borrowed while writing; a backlog is rare.
            let front = front.get(..4096).unwrap_or(front).to_vec();
            match self.write(&front) {
                0 => break,
                n => drop(self.backlog.drain(..n.min(self.backlog.len()))),
            }
        }
    }

    /// How many of `bytes` are dealt with: written, or lost because of an error.
    fn write(&mut self, bytes: &[u8]) -> usize {
        loop {
            let Some(output) = &self.output else { return bytes.len() };
            match output.write(bytes) {
                Ok(n) => {
                    if self.unreported > 0 {
                        let unreported = std::mem::take(&mut self.unreported);
                        log_seldom!(
                            warn,
                            "console output resumes; {unreported} bytes were dropped"
                        );
                    }
                    return n;
                }
                Err(Errno::AGAIN) => return 0,
                Err(Errno::INTR) => {}
                Err(error) => {
                    if self.dropped == 0 {
                        log::warn!("console output: {error}");
                    }
                    self.drop_bytes(bytes.len());
                    return bytes.len();
                }
            }
        }
    }

    fn drop_bytes(&mut self, bytes: usize) {
        if self.dropped == 0 && bytes > 0 {
            log::warn!("console output is dropped: its reader is too slow");
        }
        self.dropped = self.dropped.saturating_add(bytes as u64);
        self.unreported = self.unreported.saturating_add(bytes as u64);
    }

    /// Waits for files only: any other output has a reader, which may never read.
    fn finish(&mut self, patience: Duration) {
        let Some(Output::File(writer)) = self.output.take() else { return };
        let deadline = Instant::now() + patience;
        let left = || deadline.saturating_duration_since(Instant::now());
        let output = Output::File(writer);
        let is_writable = || output.is_writable_within(left());
        while !self.backlog.is_empty() && matches!(is_writable(), Ok(true) | Err(Errno::INTR)) {
            let (front, _) = self.backlog.as_slices();
            let written = output.write(front).unwrap_or(0);
            self.backlog.drain(..written.min(self.backlog.len()));
        }
        if let Output::File(writer) = output
            && !writer.finish(left())
        {
            log::warn!("console output: the end could not be written to its file");
        }
    }

    /// Watch for writability only while there is a backlog.
    fn watch(&mut self, epoll: &OwnedFd) {
        let wanted = !self.backlog.is_empty();
        let Some(output) = &self.output else { return };
        let fd = output.as_fd();
        if wanted && !self.watched {
            let data = epoll::EventData::new_u64(1);
            self.watched = epoll::add(epoll, fd, data, epoll::EventFlags::OUT).is_ok();
        } else if !wanted && self.watched {
            self.watched = epoll::delete(epoll, fd).is_err();
        }
    }
}

impl Drop for State {
    fn drop(&mut self) {
        self.finish(AT_THE_END);
    }
}

impl io::Write for CharSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.send(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
