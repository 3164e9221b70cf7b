//! The saved form of a block device. It includes neither the disk's contents nor what the driver
//! has written to the transport.
use std::sync::atomic::Ordering;

use ::state::{device as saved, hex::HexArray};
use virtio_queue::QueueT;

use super::{
    Block, Expect,
    redo::Redo,
    worker::{BlockWorker, Queue},
};
use crate::{
    backend::disk::{Disk, DiskMark},
    state::{Snapshot, StateError},
};

impl Snapshot for Block {
    type State = saved::Disk;

    fn save(&self) -> Result<saved::Disk, StateError> {
        let worker = self.worker.parked()?;
        let in_flight = worker.map(BlockWorker::in_flight).unwrap_or_default();
        let kept = worker.is_some_and(|worker| worker.kept);
        let broken = worker.iter().flat_map(|worker| &worker.queues).filter(|queue| queue.broken);
        let needs_reset = broken.map(|queue| queue.index).collect();
        let queues = worker.map(|worker| {
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
            in_flight,
            needs_reset,
            // With requests in flight the image has no contents that a mark could stand for.
            mark: self.disk().filter(|_| !kept).and_then(Disk::mark).map(saved::Mark::from),
            // Added later: see `Disk::spot_check`.
            spot_check: None,
        })
    }

    fn restore(&mut self, state: saved::Disk) -> Result<(), StateError> {
        if self.disk().map_or(0, Disk::size) < state.size {
            return Err(StateError::Invalid("the disk is smaller than the one that was saved"));
        }
        if let (Some(backend), Some(mark)) = (&self.backend, state.mark.map(DiskMark::from)) {
            match backend.expect {
                Expect::Saved => backend.disk.check_mark(&mark, false)?,
                Expect::Copy => backend.disk.check_mark(&mark, true)?,
                Expect::Any => {}
            }
        }
        match (self.worker.parked_mut(), state.queues) {
            (None, None) if state.in_flight.is_empty() && state.needs_reset.is_empty() => {}
            (Some(worker), Some(positions)) => {
                let queues = &mut worker.queues;
                if !queues.iter().map(|q| q.index).eq(positions.iter().map(|p| p.index)) {
                    return Err(StateError::Invalid("disk queues of another device"));
                }
                worker.redo = redo(queues, &state.in_flight)?;
                if !state.needs_reset.iter().all(|index| queues.iter().any(|q| q.index == *index)) {
                    return Err(StateError::Invalid("a broken queue that the disk does not have"));
                }
                for (queue, position) in queues.iter_mut().zip(&positions) {
                    let taken = position.next_avail.wrapping_sub(position.next_used);
                    let heads = state.in_flight.iter().filter(|(index, _)| *index == queue.index);
                    queue.broken = state.needs_reset.contains(&queue.index);
                    // A request whose answer has found the ring broken is lost.
                    if !queue.broken && heads.count() != usize::from(taken) {
                        return Err(StateError::Invalid(
                            "a disk queue with other requests in flight",
                        ));
                    }
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

/// What has to be carried out again on `queues`.
fn redo(queues: &[Queue], in_flight: &[(u16, u16)]) -> Result<Redo, StateError> {
    let each = in_flight.iter().map(|&(index, head)| {
        let position = queues.iter().position(|q| q.index == index && head < q.ring.size());
        position.map(|position| (position, head))
    });
    let waiting = each.collect::<Option<_>>();
    let waiting = waiting.ok_or(StateError::Invalid("a request in flight that cannot exist"))?;
    Ok(Redo { waiting, started: 0 })
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
