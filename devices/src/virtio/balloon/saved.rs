//! The saved form of a balloon. The buffer that the guest lends for statistics stays in its queue.
use ::state::device as saved;

use super::Balloon;
use crate::state::{Snapshot, StateError};

impl Snapshot for Balloon {
    type State = saved::Balloon;

    fn save(&self) -> Result<saved::Balloon, StateError> {
        let active = self.worker.parked()?.map(|worker| {
            let position = |ring: &super::Ring| saved::QueuePosition {
                index: ring.index(),
                next_avail: ring.position(),
                next_used: ring.position(),
            };
            saved::ActiveBalloon {
                queues: worker.queues.each().map(position).collect(),
                needs_reset: worker.broken,
            }
        });
        Ok(saved::Balloon {
            target: self.control.target(),
            actual: self.control.actual(),
            polling_interval: self.control.polling_interval(),
            active,
        })
    }

    fn restore(&mut self, state: saved::Balloon) -> Result<(), StateError> {
        match (self.worker.parked_mut(), state.active) {
            (None, None) => {}
            (Some(worker), Some(active)) => {
                let mut rings = worker.queues.each_mut();
                for saved::QueuePosition { index, next_avail, next_used } in active.queues {
                    match rings.next() {
                        Some(ring) if ring.index() == index && next_avail == next_used => {
                            ring.set_position(next_avail);
                        }
                        _ => return Err(StateError::Invalid("a balloon with other queues")),
                    }
                }
                if rings.next().is_some() {
                    return Err(StateError::Invalid("a balloon without one of its queues"));
                }
                drop(rings);
                worker.broken = active.needs_reset;
            }
            _ => return Err(StateError::Invalid("a balloon with and without driver")),
        }
        self.control.set_target(state.target);
        self.control.set_actual(state.actual);
        self.control.set_polling_interval(state.polling_interval);
        Ok(())
    }
}
