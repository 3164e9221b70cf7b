// UNSAFETY: a descriptor table private to a thread is made by a call that no safe library has.
#![expect(unsafe_code)]
//! Counts descriptors while other tests of the process open and close theirs.
use std::{io, panic::resume_unwind, thread};

/// Run `act` in a thread with its own descriptor table: empty except for the standard three, so
/// that nothing that another test closes stays open here.
///
/// # Panics
/// When `act` panics, or Linux is older than 5.9.
pub fn with_own_descriptors(act: impl FnOnce() + Send) {
    let own = || {
        let call = libc::SYS_close_range;
        // SAFETY: closes no descriptor in use: the table that it empties is this new thread's copy.
        let done = unsafe { libc::syscall(call, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_UNSHARE) };
        assert_eq!(done, 0, "close_range: {}", io::Error::last_os_error());
        act();
    };
    thread::scope(|scope| scope.spawn(own).join()).unwrap_or_else(|panic| resume_unwind(panic));
}

/// How many descriptors this thread's table has.
pub fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/thread-self/fd").unwrap().count()
}
