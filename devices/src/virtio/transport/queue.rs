//! A queue as the driver configured it, and the check that turns it into a usable one.
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::Memory;

/// Raw values: nothing is rounded, truncated or refused before [`QueueConfig::check`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::virtio) struct QueueConfig {
    pub size: u32,
    pub ready: bool,
    pub descriptors: u64,
    pub driver: u64,
    pub device: u64,
}

/// A mistake of the driver in a queue's configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(in crate::virtio) enum QueueFault {
    #[error("size {size} is not a power of two from 1 to {max}")]
    Size { size: u32, max: u16 },
    #[error("ring address is zero, unaligned, or outside guest memory")]
    Address,
}

impl QueueConfig {
    /// Build the queue, if the rings are aligned (virtio 1.3, section 2.7), lie within guest memory
    /// and have a size that the device offers. Address zero is invalid for a ring: the driver has
    /// not set it.
    pub fn check(&self, max: u16, event_idx: bool, memory: &Memory) -> Result<Queue, QueueFault> {
        let bad_size = QueueFault::Size { size: self.size, max };
        let size = u16::try_from(self.size).map_err(|_| bad_size)?;
        let mut queue = Queue::new(max).map_err(|_| bad_size)?;
        queue.try_set_size(size).map_err(|_| bad_size)?;
        if [self.descriptors, self.driver, self.device].contains(&0) {
            return Err(QueueFault::Address);
        }
        queue
            .try_set_desc_table_address(GuestAddress(self.descriptors))
            .and_then(|()| queue.try_set_avail_ring_address(GuestAddress(self.driver)))
            .and_then(|()| queue.try_set_used_ring_address(GuestAddress(self.device)))
            .map_err(|_| QueueFault::Address)?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        // `Queue::is_valid` is not used: it writes to the log each time that a driver tries.
        let entries = usize::from(size);
        let rings = [
            (self.descriptors, 16 * entries),
            (self.driver, 6 + 2 * entries),
            (self.device, 6 + 8 * entries),
        ];
        let inside = |(at, len)| memory.check_range(GuestAddress(at), len);
        if rings.into_iter().all(inside) { Ok(queue) } else { Err(QueueFault::Address) }
    }
}
