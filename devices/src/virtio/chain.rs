//! Descriptor chains, walked once and checked (virtio 1.3, section 2.7).
//!
//! The walk reads every descriptor exactly once, so changes that the guest makes to one afterwards
//! have no effect. It does not use virtio-queue's iterator because that ends a malformed chain
//! silently: a loop, a bad `next` or a bad indirect table would look like a shorter, valid chain.
#[cfg(test)]
mod tests;

use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueT, desc::split::Descriptor};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};

use crate::Memory;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const DESCRIPTOR: u64 = 16;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT`.
const NO_INTERRUPT: u16 = 1;
/// Bytes before the entries of an available ring.
const RING_HEADER: u64 = 4;
/// Entries of the longest indirect table accepted; no driver makes one this long.
const INDIRECT_MAX: u16 = 1024;

/// One guest buffer, checked to lie within one region of guest RAM and not to be empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Where it starts.
    pub addr: GuestAddress,
    /// Bytes, at least 1.
    pub len: u32,
}

/// An error in a queue or a chain. It is the driver's fault, so never a reason to stop the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// The ring itself is unusable: the device needs a reset.
    #[error("available ring is broken")]
    Ring,
    /// More descriptors than the queue has: a loop.
    #[error("descriptor chain has a loop")]
    Loop,
    /// `next` or the head is not a descriptor of the table.
    #[error("descriptor index out of range")]
    Index,
    /// A buffer or table outside guest RAM.
    #[error("descriptor points outside guest memory")]
    Address,
    /// Readable after writable, or an indirect descriptor where none may be.
    #[error("descriptors in an order that is not allowed")]
    Order,
    /// An indirect table that is empty, too long, or not a multiple of 16 bytes.
    #[error("malformed indirect table")]
    Indirect,
    /// A buffer of no bytes.
    #[error("empty descriptor")]
    Empty,
}

/// A reusable walk over chains: popping one allocates nothing once the longest has been seen.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    readable: usize,
    segments: Vec<Segment>,
}

impl Chain {
    /// Room for chains of up to `capacity` descriptors.
    pub fn with_capacity(capacity: usize) -> Self {
        Self { segments: Vec::with_capacity(capacity), ..Self::default() }
    }

    /// Take the next available chain of `queue`; false when there is none.
    ///
    /// # Errors
    /// [`ChainError::Ring`] when the queue is unusable. With any other error the head is known and
    /// there are no buffers: return it with [`Queue::add_used`] and continue.
    pub fn pop(
        &mut self,
        queue: &mut Queue,
        memory: &Memory,
        indirect: bool,
    ) -> Result<bool, ChainError> {
        self.clear();
        match pending(queue, memory) {
            None => return Err(ChainError::Ring),
            Some(0) => return Ok(false),
            Some(_) => {}
        }
        let next = queue.next_avail();
        let slot = next.checked_rem(queue.size()).ok_or(ChainError::Ring)?;
        let head: Result<u16, _> = GuestAddress(queue.avail_ring())
            .checked_add(RING_HEADER + 2 * u64::from(slot))
            .ok_or(ChainError::Ring)
            .and_then(|at| memory.read_obj(at).map_err(|_| ChainError::Ring));
        self.head = u16::from_le(head?);
        if self.head >= queue.size() {
            return Err(ChainError::Ring);
        }
        queue.set_next_avail(next.wrapping_add(1));
        self.load(self.head, queue, memory, indirect).map(|()| true)
    }

    /// Read the chain at `head` again, which was popped from `queue` before.
    ///
    /// # Errors
    /// As [`Chain::pop`], but for [`ChainError::Ring`].
    pub fn load(
        &mut self,
        head: u16,
        queue: &Queue,
        memory: &Memory,
        indirect: bool,
    ) -> Result<(), ChainError> {
        self.clear();
        self.head = head;
        let table = GuestAddress(queue.desc_table());
        let result = self.walk(table, queue.size(), head, indirect, memory);
        if result.is_err() {
            self.clear();
        }
        result
    }

    /// The chain's head, for the used ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Buffers that the device reads.
    pub fn readable(&self) -> &[Segment] {
        self.split().0
    }

    /// Buffers that the device writes.
    pub fn writable(&self) -> &[Segment] {
        self.split().1
    }

    /// Readable and writable buffers. Asserts what [`Chain::pop`] has ensured: with buffers other
    /// than the driver's, a request that was not carried out would be reported as done.
    fn split(&self) -> (&[Segment], &[Segment]) {
        self.segments.split_at(self.readable)
    }

    fn clear(&mut self) {
        self.segments.clear();
        self.readable = 0;
    }

    fn walk(
        &mut self,
        mut table: GuestAddress,
        mut size: u16,
        mut index: u16,
        mut indirect: bool,
        memory: &Memory,
    ) -> Result<(), ChainError> {
        let mut left = size;
        loop {
            if index >= size {
                return Err(ChainError::Index);
            }
            left = left.checked_sub(1).ok_or(ChainError::Loop)?;
            let at = table.checked_add(u64::from(index) * DESCRIPTOR).ok_or(ChainError::Address)?;
            let d: Descriptor = memory.read_obj(at).map_err(|_| ChainError::Address)?;
            if d.flags() & INDIRECT != 0 {
                // Section 2.7.5.3: negotiated, not nested, last of its chain, and a whole table.
                // Direct descriptors may precede it, and its WRITE flag is ignored.
                if !indirect || d.flags() & NEXT != 0 {
                    return Err(ChainError::Order);
                }
                let entries = u64::from(d.len()) / DESCRIPTOR;
                let whole = u64::from(d.len()) % DESCRIPTOR == 0;
                size = u16::try_from(entries).map_err(|_| ChainError::Indirect)?;
                if !whole || size == 0 || size > INDIRECT_MAX {
                    return Err(ChainError::Indirect);
                }
                (table, index, left, indirect) = (d.addr(), 0, size, false);
                continue;
            }
            if d.len() == 0 {
                return Err(ChainError::Empty);
            }
            if memory.get_slice(d.addr(), d.len() as usize).is_err() {
                return Err(ChainError::Address);
            }
            if d.flags() & WRITE == 0 {
                if self.readable != self.segments.len() {
                    return Err(ChainError::Order);
                }
                self.readable += 1;
            }
            self.segments.push(Segment { addr: d.addr(), len: d.len() });
            if d.flags() & NEXT == 0 {
                return Ok(());
            }
            index = d.next();
        }
    }
}

/// Total bytes of `segments`.
pub fn total(segments: &[Segment]) -> u64 {
    segments.iter().map(|s| u64::from(s.len)).sum()
}

/// Copy out of `segments`, starting at byte `offset`; returns how many bytes there were.
pub fn read(memory: &Memory, segments: &[Segment], offset: u64, out: &mut [u8]) -> usize {
    each_piece(segments, offset, out.len(), |at, range| {
        out.get_mut(range).is_some_and(|piece| memory.read_slice(piece, at).is_ok())
    })
}

/// Copy into `segments`, starting at byte `offset`; returns how many bytes fitted.
pub fn write(memory: &Memory, segments: &[Segment], offset: u64, data: &[u8]) -> usize {
    each_piece(segments, offset, data.len(), |at, range| {
        data.get(range).is_some_and(|piece| memory.write_slice(piece, at).is_ok())
    })
}

fn each_piece(
    segments: &[Segment],
    mut skip: u64,
    want: usize,
    mut copy: impl FnMut(GuestAddress, std::ops::Range<usize>) -> bool,
) -> usize {
    let mut done = 0;
    for s in segments {
        let len = u64::from(s.len);
        if skip >= len {
            skip -= len;
            continue;
        }
        let n = usize::try_from(len - skip).unwrap_or(usize::MAX).min(want - done);
        if n == 0 || !copy(s.addr.unchecked_add(skip), done..done + n) {
            break;
        }
        done += n;
        skip = 0;
    }
    done
}

/// Whether the driver wants an interrupt for the buffers used since the last call.
pub fn needs_interrupt(queue: &mut Queue, memory: &Memory) -> bool {
    // An unreadable ring is the driver's fault: better one interrupt too many.
    let wanted = queue.needs_notification(memory).unwrap_or(true);
    // virtio-queue knows used_event only, not the flag of drivers without EVENT_IDX.
    let flags = memory.load(GuestAddress(queue.avail_ring()), Ordering::Relaxed);
    let suppressed = flags.is_ok_and(|flags: u16| u16::from_le(flags) & NO_INTERRUPT != 0);
    wanted && (queue.event_idx_enabled() || !suppressed)
}

/// How many chains the driver has made available; `None` when the ring is invalid.
pub fn pending(queue: &Queue, memory: &Memory) -> Option<u16> {
    let avail = queue.avail_idx(memory, Ordering::Acquire).ok()?;
    let n = avail.0.wrapping_sub(queue.next_avail());
    (n <= queue.size()).then_some(n)
}
