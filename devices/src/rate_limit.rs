//! Limits on operations and bytes per second, for disks and network interfaces.
//!
//! A token bucket is stored as the instant at which everything passed so far is paid for, so
//! nothing is refilled and no remainder is lost. A request passes while that instant is less than
//! [`BURST`] ahead, and advances it by its own cost. So a request larger than the bucket also
//! passes, and is paid for afterwards, instead of waiting for a fill level that is never reached.
use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    time::{Duration, Instant},
};

use vmm_sys_util::timerfd::TimerFd;

/// How far ahead of payment requests may run: 100 ms worth of them may pass at once.
const BURST: u64 = 100_000_000;
const SECOND: u128 = 1_000_000_000;

/// Nanoseconds since the limiter was made.
type Nanos = u64;

#[derive(Debug)]
struct Bucket {
    per_second: u64,
    /// When everything passed so far is paid for.
    paid_at: Nanos,
}

impl Bucket {
    /// None means no limit, and so does 0, as in the configuration.
    fn new(per_second: Option<u64>) -> Option<Self> {
        per_second.filter(|&n| n > 0).map(|per_second| Self { per_second, paid_at: 0 })
    }

    /// How long until a request may pass.
    fn wait(&self, now: Nanos) -> Nanos {
        self.paid_at.saturating_sub(now.saturating_add(BURST))
    }

    fn charge(&mut self, now: Nanos, amount: u64) {
        self.paid_at = self.paid_at.max(now).saturating_add(self.cost(amount));
    }

    fn give_back(&mut self, amount: u64) {
        self.paid_at = self.paid_at.saturating_sub(self.cost(amount));
    }

    fn cost(&self, amount: u64) -> Nanos {
        let cost = u128::from(amount) * SECOND / u128::from(self.per_second);
        u64::try_from(cost).unwrap_or(u64::MAX)
    }
}

/// Two token buckets and the timer that says when to try again.
#[derive(Debug)]
pub struct RateLimiter {
    ops: Option<Bucket>,
    bytes: Option<Bucket>,
    start: Instant,
    timer: TimerFd,
    waiting: bool,
}

impl RateLimiter {
    /// A limiter with full buckets. Limits are per second; `None` and 0 mean unlimited.
    ///
    /// # Errors
    /// When the process has no descriptor left for the timer.
    pub fn new(ops: Option<u64>, bytes: Option<u64>) -> io::Result<Self> {
        let timer = TimerFd::new()?;
        let (ops, bytes) = (Bucket::new(ops), Bucket::new(bytes));
        Ok(Self { ops, bytes, start: Instant::now(), timer, waiting: false })
    }

    /// Request permission for `ops` operations and `bytes` bytes. When refused, nothing is charged
    /// and [`RateLimiter::fd`] becomes readable when it is time to retry.
    pub fn take(&mut self, ops: u64, bytes: u64) -> bool {
        self.take_at(self.now(), ops, bytes)
    }

    /// Refund what was just taken but not used.
    pub fn give_back(&mut self, ops: u64, bytes: u64) {
        for (bucket, amount) in [(&mut self.ops, ops), (&mut self.bytes, bytes)] {
            if let Some(bucket) = bucket {
                bucket.give_back(amount);
            }
        }
    }

    /// Readable when a refused request may be tried again.
    pub fn fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Call when [`RateLimiter::fd`] was readable, or when it might have been. Never blocks.
    pub fn replenish(&mut self) {
        self.replenish_at(self.now());
    }

    fn now(&self) -> Nanos {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn wait(&self, now: Nanos) -> Nanos {
        let wait = |b: &Option<Bucket>| b.as_ref().map_or(0, |b| b.wait(now));
        wait(&self.ops).max(wait(&self.bytes))
    }

    fn take_at(&mut self, now: Nanos, ops: u64, bytes: u64) -> bool {
        let wait = self.wait(now);
        if wait > 0 {
            self.arm(wait);
            return false;
        }
        if let Some(b) = &mut self.ops {
            b.charge(now, ops);
        }
        if let Some(b) = &mut self.bytes {
            b.charge(now, bytes);
        }
        true
    }

    fn replenish_at(&mut self, now: Nanos) {
        // Setting or clearing the timer also clears its readiness, so it is never read.
        match self.wait(now) {
            wait if wait > 0 && self.waiting => self.arm(wait),
            _ => {
                self.waiting = false;
                let _ = self.timer.clear();
            }
        }
    }

    fn arm(&mut self, wait: Nanos) {
        self.waiting = self.timer.reset(Duration::from_nanos(wait), None).is_ok();
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

    use super::*;

    const MS: Nanos = 1_000_000;

    fn limiter(ops: Option<u64>, bytes: Option<u64>) -> RateLimiter {
        RateLimiter::new(ops, bytes).unwrap()
    }

    /// Operations that pass in one second, tried every 100 us.
    fn passed(l: &mut RateLimiter, from: Nanos) -> usize {
        (0..10_000).filter(|i| l.take_at(from + i * MS / 10, 1, 4096)).count()
    }

    fn readable(l: &RateLimiter, timeout_ms: i32) -> bool {
        let epoll = Epoll::new().unwrap();
        let event = EpollEvent::new(EventSet::IN, 0);
        epoll.ctl(ControlOperation::Add, l.fd(), event).unwrap();
        loop {
            match epoll.wait(timeout_ms, &mut [EpollEvent::default()]) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                ready => return ready.unwrap() == 1,
            }
        }
    }

    #[test]
    fn no_limit_lets_everything_pass() {
        let mut l = limiter(None, Some(0));
        assert_eq!(passed(&mut l, 0), 10_000);
    }

    #[test]
    fn operations_pass_at_the_rate_that_was_set_after_one_burst() {
        let mut l = limiter(Some(1000), None);
        let first = passed(&mut l, 0);
        assert!((1000..=1110).contains(&first), "{first}");
        let second = passed(&mut l, 1000 * MS);
        assert!((990..=1010).contains(&second), "{second}");
    }

    #[test]
    fn bytes_are_limited_apart_from_operations() {
        let mut l = limiter(Some(u64::MAX), Some(4096 * 100));
        let n = passed(&mut l, 0);
        assert!((100..=112).contains(&n), "{n}");
    }

    #[test]
    fn an_idle_hour_does_not_save_up_more_than_one_burst() {
        let mut l = limiter(Some(1000), None);
        let n = (0..10_000).filter(|_| l.take_at(3_600_000 * MS, 1, 0)).count();
        assert!((100..=101).contains(&n), "{n}");
    }

    #[test]
    fn a_request_larger_than_the_bucket_passes_and_is_paid_for_afterwards() {
        let mut l = limiter(None, Some(1000));
        assert!(l.take_at(0, 1, 10_000));
        assert!(!l.take_at(9000 * MS, 1, 1));
        assert!(l.take_at(10_000 * MS, 1, 1));
    }

    #[test]
    fn what_is_given_back_is_as_if_it_had_not_been_taken() {
        let mut l = limiter(Some(1000), Some(1 << 20));
        let n = (0..10_000).filter(|_| l.take_at(0, 1, 4096)).count();
        assert!(n < 200, "{n}");
        let mut l = limiter(Some(1000), Some(1 << 20));
        for i in 0..10_000 {
            assert!(l.take_at(0, 1, 4096), "{i}");
            l.give_back(1, 4096);
        }
    }

    #[test]
    fn the_smallest_and_the_largest_limit_work() {
        let mut one = limiter(Some(1), Some(1));
        assert!(one.take_at(0, 1, 1));
        assert!(!one.take_at(500 * MS, 1, 1));
        assert!(one.take_at(1000 * MS, 1, u64::MAX));
        assert!(!one.take_at(u64::MAX - BURST - 1, 1, 1), "the debt saturates");
        let mut all = limiter(Some(u64::MAX), Some(u64::MAX));
        assert!((0..100).all(|_| all.take_at(0, 1, 1 << 30)));
    }

    #[test]
    fn a_refused_request_makes_the_descriptor_readable_when_its_time_has_come() {
        let mut l = limiter(Some(20), None);
        while l.take(1, 0) {}
        assert!(readable(&l, 5000));
        l.replenish();
        assert!(!readable(&l, 0), "readiness is taken back");
        assert!(l.take(1, 0));
    }

    #[test]
    fn a_call_too_early_keeps_the_alarm() {
        let mut l = limiter(Some(20), None);
        let now = l.now();
        while l.take_at(now, 1, 0) {}
        l.replenish_at(now);
        assert!(readable(&l, 5000));
    }
}
