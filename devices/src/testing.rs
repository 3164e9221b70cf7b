//! The driver's side of virtio for tests: guest memory, queues laid out in it, and an I/O thread
//! that runs only when the test calls it.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test's own mistakes end the test"
)]
mod descriptors;
mod queue;
mod thread;
mod wire;

use std::{any::Any, sync::Arc};

use vm_memory::{Bytes, GuestAddress, MmapRegion};

pub use self::{
    descriptors::{open_descriptors, with_own_descriptors},
    queue::{Buffer, DriverQueue},
    thread::{InlineThread, ThreadFault},
    wire::Wire,
};
use crate::{
    Device, Memory,
    bus::BusDevice,
    irq::Line,
    virtio::{
        F_VERSION_1, VirtioDevice,
        mmio::{Transport, registers::Registers},
    },
};

/// Bytes of guest RAM from address 0.
pub const RAM: u64 = 16 << 20;
/// A second region of RAM, behind a hole.
pub const HIGH: u64 = 1 << 30;
/// Bytes of the second region.
pub const HIGH_LEN: u64 = 1 << 20;
/// Descriptor flag: another one follows.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes.
pub const WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table.
pub const INDIRECT: u16 = 4;

const RINGS: u64 = 1 << 20;
const RING_STEP: u64 = 128 << 10;
const DATA: u64 = 8 << 20;

/// Guest RAM: [`RAM`] bytes at 0 and [`HIGH_LEN`] bytes at [`HIGH`].
pub fn memory() -> Memory {
    Memory::from_ranges(&[(GuestAddress(0), RAM as usize), (GuestAddress(HIGH), HIGH_LEN as usize)])
        .unwrap()
}

/// A register page of its own.
pub fn registers() -> Registers {
    Registers::new(Arc::new(MmapRegion::new(4096).unwrap()), 0).unwrap()
}

/// A guest with one device, whose driver is the test.
pub struct Guest {
    /// The device behind its registers.
    pub transport: Transport,
    /// Guest RAM.
    pub memory: Memory,
    /// Where the device's worker runs.
    pub thread: Arc<InlineThread>,
    /// Queues placed so far.
    pub queues: Vec<DriverQueue>,
    next_data: u64,
}

impl Guest {
    /// Attach `device`.
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        Self::with_memory(device, memory())
    }

    /// Attach `device` to a guest whose RAM exists already.
    pub fn with_memory(device: Box<dyn VirtioDevice>, memory: Memory) -> Self {
        let thread = InlineThread::new();
        let line = Line::new().unwrap();
        let transport =
            Transport::new(device, memory.clone(), registers(), line, thread.clone()).unwrap();
        Self { transport, memory, thread, queues: Vec::new(), next_data: DATA }
    }

    /// The device, if it is a `T`.
    pub fn device<T: VirtioDevice>(&mut self) -> Option<&mut T> {
        (self.transport.device_mut() as &mut dyn Any).downcast_mut()
    }

    /// As [`Transport::update`]; `None` when the device is not a `T`.
    pub fn update<T: VirtioDevice, R>(&mut self, change: impl FnOnce(&mut T) -> R) -> Option<R> {
        self.transport.update(|device| (device as &mut dyn Any).downcast_mut().map(change))
    }

    /// Read a register.
    pub fn load(&mut self, offset: usize) -> u32 {
        let mut word = [0; 4];
        self.transport.read(offset as u64, &mut word);
        u32::from_le_bytes(word)
    }

    /// Write a register.
    pub fn store(&mut self, offset: usize, value: u32) {
        self.transport.write(offset as u64, &value.to_le_bytes());
    }

    /// All feature bits offered.
    pub fn offered(&mut self) -> u64 {
        self.store(0x14, 0);
        let low = self.load(0x10);
        self.store(0x14, 1);
        u64::from(self.load(0x10)) << 32 | u64::from(low)
    }

    /// Reset, then proceed to FEATURES_OK with exactly `features`; returns whether the device
    /// accepted them.
    pub fn negotiate(&mut self, features: u64) -> bool {
        for status in [0, 1, 3] {
            self.store(0x70, status);
        }
        for (half, value) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.store(0x24, half);
            self.store(0x20, value);
        }
        self.store(0x70, 11);
        self.load(0x70) == 11
    }

    /// Place queue `index` with `size` descriptors and make it ready.
    pub fn place(&mut self, index: u16, size: u16) -> DriverQueue {
        let queue = DriverQueue::new(&self.memory, index, size);
        self.configure(index, &queue, size.into());
        queue
    }

    /// Tell the device where `queue` is and that it has `size` descriptors.
    pub fn configure(&mut self, index: u16, queue: &DriverQueue, size: u32) {
        self.store(0x30, index.into());
        self.store(0x38, size);
        let rings = [(0x80, queue.descriptors), (0x90, queue.available), (0xa0, queue.used)];
        for (offset, address) in rings {
            self.store(offset, address as u32);
            self.store(offset + 4, (address >> 32) as u32);
        }
        self.store(0x44, 1);
    }

    /// Maximum size of queue `index`; 0 when there is none.
    pub fn queue_max(&mut self, index: u16) -> u16 {
        self.store(0x30, index.into());
        u16::try_from(self.load(0x34)).unwrap()
    }

    /// The whole initialisation with `features` (VERSION_1 is added) and every queue at its
    /// largest.
    pub fn start(&mut self, features: u64) {
        assert!(self.negotiate(features | F_VERSION_1), "the device agrees to {features:#x}");
        self.place_all();
        self.store(0x70, 15);
        assert_eq!(self.load(0x70), 15, "the device is live");
    }

    /// Place every queue at its largest.
    pub fn place_all(&mut self) {
        self.queues.clear();
        for index in 0.. {
            let max = self.queue_max(index);
            if max == 0 {
                break;
            }
            let queue = self.place(index, max);
            self.queues.push(queue);
        }
    }

    /// Guest memory that nothing uses yet, zeroed.
    pub fn room(&mut self, len: usize) -> u64 {
        let at = self.next_data;
        self.next_data = (at + len as u64).next_multiple_of(16);
        assert!(self.next_data <= RAM, "room for another {len} bytes");
        at
    }

    /// Guest memory holding `bytes`.
    pub fn bytes(&mut self, bytes: &[u8]) -> u64 {
        let at = self.room(bytes.len());
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        at
    }

    /// Change guest memory.
    pub fn poke(&self, addr: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(addr)).unwrap();
    }

    /// What guest memory holds.
    pub fn peek(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }

    /// Notify queue `index`, as its ioeventfd would, and let the workers run.
    pub fn kick(&mut self, index: u16) {
        self.transport.notifiers()[usize::from(index)].write(1).unwrap();
        self.thread.settle();
    }

    /// Make a chain available on queue `index` and notify; returns its head.
    pub fn request(&mut self, index: u16, buffers: &[Buffer]) -> u16 {
        let queue = &mut self.queues[usize::from(index)];
        let head = queue.chain(buffers);
        queue.publish(head);
        self.kick(index);
        head
    }

    /// The next completion of queue `index`, waiting for it: head and bytes written.
    pub fn completion(&mut self, index: u16) -> (u16, u32) {
        let queue = &mut self.queues[usize::from(index)];
        let mut found = None;
        self.thread.until("a completion", || {
            found = queue.next_used();
            found.is_some()
        });
        found.unwrap()
    }

    /// Whether the device has interrupted since the last time this was asked.
    pub fn interrupted(&mut self) -> bool {
        self.transport.line().eventfd().read().is_ok()
    }

    /// Whether the device wants to be reset.
    pub fn needs_reset(&mut self) -> bool {
        self.load(0x70) & 0x40 != 0
    }

    /// Pause, save, restore into `device` attached to the same RAM, and resume there. The old guest
    /// is left paused.
    pub fn migrate(&mut self, device: Box<dyn VirtioDevice>) -> Self {
        self.transport.pause();
        let section = self.transport.save().unwrap();
        let mut to = Self::with_memory(device, self.memory.clone());
        to.transport.restore(&section).unwrap();
        to.queues.clone_from(&self.queues);
        to.next_data = self.next_data;
        to.transport.resume();
        to
    }
}
