//! Telling clients of a balloon's size: once a second at most, however often the guest changes it.
use std::time::{Duration, Instant};

use qmp::schema::Event;

use crate::vmm::Vmm;

/// Between two events, as with QEMU.
const INTERVAL: Duration = Duration::from_secs(1);

/// Events about the balloon.
#[derive(Default)]
pub(crate) struct BalloonEvents {
    /// There is a size that no client has been told.
    owed: bool,
    /// When one was told last.
    last: Option<Instant>,
}

impl BalloonEvents {
    /// The guest has changed it.
    pub fn changed(&mut self) {
        self.owed = true;
    }

    /// How long until clients may be told; `None` when there is nothing to tell.
    fn until_due(&self, now: Instant) -> Option<Duration> {
        let since = self.last.map_or(INTERVAL, |last| now.saturating_duration_since(last));
        self.owed.then(|| INTERVAL.saturating_sub(since))
    }
}

impl Vmm {
    /// How long until clients are to be told of the balloon.
    pub(crate) fn until_balloon(&self) -> Option<Duration> {
        self.balloon.until_due(Instant::now())
    }

    /// Tell clients of the balloon, if that is due.
    pub(crate) fn follow_balloon(&mut self) {
        if self.until_balloon() != Some(Duration::ZERO) {
            return;
        }
        self.balloon = BalloonEvents { owed: false, last: Some(Instant::now()) };
        if let Some(actual) = self.machine.balloon().map(|balloon| balloon.actual()) {
            self.tell(&Event::BalloonChange { actual });
            self.tell(&Event::BalloonChanged { actual });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_change_is_told_at_once_and_others_after_a_second() {
        let now = Instant::now();
        let mut events = BalloonEvents::default();
        assert_eq!(events.until_due(now), None);
        events.changed();
        assert_eq!(events.until_due(now), Some(Duration::ZERO));
        events = BalloonEvents { owed: false, last: Some(now) };
        assert_eq!(events.until_due(now), None);
        events.changed();
        let later = |ms| now + Duration::from_millis(ms);
        assert_eq!(events.until_due(later(400)), Some(Duration::from_millis(600)));
        assert_eq!(events.until_due(later(5000)), Some(Duration::ZERO));
    }
}
