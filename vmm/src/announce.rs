//! Announces a machine's NICs to the networks after it was restored, and on `announce-self`. There
//! are several rounds, because a port that has just come up may not yet forward.
use std::time::{Duration, Instant};

use machine::PlugError;

use crate::{lifecycle::State, vmm::Vmm};

/// How many announcements are made, and at which intervals; the defaults are QEMU's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    /// Number of rounds.
    pub rounds: u32,
    /// Pause between the first two rounds.
    pub initial: Duration,
    /// Longest pause between two rounds.
    pub max: Duration,
    /// How much longer each pause is than the one before.
    pub step: Duration,
}

impl Default for Schedule {
    fn default() -> Self {
        let of = Duration::from_millis;
        Self { rounds: 5, initial: of(50), max: of(550), step: of(100) }
    }
}

impl Schedule {
    /// The pause between round `done`, counted from 1, and the next one; `None` after the last one.
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
    /// Announce `nics`, or all NICs, once the machine runs. Replaces announcements that are under
    /// way.
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

    /// How long until the next announcement. None is made while the machine is stopped: it may have
    /// been resumed elsewhere.
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
