//! One virtqueue of a worker without requests in flight: chains are used in the order in which they
//! were taken, or put back.
//!
//! virtio-queue publishes each used buffer on its own and ignores NO_INTERRUPT. A frame in
//! mergeable buffers has to appear in the used ring as a whole (a driver that polls would take half
//! a frame for an error), so used entries are written here.
use std::{
    os::fd::{AsRawFd, RawFd},
    sync::atomic::{Ordering, fence},
};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::{
    ActiveQueue, Interrupt,
    chain::{self, Chain, ChainError},
};
use crate::{Memory, log_limit::log_seldom};

const NO_INTERRUPT: u16 = 1;

/// The ring itself is unusable, or the worker is in an invalid state: the device needs a reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Broken;

impl Broken {
    /// Log that the device `id` stops processing its queues until its driver resets it.
    pub(crate) fn report(self, id: &str, interrupt: &Interrupt) {
        log_seldom!(error, "{id}: the driver has broken a virtqueue");
        interrupt.needs_reset();
    }
}

/// The result of taking a chain.
pub(crate) enum Popped {
    /// No chain.
    Nothing,
    /// A chain.
    Chain,
    /// The head of an invalid chain.
    Malformed,
}

/// A virtqueue of a device whose driver is ready.
pub(crate) struct Ring {
    index: u16,
    queue: Queue,
    notify: EventFd,
    memory: Memory,
    indirect: bool,
    /// Used index at the last decision about an interrupt.
    signalled: u16,
}

impl Ring {
    /// Continue at the queue's position.
    pub(crate) fn new(active: ActiveQueue, memory: Memory, indirect: bool) -> Self {
        let ActiveQueue { index, queue, notify } = active;
        let signalled = queue.next_used();
        Self { index, queue, notify, memory, indirect, signalled }
    }

    /// Position among the device's queues.
    pub(crate) fn index(&self) -> u16 {
        self.index
    }

    /// Descriptors.
    pub(crate) fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The guest memory that it lies in.
    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The eventfd of the driver's notifications.
    pub(crate) fn fd(&self) -> RawFd {
        self.notify.as_raw_fd()
    }

    /// Consume the driver's notifications so far.
    pub(crate) fn drain(&self) {
        // WouldBlock: not signalled, as on adoption.
        let _ = self.notify.read();
    }

    /// Signal our own eventfd: there is more to do, but other workers get their turn first.
    pub(crate) fn come_back(&self) {
        // Saturated: it is set already.
        let _ = self.notify.write(1);
    }

    /// Take the next chain.
    pub(crate) fn pop(&mut self, chain: &mut Chain) -> Result<Popped, Broken> {
        match chain.pop(&mut self.queue, &self.memory, self.indirect) {
            Ok(true) => Ok(Popped::Chain),
            Ok(false) => Ok(Popped::Nothing),
            Err(ChainError::Ring) => Err(Broken),
            Err(_) => Ok(Popped::Malformed),
        }
    }

    /// Whether [`Ring::pop`] would return something, even without a notification.
    pub(crate) fn is_pending(&self) -> bool {
        chain::pending(&self.queue, &self.memory) != Some(0)
    }

    /// Put back the last `n` chains taken: they are available again.
    pub(crate) fn unpop(&mut self, n: u16) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(n));
    }

    /// Write the used entry that is `nth` places ahead of those published.
    pub(crate) fn put_used(&self, nth: u16, head: u16, len: u32) -> Result<(), Broken> {
        let place = self.queue.next_used().wrapping_add(nth) % self.queue.size().max(1);
        let entry = u64::from(head) | u64::from(len) << 32;
        let at = self.used(4 + 8 * u64::from(place))?;
        self.memory.write_obj(entry.to_le(), at).map_err(|_| Broken)
    }

    /// Let the driver see the next `n` used entries, all at once.
    pub(crate) fn publish(&mut self, n: u16) -> Result<(), Broken> {
        let next = self.queue.next_used().wrapping_add(n);
        self.queue.set_next_used(next);
        self.memory.store(next.to_le(), self.used(2)?, Ordering::Release).map_err(|_| Broken)
    }

    /// Whether the driver wants an interrupt for what was published since the last call (virtio
    /// 1.3, section 2.7.7.2).
    pub(crate) fn wants_interrupt(&mut self) -> Result<bool, Broken> {
        let new = self.queue.next_used();
        let old = std::mem::replace(&mut self.signalled, new);
        if new == old {
            return Ok(false);
        }
        // The used index has to be visible before the driver's event index is read.
        fence(Ordering::SeqCst);
        let size = u64::from(self.queue.size());
        let event_idx = self.queue.event_idx_enabled();
        let offset = if event_idx { 4 + 2 * size } else { 0 };
        let at = GuestAddress(self.queue.avail_ring()).checked_add(offset).ok_or(Broken)?;
        let wish: u16 = self.memory.load(at, Ordering::Relaxed).map_err(|_| Broken)?;
        let wish = u16::from_le(wish);
        Ok(if event_idx {
            new.wrapping_sub(wish).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            wish & NO_INTERRUPT == 0
        })
    }

    /// Request a notification for the next chain; true if there is one already.
    pub(crate) fn listen(&mut self) -> Result<bool, Broken> {
        self.queue.enable_notification(&self.memory).map_err(|_| Broken)
    }

    /// Turn notifications off for now.
    pub(crate) fn ignore(&mut self) -> Result<(), Broken> {
        self.queue.disable_notification(&self.memory).map_err(|_| Broken)
    }

    /// Chains taken and used so far, modulo 2^16. The two are equal, because nothing stays in
    /// flight.
    pub(crate) fn position(&self) -> u16 {
        self.queue.next_avail()
    }

    /// Continue at `position`.
    pub(crate) fn set_position(&mut self, position: u16) {
        self.queue.set_next_avail(position);
        self.queue.set_next_used(position);
        self.signalled = position;
    }

    fn used(&self, offset: u64) -> Result<GuestAddress, Broken> {
        GuestAddress(self.queue.used_ring()).checked_add(offset).ok_or(Broken)
    }
}
