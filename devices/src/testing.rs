//! The driver's side of virtio for tests: guest memory, queues laid out in it, and an I/O thread
//! that runs only when the test calls it.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test's own mistakes end the test"
)]
mod descriptors;

use std::{
    any::Any,
    io,
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::UnixDatagram,
    },
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use vm_memory::{Bytes, GuestAddress, MmapRegion};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

pub use self::descriptors::{open_descriptors, with_own_descriptors};
use crate::{
    Device, Memory,
    backend::net::{NetBackend, Offloads, frame::Frame},
    bus::BusDevice,
    irq::Line,
    virtio::{
        F_VERSION_1, VirtioDevice,
        mmio::{Transport, registers::Registers},
    },
    worker::{IoThread, Refused, Worker},
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

/// An I/O thread without the thread: workers run when the test calls [`InlineThread::turn`].
/// Readiness is edge-triggered, as on the real one.
pub struct InlineThread {
    epoll: Epoll,
    workers: Mutex<Vec<Option<Adopted>>>,
    fault: Mutex<Option<ThreadFault>>,
}

/// How an I/O thread fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadFault {
    /// It takes no worker.
    Refuses,
    /// It returns no worker.
    Loses,
}

/// A worker and the descriptors that are watched for it.
type Adopted = (Option<Box<dyn Worker>>, Vec<RawFd>);

impl InlineThread {
    /// A thread with nothing to do.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            epoll: Epoll::new().unwrap(),
            workers: Mutex::default(),
            fault: Mutex::default(),
        })
    }

    /// Handle pending events, waiting up to `patience` for the first; returns how many sources
    /// fired.
    pub fn turn(&self, patience: Duration) -> usize {
        let mut events = [EpollEvent::default(); 64];
        let patience = i32::try_from(patience.as_millis()).unwrap();
        let fired = self.epoll.wait(patience, &mut events).unwrap_or(0);
        let mut workers = self.workers.lock();
        for event in events.iter().take(fired) {
            let (key, index) = (event.data() >> 32, event.data() & 0xffff_ffff);
            if let Some(Some((Some(worker), _))) = workers.get_mut(key as usize) {
                worker.ready(index as usize);
            }
        }
        fired
    }

    /// Handle events until nothing fires any more.
    pub fn settle(&self) {
        self.until("the workers are quiet", || self.turn(Duration::ZERO) == 0);
    }

    /// Handle events until `done` returns true; panics if it never does.
    pub fn until(&self, what: &str, mut done: impl FnMut() -> bool) {
        let begin = Instant::now();
        while !done() {
            assert!(begin.elapsed() < Duration::from_secs(20), "{what}: never happened");
            self.turn(Duration::from_millis(5));
        }
    }

    /// Fail in this way from now on.
    pub fn fail(&self, fault: impl Into<Option<ThreadFault>>) {
        *self.fault.lock() = fault.into();
    }

    fn fails(&self, fault: ThreadFault) -> bool {
        *self.fault.lock() == Some(fault)
    }

    /// How many workers have been adopted.
    pub fn workers(&self) -> usize {
        self.workers.lock().iter().flatten().filter(|(worker, _)| worker.is_some()).count()
    }
}

impl IoThread for InlineThread {
    fn adopt(&self, mut worker: Box<dyn Worker>) -> Result<usize, Refused> {
        if self.fails(ThreadFault::Refuses) {
            return Err(Refused::new(worker, io::ErrorKind::QuotaExceeded));
        }
        let mut workers = self.workers.lock();
        let key = workers.len();
        let sources = worker.sources();
        for (index, fd) in sources.iter().enumerate() {
            let data = (key as u64) << 32 | index as u64;
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, data);
            self.epoll.ctl(ControlOperation::Add, *fd, event).unwrap();
        }
        for index in 0..sources.len() {
            worker.ready(index);
        }
        workers.push(Some((Some(worker), sources)));
        Ok(key)
    }

    fn lend(&self, key: usize) -> Option<Box<dyn Worker>> {
        if self.fails(ThreadFault::Loses) {
            return self.release(key);
        }
        let mut worker = self.workers.lock().get_mut(key)?.as_mut()?.0.take()?;
        worker.quiesce(None);
        Some(worker)
    }

    fn take_back(&self, key: usize, mut worker: Box<dyn Worker>) -> Result<(), Refused> {
        if self.fails(ThreadFault::Refuses) {
            return Err(Refused::new(worker, io::ErrorKind::QuotaExceeded));
        }
        let mut workers = self.workers.lock();
        let (place, sources) = workers[key].as_mut().unwrap();
        assert_eq!(*sources, worker.sources(), "a lent worker waits on something else");
        for index in 0..sources.len() {
            worker.ready(index);
        }
        *place = Some(worker);
        Ok(())
    }

    fn release(&self, key: usize) -> Option<Box<dyn Worker>> {
        let (worker, sources) = self.workers.lock().get_mut(key)?.take()?;
        for fd in sources {
            self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default()).unwrap();
        }
        let mut worker = worker?;
        worker.quiesce(None);
        (!self.fails(ThreadFault::Loses)).then_some(worker)
    }
}

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

/// A network whose frames are datagrams. The test holds the peer socket.
pub struct Wire(pub UnixDatagram);

impl NetBackend for Wire {
    fn queues(&self) -> usize {
        1
    }
    fn fd(&self, _: usize) -> RawFd {
        self.0.as_raw_fd()
    }
    fn has_header(&self) -> bool {
        true
    }
    fn has_uso(&self) -> bool {
        false
    }
    fn read(&self, queue: usize, into: &mut Frame, spill: &mut [u8]) -> io::Result<usize> {
        into.read_from(self.fd(queue), spill)
    }
    fn read_buffer(&self, _: usize, into: &mut [u8]) -> io::Result<usize> {
        self.0.recv(into)
    }
    fn write(&self, queue: usize, frame: &mut Frame) -> io::Result<usize> {
        frame.write_to(self.fd(queue))
    }
    fn write_buffer(&self, frame: &[u8]) -> io::Result<usize> {
        self.0.send(frame)
    }
    fn set_offloads(&self, _: Offloads) -> io::Result<()> {
        Ok(())
    }
    fn set_active_queues(&self, _: usize) -> io::Result<()> {
        Ok(())
    }
}
