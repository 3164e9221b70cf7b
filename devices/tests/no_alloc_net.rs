// UNSAFETY: a global allocator that counts.
#![expect(unsafe_code)]
//! The data path of a network device allocates nothing, and resets leave no descriptors open. This
//! is a test binary of its own, because both are counted for the whole process.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs, reason = "a test")]
use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    os::unix::net::UnixDatagram,
    sync::{Arc, Mutex, PoisonError},
};

use devices::{
    Device,
    backend::net::HEADER,
    testing::{Buffer, Guest, Wire, open_descriptors},
    virtio::{
        F_EVENT_IDX, F_INDIRECT_DESC,
        net::{Net, NetSettings},
    },
};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: passes everything on to the system's allocator; the counter is plain data of the thread.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller upholds the contract.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller upholds the contract.
        unsafe { System.dealloc(at, layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller upholds the contract.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// The tests count for the whole process, so they run one at a time.
static ALONE: Mutex<()> = Mutex::new(());

const MERGEABLE: u64 = 1 << 15;
const LONG: usize = 60_000;

fn lan(pps: Option<u64>) -> (Guest, UnixDatagram) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_nonblocking(true).unwrap();
    let settings = NetSettings { queue_pairs: 1, queue_size: 256, pps, ..NetSettings::default() };
    (Guest::new(Box::new(Net::new("net0", settings, Some(Arc::new(Wire(ours)))).unwrap())), theirs)
}

#[test]
fn a_frame_costs_no_allocation_either_way() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let features = [MERGEABLE, MERGEABLE | F_EVENT_IDX | F_INDIRECT_DESC, 0];
    for (features, pps) in features.into_iter().zip([None, Some(1_000_000_000), None]) {
        let (mut guest, peer) = lan(pps);
        guest.start(features);
        let mergeable = features & MERGEABLE != 0;
        // Without mergeable buffers, each buffer has to hold a whole frame.
        let size = if mergeable { 1526 } else { 65_562 };
        let buffers: Vec<u64> = (0..100).map(|_| guest.room(size)).collect();
        let out: Vec<Buffer> = (0..15).map(|_| (guest.room(4096), 4096, false)).collect();
        let long = vec![0x55; HEADER + LONG];
        let mut arrived = vec![0; 70_000];
        let mut next = 0;
        let post = |guest: &mut Guest, at| {
            let head = guest.queues[0].chain(&[(at, size as u32, true)]);
            guest.queues[0].publish(head);
        };
        let mut round = |guest: &mut Guest| {
            // Receive a long and a short frame into buffers given back at once.
            for frame in [&long[..], &long[..100]] {
                peer.send(frame).unwrap();
                guest.thread.settle();
                let mut got = 0;
                while got < frame.len() {
                    got += guest.completion(0).1 as usize;
                    post(guest, buffers[next % 100]);
                    next += 1;
                }
                guest.kick(0);
            }
            // Send the same.
            for pieces in [&out[..], &out[..1]] {
                guest.request(1, pieces);
                assert_eq!(guest.completion(1).1, 0);
                assert_eq!(peer.recv(&mut arrived).unwrap(), pieces.len() * 4096);
            }
        };
        for at in &buffers {
            post(&mut guest, *at);
        }
        guest.kick(0);
        (0..20).for_each(|_| round(&mut guest));
        let before = ALLOCATIONS.get();
        (0..100).for_each(|_| round(&mut guest));
        assert_eq!(ALLOCATIONS.get() - before, 0, "features {features:#x}");
    }
}

#[test]
fn resets_under_load_leave_no_descriptor_open() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let (mut guest, peer) = lan(Some(1000));
    guest.start(MERGEABLE);
    let before = open_descriptors();
    for n in 0..60u16 {
        guest.start(if n % 2 == 0 { MERGEABLE | F_EVENT_IDX } else { 0 });
        // The peer's buffer may be full.
        let _ = peer.send(&[1; 200]);
        guest.queues[1].set_available_index(n % 7);
        guest.queues[0].set_available_index(n % 5);
        guest.kick(1);
        guest.kick(0);
    }
    guest.transport.reset();
    guest.start(0);
    assert_eq!(open_descriptors(), before);
}
