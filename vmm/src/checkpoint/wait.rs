//! Waiting for one descriptor until another one says to stop.
use std::{io, os::fd::AsFd};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
};

/// Wait until `fd` is ready for `flags`, or `stop` can be read; whether to go on, which is not so
/// once `stop` can be read, whatever `fd` has.
///
/// # Errors
/// When the host cannot wait. Signals are no error.
pub fn until(fd: impl AsFd, flags: PollFlags, stop: impl AsFd) -> io::Result<bool> {
    let mut fds = [PollFd::new(&fd, flags), PollFd::new(&stop, PollFlags::IN)];
    loop {
        match poll(&mut fds, None) {
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
            Ok(_) => break,
        }
    }
    let [_, stop] = fds;
    Ok(stop.revents().is_empty())
}
