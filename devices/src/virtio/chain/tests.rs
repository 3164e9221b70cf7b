use virtio_queue::{Queue, QueueT};

use super::*;
use crate::testing::{self, DriverQueue, HIGH, HIGH_LEN, INDIRECT, NEXT, RAM, WRITE};

const SIZE: u16 = 16;
/// A data buffer, clear of every table.
const BUFFER: u64 = 8 << 20;
const TABLE: u64 = 9 << 20;

struct Bench {
    memory: Memory,
    driver: DriverQueue,
    queue: Queue,
    chain: Chain,
}

fn bench() -> Bench {
    let memory = testing::memory();
    let driver = DriverQueue::new(&memory, 0, SIZE);
    let mut queue = Queue::new(SIZE).unwrap();
    queue.try_set_desc_table_address(GuestAddress(driver.descriptors)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(driver.available)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(driver.used)).unwrap();
    queue.set_ready(true);
    assert!(queue.is_valid(&memory));
    Bench { memory, driver, queue, chain: Chain::default() }
}

impl Bench {
    fn pop(&mut self, indirect: bool) -> Result<bool, ChainError> {
        self.chain.pop(&mut self.queue, &self.memory, indirect)
    }

    /// Publish descriptor 0 and pop it.
    fn pop_first(&mut self, indirect: bool) -> Result<bool, ChainError> {
        self.driver.publish(0);
        self.pop(indirect)
    }

    /// The chain at descriptor 0 is refused, its head can be returned, and the next one works.
    fn refused(&mut self, indirect: bool) -> ChainError {
        let error = self.pop_first(indirect).unwrap_err();
        assert_eq!(
            (self.chain.head(), self.chain.readable(), self.chain.writable()),
            (0, &[][..], &[][..])
        );
        self.queue.add_used(&self.memory, 0, 0).unwrap();
        self.driver.descriptor(0, BUFFER, 1, 0, 0);
        assert_eq!(self.pop_first(indirect), Ok(true), "the queue works after a bad chain");
        error
    }
}

fn segment(addr: u64, len: u32) -> Segment {
    Segment { addr: GuestAddress(addr), len }
}

#[test]
fn walks_a_chain_and_copies_through_it() {
    let mut b = bench();
    assert_eq!(b.pop(false), Ok(false));
    let head = b.driver.chain(&[
        (BUFFER, 3, false),
        (BUFFER + 100, 5, false),
        (HIGH, 4, true),
        (BUFFER + 200, 1, true),
    ]);
    b.driver.publish(head);
    assert_eq!(b.pop(false), Ok(true));
    assert_eq!(b.chain.readable(), [segment(BUFFER, 3), segment(BUFFER + 100, 5)]);
    assert_eq!(b.chain.writable(), [segment(HIGH, 4), segment(BUFFER + 200, 1)]);
    assert_eq!((total(b.chain.readable()), total(b.chain.writable())), (8, 5));
    b.memory.write_slice(b"abc", GuestAddress(BUFFER)).unwrap();
    b.memory.write_slice(b"defgh", GuestAddress(BUFFER + 100)).unwrap();
    let mut out = [0; 4];
    assert_eq!(read(&b.memory, b.chain.readable(), 2, &mut out), 4);
    assert_eq!(&out, b"cdef");
    assert_eq!(read(&b.memory, b.chain.readable(), 7, &mut out), 1, "to the end only");
    assert_eq!(read(&b.memory, b.chain.readable(), 8, &mut out), 0);
    assert_eq!(read(&b.memory, b.chain.readable(), u64::MAX, &mut out), 0);
    assert_eq!(write(&b.memory, b.chain.writable(), 1, b"1234567"), 4);
    let mut back = [0; 4];
    b.memory.read_slice(&mut back, GuestAddress(HIGH)).unwrap();
    assert_eq!(&back, b"\x00123");
    assert_eq!(b.memory.read_obj::<u8>(GuestAddress(BUFFER + 200)).unwrap(), b'4');
    assert_eq!(b.pop(false), Ok(false));
    assert_eq!(total(b.chain.readable()), 0, "no buffers of the previous chain are left");
}

#[test]
fn the_ring_wraps_round() {
    let mut b = bench();
    b.queue.set_next_avail(u16::MAX - 1);
    b.driver.set_available_index(u16::MAX - 1);
    for n in 0..40u16 {
        let head = b.driver.chain(&[(BUFFER + u64::from(n), 1, false)]);
        b.driver.publish(head);
        assert_eq!(b.pop(false), Ok(true));
        assert_eq!(b.chain.readable(), [segment(BUFFER + u64::from(n), 1)]);
    }
}

#[test]
fn loops_are_found() {
    let mut b = bench();
    b.driver.descriptor(0, BUFFER, 1, NEXT, 0);
    assert_eq!(b.refused(false), ChainError::Loop, "to itself");
    b.driver.descriptor(0, BUFFER, 1, NEXT, 1);
    b.driver.descriptor(1, BUFFER, 1, NEXT, 0);
    assert_eq!(b.refused(false), ChainError::Loop, "of two");
    b.driver.descriptor(0, TABLE, 32, INDIRECT, 0);
    b.driver.descriptor_at(TABLE, 0, BUFFER, 1, NEXT, 1);
    b.driver.descriptor_at(TABLE, 1, BUFFER, 1, NEXT, 0);
    assert_eq!(b.refused(true), ChainError::Loop, "inside an indirect table");
}

#[test]
fn a_chain_may_use_every_descriptor_once() {
    let mut b = bench();
    for index in 0..SIZE {
        let flags = if index + 1 < SIZE { NEXT } else { 0 };
        b.driver.descriptor(index, BUFFER, 1, flags, index + 1);
    }
    assert_eq!(b.pop_first(false), Ok(true));
    assert_eq!(b.chain.readable().len(), usize::from(SIZE));
}

#[test]
fn next_outside_the_table_is_refused() {
    let mut b = bench();
    for next in [SIZE, SIZE + 1, 0xffff] {
        b.driver.descriptor(0, BUFFER, 1, NEXT, next);
        assert_eq!(b.refused(false), ChainError::Index);
    }
    b.driver.descriptor(0, TABLE, 32, INDIRECT, 0);
    b.driver.descriptor_at(TABLE, 0, BUFFER, 1, NEXT, 2);
    assert_eq!(b.refused(true), ChainError::Index, "past an indirect table");
}

#[test]
fn a_head_outside_the_table_breaks_the_ring() {
    for head in [SIZE, 0xffff] {
        let mut b = bench();
        b.driver.publish(head);
        assert_eq!(b.pop(false), Err(ChainError::Ring));
        assert_eq!(b.pop(false), Err(ChainError::Ring), "and keeps it broken");
    }
}

#[test]
fn an_available_index_that_jumps_breaks_the_ring() {
    for index in [SIZE + 1, SIZE + 17, 32768, 0xffff] {
        let mut b = bench();
        b.driver.set_available_index(index);
        assert_eq!(b.pop(false), Err(ChainError::Ring));
        assert_eq!(pending(&b.queue, &b.memory), None);
    }
    let mut b = bench();
    b.driver.descriptor(0, BUFFER, 1, 0, 0);
    b.pop_first(false).unwrap();
    b.driver.set_available_index(0);
    assert_eq!(b.pop(false), Err(ChainError::Ring), "backwards");
    b.driver.set_available_index(SIZE + 1);
    assert_eq!(pending(&b.queue, &b.memory), Some(SIZE), "as full as can be");
}

#[test]
fn buffers_outside_memory_are_refused() {
    let mut b = bench();
    for (addr, len) in [
        (RAM, 1),
        (RAM - 1, 2),
        (BUFFER, u32::MAX),
        (HIGH - 1, 2),
        (HIGH + HIGH_LEN - 4, 5),
        (0xd000_0000, 16),
        (1 << 40, 1),
        (u64::MAX, 1),
        (u64::MAX - 3, 16),
    ] {
        for flags in [0, WRITE] {
            b.driver.descriptor(0, addr, len, flags, 0);
            assert_eq!(b.refused(false), ChainError::Address, "{addr:#x}+{len:#x}");
        }
    }
}

#[test]
fn buffers_within_memory_may_lie_anywhere() {
    let mut b = bench();
    let rings = b.driver.used;
    for (addr, len) in [(RAM - 1, 1), (HIGH, HIGH_LEN as u32), (0, RAM as u32), (rings, 8)] {
        b.driver.descriptor(0, addr, len, WRITE, 0);
        assert_eq!(b.pop_first(false), Ok(true), "{addr:#x}+{len:#x}");
    }
}

#[test]
fn empty_buffers_are_refused_wherever_they_are() {
    for empty in 0..3 {
        let mut b = bench();
        let len = |n| u32::from(n != empty);
        b.driver.descriptor(0, BUFFER, len(0), NEXT, 1);
        b.driver.descriptor(1, BUFFER, len(1), NEXT, 2);
        b.driver.descriptor(2, BUFFER, len(2), 0, 0);
        assert_eq!(b.refused(false), ChainError::Empty);
    }
}

#[test]
fn lengths_may_add_up_to_more_than_32_bits() {
    let mut b = bench();
    let table = 512;
    for index in 0..table {
        let flags = if index + 1 < table { NEXT | WRITE } else { WRITE };
        b.driver.descriptor_at(TABLE, index, 0, RAM as u32, flags, index + 1);
    }
    b.driver.descriptor(0, TABLE, u32::from(table) * 16, INDIRECT, 0);
    assert_eq!(b.pop_first(true), Ok(true));
    assert_eq!(total(b.chain.writable()), u64::from(table) * RAM);
}

#[test]
fn readable_after_writable_is_refused() {
    let mut b = bench();
    b.driver.descriptor(0, BUFFER, 1, WRITE | NEXT, 1);
    b.driver.descriptor(1, BUFFER, 1, 0, 0);
    assert_eq!(b.refused(false), ChainError::Order);
}

#[test]
fn an_indirect_table_stands_for_its_descriptors() {
    let mut b = bench();
    b.driver.descriptor_at(TABLE, 0, BUFFER, 4, NEXT, 2);
    b.driver.descriptor_at(TABLE, 2, BUFFER + 4, 8, WRITE, 0);
    // Section 2.7.5.3.2: the device ignores WRITE beside INDIRECT...
    b.driver.descriptor(0, TABLE, 48, INDIRECT | WRITE, 0);
    assert_eq!(b.pop_first(true), Ok(true));
    assert_eq!(b.chain.readable(), [segment(BUFFER, 4)]);
    assert_eq!(b.chain.writable(), [segment(BUFFER + 4, 8)]);
    // ... and accepts direct descriptors before it.
    b.driver.descriptor(0, BUFFER, 2, NEXT, 1);
    b.driver.descriptor(1, TABLE, 48, INDIRECT, 0);
    assert_eq!(b.pop_first(true), Ok(true));
    assert_eq!(b.chain.readable(), [segment(BUFFER, 2), segment(BUFFER, 4)]);
}

#[test]
fn malformed_indirect_tables_are_refused() {
    let mut b = bench();
    b.driver.descriptor_at(TABLE, 0, BUFFER, 1, 0, 0);
    for (len, flags, negotiated, expected) in [
        (16, INDIRECT, false, ChainError::Order),
        (16, INDIRECT | NEXT, true, ChainError::Order),
        (0, INDIRECT, true, ChainError::Indirect),
        (8, INDIRECT, true, ChainError::Indirect),
        (17, INDIRECT, true, ChainError::Indirect),
        (16 * 1025, INDIRECT, true, ChainError::Indirect),
        (16 * 0x1_0001, INDIRECT, true, ChainError::Indirect),
        (!15, INDIRECT, true, ChainError::Indirect),
    ] {
        b.driver.descriptor(0, TABLE, len, flags, 1);
        assert_eq!(b.refused(negotiated), expected, "{len} bytes, flags {flags}");
    }
    for table in [RAM, RAM - 8, u64::MAX - 7, 0xd000_0000] {
        b.driver.descriptor(0, table, 16, INDIRECT, 0);
        assert_eq!(b.refused(true), ChainError::Address, "table at {table:#x}");
    }
    b.driver.descriptor(0, TABLE, 16, INDIRECT, 0);
    b.driver.descriptor_at(TABLE, 0, TABLE, 16, INDIRECT, 0);
    assert_eq!(b.refused(true), ChainError::Order, "nested");
}

#[test]
fn a_driver_that_publishes_while_we_look_breaks_nothing() {
    let b = bench();
    let Bench { memory, driver, mut queue, mut chain } = b;
    driver.descriptor(0, BUFFER, 1, 0, 0);
    let publisher = std::thread::spawn(move || {
        for n in 0..20_000u16 {
            while n.wrapping_sub(driver.used_index()) >= SIZE {
                std::hint::spin_loop();
            }
            driver.publish(0);
        }
    });
    let mut seen = 0;
    while seen < 20_000 {
        if chain.pop(&mut queue, &memory, false).expect("a correct driver does not break the ring")
        {
            queue.add_used(&memory, chain.head(), 0).unwrap();
            seen += 1;
        }
    }
    publisher.join().unwrap();
}

#[test]
fn interrupts_follow_the_drivers_wish() {
    let mut b = bench();
    assert!(needs_interrupt(&mut b.queue, &b.memory));
    b.memory.write_obj(NO_INTERRUPT, GuestAddress(b.driver.available)).unwrap();
    assert!(!needs_interrupt(&mut b.queue, &b.memory));
    b.queue.set_event_idx(true);
    b.driver.set_used_event(2);
    for expected in [false, false, true, false] {
        b.queue.add_used(&b.memory, 0, 0).unwrap();
        assert_eq!(needs_interrupt(&mut b.queue, &b.memory), expected);
    }
}
