//! Misbehaving drivers and hosts.
use super::*;
use crate::testing::{INDIRECT, NEXT, RAM, WRITE};

#[test]
fn frames_of_any_length_are_survived() {
    let mut lan = Lan::started(0);
    let at = lan.guest.room(300_000);
    for (pieces, why) in [
        (vec![(at, 1, false)], "1 byte"),
        (vec![(at, 12, false)], "a header and no frame"),
        (vec![(at, 13, true)], "nothing to read"),
        (vec![(at, 300_000, false)], "more than any frame"),
        (vec![(at, RAM as u32, false)], "outside memory"),
        (vec![(RAM - 100, 200, false)], "across the end of memory"),
        (vec![(u64::MAX - 10, 100, false)], "wraps"),
        (vec![(at, 0, false)], "empty"),
        (vec![(at, 10, true), (at, 10, false)], "wrong order"),
    ] {
        let before = lan.drops().1;
        lan.guest.request(TX, &pieces);
        assert_eq!((lan.tx_done(), lan.drops().1), (1, before + 1), "{why}");
    }
    lan.send(&Lan::frame(1, 0));
    lan.send(&Lan::frame(65_550 - HEADER, 0));
    assert!(lan.at_host().is_some() && lan.at_host().is_some() && lan.at_host().is_none());
    assert!(!lan.guest.needs_reset());
}

#[test]
fn a_frame_in_more_pieces_than_one_call_takes_is_dropped() {
    let mut lan = Lan::new(NetSettings { queue_size: 2048, ..settings(1) }, true);
    lan.guest.start(F_INDIRECT_DESC);
    let data = lan.guest.room(4096);
    lan.guest.request(TX, &vec![(data, 1, false); 1025]);
    assert_eq!((lan.tx_done(), lan.drops().1), (1, 1));
    lan.guest.request(TX, &vec![(data, 1, false); 1022]);
    assert_eq!(lan.at_host().map(|f| f.len()), Some(1022));
}

#[test]
fn chains_that_loop_or_lead_nowhere_are_given_back() {
    let mut lan = Lan::started(F_INDIRECT_DESC);
    let table = lan.guest.room(64);
    let at = lan.guest.room(4096);
    let lay = [
        (0, at, 100, NEXT, 0),
        (1, at, 100, NEXT, 256),
        (2, at, 100, NEXT, 0xffff),
        (3, table, 15, INDIRECT, 0),
        (4, table, 16, INDIRECT | NEXT, 0),
        (5, RAM + 5, 16, INDIRECT, 0),
    ];
    for queue in [TX, RX] {
        for (index, addr, len, flags, next) in lay {
            let flags = if queue == RX && flags & INDIRECT == 0 { flags | WRITE } else { flags };
            let q = &lan.guest.queues[usize::from(queue)];
            q.descriptor(index, addr, len, flags, next);
            q.publish(index);
        }
        lan.guest.kick(queue);
        // The receive queue is processed when there is a frame.
        lan.peers[0].send(&Lan::frame(60, 0)).unwrap();
        for (index, ..) in lay {
            assert_eq!(lan.guest.completion(queue), (index, 0));
        }
    }
    assert!(!lan.guest.needs_reset());
    lan.guest.queues[0].set_available_index(6);
    lan.refill(10, 1526);
    assert_eq!(lan.guest.completion(RX).1, 72, "the frame was not lost");
}

#[test]
fn a_malformed_chain_waits_its_turn_behind_good_ones() {
    let mut lan = Lan::started(MERGEABLE);
    lan.post(3, 1526);
    lan.guest.queues[0].descriptor(200, RAM, 100, WRITE, 0);
    lan.guest.queues[0].publish(200);
    lan.post(50, 1526);
    lan.guest.kick(RX);
    lan.host_sends(&Lan::frame(1000, 0));
    assert_eq!(lan.used(), [1012]);
    lan.host_sends(&Lan::frame(5000, 0));
    assert_eq!((lan.used(), lan.drops().0), (vec![], 1), "it does not fit before the bad one");
    lan.host_sends(&Lan::frame(2000, 0));
    assert_eq!(lan.used(), [1526, 486, 0], "the bad one is returned");
    lan.host_sends(&Lan::frame(3000, 0));
    assert_eq!(lan.used(), [1526, 1486]);
}

#[test]
fn buffers_of_one_byte_take_what_they_can() {
    let mut lan = Lan::started(MERGEABLE);
    let addresses = lan.refill(256, 1);
    lan.host_sends(&Lan::frame(300, 0));
    assert_eq!((lan.used(), lan.drops().0), (vec![], 1), "more than a whole ring of them");
    lan.host_sends(&Lan::frame(100, 8));
    let used = lan.used();
    assert_eq!(used, [1; 112]);
    let seen: Vec<u8> = addresses[..112].iter().flat_map(|at| lan.guest.peek(*at, 1)).collect();
    assert_eq!(seen[10], 112);
    assert_eq!(seen[12..], Lan::frame(100, 8)[12..]);
}

#[test]
fn a_buffer_too_small_stays_for_a_smaller_frame() {
    let mut lan = Lan::started(0);
    let at = lan.refill(1, 1526)[0];
    lan.host_sends(&Lan::frame(3000, 0));
    assert_eq!((lan.used(), lan.drops().0), (vec![], 1));
    lan.host_sends(&Lan::frame(1514, 4));
    assert_eq!(lan.used(), [1526]);
    assert_eq!(lan.guest.peek(at + 12, 1514), Lan::frame(1514, 4)[12..]);
}

#[test]
fn a_broken_ring_costs_the_driver_its_device_until_it_resets() {
    for (queue, jump) in [(RX, 257), (TX, 32_768), (TX, 0xffff), (2, 65)] {
        let mut lan = Lan::started(CONTROL);
        lan.guest.queues[usize::from(queue)].set_available_index(jump);
        lan.guest.kick(queue);
        // The receive ring is processed when a frame arrives.
        lan.host_sends(&Lan::frame(60, 0));
        assert!(lan.guest.needs_reset(), "queue {queue}, index {jump}");
        let calls = lan.switches.calls.load(SeqCst);
        for _ in 0..10 {
            lan.guest.kick(queue);
            lan.host_sends(&Lan::frame(60, 0));
        }
        assert_eq!(lan.switches.calls.load(SeqCst), calls, "it is ignored");
        lan.guest.start(CONTROL);
        lan.send(&Lan::frame(60, 0));
        assert!(lan.at_host().is_some());
        assert!(!lan.guest.needs_reset());
    }
}

#[test]
fn commands_that_make_no_sense_are_refused() {
    let mut lan = Lan::new(settings(2), true);
    lan.guest.start(CONTROL | 1 << VIRTIO_NET_F_MQ);
    for bytes in [&[4][..], &[4, 0], &[4, 0, 1], &[4, 9, 1, 0], &[5, 0, 1], &[0xff; 300]] {
        assert_eq!(lan.command(4, bytes), (1, 1), "{bytes:?}");
    }
    let at = lan.guest.bytes(&[4, 0, 2, 0]);
    lan.guest.request(4, &[(at, 4, false)]);
    assert_eq!(lan.guest.completion(4).1, 0);
    assert_eq!(lan.switches.active.load(SeqCst), 1, "no room for an answer: not carried out");
    // The command in several pieces is fine.
    let status = lan.guest.room(1);
    let pieces = [(at, 1, false), (at + 1, 2, false), (at + 3, 1, false), (status, 1, true)];
    lan.guest.request(4, &pieces);
    assert_eq!(lan.guest.completion(4).1, 1);
    assert_eq!(lan.switches.active.load(SeqCst), 2);
}

#[test]
fn a_flood_of_commands_leaves_others_their_turn() {
    let mut lan = Lan::new(settings(2), true);
    lan.guest.start(CONTROL | 1 << VIRTIO_NET_F_MQ);
    let at = lan.guest.bytes(&[4, 0, 2, 0, 0xee]);
    let queue = &mut lan.guest.queues[4];
    for _ in 0..20 {
        let head = queue.chain(&[(at, 4, false), (at + 4, 1, true)]);
        queue.publish(head);
    }
    lan.guest.transport.notifiers()[4].write(1).unwrap();
    lan.guest.thread.turn(std::time::Duration::ZERO);
    assert_eq!(lan.guest.queues[4].used_index(), 1, "the host may take milliseconds for each");
    lan.guest.thread.settle();
    assert_eq!(lan.guest.queues[4].used_index(), 20);
    assert!(lan.guest.interrupted());
}

#[test]
fn faults_of_the_host_lose_frames_and_nothing_else() {
    let mut lan = Lan::started(MERGEABLE);
    lan.refill(64, 1526);
    for fault in [libc::EIO, libc::EBADFD, libc::ENETDOWN, libc::ENOBUFS, libc::EINVAL] {
        lan.switches.fault.store(fault, SeqCst);
        let (rx, tx) = lan.drops();
        let calls = lan.switches.calls.load(SeqCst);
        lan.send(&Lan::frame(60, 1));
        lan.host_sends(&Lan::frame(60, 1));
        assert_eq!((lan.tx_done(), lan.drops()), (1, (rx + 1, tx + 1)));
        assert_eq!(lan.switches.calls.load(SeqCst), calls + 2, "no spinning on {fault}");
        lan.switches.fault.store(0, SeqCst);
        lan.host_sends(&Lan::frame(61, 1));
        assert_eq!(lan.used(), [72, 73], "waiting frames arrive afterwards");
    }
    assert!(!lan.guest.needs_reset());
}

#[test]
fn a_host_that_is_always_busy_is_not_hammered() {
    let mut lan = Lan::started(MERGEABLE);
    lan.refill(64, 1526);
    lan.switches.fault.store(libc::EAGAIN, SeqCst);
    lan.send(&Lan::frame(60, 1));
    lan.guest.thread.settle();
    let calls = lan.switches.calls.load(SeqCst);
    assert!(calls < 10, "{calls}");
    assert_eq!((lan.tx_done(), lan.drops().1), (1, 1));
}
