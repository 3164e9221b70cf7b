//! The data path of a disk allocates nothing for a request, once it has seen the longest one. This
//! is a test binary of its own, because it counts every allocation of the process.
// UNSAFETY: a global allocator cannot be written without.
#![expect(unsafe_code)]
use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering},
};

use devices::{
    backend::disk::{Aio, Disk, OpenOptions},
    testing::{Buffer, Guest},
    virtio::{
        F_EVENT_IDX, F_INDIRECT_DESC,
        blk::{Block, Settings},
    },
};
use vmm_sys_util::tempdir::TempDir;

struct Counting;
static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller upholds the contract, which is that of `System`.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const READ: u32 = 0;
const WRITE: u32 = 1;
const ZEROES: u32 = 13;
const REQUESTS: usize = 400;

/// Lay out a request of `parts` pieces of 4 KiB; its head.
#[expect(clippy::indexing_slicing, reason = "a mistake ends the test")]
fn lay_out(guest: &mut Guest, kind: u32, sector: u64, parts: usize) -> u16 {
    let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
    let mut chain: Vec<Buffer> = vec![(guest.bytes(&header), 16, false)];
    if kind == ZEROES {
        chain.push((guest.bytes(&[0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0]), 16, false));
    }
    for _ in 0..parts {
        let page = guest.room(8192).next_multiple_of(4096);
        chain.push((page, 4096, kind == READ));
    }
    chain.push((guest.room(1), 1, true));
    guest.queues[0].chain(&chain)
}

#[test]
fn requests_allocate_nothing() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("image");
    for (direct, aio) in
        [(false, Aio::Auto), (false, Aio::Off), (true, Aio::Auto), (true, Aio::Off)]
    {
        std::fs::write(&path, vec![1; 4 << 20]).unwrap();
        let options = OpenOptions { direct, aio, ..OpenOptions::default() };
        let disk = Disk::open(&path, &options).unwrap();
        let block = Block::new("disk", Settings::default(), Some(disk.into()));
        let stats = block.stats();
        let mut guest = Guest::new(Box::new(block));
        guest.start(F_INDIRECT_DESC | F_EVENT_IDX | 1 << 9);
        let heads = [
            lay_out(&mut guest, READ, 0, 1),
            lay_out(&mut guest, WRITE, 64, 1),
            lay_out(&mut guest, READ, 128, 60),
            lay_out(&mut guest, WRITE, 1024, 40),
            lay_out(&mut guest, ZEROES, 0, 0),
        ];
        let mut run = |requests: usize| {
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            for _ in 0..requests / heads.len() {
                for head in heads {
                    guest.queues[0].publish(head);
                }
                guest.kick(0);
                for _ in heads {
                    guest.completion(0);
                }
            }
            ALLOCATIONS.load(Ordering::Relaxed) - before
        };
        // The lists of requests in flight are reused in turn, and each grows once, at a time that
        // the host's disk decides. A request that allocates would show in every round.
        run(2000);
        let rounds: Vec<usize> = (0..5).map(|_| run(REQUESTS)).collect();
        assert_eq!(rounds.iter().min(), Some(&0), "direct {direct}, {aio:?}: {rounds:?}");
        assert_eq!(
            stats.rd_operations.load(Ordering::Relaxed),
            2 * ((2000 + 5 * REQUESTS) / 5) as u64,
            "they were real requests"
        );
    }
}
