//! Telling the networks where a machine's NICs are now: after it went on from a saved state, and on
//! `announce-self`. Several times, because a port that has just come up may not yet forward.
use std::time::{Duration, Instant};

use machine::PlugError;

use crate::{lifecycle::State, vmm::Vmm};

/// How often, and how long in between. The default is QEMU's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    /// How many times.
    pub rounds: u32,
    /// Between the first two.
    pub initial: Duration,
    /// Between any two, at most.
    pub max: Duration,
    /// How much longer each time.
    pub step: Duration,
}

impl Default for Schedule {
    fn default() -> Self {
        let of = Duration::from_millis;
        Self { rounds: 5, initial: of(50), max: of(550), step: of(100) }
    }
}

impl Schedule {
    /// How long after round `done`, from 1, the next one comes; `None` after the last one.
    fn pause(&self, done: u32) -> Option<Duration> {
        let longer = self.step.saturating_mul(done.saturating_sub(1));
        (done < self.rounds).then(|| self.initial.saturating_add(longer).min(self.max))
    }
}

/// Announcements under way.
pub(crate) struct Announcing {
    schedule: Schedule,
    done: u32,
    next: Instant,
    /// Ids of the NICs; `None`: all.
    nics: Option<Vec<String>>,
}

impl Vmm {
    /// Announce `nics`, or all there are, once the machine runs. Takes the place of announcements
    /// that are under way.
    ///
    /// # Errors
    /// When there is no such NIC.
    pub fn announce(
        &mut self,
        schedule: Schedule,
        nics: Option<Vec<String>>,
    ) -> Result<(), PlugError> {
        if let Some(unknown) = nics.iter().flatten().find(|id| !self.machine.has_nic(id)) {
            return Err(PlugError::NoDevice(unknown.clone()));
        }
        self.announcing = Some(Announcing { schedule, done: 0, next: Instant::now(), nics });
        Ok(())
    }

    /// How long until the next announcement. None are made while the machine stands still: it may
    /// go on elsewhere.
    pub(crate) fn until_announcement(&self) -> Option<Duration> {
        let announcing = self.announcing.as_ref().filter(|_| self.state() == State::Running)?;
        Some(announcing.next.saturating_duration_since(Instant::now()))
    }

    /// Make the announcement that is due, if there is one.
    pub(crate) fn follow_announcements(&mut self) {
        if self.until_announcement() != Some(Duration::ZERO) {
            return;
        }
        let Some(announcing) = &mut self.announcing else { return };
        self.machine.announce(announcing.nics.as_deref());
        announcing.done += 1;
        match announcing.schedule.pause(announcing.done) {
            Some(pause) => announcing.next = Instant::now() + pause,
            None => self.announcing = None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_up_to_the_longest_one() {
        let pauses = |s: &Schedule| {
            let each = (1..10).map_while(|done| s.pause(done));
            each.map(|p| p.as_millis()).collect::<Vec<_>>()
        };
        assert_eq!(pauses(&Schedule::default()), [50, 150, 250, 350]);
        let short = Schedule { max: Duration::from_millis(160), ..Schedule::default() };
        assert_eq!(pauses(&short), [50, 150, 160, 160]);
        assert_eq!(pauses(&Schedule { rounds: 1, ..short }), []);
    }
}
