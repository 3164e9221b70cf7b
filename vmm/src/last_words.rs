//! Messages of signal handlers before the process ends. They take no lock and allocate nothing: the
//! interrupted thread may be in the allocator or in the middle of a log line.
use std::{io::Write, sync::OnceLock};

use crate::{
    logging::{self, Rest},
    terminal,
};

/// Opened before it can be needed.
static LOG: OnceLock<Rest> = OnceLock::new();

/// Have the messages written to the log, too.
pub(crate) fn prepare(log: Rest) {
    LOG.get_or_init(|| log);
}

/// Write `line`, and restore the terminal.
pub(crate) fn say(line: &[u8]) {
    if let Some(Rest { file, pipe, .. }) = LOG.get() {
        let mut file = file;
        let mut rest = [0; 512];
        // Lines that the log's thread has not written yet come first. An empty pipe does not block.
        while let Some(pipe) = pipe
            && let Ok(length @ 1..) = rustix::io::read(pipe, &mut rest)
        {
            let _ = file.write_all(rest.get(..length).unwrap_or_default());
        }
        let _ = file.write_all(line);
    }
    terminal::put_back();
    // Not through `Stderr`, which has a lock; and a reader that has stopped reading must not block
    // us.
    let to_stderr = LOG.get().is_some_and(|log| log.is_stderr);
    if !to_stderr && logging::writable() {
        let _ = rustix::io::write(rustix::stdio::stderr(), line);
    }
}
