//! The log: one line for each event, `TIME:LEVEL: module: text`, to standard error or a file.
//!
//! A guest can cause some of the lines as often as it likes, and libraries that it can make
//! complain have no limit of their own. So there is a limit for each source here.
//!
//! A log that is a regular file is written by a thread of its own, because its storage may hang: no
//! thread waits for storage in order to log.
use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{self, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
    sync::{Arc, OnceLock},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use log::{Level, LevelFilter, Log, Metadata, Record};
use machine::{ThreadStart, writer::Writer};
use parking_lot::Mutex;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::OFlags,
    io::Errno,
};

use time::UtcDateTime;

use crate::{daemon, last_words};

/// Environment variable with the level: trace, debug, info, warn or error.
const LEVEL: &str = "STRATOVIRT_LOG_LEVEL";

/// Errors and warnings that one source may log in a [`WINDOW`].
const LIMIT: u32 = 20;
const WINDOW: Duration = Duration::from_secs(1);

/// Destination of lines that do not go to standard error.
static LOG: OnceLock<Mutex<Out>> = OnceLock::new();

struct Logger {
    /// By source. Any thread may log, and the lock is never held while waiting.
    paces: Mutex<BTreeMap<String, Pace>>,
}

/// Rate at which one source logs.
struct Pace {
    since: Instant,
    lines: u32,
}

impl Pace {
    const fn new(now: Instant) -> Self {
        Self { since: now, lines: 0 }
    }

    /// Whether a line may pass at `now`, and how many lines were suppressed in the window that has
    /// just ended.
    fn admit(&mut self, now: Instant) -> (bool, u32) {
        let mut missed = 0;
        if now.saturating_duration_since(self.since) >= WINDOW {
            missed = self.lines.saturating_sub(LIMIT);
            *self = Self::new(now);
        }
        self.lines = self.lines.saturating_add(1);
        (self.lines <= LIMIT, missed)
    }
}

/// The log's file.
struct Out {
    to: To,
    /// Number of lines that could not be written and are not reported yet.
    left_out: u64,
    /// The last line was written only in part.
    cut: bool,
}

enum To {
    /// A regular file.
    File(Writer),
    /// A device or a FIFO, non-blocking.
    Other(File),
    /// Nowhere: the process is ending.
    Nothing,
}

impl Out {
    fn write(&mut self, line: &str) {
        let mut text = String::new();
        if self.cut {
            text.push('\n');
        }
        if self.left_out > 0 {
            text.push_str(&format!(
                "{} lines dropped: the log could not be written\n",
                self.left_out
            ));
        }
        text.push_str(line);
        let mut rest = text.as_bytes();
        while !rest.is_empty() {
            let written = match &self.to {
                To::File(writer) => rustix::io::write(writer, rest),
                To::Other(file) => rustix::io::write(file, rest),
                To::Nothing => return,
            };
            match written {
                Ok(n) => rest = rest.get(n..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                // There is nowhere else to report it.
                Err(_) => {
                    self.cut |= rest.len() < text.len();
                    self.left_out = self.left_out.saturating_add(1);
                    return;
                }
            }
        }
        (self.cut, self.left_out) = (false, 0);
    }
}

/// What a dying process needs to complete the log without waiting for the thread: the file, and
/// lines that are logged but not written yet.
pub(crate) struct Rest {
    pub file: File,
    pub pipe: Option<Arc<OwnedFd>>,
    pub is_stderr: bool,
}

/// Start logging: to `file`, which is appended to and created with mode 0640, or to standard error.
/// Only errors and warnings are logged unless `STRATOVIRT_LOG_LEVEL` says otherwise. A regular file
/// is written by a thread, which is started through `start`.
///
/// # Errors
/// When the file cannot be opened.
pub fn start(file: Option<&Path>, start: &ThreadStart) -> io::Result<()> {
    let named = file.is_some();
    let file = match file {
        // Opening a FIFO that has no reader is an error instead of a wait.
        Some(path) => {
            let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
            let mut options = OpenOptions::new();
            options.append(true).create(true).mode(0o640).custom_flags(flags);
            Some(options.open(path)?)
        }
        // Standard error may be a file, too; in the background it is closed.
        None if std::env::var_os(daemon::MARK).is_none() => {
            let stderr = File::from(io::stderr().as_fd().try_clone_to_owned()?);
            stderr.metadata()?.is_file().then_some(stderr)
        }
        None => None,
    };
    if let Some(file) = file {
        let copy = file.try_clone()?;
        let (to, pipe) = if file.metadata()?.is_file() {
            let writer = Writer::spawn("log", file, start, |_, _| ())?;
            let rest = writer.rest();
            (To::File(writer), Some(rest))
        } else {
            (To::Other(file), None)
        };
        last_words::prepare(Rest { file: copy, pipe, is_stderr: !named });
        LOG.get_or_init(|| Mutex::new(Out { to, left_out: 0, cut: false }));
    }
    let (level, wrong) = level(std::env::var_os(LEVEL).map(|word| word.to_string_lossy().into()));
    log::set_max_level(level);
    log::set_boxed_logger(Box::new(Logger { paces: Mutex::default() }))
        .map_err(io::Error::other)?;
    if let Some(word) = wrong {
        log::warn!("{LEVEL}: '{word}': must be error, warn, info, debug or trace; warn is used");
    }
    Ok(())
}

/// End logging: wait for at most `limit` until what has been logged is in the file. Nothing is
/// logged afterwards.
pub fn finish(limit: Duration) {
    if let Some(log) = LOG.get()
        && let To::File(writer) = std::mem::replace(&mut log.lock().to, To::Nothing)
    {
        writer.finish(limit);
    }
}

/// The level named by `word`, and `word` itself if it is not a level.
fn level(word: Option<String>) -> (LevelFilter, Option<String>) {
    match word.as_deref().map(str::parse) {
        Some(Ok(level)) => (level, None),
        Some(Err(_)) if word.as_deref() != Some("") => (LevelFilter::Warn, word),
        _ => (LevelFilter::Warn, None),
    }
}

/// Date and time (UTC) `seconds` after the beginning of 1970, in RFC 3339 format, to the second.
fn date_time(seconds: u64) -> String {
    let seconds = i64::try_from(seconds).unwrap_or_default();
    let t = UtcDateTime::from_unix_timestamp(seconds).unwrap_or(UtcDateTime::UNIX_EPOCH);
    let (date, (hour, minute, second)) = (t.date(), t.as_hms());
    format!("{date}T{hour:02}:{minute:02}:{second:02}")
}

/// Whether a line can be written to standard error without blocking.
pub(crate) fn writable() -> bool {
    let stderr = io::stderr();
    let mut fds = [PollFd::new(&stderr, PollFlags::OUT)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|n| n > 0)
}

impl Log for Logger {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        // A user who asks for more than warnings wants all of it.
        if record.level() <= Level::Warn {
            let now = Instant::now();
            let (admitted, missed) = {
                let mut paces = self.paces.lock();
                let source = paces.entry(record.target().to_owned());
                source.or_insert_with(|| Pace::new(now)).admit(now)
            };
            if missed > 0 {
                let lines = format_args!("{missed} lines dropped");
                self.write(record.level(), record.target(), &lines);
            }
            if !admitted {
                return;
            }
        }
        self.write(record.level(), record.target(), record.args());
    }

    fn flush(&self) {}
}

impl Logger {
    fn write(&self, level: Level, source: &str, text: &std::fmt::Arguments<'_>) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // One write for each line, so that lines of several threads do not mix.
        let (time, nanos) = (date_time(now.as_secs()), now.subsec_nanos());
        let line = format!("{time}.{nanos:09}Z:{level}: {source}: {text}\n");
        match LOG.get() {
            Some(log) => log.lock().write(&line),
            // A reader that has stopped reading must not stop a vCPU.
            None if !writable() => {}
            // There is nowhere to report that logging has failed.
            None => drop(io::stderr().write_all(line.as_bytes())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_log_does_not_take_is_counted_and_told_later() {
        let (mut reader, writer) = io::pipe().unwrap();
        let writer = File::from(OwnedFd::from(writer));
        rustix::fs::fcntl_setfl(&writer, OFlags::NONBLOCK).unwrap();
        let mut out = Out { to: To::Other(writer), left_out: 0, cut: false };
        let line = "x".repeat(4095) + "\n";
        while out.left_out < 3 {
            out.write(&line);
        }
        let mut taken = vec![0; 1 << 20];
        let length = io::Read::read(&mut reader, &mut taken).unwrap();
        assert!(taken[..length].iter().all(|byte| b"x\n".contains(byte)));
        out.write("more\n");
        out.write("and more\n");
        drop(out);
        let mut rest = String::new();
        io::Read::read_to_string(&mut reader, &mut rest).unwrap();
        assert_eq!(rest, "3 lines dropped: the log could not be written\nmore\nand more\n");
    }

    #[test]
    fn a_level_that_there_is_not_is_told_of() {
        let named = |word: &str| level(Some(word.to_owned()));
        assert_eq!(level(None), (LevelFilter::Warn, None));
        assert_eq!(named(""), (LevelFilter::Warn, None));
        assert_eq!(named("info"), (LevelFilter::Info, None));
        assert_eq!(named("TRACE"), (LevelFilter::Trace, None));
        assert_eq!(named("verbose"), (LevelFilter::Warn, Some("verbose".into())));
    }

    #[test]
    fn a_time_is_shown_as_people_write_it() {
        for (seconds, shown) in [
            (0, "1970-01-01T00:00:00"),
            (951_782_399, "2000-02-28T23:59:59"),
            (951_782_400, "2000-02-29T00:00:00"),
            (1_795_286_130, "2026-11-21T18:35:30"),
            (4_102_444_799, "2099-12-31T23:59:59"),
            (u64::MAX, "1970-01-01T00:00:00"),
        ] {
            assert_eq!(date_time(seconds), shown);
        }
    }

    #[test]
    fn a_flood_is_cut_and_counted() {
        let begin = Instant::now();
        let mut pace = Pace::new(begin);
        let passed = (0..1000).filter(|_| pace.admit(begin).0).count();
        assert_eq!(passed, LIMIT as usize);
        assert_eq!(pace.admit(begin + WINDOW), (true, 1000 - LIMIT));
        assert_eq!(pace.admit(begin + WINDOW * 2), (true, 0));
    }
}
