//! When the next epoch begins, with `-i auto`: at once when output waits for it, as far as what
//! epochs cost the guest allows that; else more and more rarely, but at least every [`RELAXED`] as
//! long as that costs little.
use std::{collections::VecDeque, time::Duration};

use crate::timers::Time;

/// Shortest time from the beginning of one epoch to the next.
pub const SHORTEST: Duration = Duration::from_millis(2);
/// Longest time that it grows to without output.
pub const RELAXED: Duration = Duration::from_millis(200);
/// Longest time if epochs cost much, if nothing else is configured (`max-period`).
pub const LONGEST: Duration = Duration::from_secs(1);
/// What epochs may cost is the guest's time divided by this: 10 %.
const SHARE: u32 = 10;

/// What one epoch costs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Cost {
    /// How long it stood still.
    pub pause: Duration,
    /// The pages that were copied: those that it wrote to since the epoch before, and for each of
    /// which it pays once more after this one.
    pub pages: u64,
    /// What the first write to a page costs it after an epoch, as measured.
    pub fault: Duration,
}

impl Cost {
    /// All of it.
    #[must_use]
    pub fn total(&self) -> Duration {
        let faults = u64::try_from(self.fault.as_nanos()).unwrap_or(u64::MAX);
        self.pause.saturating_add(Duration::from_nanos(faults.saturating_mul(self.pages)))
    }
}

/// The times of epochs. Each epoch delays the next one by at least ten times what it cost, so that
/// epochs take no more than a tenth of the guest's time, except where the longest period is shorter
/// than that.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Pace {
    longest: Duration,
    /// Output is held that no epoch covers.
    output_waits: bool,
    /// The epoch that is being captured: when it began, and whether output had waited for it.
    begun: Option<(Time, bool)>,
    /// When the last epoch began.
    began: Time,
    /// The shortest time after it.
    floor: Duration,
    /// The time after it if no output waits.
    period: Duration,
}

impl Pace {
    /// A pace with this longest period, or [`SHORTEST`] if that is longer. The first epoch may begin
    /// at once.
    #[must_use]
    pub fn new(longest: Duration) -> Self {
        let longest = longest.max(SHORTEST);
        Self {
            longest,
            output_waits: false,
            begun: None,
            began: Time::ZERO,
            floor: Duration::ZERO,
            period: Duration::ZERO,
        }
    }

    /// An epoch begins.
    pub fn begins(&mut self, now: Time) {
        self.begun = Some((now, self.output_waits));
    }

    /// It has cost this.
    pub fn paid(&mut self, cost: &Cost) {
        if let Some((began, output_waited)) = self.begun.take() {
            self.captured(began, cost, output_waited);
        }
    }

    /// Output is held that no epoch covers, or none.
    pub fn set_output_waits(&mut self, waits: bool) {
        self.output_waits = waits;
    }

    /// When the next epoch begins, as far as is known now. While one is being captured, no later
    /// than after the longest period.
    #[must_use]
    pub fn due(&self) -> Time {
        match self.begun {
            Some((began, _)) => began.saturating_add(self.longest),
            None => self.next(self.output_waits),
        }
    }

    /// An epoch began at `began`, which has cost this; output had waited for it, or not.
    pub fn captured(&mut self, began: Time, cost: &Cost, output_waited: bool) {
        let budget = cost.total().saturating_mul(SHARE);
        self.began = began;
        self.floor = budget.clamp(SHORTEST, self.longest);
        let grown = if output_waited { SHORTEST } else { self.period.saturating_mul(2) };
        self.period = grown.min(RELAXED).clamp(self.floor, self.longest);
    }

    /// When the next epoch begins, as long as nothing changes; it may be in the past.
    #[must_use]
    pub fn next(&self, output_waits: bool) -> Time {
        self.began.saturating_add(if output_waits { self.floor } else { self.period })
    }
}

/// How long processor time and pages are added up before they are compared: the kernel counts in
/// ticks of milliseconds.
const WINDOW: Duration = Duration::from_secs(2);
/// Fewer pages in that time say nothing.
const PAGES: u64 = 500;
/// What is assumed before anything is known, and at most.
const USUAL: Duration = Duration::from_micros(10);
const MOST: Duration = Duration::from_micros(50);

/// The kernel sees about half of the time of a page fault: it counts in ticks, and no tick comes
/// while interrupts are disabled. So what it says counts as many times. (Of a guest with 2,000 pages
/// each 50 ms, measured by what it computed, this was 2 to 3.3 us a page on an AMD EPYC and 18 us on
/// an Intel Xeon; the kernel said 1.4 and 8.)
const UNSEEN: u64 = 2;

/// Measures what the first write to a page costs the guest after an epoch: the time that the kernel
/// spends in the threads of its vCPUs, divided by the pages. That time has other causes, too, which
/// come and go; so the least of some measurements counts.
#[derive(Debug, Clone, Default)]
pub struct Faults {
    /// When this measurement began, and the kernel's time by then.
    since: Option<(Time, Duration)>,
    pages: u64,
    recent: VecDeque<Duration>,
}

impl Faults {
    /// An epoch with this many pages was captured at `now`; by then the kernel has spent `system` in
    /// the threads of the vCPUs.
    pub fn captured(&mut self, now: Time, system: Duration, pages: u64) {
        let Some((began, before)) = self.since else {
            self.since = Some((now, system));
            return;
        };
        self.pages += pages;
        if now.saturating_sub(began) < WINDOW {
            return;
        }
        if self.pages >= PAGES {
            let spent = u64::try_from(system.saturating_sub(before).as_nanos()).unwrap_or(u64::MAX);
            let each = Duration::from_nanos(spent.saturating_mul(UNSEEN) / self.pages);
            if self.recent.len() == 4 {
                self.recent.pop_front();
            }
            self.recent.push_back(each.min(MOST));
        }
        (self.since, self.pages) = (Some((now, system)), 0);
    }

    /// What is known.
    #[must_use]
    pub fn each(&self) -> Duration {
        self.recent.iter().min().copied().unwrap_or(USUAL)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn cost(pause_us: u64, pages: u64, fault_ns: u64) -> Cost {
        let (pause, fault) = (Duration::from_micros(pause_us), Duration::from_nanos(fault_ns));
        Cost { pause, pages, fault }
    }

    #[test]
    fn without_output_epochs_become_rare_and_with_output_they_come_at_once() {
        let mut pace = Pace::new(LONGEST);
        let mut now = ms(1000);
        assert!(pace.next(true) <= now && pace.next(false) <= now, "the first one");
        pace.captured(now, &cost(100, 10, 1000), true);
        let mut periods = Vec::new();
        for _ in 0..10 {
            let next = pace.next(false);
            periods.push((next - now).as_millis());
            now = next;
            pace.captured(now, &cost(100, 10, 1000), false);
        }
        assert_eq!(periods, [2, 4, 8, 16, 32, 64, 128, 200, 200, 200]);
        // Output in the middle of a long period: at once.
        assert!(pace.next(true) < now + ms(50));
        pace.captured(now + ms(50), &cost(100, 10, 1000), true);
        assert_eq!(pace.next(true), now + ms(52));
        assert_eq!(pace.next(false), now + ms(52));
    }

    #[test]
    fn epochs_cost_no_more_than_a_tenth_whatever_the_guest_does() {
        let mut random = fastrand::Rng::with_seed(1);
        let mut pace = Pace::new(LONGEST);
        let mut spent = Duration::ZERO;
        for _ in 0..100_000 {
            let waits = random.bool();
            let began = pace.next(waits) + Duration::from_micros(random.u64(..3000));
            // At most 18 ms: ten times this fits into the longest period.
            let cost = cost(random.u64(..2000), random.u64(..800), random.u64(..20_000));
            pace.captured(began, &cost, waits);
            spent += cost.total();
        }
        let now = pace.next(true);
        assert!(spent * 10 <= now, "{spent:?} of {now:?}");
        assert!(spent * 20 > now, "and they are not much rarer than that: {spent:?} of {now:?}");
    }

    /// What a guest loses that writes 2,000 pages in each 25 ms of its work, when the first write to
    /// a page costs it 18 us, of which the kernel sees 8; and the period.
    fn lost(longest: Duration) -> (f64, Duration) {
        const PAGES: u64 = 2000;
        let us = Duration::from_micros;
        let pause = us(1500);
        let (mut pace, mut faults) = (Pace::new(longest), Faults::default());
        let (mut now, mut system, mut paid) = (ms(0), ms(0), ms(0));
        for _ in 0..200 {
            faults.captured(now, system, PAGES);
            pace.captured(now, &Cost { pause, pages: PAGES, fault: faults.each() }, false);
            system += us(8) * PAGES as u32;
            paid += pause + us(18) * PAGES as u32;
            now = pace.next(false);
        }
        (paid.div_duration_f64(now), now / 200)
    }

    #[test]
    fn a_guest_that_pays_much_for_each_page_loses_no_more_than_it_should() {
        let (share, period) = lost(LONGEST);
        assert!(share < 0.15, "{share} at {period:?}");
        assert!(period > RELAXED && period < LONGEST, "{period:?}");
        let (share, period) = lost(RELAXED);
        assert!(share > 0.15 && period == RELAXED, "as far as it may: {share} at {period:?}");
    }

    #[test]
    fn output_that_comes_while_an_epoch_is_captured_waits_for_the_next_one() {
        let mut pace = Pace::new(LONGEST);
        pace.set_output_waits(true);
        assert!(pace.due() <= ms(10));
        pace.begins(ms(10));
        assert_eq!(pace.due(), ms(10) + LONGEST, "it is not known yet what this one costs");
        pace.paid(&cost(500, 0, 0));
        assert_eq!(pace.due(), ms(15), "still held");
        pace.set_output_waits(false);
        assert_eq!(pace.due(), ms(15));
        pace.begins(ms(15));
        pace.paid(&cost(500, 0, 0));
        assert_eq!(pace.due(), ms(25));
        pace.set_output_waits(true);
        assert_eq!(pace.due(), ms(20));
    }

    #[test]
    fn the_cost_of_a_write_is_measured_and_what_else_the_kernel_does_is_not_part_of_it() {
        let us = Duration::from_micros;
        let mut faults = Faults::default();
        let (mut now, mut system) = (ms(1000), ms(77));
        assert_eq!(faults.each(), USUAL);
        let mut second = |faults: &mut Faults, pages: u64, other: Duration| {
            for _ in 0..40 {
                now += ms(25);
                system += us(7 * pages) + other / 40;
                faults.captured(now, system, pages);
            }
        };
        (0..3).for_each(|_| second(&mut faults, 200, Duration::ZERO));
        assert_eq!(faults.each(), us(14), "half of it is not seen");
        (0..3).for_each(|_| second(&mut faults, 200, ms(800)));
        assert_eq!(faults.each(), us(14), "a guest that also does I/O");
        (0..30).for_each(|_| second(&mut faults, 0, ms(800)));
        assert_eq!(faults.each(), us(14), "a guest that writes nothing");
        (0..30).for_each(|_| second(&mut faults, 100, ms(800)));
        assert_eq!(faults.each(), MOST);
    }

    #[test]
    fn a_period_has_limits_whatever_is_measured() {
        let most = Cost { pause: Duration::MAX, pages: u64::MAX, fault: Duration::MAX };
        let mut pace = Pace::new(ms(50));
        for waits in [true, false] {
            pace.captured(ms(7), &most, waits);
            assert_eq!((pace.next(true), pace.next(false)), (ms(57), ms(57)));
            pace.captured(ms(7), &Cost::default(), true);
            assert_eq!((pace.next(true), pace.next(false)), (ms(9), ms(9)));
        }
        pace.captured(Duration::MAX, &most, false);
        assert_eq!(pace.next(false), Duration::MAX);
        let mut pace = Pace::new(Duration::ZERO);
        pace.captured(ms(1), &most, false);
        assert_eq!(pace.next(false), ms(1) + SHORTEST);
    }
}
