//! The saved form of a block device. It includes neither the disk's contents nor what the driver
//! has written to the transport.
use std::sync::atomic::Ordering;

use ::state::{device as saved, hex::HexArray};
use virtio_queue::QueueT;

use super::{Block, Expect};
use crate::{
    backend::disk::{Disk, DiskMark},
    state::{Snapshot, StateError},
};

impl Snapshot for Block {
    type State = saved::Disk;

    fn save(&self) -> Result<saved::Disk, StateError> {
        let queues = self.worker.parked()?.map(|worker| {
            let queues = worker.queues.iter();
            let position = queues.map(|queue| saved::QueuePosition {
                index: queue.index,
                next_avail: queue.ring.next_avail(),
                next_used: queue.ring.next_used(),
            });
            position.collect()
        });
        Ok(saved::Disk {
            size: self.disk().map_or(0, Disk::size),
            writeback: self.writeback.load(Ordering::Relaxed),
            queues,
            in_flight: Vec::new(),
            mark: self.disk().and_then(Disk::mark).map(saved::Mark::from),
            // Added later: see `Disk::spot_check`.
            spot_check: None,
        })
    }

    fn restore(&mut self, state: saved::Disk) -> Result<(), StateError> {
        if self.disk().map_or(0, Disk::size) < state.size {
            return Err(StateError::Invalid("the disk is smaller than the one that was saved"));
        }
        if !state.in_flight.is_empty() {
            return Err(StateError::Invalid("requests in flight, where a save leaves none"));
        }
        if let (Some(backend), Some(mark)) = (&self.backend, state.mark.map(DiskMark::from)) {
            match backend.expect {
                Expect::Saved => backend.disk.check_mark(&mark, false)?,
                Expect::Copy => backend.disk.check_mark(&mark, true)?,
                Expect::Any => {}
            }
        }
        let queues = self.worker.parked_mut().map(|worker| &mut worker.queues);
        match (queues, state.queues) {
            (None, None) => {}
            (Some(queues), Some(positions)) => {
                let same = queues.iter().map(|q| q.index).eq(positions.iter().map(|p| p.index));
                // A quiesced device has nothing in flight.
                let quiet = positions.iter().all(|p| p.next_avail == p.next_used);
                if !same || !quiet {
                    return Err(StateError::Invalid("disk queues with requests in flight"));
                }
                for (queue, position) in queues.iter_mut().zip(&positions) {
                    queue.ring.set_next_avail(position.next_avail);
                    queue.ring.set_next_used(position.next_used);
                }
            }
            _ => {
                return Err(StateError::Invalid(
                    "disk active only in the transport or only in the \
                                                 device",
                ));
            }
        }
        self.writeback.store(state.writeback, Ordering::Relaxed);
        Ok(())
    }
}

impl From<DiskMark> for saved::Mark {
    fn from(mark: DiskMark) -> Self {
        let DiskMark { generation, size, mtime_ns } = mark;
        Self { generation: generation.map(HexArray::from), size, mtime_ns }
    }
}

impl From<saved::Mark> for DiskMark {
    fn from(mark: saved::Mark) -> Self {
        let saved::Mark { generation, size, mtime_ns } = mark;
        Self { generation: generation.map(u128::from), size, mtime_ns }
    }
}
