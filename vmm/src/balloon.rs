//! Events about the balloon's size: at most one a second, however often the guest changes it.
use std::time::{Duration, Instant};

use qmp::schema::Event;

use crate::vmm::Vmm;

/// Shortest interval between two events, as with QEMU.
const INTERVAL: Duration = Duration::from_secs(1);

/// State of the balloon's events.
#[derive(Default)]
pub(crate) struct BalloonEvents {
    /// The size has changed since the last event.
    owed: bool,
    /// When the last event was sent.
    last: Option<Instant>,
}

impl BalloonEvents {
    /// The guest has changed the size.
    pub fn changed(&mut self) {
        self.owed = true;
    }

    /// How long until an event may be sent; `None` when there is none to send.
    fn until_due(&self, now: Instant) -> Option<Duration> {
        let since = self.last.map_or(INTERVAL, |last| now.saturating_duration_since(last));
        self.owed.then(|| INTERVAL.saturating_sub(since))
    }
}

impl Vmm {
    /// How long until an event about the balloon is due.
    pub(crate) fn until_balloon(&self) -> Option<Duration> {
        self.balloon.until_due(Instant::now())
    }

    /// Send the event about the balloon, if it is due.
    pub(crate) fn follow_balloon(&mut self) {
        if self.until_balloon() != Some(Duration::ZERO) {
            return;
        }
        self.balloon = BalloonEvents { owed: false, last: Some(Instant::now()) };
        if let Some(actual) = self.machine.balloon().map(|balloon| balloon.actual()) {
            self.tell_of_guest(Event::BalloonChange { actual });
            self.tell_of_guest(Event::BalloonChanged { actual });
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
