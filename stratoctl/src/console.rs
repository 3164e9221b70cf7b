//! Connects a terminal, or a pipe, to a domain's console.
use std::{
    collections::VecDeque,
    io::{self, IsTerminal, Read, Write},
    os::unix::net::UnixStream,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    termios::{OptionalActions, Termios, tcgetattr, tcsetattr},
};
use signal_hook::{
    SigId,
    consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM},
};

/// The signals that end an attachment.
const ENDING: [i32; 4] = [SIGTERM, SIGINT, SIGHUP, SIGQUIT];
/// `Ctrl-]`.
const ESCAPE: u8 = 0x1d;
/// Most typed bytes that wait for the guest; until it takes some, no more are read.
const MAX_TYPED: usize = 4096;
/// How long a console may be silent at the beginning before a hint is shown.
const HINT_AFTER: Duration = Duration::from_secs(2);

/// How an attachment ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// `Ctrl-]`.
    Left,
    /// The monitor has hung up.
    HungUp,
    /// A signal.
    Signal(u8),
    /// Standard output was closed by its reader.
    NobodyReads,
}

/// Copy bytes between standard input and output and `console` until one of them ends it. The end of
/// standard input does not.
///
/// # Errors
/// When the host refuses.
pub fn attach(console: UnixStream) -> io::Result<End> {
    console.set_nonblocking(true)?;
    // Before the terminal becomes raw, so that it is restored in every case.
    let signals = Signals::catch()?;
    let _raw = Raw::enter();
    Attachment { console, typed: VecDeque::new(), open: true, leaving: false, heard: false }
        .run(&signals)
}

struct Attachment {
    console: UnixStream,
    /// Typed bytes that the guest has not taken yet.
    typed: VecDeque<u8>,
    /// Standard input has not reached its end.
    open: bool,
    leaving: bool,
    /// The guest has sent something.
    heard: bool,
}

impl Attachment {
    fn run(mut self, signals: &Signals) -> io::Result<End> {
        let stdin = io::stdin();
        let begin = Instant::now();
        loop {
            if self.leaving && self.typed.is_empty() {
                return Ok(End::Left);
            }
            let mut to_console = PollFlags::IN;
            to_console.set(PollFlags::OUT, !self.typed.is_empty());
            let listens = self.open && !self.leaving && self.typed.len() < MAX_TYPED;
            let mut fds = vec![
                PollFd::new(&self.console, to_console),
                PollFd::new(&signals.wakeup, PollFlags::IN),
            ];
            if listens {
                fds.push(PollFd::new(&stdin, PollFlags::IN));
            }
            let until_hint = HINT_AFTER.saturating_sub(begin.elapsed());
            let timeout = (!self.heard && !self.leaving).then_some(until_hint);
            let timeout = timeout.and_then(|left| Timespec::try_from(left).ok());
            match poll(&mut fds, timeout.as_ref()) {
                Err(Errno::INTR) => continue,
                other => other?,
            };
            let ready = |at: usize| fds.get(at).is_some_and(|fd| !fd.revents().is_empty());
            let (from_console, wakeup, from_stdin) = (ready(0), ready(1), ready(2));
            if wakeup && let Some(signal) = signals.number() {
                return Ok(End::Signal(signal));
            }
            if !self.heard && begin.elapsed() >= HINT_AFTER {
                self.heard = true;
                if stdin.is_terminal() {
                    eprint!("(no output yet; only one client can be attached at a time)\r\n");
                }
            }
            if from_stdin {
                self.read_typed();
            }
            if from_console && let Some(end) = self.exchange()? {
                return Ok(end);
            }
        }
    }

    fn read_typed(&mut self) {
        let mut bytes = [0; 1024];
        // Bypasses the standard library's buffer, which `poll` does not know of.
        match rustix::io::read(io::stdin(), &mut bytes) {
            Ok(0) => self.open = false,
            Ok(n) => {
                let bytes = bytes.get(..n).unwrap_or_default();
                let end = bytes.iter().position(|byte| *byte == ESCAPE);
                self.leaving = end.is_some();
                self.typed.extend(bytes.iter().take(end.unwrap_or(n)));
            }
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => self.open = false,
        }
    }

    /// Copy what can be copied now, both ways.
    fn exchange(&mut self) -> io::Result<Option<End>> {
        let mut bytes = [0; 16 << 10];
        match self.console.read(&mut bytes) {
            Ok(0) => return Ok(Some(End::HungUp)),
            Ok(n) => {
                self.heard = true;
                let mut out = io::stdout().lock();
                let said = bytes.get(..n).unwrap_or_default();
                if out.write_all(said).and_then(|()| out.flush()).is_err() {
                    return Ok(Some(End::NobodyReads));
                }
            }
            Err(e) => match e.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => {}
                io::ErrorKind::ConnectionReset => return Ok(Some(End::HungUp)),
                _ => return Err(e),
            },
        }
        while !self.typed.is_empty() {
            let (front, _) = self.typed.as_slices();
            match self.console.write(front) {
                Ok(n) => drop(self.typed.drain(..n.min(self.typed.len()))),
                Err(e) => match e.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock if self.leaving => {
                        // The guest takes nothing: bytes typed last are not waited for.
                        self.typed.clear();
                    }
                    io::ErrorKind::WouldBlock => break,
                    _ => return Ok(Some(End::HungUp)),
                },
            }
        }
        Ok(None)
    }
}

/// Signals that would end the process, caught while this exists.
struct Signals {
    wakeup: UnixStream,
    last: Arc<AtomicUsize>,
    ids: Vec<SigId>,
}

impl Signals {
    fn catch() -> io::Result<Self> {
        let (wakeup, waker) = UnixStream::pair()?;
        let mut this = Self { wakeup, last: Arc::default(), ids: Vec::new() };
        for signal in ENDING {
            let number = usize::try_from(signal).unwrap_or_default();
            // In this order: a reader that is woken finds the number.
            let flag = signal_hook::flag::register_usize(signal, this.last.clone(), number)?;
            let pipe = signal_hook::low_level::pipe::register(signal, waker.try_clone()?)?;
            this.ids.extend([flag, pipe]);
        }
        Ok(this)
    }

    fn number(&self) -> Option<u8> {
        u8::try_from(self.last.load(Ordering::SeqCst)).ok().filter(|number| *number != 0)
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for id in self.ids.drain(..) {
            signal_hook::low_level::unregister(id);
        }
    }
}

/// The terminal on standard input, raw while this exists. Unlike the monitor, which writes lines of
/// its own, this makes output raw, too: all of it is the guest's.
struct Raw(Termios);

impl Raw {
    fn enter() -> Option<Self> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return None;
        }
        let before = tcgetattr(&stdin).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw).ok()?;
        Some(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // The terminal may be gone.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}
