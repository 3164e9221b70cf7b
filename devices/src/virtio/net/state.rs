//! The saved form of a network interface. Frames on their way are not part of it: networks lose
//! frames.
use serde::{Deserialize, Serialize};

use super::Net;
use crate::{
    backend::net::NetBackend,
    state::{Snapshot, StateError},
    virtio::ring::Ring,
};

/// What the device knows and its configuration does not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetState {
    mac: [u8; 6],
    link: bool,
    active: Option<Active>,
}

/// What it knows once a driver uses it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Active {
    /// Queue pairs that receive.
    pairs: u16,
    /// Offloads in force.
    offloads: u64,
    broken: bool,
    queues: Vec<QueuePosition>,
}

/// Where the device is in a ring; nothing is in flight, so one number says it all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct QueuePosition {
    index: u16,
    position: u16,
}

impl<B: NetBackend> Snapshot for Net<B> {
    const KIND: &'static str = "virtio-net";
    const VERSION: u32 = 1;
    type State = NetState;

    fn save(&self) -> NetState {
        let position = |r: &Ring| QueuePosition { index: r.index(), position: r.position() };
        let active = self.home.parked().map(|worker| Active {
            pairs: worker.active_pairs(),
            offloads: worker.offloads().0,
            broken: worker.broken(),
            queues: worker.rings().map(position).collect(),
        });
        NetState { mac: self.mac, link: self.link, active }
    }

    fn restore(&mut self, state: NetState) -> Result<(), StateError> {
        match (self.home.parked_mut(), &state.active) {
            (None, None) => {}
            (Some(worker), Some(active)) => {
                let indexes = worker.rings().map(Ring::index);
                if !indexes.eq(active.queues.iter().map(|q| q.index)) {
                    return Err(StateError::Invalid("other queues of a network interface"));
                }
                if !worker.accepts(active.pairs, active.offloads) {
                    return Err(StateError::Invalid("queue pairs or offloads not negotiated"));
                }
                for (ring, saved) in worker.rings_mut().zip(&active.queues) {
                    ring.set_position(saved.position);
                }
                worker.restore(active.pairs, active.offloads, active.broken);
                worker.set_link(state.link);
            }
            _ => return Err(StateError::Invalid("a network interface with and without driver")),
        }
        self.mac = state.mac;
        self.link = state.link;
        Ok(())
    }
}
