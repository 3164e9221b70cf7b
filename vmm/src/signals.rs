//! Signals: those that end the monitor in order, and those that would end it without a word.
//!
//! SIGTERM, SIGINT, SIGHUP and SIGQUIT are read by the main loop, like any other event.
//!
//! SIGBUS: a page of a mapped file is not there any more, because the file was cut off or its disk
//! fails; so it is with the memory of a saved state that a machine runs on. The process cannot
//! continue then, but says why. SIGXFSZ: a file would grow past `ulimit -f`; the write fails, and
//! who asked for it reports that. SIGSYS belongs to `seccomp`.
use std::{io, path::Path, sync::OnceLock};

use libc::{c_int, c_void, siginfo_t};
use mio::{Interest, Registry, Token};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook_mio::v1_0::Signals;

use crate::last_words;

/// The signals that end the monitor.
const ENDING: [c_int; 4] = [SIGTERM, SIGINT, SIGHUP, SIGQUIT];

/// Have the signals that end the monitor reported as `token`.
///
/// # Errors
/// When the host refuses.
pub fn ending(registry: &Registry, token: Token) -> io::Result<Signals> {
    let mut signals = Signals::new(ENDING)?;
    registry.register(&mut signals, token, Interest::READABLE)?;
    Ok(signals)
}

/// Have `signal` call `handler`, on the thread that it interrupts.
///
/// # Errors
/// When the host refuses.
pub(crate) fn handle(
    signal: c_int,
    handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void),
) -> io::Result<()> {
    vmm_sys_util::signal::register_signal_handler(signal, handler)
        .map_err(|e| io::Error::from_raw_os_error(e.errno()))
}

/// Handle the signals that files send.
///
/// # Errors
/// When the host refuses.
pub fn handle_those_of_files() -> io::Result<()> {
    handle(libc::SIGBUS, lost)?;
    handle(libc::SIGXFSZ, too_large)
}

/// What to say, made before it can be needed: the handler of a signal takes no memory.
static LINE: OnceLock<String> = OnceLock::new();

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
