//! The log: one line an event, to standard error or a file.
//!
//! A guest decides how often some of the lines come, and libraries that it can make complain know no
//! limit. So each source has one here.
use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use log::{Level, LevelFilter, Log, Metadata, Record};
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Names the level: trace, debug, info, warn or error.
const LEVEL: &str = "STRATOVIRT_LOG_LEVEL";

/// Errors and warnings that one source may log in a [`WINDOW`].
const LIMIT: u32 = 20;
const WINDOW: Duration = Duration::from_secs(1);

struct Logger {
    file: Option<File>,
    /// By source. Any thread may log, and nobody waits while holding it.
    paces: Mutex<BTreeMap<String, Pace>>,
}

/// How fast one source logs.
struct Pace {
    since: Instant,
    lines: u32,
}

impl Pace {
    const fn new(now: Instant) -> Self {
        Self { since: now, lines: 0 }
    }

    /// Whether a line may pass at `now`, and how many did not in the window that has just ended.
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

/// Start logging: to `file`, appended to and made with mode 0640, or to standard error. Only errors
/// and warnings unless `STRATOVIRT_LOG_LEVEL` says otherwise.
///
/// # Errors
/// When the file cannot be opened.
pub fn start(file: Option<&Path>) -> io::Result<()> {
    let file = file
        .map(|path| OpenOptions::new().append(true).create(true).mode(0o640).open(path))
        .transpose()?;
    let level = std::env::var(LEVEL).ok().and_then(|l| l.parse().ok());
    log::set_max_level(level.unwrap_or(LevelFilter::Warn));
    log::set_boxed_logger(Box::new(Logger { file, paces: Mutex::default() }))
        .map_err(io::Error::other)
}

/// Whether a line can be written to standard error without waiting.
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
        // Who asks for more than warnings wants all of it.
        if record.level() <= Level::Warn {
            let now = Instant::now();
            let (admitted, missed) = {
                let mut paces = self.paces.lock();
                let source = paces.entry(record.target().to_owned());
                source.or_insert_with(|| Pace::new(now)).admit(now)
            };
            if missed > 0 {
                let lines = format_args!("{missed} lines left out");
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
        // One write a line, so that lines of several threads do not mix.
        let (seconds, micros) = (now.as_secs(), now.subsec_micros());
        let line = format!("{seconds}.{micros:06}:{level}: {source}: {text}\n");
        // There is nowhere to report that logging has failed.
        let _ = match &self.file {
            Some(file) => { file }.write_all(line.as_bytes()),
            // A reader that has stopped reading must not stop a vCPU.
            None if !writable() => return,
            None => io::stderr().write_all(line.as_bytes()),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
