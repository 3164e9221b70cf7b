//! A disk whose changes an observer delays, or must be notified of first.
use std::sync::atomic::{AtomicU16, AtomicUsize};

use super::*;
use crate::backend::disk::{Change, Observer, Verdict};

/// Delays every change until it is opened; records the guest's used index at the end of each.
struct Gate {
    open: AtomicBool,
    asked: AtomicUsize,
    memory: crate::Memory,
    used_ring: u64,
    used_at_end: AtomicU16,
}

impl Gate {
    fn on(r: &mut Rig, open: bool) -> Arc<Self> {
        let gate = Arc::new(Self {
            open: AtomicBool::new(open),
            asked: AtomicUsize::new(0),
            memory: r.guest.memory.clone(),
            used_ring: r.guest.queues[0].used,
            used_at_end: AtomicU16::new(0),
        });
        let disk = r.block().disk().unwrap();
        // The image gets its next generation beforehand, so that changes wait for the gate only.
        disk.resize(disk.size()).unwrap();
        disk.observe(gate.clone());
        gate
    }

    fn open(&self, r: &mut Rig) {
        self.open.store(true, Ordering::SeqCst);
        r.block().disk().unwrap().waker().wake();
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

impl Observer for Gate {
    fn before(&self, _: &Change) -> io::Result<Verdict> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let open = self.open.load(Ordering::SeqCst);
        Ok(if open { Verdict::Start } else { Verdict::Wait })
    }

    fn after(&self, _: &Change, _: &io::Result<()>) {
        let used: u16 = self.memory.read_obj(GuestAddress(self.used_ring + 2)).unwrap();
        self.used_at_end.store(used, Ordering::SeqCst);
    }
}

/// Send a write of one sector of `value` through `queue` without waiting for it.
fn send(r: &mut Rig, queue: u16, sector: u64, value: u8) -> u16 {
    let g = &mut r.guest;
    let header = g.bytes(&header(VIRTIO_BLK_T_OUT, sector));
    let (data, status) = (g.bytes(&[value; 512]), g.bytes(&[0xff]));
    g.request(queue, &[(header, 16, false), (data, 512, false), (status, 1, true)])
}

#[test]
fn an_observer_hears_of_a_change_before_the_guest_does() {
    for way in every_way() {
        let mut r = Rig::new(way);
        let gate = Gate::on(&mut r, true);
        for round in 0..3 {
            assert_eq!(r.write(round.into(), &[1; 512]), OK);
            assert_eq!(gate.used_at_end.load(Ordering::SeqCst), round, "{way:?}");
        }
    }
}

#[test]
fn a_change_that_has_to_wait_stays_in_its_queue() {
    for way in every_way() {
        let settings = Settings { queues: 2, ..Settings::default() };
        let mut r = Rig::with(way, USUAL | 1 << VIRTIO_BLK_F_MQ, settings);
        let before = r.image();
        let gate = Gate::on(&mut r, false);
        let heads = [send(&mut r, 0, 0, 1), send(&mut r, 0, 1, 2)];
        r.guest.thread.settle();
        assert_eq!(r.guest.queues[0].used_index(), 0, "{way:?}");
        assert_eq!(r.stat(|s| &s.in_flight), 0, "nothing that a pause would wait for");

        // Another queue is held up only by changes of its own.
        let header = r.guest.bytes(&header(VIRTIO_BLK_T_IN, 0));
        let (data, status) = (r.guest.room(512), r.guest.bytes(&[0xff]));
        r.guest.request(1, &[(header, 16, false), (data, 512, true), (status, 1, true)]);
        r.guest.completion(1);
        assert_eq!(r.guest.peek(data, 512), &before[..512]);

        // After a pause, the observer is asked again; no change is lost.
        r.guest.transport.pause();
        r.guest.transport.resume();
        r.guest.thread.settle();
        assert_eq!(r.guest.queues[0].used_index(), 0);

        // Woken for another reason.
        let asked = gate.asked();
        r.block().disk().unwrap().waker().wake();
        r.guest.thread.settle();
        assert_eq!((gate.asked(), r.guest.queues[0].used_index()), (asked + 1, 0), "once each");

        gate.open(&mut r);
        for head in heads {
            assert_eq!(r.guest.completion(0), (head, 1));
        }
        assert_eq!(r.image()[..1024], [[1; 512], [2; 512]].concat());
        assert_eq!(r.stat(|s| &s.wr_operations), 2);
    }
}

#[test]
fn a_change_that_is_refused_is_an_error_to_the_guest() {
    struct Never;
    impl Observer for Never {
        fn before(&self, _: &Change) -> io::Result<Verdict> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn after(&self, _: &Change, _: &io::Result<()>) {}
    }
    let mut r = Rig::new(rw());
    let never = Arc::new(Never);
    r.block().disk().unwrap().observe(never.clone());
    let before = r.image();
    assert_eq!(r.write(0, &[1; 512]), IOERR);
    assert_eq!(r.range(VIRTIO_BLK_T_DISCARD, 0, 8, 0), IOERR);
    assert_eq!(r.read(0, 512).0, OK);
    assert!(r.image() == before);
    r.block().disk().unwrap().unobserve(&*never);
    assert_eq!(r.write(0, &[1; 512]), OK);
}

#[test]
fn a_driver_that_resets_its_disk_has_taken_back_what_was_held() {
    let mut r = Rig::new(rw());
    let before = r.image();
    let gate = Gate::on(&mut r, false);
    send(&mut r, 0, 0, 1);
    r.guest.thread.settle();
    r.guest.start(USUAL);
    gate.open(&mut r);
    r.guest.thread.settle();
    assert!(r.image() == before, "a new driver has not requested it");
    assert_eq!(r.write(0, &[2; 512]), OK);
}

#[test]
fn a_disk_that_is_taken_out_fails_what_it_held() {
    let mut r = Rig::new(rw());
    let _gate = Gate::on(&mut r, false);
    let head = send(&mut r, 0, 0, 1);
    r.guest.thread.settle();
    let disk = r.guest.update(Block::unplug).unwrap();
    assert!(disk.is_some());
    assert_eq!(r.guest.completion(0), (head, 1));
    assert_eq!(r.stat(|s| &s.wr_operations), 0);
}

#[test]
fn a_limit_is_charged_once_for_a_change_that_waits() {
    // One write takes the whole burst, and most of an hour at this rate.
    let mut r = Rig::limited(None, Some(1));
    let gate = Gate::on(&mut r, false);
    let head = send(&mut r, 0, 0, 1);
    r.guest.thread.settle();
    for _ in 0..3 {
        let asked = gate.asked();
        r.block().disk().unwrap().waker().wake();
        r.guest.thread.settle();
        assert_eq!(gate.asked(), asked + 1, "the limit lets it pass");
    }
    gate.open(&mut r);
    assert_eq!(r.guest.completion(0), (head, 1));
}

/// A disk on which every change takes a millisecond of the I/O thread's time.
struct Slow;
impl Observer for Slow {
    fn before(&self, _: &Change) -> io::Result<Verdict> {
        std::thread::sleep(std::time::Duration::from_millis(1));
        Ok(Verdict::Start)
    }
    fn after(&self, _: &Change, _: &io::Result<()>) {}
}

#[test]
fn a_turn_ends_when_the_disk_has_taken_its_time_whatever_is_asked_for() {
    const EACH: usize = 20;
    let zeroes = [&0u64.to_le_bytes()[..], &8u32.to_le_bytes(), &0u32.to_le_bytes()].concat();
    for (kind, out) in [
        (VIRTIO_BLK_T_WRITE_ZEROES, &zeroes[..]),
        (VIRTIO_BLK_T_DISCARD, &zeroes[..]),
        (VIRTIO_BLK_T_OUT, &[7; 512]),
    ] {
        let way = OpenOptions { aio: Aio::Off, ..rw() };
        let settings = Settings { queues: 4, ..Settings::default() };
        let mut r = Rig::with(way, USUAL | 1 << VIRTIO_BLK_F_MQ, settings);
        r.block().disk().unwrap().observe(Arc::new(Slow));
        let header = r.guest.bytes(&header(kind, 0));
        let (out_at, status) = (r.guest.bytes(out), r.guest.bytes(&[0xff]));
        let chain = [(header, 16, false), (out_at, out.len() as u32, false), (status, 1, true)];
        for queue in &mut r.guest.queues {
            for _ in 0..EACH {
                let head = queue.chain(&chain);
                queue.publish(head);
            }
        }
        let used = |r: &Rig| {
            r.guest.queues.iter().map(|q| usize::from(q.used_index())).collect::<Vec<_>>()
        };
        // All queues have work when the worker returns to its thread: one turn each.
        r.guest.transport.pause();
        r.guest.transport.resume();
        assert!(used(&r).iter().all(|n| *n <= 2), "{kind}: {:?}", used(&r));
        // A wake-up of all queues is one turn.
        let before = used(&r).iter().sum::<usize>();
        let gate = Gate::on(&mut r, false);
        r.guest.thread.settle();
        assert_eq!(used(&r).iter().sum::<usize>(), before, "held");
        gate.open(&mut r);
        r.guest.thread.turn(std::time::Duration::ZERO);
        let after = used(&r).iter().sum::<usize>();
        assert!(after - before <= 2, "{kind}: {before}, {after}");
        // Nothing is lost.
        r.guest.thread.settle();
        assert_eq!(used(&r), [EACH; 4], "{kind}");
    }
}
