//! Polls briefly for the next request, or for the answer to a frame, before sleeping. That saves
//! the guest an exit and the thread a wake-up.
use std::{
    hint,
    time::{Duration, Instant},
};

/// How long to poll. The window grows while requests arrive soon after the last one was served. It
/// drops to zero when they do not (as KVM does for a halted vCPU), when they always arrive a little
/// after the longest window, or when another thread needs the CPU, perhaps a vCPU of the same
/// guest.
#[derive(Default)]
pub(crate) struct Spin {
    window: Duration,
    /// Consecutive unsuccessful polls at the longest window.
    futile: u8,
    idle_since: Option<Instant>,
    rest_until: Option<Instant>,
}

impl Spin {
    const FIRST: Duration = Duration::from_micros(8);
    const MAX: Duration = Duration::from_micros(64);
    /// A notification this soon indicates that a longer window would have caught the request. It
    /// exceeds the longest window by the time that the notification itself and the wake-up take,
    /// which differs between hosts: on a fast one the indication can be wrong.
    const SOON: Duration = Duration::from_micros(100);
    /// After this many unsuccessful polls the indication is taken to be wrong.
    const FUTILE: u8 = 8;
    /// No polling for this long after that.
    const LONG_REST: Duration = Duration::from_millis(20);
    /// A turn of the loop that took this long was preempted by another thread: a timer interrupt
    /// takes half of it where the host is itself a virtual machine.
    const STOLEN: Duration = Duration::from_micros(50);
    /// No polling for this long after that: where this thread shares its CPU with the guest, one
    /// window in each such period is lost.
    const REST: Duration = Duration::from_millis(1);

    /// Polls for `window` at first.
    #[cfg(test)]
    pub(crate) fn with_window(window: Duration) -> Self {
        Self { window, ..Self::default() }
    }

    /// Poll for a request; whether one has arrived.
    pub(crate) fn wait(&mut self, mut has_come: impl FnMut() -> bool) -> bool {
        let begin = Instant::now();
        let mut last = begin;
        while last.duration_since(begin) < self.window {
            if has_come() {
                self.caught();
                return true;
            }
            hint::spin_loop();
            let now = Instant::now();
            if now.duration_since(last) > Self::STOLEN {
                self.rest(now + Self::REST);
            }
            last = now;
        }
        self.sleeps(begin, last);
        false
    }

    fn caught(&mut self) {
        (self.idle_since, self.futile) = (None, 0);
    }

    /// No request has arrived from `since` until `now`.
    fn sleeps(&mut self, since: Instant, now: Instant) {
        self.idle_since = Some(since);
        if self.window < Self::MAX {
            return;
        }
        self.futile += 1;
        if self.futile == Self::FUTILE {
            self.futile = 0;
            self.rest(now + Self::LONG_REST);
        }
    }

    /// The driver had to send a notification.
    pub(crate) fn woken(&mut self, now: Instant) {
        let Some(since) = self.idle_since.take() else { return };
        let resting = self.rest_until.is_some_and(|until| now < until);
        self.window = if !resting && now.duration_since(since) <= Self::SOON {
            (self.window * 2).clamp(Self::FIRST, Self::MAX)
        } else {
            Duration::ZERO
        };
    }

    fn rest(&mut self, until: Instant) {
        (self.window, self.rest_until) = (Duration::ZERO, Some(until));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Simulate a driver whose requests arrive `gap` after the last one was served, with no other
    /// thread running. Returns how many requests were caught by polling, and the share of time
    /// spent polling.
    fn driver(gap: Duration, requests: u32) -> (u32, f64) {
        let mut spin = Spin::default();
        let (begin, mut now) = (Instant::now(), Instant::now());
        let (mut caught, mut waited) = (0, Duration::ZERO);
        for _ in 0..requests {
            waited += spin.window.min(gap);
            if gap < spin.window {
                caught += 1;
                now += gap;
                spin.caught();
                continue;
            }
            spin.sleeps(now, now + spin.window);
            now += gap;
            spin.woken(now);
        }
        (caught, waited.as_secs_f64() / now.duration_since(begin).as_secs_f64())
    }

    #[test]
    fn a_quick_driver_is_waited_for() {
        let (caught, _) = driver(Duration::from_micros(30), 10_000);
        assert!(caught > 9_990, "{caught}");
    }

    #[test]
    fn one_that_is_always_a_little_too_slow_is_not() {
        let (caught, waited) = driver(Duration::from_micros(80), 10_000);
        assert!(caught == 0 && waited < 0.05, "{caught}, {waited:.3} of the time");
    }

    #[test]
    fn nor_is_a_slow_one() {
        let (caught, waited) = driver(Duration::from_millis(1), 10_000);
        assert!(caught == 0 && waited < 0.001, "{caught}, {waited:.3} of the time");
    }

    #[test]
    fn what_has_come_already_ends_the_wait() {
        let mut spin = Spin { window: Duration::from_secs(3600), ..Spin::default() };
        assert!(spin.wait(|| true));
        assert!(!Spin::default().wait(|| true), "no window, no look");
    }
}
