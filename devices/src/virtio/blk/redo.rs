//! Requests that were in flight when the device was saved ([`Park::Keep`](crate::worker::Park)).
//!
//! They are carried out again, in the order in which they were taken from the queues: their results
//! are unknown, and the driver still waits for all of them. It may rely on no order between them,
//! nor between them and requests that are complete (virtio 1.3, section 5.2.6.2), so carrying out
//! one twice does no harm. Nothing is taken from a queue before all of them are complete, and a flush
//! among them waits for those before it: a flush covers everything older, here as well as there.
use std::collections::VecDeque;

use super::worker::BlockWorker;

/// What is left of them.
#[derive(Debug, Default)]
pub(super) struct Redo {
    /// Those not started yet: position of the queue, and first descriptor.
    pub waiting: VecDeque<(usize, u16)>,
    /// How many are in flight again.
    pub started: usize,
}

impl Redo {
    /// Whether all of them are complete.
    pub fn is_over(&self) -> bool {
        self.waiting.is_empty() && self.started == 0
    }
}

impl BlockWorker {
    /// Start as many as possible; true when all are complete. Otherwise, the event that lets the
    /// next one start, or completes the last one, will come.
    pub fn redo(&mut self) -> bool {
        while let Some(&(index, head)) = self.redo.waiting.front() {
            let has_room = self.storage.as_ref().is_none_or(|s| s.has_room());
            let Some(queue) = self.queues.get(index).filter(|q| has_room && !q.held) else { break };
            match self.chain.load(head, &queue.ring, &self.memory, self.indirect) {
                Ok(()) if self.handle(index, true).is_none() => break,
                Ok(()) => {}
                Err(why) => {
                    // The driver has changed it meanwhile.
                    self.reporter.invalid(&self.stats, &why);
                    self.used(index, head, 0);
                }
            }
            self.redo.waiting.pop_front();
        }
        if let Some(storage) = &mut self.storage {
            storage.submit();
        }
        self.signal();
        self.redo.is_over()
    }

    /// The requests that are in flight, or wait to be so again: index of the queue and first
    /// descriptor, in the order in which they were taken from the queues.
    pub fn in_flight(&self) -> Vec<(u16, u16)> {
        let mut pending: Vec<_> = self.storage.iter().flat_map(|s| s.pending()).collect();
        pending.sort_unstable_by_key(|ticket| ticket.number);
        let pending = pending.into_iter().map(|ticket| (ticket.queue, ticket.head));
        let all = pending.chain(self.redo.waiting.iter().copied());
        all.filter_map(|(queue, head)| Some((self.queues.get(queue)?.index, head))).collect()
    }
}
