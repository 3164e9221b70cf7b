//! The saved form of a network interface. Frames in transit are not part of it: networks may lose
//! frames.
use ::state::{
    device as saved,
    hex::{Hex, HexArray},
};

use super::Net;
use crate::{
    state::{Snapshot, StateError},
    virtio::ring::Ring,
};

impl Snapshot for Net {
    type State = saved::Nic;

    fn save(&self) -> Result<saved::Nic, StateError> {
        // Nothing is in flight: every chain taken has been used.
        let position = |r: &Ring| {
            let (index, next) = (r.index(), r.position());
            saved::QueuePosition { index, next_avail: next, next_used: next }
        };
        let active = self.worker.parked()?.map(|worker| saved::ActiveNic {
            queue_pairs: worker.active_pairs(),
            offloads: Hex(worker.offloads().0),
            needs_reset: worker.broken(),
            queues: worker.rings().map(position).collect(),
        });
        Ok(saved::Nic { mac: HexArray(self.mac), link: self.link, active })
    }

    fn restore(&mut self, state: saved::Nic) -> Result<(), StateError> {
        match (self.worker.parked_mut(), &state.active) {
            (None, None) => {}
            (Some(worker), Some(active)) => {
                let indexes = worker.rings().map(Ring::index);
                if !indexes.eq(active.queues.iter().map(|q| q.index)) {
                    return Err(StateError::Invalid("other queues of a network interface"));
                }
                if active.queues.iter().any(|q| q.next_avail != q.next_used) {
                    return Err(StateError::Invalid("network queues with frames in flight"));
                }
                let (pairs, Hex(offloads)) = (active.queue_pairs, active.offloads);
                if !worker.accepts(pairs, offloads) {
                    return Err(StateError::Invalid("queue pairs or offloads not negotiated"));
                }
                for (ring, saved) in worker.rings_mut().zip(&active.queues) {
                    ring.set_position(saved.next_avail);
                }
                worker.restore(pairs, offloads, active.needs_reset);
                worker.set_link(state.link);
            }
            _ => return Err(StateError::Invalid("a network interface with and without driver")),
        }
        self.mac = state.mac.0;
        self.link = state.link;
        Ok(())
    }
}
