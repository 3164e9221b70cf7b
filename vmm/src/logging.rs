//! The log: one line an event, to standard error or a file.
use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use log::{LevelFilter, Log, Metadata, Record};

/// Names the level: trace, debug, info, warn or error.
const LEVEL: &str = "STRATOVIRT_LOG_LEVEL";

struct Logger(Option<File>);

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
    log::set_boxed_logger(Box::new(Logger(file))).map_err(io::Error::other)
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
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // One write a line, so that lines of several threads do not mix.
        let line = format!(
            "{}.{:06}:{}: {}: {}\n",
            now.as_secs(),
            now.subsec_micros(),
            record.level(),
            record.target(),
            record.args()
        );
        // There is nowhere to report that logging has failed.
        let _ = match &self.0 {
            Some(file) => { file }.write_all(line.as_bytes()),
            // A reader that has stopped reading must not stop a vCPU.
            None if !writable() => return,
            None => io::stderr().write_all(line.as_bytes()),
        };
    }

    fn flush(&self) {}
}
