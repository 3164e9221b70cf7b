//! Waiting for the next request for a moment before sleeping: it spares the guest its exit and the
//! thread its wake-up.
use std::{
    hint,
    time::{Duration, Instant},
};

/// How long to wait. It grows while requests come soon after the last one was served, and drops to
/// nothing when they do not (as KVM does for a halted vCPU), when they always come a little later
/// than that, or when somebody else needs the CPU, perhaps the very guest that is waited for.
#[derive(Default)]
pub(super) struct Spin {
    window: Duration,
    /// Waits in vain, one after the other, that could not have been longer.
    futile: u8,
    idle_since: Option<Instant>,
    rest_until: Option<Instant>,
}

impl Spin {
    const FIRST: Duration = Duration::from_micros(8);
    const MAX: Duration = Duration::from_micros(64);
    /// A notification this soon says that a longer window would have caught the request. It is
    /// more than the window's maximum by what the notification itself and the wake-up take, which
    /// differs from host to host: on a fast one it is not true of all.
    const SOON: Duration = Duration::from_micros(100);
    /// So many futile waits show that it is not true here.
    const FUTILE: u8 = 8;
    /// No waiting for so long after that.
    const LONG_REST: Duration = Duration::from_millis(20);
    /// A turn of the loop that took this long was interrupted by another thread: a timer's
    /// interrupt takes half of it where the host is a virtual machine itself.
    const STOLEN: Duration = Duration::from_micros(50);
    /// No waiting for so long after that: where this thread shares its CPU with the guest, one
    /// window in each of these is lost.
    const REST: Duration = Duration::from_millis(1);

    /// Wait for a request; whether one has come.
    pub(super) fn wait(&mut self, has_come: impl Fn() -> bool) -> bool {
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

    /// Nothing has come from `since` until `now`.
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

    /// The driver had to notify.
    pub(super) fn woken(&mut self, now: Instant) {
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

    /// A driver whose requests come `gap` after the last one was served, and no other thread: how
    /// often its request was there in time, and how much of the time went into waiting.
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
