//! Waiting for one descriptor, cancellable by a second one.
use std::{
    io,
    os::fd::AsFd,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

/// How waiting has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waited {
    /// The descriptor is ready.
    Ready,
    /// The second descriptor is readable.
    Stop,
    /// Neither was ready within the time limit.
    Nothing,
}

/// Wait for at most `at_most` until `fd` is ready for `flags`, or `stop` is readable, which takes
/// precedence.
///
/// # Errors
/// When the host cannot wait. Signals are no error.
pub fn until(
    fd: impl AsFd,
    flags: PollFlags,
    stop: impl AsFd,
    at_most: Option<Duration>,
) -> io::Result<Waited> {
    let mut fds = [PollFd::new(&fd, flags), PollFd::new(&stop, PollFlags::IN)];
    let deadline = at_most.map(|time| Instant::now() + time);
    loop {
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let left = left.map(Timespec::try_from).transpose().map_err(io::Error::other)?;
        match poll(&mut fds, left.as_ref()) {
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
            Ok(0) => return Ok(Waited::Nothing),
            Ok(_) => break,
        }
    }
    let [_, stop] = fds;
    Ok(if stop.revents().is_empty() { Waited::Ready } else { Waited::Stop })
}
