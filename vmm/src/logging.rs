//! The log: one line an event, `TIME:LEVEL: module: text`, to standard error or a file.
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
use time::UtcDateTime;

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
    let (level, wrong) = level(std::env::var_os(LEVEL).map(|word| word.to_string_lossy().into()));
    log::set_max_level(level);
    log::set_boxed_logger(Box::new(Logger { file, paces: Mutex::default() }))
        .map_err(io::Error::other)?;
    if let Some(word) = wrong {
        log::warn!("{LEVEL}: '{word}': must be error, warn, info, debug or trace; it is warn now");
    }
    Ok(())
}

/// The level that `word` names, and `word` if it names none.
fn level(word: Option<String>) -> (LevelFilter, Option<String>) {
    match word.as_deref().map(str::parse) {
        Some(Ok(level)) => (level, None),
        Some(Err(_)) if word.as_deref() != Some("") => (LevelFilter::Warn, word),
        _ => (LevelFilter::Warn, None),
    }
}

/// Date and time (UTC) `seconds` after the beginning of 1970, as RFC 3339 has them, up to the second.
pub fn date_time(seconds: u64) -> String {
    let seconds = i64::try_from(seconds).unwrap_or_default();
    let t = UtcDateTime::from_unix_timestamp(seconds).unwrap_or(UtcDateTime::UNIX_EPOCH);
    let (date, (hour, minute, second)) = (t.date(), t.as_hms());
    format!("{date}T{hour:02}:{minute:02}:{second:02}")
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
        let (time, nanos) = (date_time(now.as_secs()), now.subsec_nanos());
        let line = format!("{time}.{nanos:09}Z:{level}: {source}: {text}\n");
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
