//! One direction of a link: what becomes of each frame, and when it arrives. It does no I/O and
//! reads no clock.
use std::time::{Duration, Instant};

use fastrand::Rng;

/// Frames that are under way at most; what comes then is lost, as in a real queue.
const LONGEST_QUEUE: usize = 10_000;

/// How a line treats what is sent on it. The default is a perfect line: without delay, of any rate.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Impairment {
    /// From one end to the other.
    pub delay: Duration,
    /// Each frame is early or late by up to this, evenly distributed. This does not reorder frames.
    pub jitter: Duration,
    /// The part of all frames that is lost, 0 to 1.
    pub loss: f64,
    /// The part of all frames that arrives without `delay`, before those sent earlier; 0 to 1.
    pub reorder: f64,
    /// Bits per second, if limited; 0 is a line that never delivers, which is a [cut](Self::cut).
    pub rate: Option<u64>,
    /// Nothing arrives any more: neither what is sent from now on nor what is under way.
    pub cut: bool,
}

impl Impairment {
    /// A line that only delays.
    #[must_use]
    pub fn delay(delay: Duration) -> Self {
        Self { delay, ..Self::default() }
    }

    /// A line that only loses a part of all frames, 0 to 1.
    #[must_use]
    pub fn loss(loss: f64) -> Self {
        Self { loss, ..Self::default() }
    }

    /// A line of that many bits per second.
    #[must_use]
    pub fn rate(rate: u64) -> Self {
        Self { rate: Some(rate), ..Self::default() }
    }

    /// A line on which nothing arrives.
    #[must_use]
    pub fn cut() -> Self {
        Self { cut: true, ..Self::default() }
    }
}

/// What has become of the frames sent on a line. Those that are in none of the sums are under way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Sent.
    pub sent: u64,
    /// Arrived.
    pub arrived: u64,
    /// Bytes of these.
    pub bytes: u64,
    /// Lost at random.
    pub lost: u64,
    /// Lost because the line is cut.
    pub cut: u64,
    /// Lost because too many were under way.
    pub overflowed: u64,
    /// Arrived, or will arrive, before one that was sent earlier.
    pub reordered: u64,
}

/// One direction of a link.
#[derive(Debug)]
pub struct Line {
    impairment: Impairment,
    rng: Rng,
    /// When the last bit of everything sent so far has left.
    free: Instant,
    /// When the last frame that kept its place arrives.
    last: Instant,
    under_way: usize,
    counts: Counts,
}

impl Line {
    /// A perfect line.
    #[must_use]
    pub fn new(now: Instant, seed: u64) -> Self {
        Self {
            impairment: Impairment::default(),
            rng: Rng::with_seed(seed),
            free: now,
            last: now,
            under_way: 0,
            counts: Counts::default(),
        }
    }

    /// Changes how it treats frames from now on. Those under way keep the time of their arrival.
    pub const fn set(&mut self, impairment: Impairment) {
        self.impairment = impairment;
    }

    /// How it treats frames.
    #[must_use]
    pub const fn impairment(&self) -> Impairment {
        self.impairment
    }

    /// The sums since its beginning.
    #[must_use]
    pub const fn counts(&self) -> Counts {
        self.counts
    }

    /// A frame of that many bytes is sent. Returns when it arrives; call [`Self::arrives`] then.
    /// `None` if it is lost.
    pub fn send(&mut self, now: Instant, bytes: usize) -> Option<Instant> {
        self.counts.sent += 1;
        let Impairment { delay, jitter, loss, reorder, rate, cut } = self.impairment;
        if cut || rate == Some(0) {
            self.counts.cut += 1;
            return None;
        }
        if self.under_way >= LONGEST_QUEUE {
            self.counts.overflowed += 1;
            return None;
        }
        if self.rng.f64() < loss {
            self.counts.lost += 1;
            return None;
        }
        self.under_way += 1;
        let takes = rate.map_or(Duration::ZERO, |rate| {
            Duration::from_secs_f64(bytes as f64 * 8.0 / rate as f64)
        });
        self.free = self.free.max(now) + takes;
        if self.rng.f64() < reorder {
            self.counts.reordered += u64::from(self.free < self.last);
            return Some(self.free);
        }
        let late = (delay + 2 * jitter.mul_f64(self.rng.f64())).saturating_sub(jitter);
        self.last = self.last.max(self.free + late);
        Some(self.last)
    }

    /// A frame comes to the other end. Returns whether it arrives, or is lost because the line has
    /// been cut meanwhile.
    pub const fn arrives(&mut self, bytes: usize) -> bool {
        self.under_way = self.under_way.saturating_sub(1);
        if self.impairment.cut {
            self.counts.cut += 1;
            return false;
        }
        self.counts.arrived += 1;
        self.counts.bytes += bytes as u64;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn line(impairment: Impairment) -> (Line, Instant) {
        let now = Instant::now();
        let mut line = Line::new(now, 7);
        line.set(impairment);
        (line, now)
    }

    #[test]
    fn a_perfect_line_delivers_at_once() {
        let (mut line, now) = line(Impairment::default());
        assert_eq!(line.send(now, 1500), Some(now));
        assert!(line.arrives(1500));
        let counts = Counts { sent: 1, arrived: 1, bytes: 1500, ..Counts::default() };
        assert_eq!(line.counts(), counts);
    }

    #[test]
    fn jitter_stays_within_its_bounds_and_keeps_the_order() {
        let impairment = Impairment { delay: 10 * MS, jitter: 4 * MS, ..Impairment::default() };
        let (mut line, now) = line(impairment);
        let sent: Vec<_> = (0..1000).map(|n| now + n * MS / 10).collect();
        let due: Vec<_> = sent.iter().map(|at| line.send(*at, 60).unwrap()).collect();
        assert!(due.is_sorted());
        let late: Vec<_> = sent.iter().zip(&due).map(|(sent, due)| *due - *sent).collect();
        assert!(late.iter().all(|late| (6 * MS..=14 * MS).contains(late)));
        assert!(late.iter().max().unwrap().abs_diff(*late.iter().min().unwrap()) > 2 * MS);
    }

    #[test]
    fn a_rate_makes_frames_wait_for_each_other() {
        // 1000 bytes are 8 ms on a line of 1 Mbit/s.
        let impairment = Impairment { delay: 5 * MS, ..Impairment::rate(1_000_000) };
        let (mut line, now) = line(impairment);
        let due: Vec<_> = (0..3).map(|_| line.send(now, 1000).unwrap() - now).collect();
        assert_eq!(due, [13 * MS, 21 * MS, 29 * MS]);
        // After an idle time it owes nothing.
        assert_eq!(line.send(now + 100 * MS, 1000), Some(now + 113 * MS));
    }

    #[test]
    fn loss_is_the_part_that_was_asked_for_and_the_same_for_a_seed() {
        let lost = |seed| {
            let now = Instant::now();
            let mut line = Line::new(now, seed);
            line.set(Impairment::loss(0.1));
            (0..5000)
                .map(|_| {
                    line.send(now, 60)
                        .inspect(|_| {
                            line.under_way = 0;
                        })
                        .is_none()
                })
                .collect::<Vec<_>>()
        };
        let first = lost(1);
        let sum = first.iter().filter(|lost| **lost).count();
        assert!((400..600).contains(&sum), "{sum} of 5000");
        assert_eq!(first, lost(1));
        assert_ne!(first, lost(2));
    }

    #[test]
    fn what_overtakes_arrives_first() {
        let impairment = Impairment { delay: 10 * MS, reorder: 0.2, ..Impairment::default() };
        let (mut line, now) = line(impairment);
        let due: Vec<_> = (0..1000).map(|n| line.send(now + n * MS, 60).unwrap()).collect();
        let overtakers = due.windows(2).filter(|pair| pair[1] < pair[0]).count() as u64;
        assert!(overtakers > 100);
        // Behind one that overtakes, another one overtakes the same ones but not the first.
        assert!(line.counts().reordered >= overtakers);
        assert!((100..300).contains(&line.counts().reordered));
    }

    #[test]
    fn a_cut_loses_what_is_under_way() {
        let (mut line, now) = line(Impairment::delay(10 * MS));
        line.send(now, 60).unwrap();
        line.set(Impairment::cut());
        assert_eq!(line.send(now, 60), None);
        assert!(!line.arrives(60));
        line.set(Impairment::default());
        line.send(now, 60).unwrap();
        assert!(line.arrives(60));
        let counts = line.counts();
        assert_eq!((counts.sent, counts.cut, counts.arrived), (3, 2, 1));
    }

    #[test]
    fn a_line_does_not_hold_more_than_its_queue() {
        let (mut line, now) = line(Impairment::rate(1));
        let accepted = (0..LONGEST_QUEUE + 5).filter(|_| line.send(now, 60).is_some()).count();
        assert_eq!(accepted, LONGEST_QUEUE);
        assert_eq!(line.counts().overflowed, 5);
    }
}
