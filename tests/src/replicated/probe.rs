//! How long the guest is away, as the network sees it: a stream of datagrams that it sends back.
//! TCP would not show that, since it doubles the time until it tries again with each loss.
use std::io::ErrorKind;
use std::net::UdpSocket;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use crate::lab::hosts::GUEST;
use crate::lab::namespace::Namespace;
use crate::monitor::SOON;

/// Asks the guest for a sign of life every few milliseconds; ended when dropped.
pub struct Probe {
    seen: Arc<Mutex<Seen>>,
    thread: Option<JoinHandle<Result<()>>>,
}

#[derive(Default)]
struct Seen {
    stop: bool,
    failed: Option<String>,
    /// When an answer came.
    answers: Vec<Instant>,
}

impl Probe {
    /// Asks every `period` from `namespace`. Returns after the first answer, so that a gap that
    /// begins then is seen.
    ///
    /// # Errors
    /// No more threads, or no answer.
    pub fn start(namespace: &Namespace, period: Duration) -> Result<Self> {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let theirs = Arc::clone(&seen);
        let thread = namespace.spawn("probe", move || {
            if let Err(error) = ask(&theirs, period) {
                lock(&theirs).failed = Some(format!("{error:#}"));
            }
        })?;
        let this = Self { seen, thread: Some(thread) };
        let deadline = Instant::now() + SOON;
        while lock(&this.seen).answers.is_empty() {
            this.longest_gap(deadline)?;
            ensure!(Instant::now() < deadline, "the guest does not answer to a probe");
            std::thread::sleep(period);
        }
        Ok(this)
    }

    /// The longest time without an answer that contains or follows `since`.
    ///
    /// # Errors
    /// It cannot ask any more.
    pub fn longest_gap(&self, since: Instant) -> Result<Duration> {
        let seen = lock(&self.seen);
        if let Some(error) = &seen.failed {
            bail!("the probe: {error}");
        }
        Ok(longest_gap(&seen.answers, since))
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        lock(&self.seen).stop = true;
        // Its failure was reported to those that asked for a gap.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

fn ask(seen: &Mutex<Seen>, period: Duration) -> Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(GUEST)?;
    let mut next = Instant::now();
    while !lock(seen).stop {
        next += period;
        match socket.send(b"?") {
            // Nobody is there at the moment: no neighbour, or no server yet.
            Err(error) if !is_absence(error.kind()) => return Err(error.into()),
            _ => {}
        }
        loop {
            let left = next.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            socket.set_read_timeout(Some(left))?;
            match socket.recv(&mut [0]) {
                Ok(_) => lock(seen).answers.push(Instant::now()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) if is_absence(error.kind()) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}

fn is_absence(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::ConnectionRefused | ErrorKind::HostUnreachable)
}

/// The longest time between two moments that follow each other, the second not before `since`.
pub(super) fn longest_gap(moments: &[Instant], since: Instant) -> Duration {
    let pairs = moments.iter().zip(moments.iter().skip(1));
    let after = pairs.filter(|(_, next)| **next >= since);
    after.map(|(moment, next)| *next - *moment).max().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_gap_is_that_around_or_after_a_moment() {
        let now = Instant::now();
        let ms = Duration::from_millis;
        let moments = [0, 100, 110, 150, 160].map(|at| now + ms(at));
        for (since, gap) in [(0, 100), (105, 40), (120, 40), (155, 10), (200, 0)] {
            assert_eq!(longest_gap(&moments, now + ms(since)), ms(gap));
        }
    }
}
