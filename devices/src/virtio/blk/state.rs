//! The saved form of a block device. The disk's contents are not in it, nor is what the driver
//! told the transport.
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_queue::QueueT;

use super::{Block, Expect};
use crate::{
    backend::disk::{Disk, DiskMark},
    state::{Snapshot, StateError},
};

/// What a block device knows between two requests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Bytes of the disk, 0 for an empty slot.
    size: u64,
    writeback: bool,
    /// Of the active queues; `None` before the driver has set the device up.
    queues: Option<Vec<Position>>,
    /// By which an image that can be written is known again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mark: Option<DiskMark>,
}

/// How far a queue has been worked off.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Position {
    index: u16,
    next_avail: u16,
    next_used: u16,
}

impl Snapshot for Block {
    const KIND: &'static str = "virtio-blk";
    const VERSION: u32 = 1;
    type State = State;

    fn save(&self) -> State {
        let queues = self.home.parked().map(|worker| {
            let lanes = worker.lanes.iter();
            let position = lanes.map(|lane| Position {
                index: lane.index,
                next_avail: lane.queue.next_avail(),
                next_used: lane.queue.next_used(),
            });
            position.collect()
        });
        State {
            size: self.disk().map_or(0, Disk::size),
            writeback: self.writeback.load(Ordering::Relaxed),
            queues,
            mark: self.disk().and_then(Disk::mark),
        }
    }

    fn restore(&mut self, state: State) -> Result<(), StateError> {
        if self.disk().map_or(0, Disk::size) < state.size {
            return Err(StateError::Invalid("the disk is smaller than the one that was saved"));
        }
        if let (Some(inserted), Some(mark)) = (&self.inserted, &state.mark) {
            match inserted.expect {
                Expect::Saved => inserted.disk.check_mark(mark, false)?,
                Expect::Copy => inserted.disk.check_mark(mark, true)?,
                Expect::Any => {}
            }
        }
        let lanes = self.home.parked_mut().map(|worker| &mut worker.lanes);
        match (lanes, state.queues) {
            (None, None) => {}
            (Some(lanes), Some(positions)) => {
                let same = lanes.iter().map(|l| l.index).eq(positions.iter().map(|p| p.index));
                // Nothing is in flight in a quiet device.
                let quiet = positions.iter().all(|p| p.next_avail == p.next_used);
                if !same || !quiet {
                    return Err(StateError::Invalid("disk queues that a quiet disk cannot have"));
                }
                for (lane, position) in lanes.iter_mut().zip(&positions) {
                    lane.queue.set_next_avail(position.next_avail);
                    lane.queue.set_next_used(position.next_used);
                }
            }
            _ => return Err(StateError::Invalid("disk active in one place only")),
        }
        self.writeback.store(state.writeback, Ordering::Relaxed);
        Ok(())
    }
}
