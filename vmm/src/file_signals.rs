//! Signals that files send, each of which would end the process without a word.
//!
//! SIGBUS: a page of a mapped file is not there any more, because the file was cut off or its disk
//! fails; so it is with the memory of a saved state that a machine lives on. Nobody can go on then,
//! but why is said. SIGXFSZ: a file would grow past `ulimit -f`; the write fails, and whoever asked
//! for it says so.
use std::{io, path::Path, sync::OnceLock};

use libc::{c_int, c_void, siginfo_t};

use crate::last_words;

/// What to say, made before it can be needed: the handler of a signal takes no memory.
static LINE: OnceLock<String> = OnceLock::new();

/// Handle both.
///
/// # Errors
/// When the host refuses.
pub fn handle() -> io::Result<()> {
    for (signal, handler) in [(libc::SIGBUS, lost as _), (libc::SIGXFSZ, too_large as _)] {
        vmm_sys_util::signal::register_signal_handler(signal, handler)
            .map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
    }
    Ok(())
}

/// Guest memory comes from `path`: to be said when it is lost.
pub fn memory_is(path: &Path) {
    LINE.get_or_init(|| {
        format!(
            "stratovirt: a page of guest memory cannot be had from {} (SIGBUS): it was cut off, or \
             its disk is full or fails\n",
            path.display()
        )
    });
}

extern "C" fn lost(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    let anywhere = "stratovirt: the host cannot give a page of memory (SIGBUS)\n";
    last_words::say(LINE.get().map_or(anywhere, String::as_str).as_bytes());
    signal_hook::low_level::exit(1);
}

/// That there is a handler is enough: the write fails with EFBIG.
extern "C" fn too_large(_: c_int, _: *mut siginfo_t, _: *mut c_void) {}
