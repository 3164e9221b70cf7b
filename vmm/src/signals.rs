//! Signals: those that end the monitor in order, and those that would end it without a message.
//!
//! SIGTERM, SIGINT, SIGHUP and SIGQUIT are read by the main loop, like any other event.
//!
//! SIGBUS: a page of a mapped file is no longer there, because the file was truncated or its disk
//! fails; this also applies to the memory files of a saved state that a machine runs on. The
//! process cannot continue then, but reports why. SIGXFSZ: a file would grow past `ulimit -f`; the
//! write fails, and the thread that wrote reports that. SIGSYS is handled in `seccomp`.
use std::{io, path::Path, sync::OnceLock};

use libc::{c_int, c_void, siginfo_t};
use mio::{Interest, Registry, Token};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook_mio::v1_0::Signals;

use crate::last_words;

/// The signals that end the monitor.
const ENDING: [c_int; 4] = [SIGTERM, SIGINT, SIGHUP, SIGQUIT];

/// Make the event loop report the signals that end the monitor as `token`.
///
/// # Errors
/// When the host refuses.
pub fn ending(registry: &Registry, token: Token) -> io::Result<Signals> {
    let mut signals = Signals::new(ENDING)?;
    registry.register(&mut signals, token, Interest::READABLE)?;
    Ok(signals)
}

/// Make `signal` call `handler`, on the thread that it interrupts.
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

/// Handle the signals that accesses to files raise.
///
/// # Errors
/// When the host refuses.
pub fn handle_those_of_files() -> io::Result<()> {
    handle(libc::SIGBUS, lost)?;
    handle(libc::SIGXFSZ, too_large)
}

/// The message, prepared before it can be needed: a signal handler must not allocate.
static LINE: OnceLock<String> = OnceLock::new();

/// Guest memory is mapped from `path`, which is reported when it is lost.
pub fn memory_is(path: &Path) {
    LINE.get_or_init(|| {
        format!(
            "stratovirt: cannot read a page of guest memory from {} (SIGBUS): it was truncated, or \
             its disk is full or fails\n",
            path.display()
        )
    });
}

extern "C" fn lost(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    let anywhere = "stratovirt: the host cannot provide a page of memory (SIGBUS)\n";
    last_words::say(LINE.get().map_or(anywhere, String::as_str).as_bytes());
    signal_hook::low_level::exit(1);
}

/// An empty handler is enough: the write fails with EFBIG.
extern "C" fn too_large(_: c_int, _: *mut siginfo_t, _: *mut c_void) {}
