//! Invalid rings and chains (and some that are only unusual).
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use super::{BUFFER, LIVE, Make, STATUS, live, queue_count, recovers};
use crate::{
    Device,
    testing::{DriverQueue, Guest, HIGH, HIGH_LEN, INDIRECT, NEXT, RAM, WRITE},
};

/// Where a hostile driver keeps a table.
const TABLE: u64 = 9 << 20;

type Lay = fn(&DriverQueue);

/// The layouts, and whether each breaks the ring: then nothing may be used at all.
const CASES: &[(&str, bool, Lay)] = &[
    ("a loop of one", false, |q| {
        q.descriptor(0, BUFFER, 16, NEXT, 0);
        q.publish(0);
    }),
    ("a loop of two", false, |q| {
        q.descriptor(0, BUFFER, 16, NEXT, 1);
        q.descriptor(1, BUFFER, 16, WRITE | NEXT, 0);
        q.publish(0);
    }),
    ("a loop in an indirect table", false, |q| {
        q.descriptor_at(TABLE, 0, BUFFER, 16, NEXT, 1);
        q.descriptor_at(TABLE, 1, BUFFER, 16, NEXT, 0);
        q.descriptor(0, TABLE, 32, INDIRECT, 0);
        q.publish(0);
    }),
    ("next past the table", false, |q| {
        q.descriptor(0, BUFFER, 16, NEXT, q.size);
        q.publish(0);
    }),
    ("next of 0xffff", false, |q| {
        q.descriptor(0, BUFFER, 16, NEXT, 0xffff);
        q.publish(0);
    }),
    ("a head past the table", true, |q| q.publish(q.size)),
    ("a head of 0xffff", true, |q| q.publish(0xffff)),
    ("one more available than there is room", true, |q| q.set_available_index(q.size + 1)),
    ("32768 more available", true, |q| {
        if q.size < 32768 {
            q.set_available_index(32768);
        } else {
            q.publish(0xffff);
        }
    }),
    ("an available index that went backwards", true, |q| q.set_available_index(0xffff)),
    ("a buffer past memory", false, |q| one(q, RAM, 16)),
    ("a buffer whose end wraps", false, |q| one(q, u64::MAX - 7, 16)),
    ("a buffer across the end of memory", false, |q| one(q, RAM - 8, 16)),
    ("a buffer across the end of the second region", false, |q| one(q, HIGH + HIGH_LEN - 8, 16)),
    ("a buffer into the second region from the hole", false, |q| one(q, HIGH - 8, 16)),
    ("a buffer in the MMIO window", false, |q| one(q, 0xf010_0000, 64)),
    ("a buffer that is the descriptor table", false, |q| one(q, q.descriptors, 64)),
    ("a buffer that is the used ring", false, |q| one(q, q.used, 64)),
    ("overlapping buffers in both directions", false, |q| {
        q.descriptor(0, BUFFER, 4096, NEXT, 1);
        q.descriptor(1, BUFFER, 4096, WRITE, 0);
        q.publish(0);
    }),
    ("an empty buffer at the head", false, |q| three(q, [0, 16, 16])),
    ("an empty buffer in the middle", false, |q| three(q, [16, 0, 16])),
    ("an empty buffer at the end", false, |q| three(q, [16, 16, 0])),
    ("only empty buffers", false, |q| three(q, [0, 0, 0])),
    ("more than 4 GiB", false, |q| {
        for n in 0..512 {
            let next = if n < 511 { NEXT } else { 0 };
            q.descriptor_at(TABLE, n, 8 << 20, 8 << 20, WRITE | next, n + 1);
        }
        q.descriptor(0, TABLE, 512 * 16, INDIRECT, 0);
        q.publish(0);
    }),
    ("readable after writable", false, |q| {
        q.descriptor(0, BUFFER, 16, WRITE | NEXT, 1);
        q.descriptor(1, BUFFER, 16, 0, 0);
        q.publish(0);
    }),
    ("nothing writable", false, |q| {
        q.descriptor(0, BUFFER, 16, NEXT, 1);
        q.descriptor(1, BUFFER, 512, 0, 0);
        q.publish(0);
    }),
    ("nothing readable", false, |q| {
        q.descriptor(0, BUFFER, 16, WRITE, 0);
        q.publish(0);
    }),
    ("bytes in descriptors of one each", false, |q| {
        let count = q.size.min(64);
        for n in 0..count {
            let write = if n >= count / 2 { WRITE } else { 0 };
            let next = if n + 1 < count { NEXT } else { 0 };
            q.descriptor(n, BUFFER + u64::from(n), 1, write | next, n + 1);
        }
        q.publish(0);
    }),
    ("an indirect table inside an indirect table", false, |q| {
        q.descriptor_at(TABLE, 0, TABLE, 16, INDIRECT, 0);
        q.descriptor(0, TABLE, 16, INDIRECT, 0);
        q.publish(0);
    }),
    ("an indirect table of no bytes", false, |q| indirect(q, TABLE, 0, INDIRECT)),
    ("an indirect table of 24 bytes", false, |q| indirect(q, TABLE, 24, INDIRECT)),
    ("an indirect table of 4 GiB", false, |q| indirect(q, TABLE, !15, INDIRECT)),
    ("an indirect table past memory", false, |q| indirect(q, RAM - 8, 16, INDIRECT)),
    ("an indirect table that is not the end", false, |q| {
        indirect(q, TABLE, 16, INDIRECT | NEXT);
    }),
    ("one head twice", false, |q| {
        q.descriptor(0, BUFFER, 512, NEXT, 1);
        q.descriptor(1, BUFFER + 512, 512, WRITE, 0);
        q.publish(0);
        q.publish(0);
    }),
    ("a used_event from nowhere", false, |q| {
        q.set_used_event(0x8000);
        q.descriptor(0, BUFFER, 512, WRITE, 0);
        q.publish(0);
    }),
];

fn one(q: &DriverQueue, addr: u64, len: u32) {
    q.descriptor(0, addr, len, 0, 0);
    q.descriptor(1, addr, len, WRITE, 0);
    q.publish(0);
    q.publish(1);
}

fn three(q: &DriverQueue, lens: [u32; 3]) {
    if q.size < 3 {
        return one(q, BUFFER, lens[0]);
    }
    q.descriptor(0, BUFFER, lens[0], NEXT, 1);
    q.descriptor(1, BUFFER, lens[1], NEXT, 2);
    q.descriptor(2, BUFFER, lens[2], WRITE, 0);
    q.publish(0);
}

fn indirect(q: &DriverQueue, table: u64, len: u32, flags: u16) {
    q.descriptor_at(TABLE, 0, BUFFER, 16, WRITE, 0);
    q.descriptor(0, table, len, flags, 0);
    q.publish(0);
}

/// Every case, on every queue, with every ring feature and with none.
pub(super) fn rings(make: &impl Make) {
    let mut g = live(make);
    let offered = g.offered();
    for features in [offered, 0] {
        for index in 0..queue_count(&mut g) {
            recovers(&mut g, "the last queue");
            g.start(features);
            let looks = looks_at(&mut g, index);
            for (case, broken, lay) in CASES {
                recovers(&mut g, "the last case");
                g.start(features);
                let place = usize::from(index);
                let honest = g.queues[place].clone();
                lay(&honest);
                g.kick(index);
                g.kick(index);
                let what = format!("queue {index}: {case}");
                returned_no_more_than_given(&g, place, *broken, &what);
                assert_eq!(g.load(STATUS) & !0x40, LIVE, "{what}");
                assert!(g.needs_reset() || !(looks && *broken), "{what} needs a reset");
            }
        }
    }
    recovers(&mut g, "all cases");
}

/// Whether a notification makes the device process this queue at once (and not, as with a receive
/// queue, when data arrives).
fn looks_at(g: &mut Guest, index: u16) -> bool {
    let queue = &g.queues[usize::from(index)];
    queue.descriptor(0, BUFFER, 16, NEXT, 1);
    queue.descriptor(1, BUFFER + 512, 16, WRITE, 0);
    queue.publish(0);
    g.kick(index);
    g.queues[usize::from(index)].used_index() > 0
}

fn returned_no_more_than_given(g: &Guest, index: usize, broken: bool, what: &str) {
    let mut queue = g.queues[index].clone();
    let used = queue.used_index();
    let given = if broken { 0 } else { queue.available_index() };
    // A chain that points at the used ring overwrites the ring when it is processed.
    if !what.ends_with("is the used ring") {
        assert!(used <= given, "{what}: {used} returned of {given}");
        while let Some((head, _)) = queue.next_used() {
            assert!(head < queue.size, "{what}: head {head} returned");
        }
    }
}

/// Random tables, for cases not listed above.
pub(super) fn random_rings(make: &impl Make) {
    let mut g = live(make);
    let mut rng = Rng(1);
    for _ in 0..100 {
        recovers(&mut g, "random rings");
        for queue in g.queues.clone() {
            for index in 0..queue.size.min(32) {
                random_descriptor(&mut rng, &queue, queue.descriptors, index);
                random_descriptor(&mut rng, &queue, TABLE, index);
            }
            for _ in 0..queue.size.min(16) {
                queue.publish(rng.below(32) as u16 % queue.size);
            }
        }
        for index in 0..queue_count(&mut g) {
            g.kick(index);
        }
        g.transport.pause();
        g.transport.resume();
        g.thread.settle();
        assert_eq!(g.load(STATUS) & !0x40, LIVE);
    }
    recovers(&mut g, "random rings");
}

fn random_descriptor(rng: &mut Rng, queue: &DriverQueue, table: u64, index: u16) {
    let addr = match rng.below(16) {
        0 => rng.next(),
        1 => RAM - rng.below(64),
        2 => queue.used,
        3..6 => TABLE,
        _ => BUFFER + rng.below(4096),
    };
    let len = match rng.below(8) {
        0 => rng.next() as u32,
        1 => 0,
        2 => 16 * rng.below(8) as u32,
        _ => 1 + rng.below(2048) as u32,
    };
    let flags = [0, NEXT, WRITE, NEXT | WRITE, NEXT, WRITE, INDIRECT, 7][rng.below(8) as usize];
    queue.descriptor_at(table, index, addr, len, flags, rng.below(34) as u16);
}

/// Another vCPU rewrites descriptors while the device reads them.
pub(super) fn changing_rings(make: &impl Make) {
    let mut g = live(make);
    let stop = Arc::new(AtomicBool::new(false));
    let (queues, done) = (g.queues.clone(), stop.clone());
    let rewriter = std::thread::spawn(move || {
        let mut rng = Rng(2);
        while !done.load(Ordering::Relaxed) {
            for queue in &queues {
                random_descriptor(&mut rng, queue, queue.descriptors, 1 % queue.size);
                random_descriptor(&mut rng, queue, queue.descriptors, 0);
            }
        }
    });
    for _ in 0..200 {
        for index in 0..g.queues.len() {
            let queue = &g.queues[index];
            let waiting = queue.available_index().wrapping_sub(queue.used_index());
            if waiting < queue.size {
                queue.publish(0);
            }
            let index = u16::try_from(index).unwrap();
            g.transport.notifiers()[usize::from(index)].write(1).unwrap();
            g.thread.turn(std::time::Duration::ZERO);
        }
    }
    stop.store(true, Ordering::Relaxed);
    rewriter.join().unwrap();
    g.thread.settle();
    recovers(&mut g, "rings that changed concurrently");
}

/// A seeded PRNG (splitmix64).
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}
