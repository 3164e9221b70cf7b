//! Descriptors that this process was started with, taken over by number.
// UNSAFETY: a number becomes an owned descriptor.
#![expect(unsafe_code, reason = "adopting descriptors by number")]
use std::{
    io,
    os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};

/// Take ownership of descriptor `number`.
///
/// # Errors
/// When no such descriptor was inherited. A close-on-exec descriptor was not inherited: this
/// process has opened it, or has taken it before, because taking one sets that flag.
pub fn take(number: RawFd) -> io::Result<OwnedFd> {
    let refused = |why: &str| io::Error::other(format!("descriptor {number} {why}"));
    if number <= 2 {
        return Err(refused("is standard input, output or error"));
    }
    // SAFETY: only its flags are read; a number that is no open descriptor is an error.
    let fd = unsafe { BorrowedFd::borrow_raw(number) };
    let flags = fcntl_getfd(fd).map_err(|_| refused("is not open"))?;
    if flags.contains(FdFlags::CLOEXEC) {
        return Err(refused("was not inherited, or is used twice"));
    }
    fcntl_setfd(fd, flags | FdFlags::CLOEXEC)?;
    // SAFETY: open and inherited, and by the flag not owned by anything else in this process.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
