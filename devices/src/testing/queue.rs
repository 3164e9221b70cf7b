//! A queue, as its driver sees it.
use vm_memory::{Bytes, GuestAddress};

use super::{NEXT, RING_STEP, RINGS, WRITE};
use crate::Memory;

/// One queue, from the driver's side. Nothing is checked: a test may lay out what it likes.
#[derive(Debug, Clone)]
pub struct DriverQueue {
    /// Descriptors.
    pub size: u16,
    /// Address of the descriptor table.
    pub descriptors: u64,
    /// Address of the available ring.
    pub available: u64,
    /// Address of the used ring.
    pub used: u64,
    next_descriptor: u16,
    next_used: u16,
    memory: Memory,
}

/// A buffer of a chain: address, bytes, and whether the device writes it.
pub type Buffer = (u64, u32, bool);

impl DriverQueue {
    /// Queue number `index` in its usual place, rings cleared.
    pub fn new(memory: &Memory, index: u16, size: u16) -> Self {
        let descriptors = RINGS + u64::from(index) * RING_STEP;
        let available = descriptors + 16 * u64::from(size);
        let used = (available + 6 + 2 * u64::from(size)).next_multiple_of(4);
        let memory = memory.clone();
        let end = used + 6 + 8 * u64::from(size);
        memory
            .write_slice(&vec![0; (end - descriptors) as usize], GuestAddress(descriptors))
            .unwrap();
        Self { size, descriptors, available, used, next_descriptor: 0, next_used: 0, memory }
    }

    /// `queue` in a copy of its memory.
    pub fn over(queue: &Self, memory: &Memory) -> Self {
        Self { memory: memory.clone(), ..queue.clone() }
    }

    /// Write descriptor `index`.
    pub fn descriptor(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        self.descriptor_at(self.descriptors, index, addr, len, flags, next);
    }

    /// Write descriptor `index` of the table at `table`.
    pub fn descriptor_at(
        &self,
        table: u64,
        index: u16,
        addr: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(table + 16 * u64::from(index))).unwrap();
    }

    /// Lay out a chain in the least recently used descriptors; returns its head.
    pub fn chain(&mut self, buffers: &[Buffer]) -> u16 {
        let head = self.next_descriptor;
        for (n, (addr, len, write)) in buffers.iter().enumerate() {
            let here = self.next_descriptor;
            self.next_descriptor = (here + 1) % self.size;
            let last = n + 1 == buffers.len();
            let flags = if *write { WRITE } else { 0 } | if last { 0 } else { NEXT };
            self.descriptor(here, *addr, *len, flags, self.next_descriptor);
        }
        head
    }

    /// Make `head` available.
    pub fn publish(&self, head: u16) {
        let index = self.available_index();
        let entry = self.available + 4 + 2 * u64::from(index % self.size);
        self.memory.write_obj(head.to_le(), GuestAddress(entry)).unwrap();
        self.set_available_index(index.wrapping_add(1));
    }

    /// The available ring's index.
    pub fn available_index(&self) -> u16 {
        u16::from_le(self.memory.read_obj(GuestAddress(self.available + 2)).unwrap())
    }

    /// Claim that `index` chains have been made available.
    pub fn set_available_index(&self, index: u16) {
        self.memory.write_obj(index.to_le(), GuestAddress(self.available + 2)).unwrap();
    }

    /// `used_event`: interrupt when the used index passes it.
    pub fn set_used_event(&self, index: u16) {
        let at = self.available + 4 + 2 * u64::from(self.size);
        self.memory.write_obj(index.to_le(), GuestAddress(at)).unwrap();
    }

    /// The used ring's index.
    pub fn used_index(&self) -> u16 {
        u16::from_le(self.memory.read_obj(GuestAddress(self.used + 2)).unwrap())
    }

    /// Overwrite the used ring's index.
    pub fn set_used_index(&self, index: u16) {
        self.memory.write_obj(index.to_le(), GuestAddress(self.used + 2)).unwrap();
    }

    /// The next used element not seen yet: head and bytes written.
    pub fn next_used(&mut self) -> Option<(u16, u32)> {
        if self.next_used == self.used_index() {
            return None;
        }
        let at = self.used + 4 + 8 * u64::from(self.next_used % self.size);
        let [id, len]: [u32; 2] = self.memory.read_obj(GuestAddress(at)).unwrap();
        self.next_used = self.next_used.wrapping_add(1);
        Some((u16::try_from(u32::from_le(id)).unwrap(), u32::from_le(len)))
    }
}
