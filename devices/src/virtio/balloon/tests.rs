use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use parking_lot::Mutex;
use vm_memory::GuestAddress;

use super::*;
use crate::{
    conformance,
    testing::{Guest, INDIRECT, NEXT, RAM},
};

const ALL: u64 = F_MUST_TELL_HOST | F_STATS_QUEUE | F_PAGE_REPORTING | F_INDIRECT_DESC;
const SETTINGS: Settings = Settings { deflate_on_oom: true, page_reporting: true };
const STATS_QUEUE: u16 = STATS;

/// A call on guest memory, in pages: the first one, and how many.
#[derive(Debug, PartialEq, Eq)]
enum Reclaimed {
    Discard(u64, u64),
    Withhold(u64, u64),
    Release(u64, u64),
    ReleaseAll,
}

use Reclaimed::*;

/// Records the calls.
#[derive(Default)]
struct Notes(Mutex<Vec<Reclaimed>>);

impl Notes {
    fn note(
        &self,
        as_what: fn(u64, u64) -> Reclaimed,
        GuestAddress(start): GuestAddress,
        len: u64,
    ) {
        assert!(start.is_multiple_of(BALLOON_PAGE) && len.is_multiple_of(BALLOON_PAGE));
        self.0.lock().push(as_what(start / BALLOON_PAGE, len / BALLOON_PAGE));
    }
}

impl Reclaim for Notes {
    fn discard(&self, at: GuestAddress, len: u64) {
        self.note(Discard, at, len);
    }

    fn withhold(&self, at: GuestAddress, len: u64) {
        self.note(Withhold, at, len);
    }

    fn release(&self, at: GuestAddress, len: u64) {
        self.note(Release, at, len);
    }

    fn release_all(&self) {
        self.0.lock().push(ReleaseAll);
    }
}

/// The test's handles on a balloon.
struct Outside {
    control: Arc<Control>,
    notes: Arc<Notes>,
    changes: Arc<AtomicU32>,
}

impl Outside {
    fn asked(&self) -> Vec<Reclaimed> {
        std::mem::take(&mut *self.notes.0.lock())
    }
}

fn balloon() -> (Box<Balloon>, Outside) {
    let (notes, changes) = (Arc::new(Notes::default()), Arc::new(AtomicU32::new(0)));
    let on_change: OnChange = {
        let changes = changes.clone();
        Box::new(move || _ = changes.fetch_add(1, Ordering::Relaxed))
    };
    let balloon = Balloon::new("balloon0", SETTINGS, notes.clone(), on_change).unwrap();
    let control = balloon.control();
    (Box::new(balloon), Outside { control, notes, changes })
}

fn guest() -> (Guest, Outside) {
    let (balloon, outside) = balloon();
    let mut guest = Guest::new(balloon);
    guest.start(ALL);
    // A driver begins with a reset.
    outside.asked();
    (guest, outside)
}

fn numbers(pages: &[u32]) -> Vec<u8> {
    pages.iter().flat_map(|page| page.to_le_bytes()).collect()
}

fn entry(tag: u16, value: u64) -> Vec<u8> {
    [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
}

#[test]
fn conforms() {
    /// The suite reports ranges of any size.
    struct Unused;
    impl Reclaim for Unused {
        fn discard(&self, _: GuestAddress, _: u64) {}
        fn withhold(&self, _: GuestAddress, _: u64) {}
        fn release(&self, _: GuestAddress, _: u64) {}
        fn release_all(&self) {}
    }
    conformance::run(|| {
        Box::new(Balloon::new("b", SETTINGS, Arc::new(Unused), Box::new(|| ())).unwrap())
    });
}

#[test]
fn offers_what_it_is_set_to() {
    let features = |deflate_on_oom, page_reporting| {
        let settings = Settings { deflate_on_oom, page_reporting };
        let memory = Arc::new(Notes::default());
        let balloon = Balloon::new("b", settings, memory, Box::new(|| ())).unwrap();
        balloon.features() & (F_DEFLATE_ON_OOM | F_PAGE_REPORTING | F_STATS_QUEUE)
    };
    assert_eq!(features(false, false), F_STATS_QUEUE);
    assert_eq!(features(true, false), F_STATS_QUEUE | F_DEFLATE_ON_OOM);
    assert_eq!(features(false, true), F_STATS_QUEUE | F_PAGE_REPORTING);
}

#[test]
fn pages_that_lie_together_are_discarded_at_once() {
    let (mut g, outside) = guest();
    // As Linux sends them: mostly from high to low; some twice.
    let pages = g.bytes(&numbers(&[9, 8, 7, 100, 7, 3, 102, 101, u32::MAX]));
    let head = g.request(INFLATE, &[(pages, 36, false)]);
    assert_eq!(g.completion(INFLATE), (head, 0));
    assert!(g.interrupted());
    let end = u64::from(u32::MAX);
    let asked = [Withhold(3, 1), Withhold(7, 3), Withhold(100, 3), Withhold(end, 1)];
    assert_eq!(outside.asked(), asked);
}

#[test]
fn a_driver_that_does_not_tell_may_use_its_pages_at_any_time() {
    let (balloon, outside) = balloon();
    let mut g = Guest::new(balloon);
    g.start(0);
    outside.asked();
    let pages = g.bytes(&numbers(&[1]));
    g.request(INFLATE, &[(pages, 4, false)]);
    assert_eq!(outside.asked(), [Discard(1, 1)]);
}

#[test]
fn page_numbers_may_be_split_over_buffers() {
    let (mut g, outside) = guest();
    let pages = g.bytes(&numbers(&[5, 6, 7]));
    g.request(INFLATE, &[(pages, 6, false), (pages + 6, 6, false), (pages, 3, false)]);
    assert_eq!(outside.asked(), [Withhold(5, 3)], "an incomplete number is ignored");
}

/// A request of gigabytes in `queue`, and what became of it.
fn gigabytes(queue: u16) -> Vec<Reclaimed> {
    let (mut g, outside) = guest();
    let table = g.room(64 * 16);
    for index in 0..64 {
        let flags = if index < 63 { NEXT } else { 0 };
        let len = (RAM - (8 << 20)) as u32;
        g.queues[0].descriptor_at(table, index, 8 << 20, len, flags, index + 1);
    }
    g.queues[usize::from(queue)].descriptor(0, table, 64 * 16, INDIRECT, 0);
    g.queues[usize::from(queue)].publish(0);
    g.kick(queue);
    assert_eq!(g.completion(queue), (0, 0));
    outside.asked()
}

#[test]
fn a_request_of_gigabytes_is_cut() {
    assert!(gigabytes(INFLATE).len() <= 1024);
    // None of the guest's pages may be taken for one in the balloon.
    assert_eq!(gigabytes(DEFLATE), [ReleaseAll]);
}

#[test]
fn pages_that_lie_apart_are_cut_and_all_of_them_return() {
    let (mut g, outside) = guest();
    let apart: Vec<u32> = (0..2000).map(|n| 2 * n).collect();
    let (pages, len) = (g.bytes(&numbers(&apart)), 4 * 2000);
    g.request(INFLATE, &[(pages, len, false)]);
    assert_eq!(outside.asked().len(), 1024);
    g.request(DEFLATE, &[(pages, len, false)]);
    assert_eq!(outside.asked().len(), 2000);
}

#[test]
fn ranges_of_one_report_that_overlap_are_cut() {
    let (mut g, outside) = guest();
    let all = (0u64, RAM as u32, true);
    let count = usize::try_from((1 << 30) / RAM).unwrap() + 2;
    g.request(REPORTING[0], &vec![all; count]);
    let sizes = outside.asked().into_iter().map(|call| match call {
        Discard(0, pages) => pages * BALLOON_PAGE,
        other => panic!("{other:?}"),
    });
    assert_eq!(sizes.sum::<u64>(), 1 << 30);
}

#[test]
fn a_host_that_takes_its_time_does_not_keep_the_thread() {
    /// Longer than a turn.
    struct Slow;
    impl Slow {
        fn work() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
    impl Reclaim for Slow {
        fn discard(&self, _: GuestAddress, _: u64) {
            Self::work();
        }
        fn withhold(&self, _: GuestAddress, _: u64) {
            Self::work();
        }
        fn release(&self, _: GuestAddress, _: u64) {
            Self::work();
        }
        fn release_all(&self) {}
    }
    let balloon = Balloon::new("b", SETTINGS, Arc::new(Slow), Box::new(|| ())).unwrap();
    let mut g = Guest::new(Box::new(balloon));
    g.start(ALL);
    let pages = g.bytes(&numbers(&[1]));
    let queues = [(INFLATE, false), (DEFLATE, false), (REPORTING[0], true)];
    for (queue, write) in queues {
        for _ in 0..5 {
            let index = usize::from(queue);
            let head = g.queues[index].chain(&[(pages, 4, write)]);
            g.queues[index].publish(head);
        }
    }
    g.transport.notifiers()[usize::from(INFLATE)].write(1).unwrap();
    g.thread.turn(std::time::Duration::ZERO);
    let served = |g: &Guest| queues.map(|(queue, _)| g.queues[usize::from(queue)].used_index());
    assert_eq!(served(&g), [1; 3], "others have their turn");
    g.thread.settle();
    assert_eq!(served(&g), [5; 3]);
}

#[test]
fn pages_that_are_taken_out_are_the_guest_s_again() {
    let (mut g, outside) = guest();
    let pages = g.bytes(&numbers(&[1, 2]));
    let head = g.request(DEFLATE, &[(pages, 8, false)]);
    assert_eq!(g.completion(DEFLATE), (head, 0));
    assert_eq!(outside.asked(), [Release(1, 2)]);
    g.store(0x70, 0);
    assert_eq!(outside.asked(), [ReleaseAll], "a guest that is reset has no balloon");
}

#[test]
fn free_pages_are_discarded_whichever_number_the_queue_has() {
    for queue in REPORTING {
        let (mut g, outside) = guest();
        let head = g.request(queue, &[(2 << 20, 2 << 20, true), (8 << 20, 4096, true)]);
        assert_eq!(g.completion(queue), (head, 0));
        assert_eq!(outside.asked(), [Discard(512, 512), Discard(2048, 1)], "queue {queue}");
        // Outside of memory, completely or in part.
        g.request(queue, &[(RAM, 4096, true)]);
        g.request(queue, &[(RAM - 4096, 8192, true)]);
        assert_eq!(outside.asked(), []);
    }
    let (balloon, outside) = balloon();
    let mut g = Guest::new(balloon);
    g.start(F_STATS_QUEUE);
    outside.asked();
    for queue in REPORTING {
        g.request(queue, &[(0, 4096, true)]);
    }
    assert_eq!(outside.asked(), [], "not negotiated");
}

#[test]
fn the_driver_sees_the_target_and_says_what_it_has_done() {
    let (mut g, outside) = guest();
    outside.control.set_target(1000);
    g.update(|_: &mut Balloon| ());
    assert_eq!((g.load(0x100), g.load(0x104)), (1000, 0));
    g.store(0x104, 900);
    assert_eq!((outside.control.actual(), g.load(0x104)), (900, 900));
    assert_eq!(outside.changes.load(Ordering::Relaxed), 1);
    g.store(0x100, 7);
    assert_eq!(outside.control.target(), 1000, "read-only for the driver");
    g.store(0x70, 0);
    assert_eq!((outside.control.target(), outside.control.actual()), (1000, 0));
}

#[test]
fn statistics_are_read_when_they_are_lent_and_when_they_are_asked_for() {
    let (mut g, outside) = guest();
    let value = |name| {
        let stats = outside.control.stats().unwrap();
        stats.each().find(|(known, _)| *known == name).unwrap().1
    };
    let entries = [entry(4, 1 << 20), entry(5, 16 << 20), entry(99, 1), entry(4, 2 << 20)].concat();
    let len = entries.len() as u32;
    let at = g.bytes(&entries);
    let head = g.request(STATS_QUEUE, &[(at, len, false)]);
    assert_eq!(value("stat-free-memory"), Some(2 << 20), "the last one counts");
    assert_eq!(value("stat-total-memory"), Some(16 << 20));
    assert_eq!(value("stat-swap-in"), None);
    assert_eq!(g.queues[2].next_used(), None, "the device keeps the buffer");

    outside.control.set_polling_interval(1);
    assert_eq!(g.completion(STATS_QUEUE), (head, 0));
    assert!(g.interrupted());
    g.poke(at, &entry(4, 3 << 20).repeat(4));
    g.queues[2].publish(head);
    g.kick(STATS_QUEUE);
    assert_eq!(value("stat-free-memory"), Some(3 << 20));
    assert_eq!(g.completion(STATS_QUEUE), (head, 0), "returned for new statistics");

    outside.control.set_polling_interval(0);
    g.queues[2].publish(head);
    g.kick(STATS_QUEUE);
    std::thread::sleep(std::time::Duration::from_millis(1100));
    g.thread.settle();
    assert_eq!(g.queues[2].next_used(), None, "no more");
}

#[test]
fn statistics_may_say_anything() {
    let (mut g, outside) = guest();
    // Gigabytes of page numbers, and an incomplete one.
    let len = (RAM - (8 << 20)) as u32;
    g.request(STATS_QUEUE, &[(8 << 20, len, false), (8 << 20, len, false)]);
    assert!(outside.control.stats().is_some());
    let (mut g, outside) = guest();
    let at = g.bytes(&[4, 0, 1]);
    g.request(STATS_QUEUE, &[(at, 3, false)]);
    assert!(outside.control.stats().unwrap().each().all(|(_, value)| value.is_none()));
}

#[test]
fn buffers_that_cannot_be_read_go_back() {
    let (mut g, _outside) = guest();
    let at = g.room(16);
    for _ in 0..100 {
        let head = g.queues[2].chain(&[(at, 0, false)]);
        g.queues[2].publish(head);
    }
    g.transport.notifiers()[usize::from(STATS_QUEUE)].write(1).unwrap();
    g.thread.turn(std::time::Duration::ZERO);
    g.thread.settle();
    assert_eq!(g.queues[2].used_index(), 100);
}

#[test]
fn it_moves_with_its_sizes_and_the_buffer_that_is_lent() {
    let (mut g, outside) = guest();
    let at = g.bytes(&entry(4, 1));
    let head = g.request(STATS_QUEUE, &[(at, 10, false)]);
    outside.control.set_target(50);
    outside.control.set_actual(40);
    outside.control.set_polling_interval(1);
    let (device, outside) = balloon();
    let mut g = g.migrate(device);
    g.thread.settle();
    assert_eq!((outside.control.target(), outside.control.actual()), (50, 40));
    assert_eq!((g.load(0x100), g.load(0x104)), (50, 40));
    assert_eq!(g.completion(STATS_QUEUE), (head, 0), "kept after the migration, too, and returned");
}

#[test]
fn a_broken_ring_needs_a_reset() {
    for queue in [INFLATE, DEFLATE, STATS_QUEUE, REPORTING[1]] {
        let (mut g, _outside) = guest();
        g.queues[usize::from(queue)].set_available_index(30_000);
        g.kick(queue);
        assert!(g.needs_reset(), "queue {queue}");
    }
}
