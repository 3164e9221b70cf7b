//! Slowing a guest down: its vCPUs are kept out of it for a part of each 10 ms.
use std::time::{Duration, Instant};

/// How often they are.
const SLICE: Duration = Duration::from_millis(10);

/// How much it is slowed down.
#[derive(Debug, Default)]
pub struct Throttle {
    percent: u8,
    /// When the next slice begins.
    next: Option<Instant>,
}

impl Throttle {
    /// Keep the vCPUs out of the guest for so many percent of the time; what it was before.
    pub fn set(&mut self, percent: u8) -> u8 {
        self.next = (percent > 0).then(|| self.next.unwrap_or_else(Instant::now));
        std::mem::replace(&mut self.percent, percent)
    }

    /// How long until the next slice begins.
    pub fn left(&self) -> Option<Duration> {
        self.next.map(|next| next.saturating_duration_since(Instant::now()))
    }

    /// If a slice begins, how long the vCPUs are to rest.
    pub fn due(&mut self) -> Option<Duration> {
        let now = Instant::now();
        let next = self.next.filter(|next| *next <= now)?;
        // A slice that was missed is not made up for.
        self.next = Some((next + SLICE).max(now));
        Some(SLICE * u32::from(self.percent) / 100)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_rests_for_a_part_of_each_slice() {
        let mut throttle = Throttle::default();
        assert_eq!((throttle.due(), throttle.left()), (None, None));
        assert_eq!(throttle.set(30), 0);
        assert_eq!(throttle.due(), Some(Duration::from_millis(3)));
        assert_eq!(throttle.due(), None, "the slice has just begun");
        assert!(throttle.left() <= Some(SLICE));
        assert_eq!(throttle.set(90), 30);
        std::thread::sleep(throttle.left().unwrap());
        assert_eq!(throttle.due(), Some(Duration::from_millis(9)));
        assert_eq!(throttle.set(0), 90);
        assert_eq!((throttle.due(), throttle.left()), (None, None));
    }
}
