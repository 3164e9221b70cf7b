//! What a signal handler says before the process ends. It takes no lock and no memory: the thread
//! that it interrupts may be in the allocator or in the middle of a log line.
use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    path::Path,
    sync::OnceLock,
};

use crate::{logging, terminal};

/// Opened before it can be needed.
static LOG: OnceLock<File> = OnceLock::new();

/// Say them in the file `log` too.
///
/// # Errors
/// When it cannot be opened a second time.
pub fn prepare(log: Option<&Path>) -> io::Result<()> {
    if let Some(path) = log {
        let file = OpenOptions::new().append(true).open(path)?;
        LOG.get_or_init(|| file);
    }
    Ok(())
}

/// Say `line`, and put the terminal back.
pub(crate) fn say(line: &[u8]) {
    if let Some(mut log) = LOG.get() {
        let _ = log.write_all(line);
    }
    terminal::put_back();
    // Not through `Stderr`, which has a lock; and a reader that has stopped must not keep us alive.
    if logging::writable() {
        let _ = rustix::io::write(rustix::stdio::stderr(), line);
    }
}
