//! Queue pairs, link, hot-plug, saved state.
use std::time::Duration;

use super::*;
use crate::{conformance, virtio::mmio::registers::CONFIG};

const MQ: u64 = 1 << VIRTIO_NET_F_MQ;
const CSUM: u64 = 1 << 1;
const TSO4: u64 = 1 << 7;

fn status(guest: &mut Guest) -> u32 {
    guest.load(CONFIG + 4) >> 16
}

fn offloads_command(bits: u64) -> Vec<u8> {
    [&[5, 0][..], &bits.to_le_bytes()].concat()
}

#[test]
fn every_rule_of_virtio_is_kept() {
    // The peers are closed, so each transfer fails; an empty slot has none to begin with.
    let net = |pairs, wire: Option<Wire>| {
        let settings = NetSettings { mac: Some([2, 0, 0, 0, 0, 1]), ..settings(pairs) };
        let backend = wire.map(|wire| Arc::new(wire) as Arc<dyn NetBackend>);
        Box::new(Net::new("net0", settings, backend).unwrap())
    };
    conformance::run(|| net(1, Some(Wire::new(1, true).0)));
    conformance::run(|| net(2, Some(Wire::new(2, true).0)));
    conformance::run(|| net(1, None));
}

#[test]
fn the_configuration_shows_address_link_and_pairs() {
    let mac = Some([2, 4, 6, 8, 10, 12]);
    let mut lan = Lan::new(NetSettings { mac, ..settings(4) }, true);
    let words = [0, 4, 8].map(|at| lan.guest.load(CONFIG + at).to_le_bytes());
    assert_eq!(words.concat(), [2, 4, 6, 8, 10, 12, 1, 0, 4, 0, 0, 0]);
    assert_ne!(lan.guest.offered() & MQ, 0);
}

#[test]
fn made_up_addresses_are_local_and_differ() {
    let macs = [0; 8].map(|_| Net::new("n", settings(1), None).unwrap().mac());
    for (n, mac) in macs.iter().enumerate() {
        assert_eq!(mac[0] & 3, 2, "unicast, locally administered");
        assert!(!macs[..n].contains(mac));
    }
}

#[test]
fn the_driver_chooses_its_queue_pairs() {
    let mut lan = Lan::new(settings(3), true);
    lan.guest.start(MQ | CONTROL);
    assert_eq!(lan.switches.active.load(SeqCst), 1, "one until it enables more");
    assert_eq!(lan.command(6, &[4, 0, 3, 0]), (0, 1));
    assert_eq!(lan.switches.active.load(SeqCst), 3);
    for pairs in [0u16, 4, 0x8000, 0xffff] {
        let [low, high] = pairs.to_le_bytes();
        assert_eq!(lan.command(6, &[4, 0, low, high]), (1, 1), "{pairs} pairs");
    }
    assert_eq!(lan.switches.active.load(SeqCst), 3);
    // Frames are sent and received on the last pair.
    let at = lan.guest.room(1526);
    lan.guest.request(4, &[(at, 1526, true)]);
    lan.peers[2].send(&Lan::frame(33, 0)).unwrap();
    assert_eq!(lan.guest.completion(4).1, 45);
    let frame = lan.guest.bytes(&Lan::frame(50, 6));
    lan.guest.request(5, &[(frame, 62, false)]);
    let mut seen = [0; 100];
    assert_eq!(lan.peers[2].recv(&mut seen).unwrap(), 62);
    lan.guest.transport.reset();
    assert_eq!(lan.switches.active.load(SeqCst), 1);
}

#[test]
fn without_multi_queue_the_control_queue_is_the_third() {
    let mut lan = Lan::new(settings(2), true);
    lan.guest.start(CONTROL | CSUM | TSO4);
    assert_eq!(lan.command(2, &offloads_command(CSUM)), (0, 1));
    assert_eq!(lan.switches.offloads.load(SeqCst), CSUM);
}

#[test]
fn offloads_follow_the_driver() {
    let mut lan = Lan::new(settings(1), true);
    lan.guest.start(CONTROL | CSUM | TSO4 | 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS);
    assert_eq!(lan.switches.offloads.load(SeqCst), CSUM | TSO4);
    assert_eq!(lan.command(2, &offloads_command(CSUM)), (0, 1));
    assert_eq!(lan.switches.offloads.load(SeqCst), CSUM);
    for bad in [CSUM | 1 << 8, u64::MAX, 1 << 63] {
        assert_eq!(lan.command(2, &offloads_command(bad)), (1, 1), "not negotiated: {bad:#x}");
    }
    assert_eq!(lan.switches.offloads.load(SeqCst), CSUM);
    lan.guest.transport.reset();
    assert_eq!(lan.switches.offloads.load(SeqCst), 0, "the host segments for the next driver");
}

#[test]
fn a_pulled_cable_carries_nothing_and_keeps_nothing() {
    let mut lan = Lan::started(MERGEABLE);
    lan.refill(64, 1526);
    let link = |lan: &mut Lan, up| {
        let result = lan.guest.update(|net: &mut Net| net.set_link(up));
        result.unwrap().unwrap();
    };
    link(&mut lan, false);
    assert_eq!(status(&mut lan.guest), 0);
    assert!(lan.guest.interrupted(), "the driver is notified");
    lan.host_sends(&Lan::frame(60, 1));
    lan.send(&Lan::frame(60, 1));
    assert_eq!((lan.used(), lan.tx_done(), lan.at_host()), (vec![], 1, None));
    assert_eq!(lan.drops(), (1, 1));
    link(&mut lan, true);
    assert_eq!(status(&mut lan.guest), 1);
    lan.host_sends(&Lan::frame(70, 1));
    assert_eq!(lan.used(), [82], "and not the earlier frame");
}

#[test]
fn an_address_is_announced_while_there_is_a_link() {
    for header in [true, false] {
        let mut lan = Lan::new(settings(1), header);
        let mac = lan.guest.device::<Net>().unwrap().mac();
        let announce = |lan: &mut Lan| {
            let net = lan.guest.device::<Net>().unwrap();
            net.announce().map_err(|e| e.raw_os_error())
        };
        assert_eq!(announce(&mut lan), Ok(()), "no driver is needed");
        let frame = lan.at_host().unwrap();
        let frame = if header { &frame[HEADER..] } else { &frame[..] };
        assert_eq!((frame.len(), &frame[..6], &frame[6..12]), (60, &[0xff; 6][..], &mac[..]));
        lan.switches.fault.store(libc::EIO, SeqCst);
        assert_eq!(announce(&mut lan), Err(Some(libc::EIO)));
        lan.guest.update(|net: &mut Net| net.set_link(false).unwrap()).unwrap();
        assert_eq!((announce(&mut lan), lan.at_host()), (Ok(()), None));
    }
}

#[test]
fn a_cable_pulled_while_frames_wait_for_the_host_works_again_later() {
    let mut lan = Lan::started(0);
    let at = lan.guest.bytes(&Lan::frame(1500, 5));
    while lan.guest.queues[1].used_index() == lan.guest.queues[1].available_index() {
        lan.guest.request(TX, &[(at, 1512, false)]);
    }
    let net = |on| move |net: &mut Net| net.set_link(on).unwrap();
    lan.guest.update(net(false)).unwrap();
    while lan.at_host().is_some() {}
    lan.guest.thread.settle();
    lan.guest.update(net(true)).unwrap();
    lan.guest.thread.settle();
    lan.send(&Lan::frame(61, 1));
    assert_eq!(lan.at_host().unwrap(), Lan::frame(61, 1));
}

#[test]
fn an_empty_slot_comes_to_life_when_a_tap_is_plugged() {
    let net = Net::new("net1", settings(1), None).unwrap();
    let mut guest = Guest::new(Box::new(net));
    assert_eq!(status(&mut guest), 0);
    guest.start(MERGEABLE | CSUM | TSO4);
    let stats = guest.device::<Net>().unwrap().stats();
    for round in 0..3u8 {
        let (wire, peers, switches) = Wire::new(1, true);
        let mac = [2, 0, 0, 0, 0, round];
        guest.interrupted();
        let plug = |net: &mut Net| net.plug(Arc::new(wire), Some(mac));
        assert_eq!(guest.update(plug), Some(Ok(())));
        assert!(guest.interrupted());
        assert_eq!(status(&mut guest), 1);
        assert_eq!(guest.load(CONFIG + 4).to_le_bytes()[1], round);
        assert_eq!(switches.offloads.load(SeqCst), CSUM | TSO4, "as negotiated long ago");
        let mut lan = Lan { guest, peers, switches, stats: stats.clone() };
        lan.refill(50, 1526);
        lan.host_sends(&Lan::frame(60, round));
        assert_eq!(lan.used(), [72]);
        lan.send(&Lan::frame(60, round));
        assert_eq!(lan.at_host(), Some(Lan::frame(60, round)));
        let peer = lan.peers.swap_remove(0);
        guest = lan.guest;
        let (second, ..) = Wire::new(1, true);
        let plug = |net: &mut Net| net.plug(Arc::new(second), None);
        assert_eq!(guest.update(plug), Some(Err(PlugError::Occupied)));
        guest.update(|net: &mut Net| net.unplug()).unwrap().unwrap();
        assert_eq!(status(&mut guest), 0);
        assert!(peer.send(b"hello?").is_err(), "the other end is closed");
    }
}

#[test]
fn a_slot_takes_no_tap_that_does_not_fit() {
    let mut net = Net::new("net1", settings(2), None).unwrap();
    let refused = net.plug(Arc::new(Wire::new(1, true).0), None);
    assert_eq!(refused, Err(PlugError::Queues { has: 1, needs: 2 }));
    assert_eq!(net.plug(Arc::new(Wire::new(2, false).0), None), Err(PlugError::NoHeader));
    assert_eq!(net.plug(Arc::new(Wire::new(2, true).0), None), Ok(()));
}

#[test]
fn a_saved_interface_continues_elsewhere() {
    let mut lan = Lan::new(settings(1), true);
    lan.guest.start(MERGEABLE | CONTROL | CSUM | TSO4 | F_EVENT_IDX);
    let first = lan.refill(100, 1526);
    lan.host_sends(&Lan::frame(4000, 1));
    assert_eq!(lan.used().len(), 3);
    lan.send(&Lan::frame(60, 1));
    lan.command(2, &offloads_command(CSUM));
    let mac = lan.guest.device::<Net>().unwrap().mac();

    let (wire, peers, switches) = Wire::new(1, true);
    let net = Net::new("net0", settings(1), Some(Arc::new(wire))).unwrap();
    let stats = net.stats();
    let guest = lan.guest.migrate(Box::new(net));
    let mut lan = Lan { guest, peers, switches, stats };
    assert_eq!(lan.guest.device::<Net>().unwrap().mac(), mac);
    assert_eq!(lan.switches.offloads.load(SeqCst), CSUM);
    lan.host_sends(&Lan::frame(50, 2));
    assert_eq!(lan.used(), [62]);
    assert_eq!(lan.guest.peek(first[3] + 12, 50), Lan::frame(50, 2)[12..], "the fourth buffer");
    lan.send(&Lan::frame(61, 3));
    assert_eq!(lan.at_host(), Some(Lan::frame(61, 3)), "once, and not the old one again");
    assert_eq!(lan.at_host(), None);
}

#[test]
fn a_pause_keeps_a_frame_that_waits_for_buffers() {
    let mut lan = Lan::started(MERGEABLE);
    let mut buffers = lan.refill(2, 1526);
    let frame = Lan::frame(9000, 1);
    lan.host_sends(&frame);
    for _ in 0..3 {
        lan.guest.transport.pause();
        let zeros = [0; 1526];
        for at in &buffers {
            lan.guest.poke(*at, &zeros);
        }
        lan.guest.transport.resume();
    }
    buffers.extend(lan.refill(10, 1526));
    let used = lan.used();
    assert_eq!(used.iter().sum::<u32>(), 9012);
    let pieces = buffers.iter().zip(used).map(|(at, len)| lan.guest.peek(*at, len as usize));
    assert_eq!(pieces.collect::<Vec<_>>().concat()[12..], frame[12..]);
}

#[test]
fn states_that_no_interface_can_be_in_are_refused() {
    let mut lan = Lan::new(settings(2), true);
    lan.guest.start(MQ | CONTROL | CSUM);
    lan.guest.transport.pause();
    let net = lan.guest.device::<Net>().unwrap();
    let good = Device::save(net).unwrap();
    let text = good.state.get();
    for (from, to) in [
        ("\"queue_pairs\":1", "\"queue_pairs\":0"),
        ("\"queue_pairs\":1", "\"queue_pairs\":3"),
        ("\"queue_pairs\":1", "\"queue_pairs\":65536"),
        ("\"offloads\":\"0x2\"", "\"offloads\":\"0x3\""),
        ("\"offloads\":\"0x2\"", "\"offloads\":\"0xffffffffffffffff\""),
        ("\"index\":1", "\"index\":0"),
        (
            "{\"index\":4,\"next_avail\":0,\"next_used\":0}",
            "{\"index\":4,\"next_avail\":0,\"next_used\":0},{\"index\":5,\"next_avail\":0,\"next_used\":0}",
        ),
        ("\"needs_reset\":false", "\"needs_reset\":false,\"more\":1"),
        ("\"next_used\":0", "\"next_used\":1"),
        ("\"queues\":[", "\"queues\":0,\"q\":["),
    ] {
        assert!(text.contains(from), "{text}");
        let bad = good.with(text.replacen(from, to, 1)).unwrap();
        assert!(net.restore(&bad).is_err(), "{to}");
    }
    assert!(net.restore(&Section { version: 2, ..good.clone() }).is_err());
    let mut idle = Net::new("x", settings(2), Some(Arc::new(Wire::new(2, true).0))).unwrap();
    assert!(idle.restore(&good).is_err(), "no driver there");
    net.restore(&good).unwrap();
    let net_state = Device::save(net).unwrap();
    assert_eq!(net_state, good, "refusals have changed nothing");
}

/// Let `act` have the device's worker while it is off its thread.
fn with_worker(lan: &mut Lan, act: impl FnOnce(&mut NetWorker)) {
    let net = lan.guest.device::<Net>().unwrap();
    net.pause();
    act(net.worker.parked_mut().unwrap());
    net.resume();
}

#[test]
fn one_interrupt_serves_a_frame_and_its_answer() {
    for features in [MERGEABLE, MERGEABLE | F_EVENT_IDX] {
        let mut lan = Lan::started(features);
        lan.refill(64, 1526);
        lan.guest.interrupted();
        let (at, answer) = (lan.guest.bytes(&Lan::frame(60, 1)), Lan::frame(60, 2));
        let queue = &mut lan.guest.queues[usize::from(TX)];
        let head = queue.chain(&[(at, 72, false)]);
        queue.publish(head);
        lan.peers[0].send(&answer).unwrap();
        // The answer arrives while the worker looks for it, not by its own event.
        with_worker(&mut lan, |worker| {
            worker.look_for(Duration::from_secs(20));
            worker.ready_to_send();
        });
        assert_eq!(lan.guest.transport.line().eventfd().read().ok(), Some(1));
        assert_eq!((lan.tx_done(), lan.used()), (1, vec![72]));
    }
}

#[test]
fn without_an_answer_the_look_ends_and_the_driver_learns_that_its_frame_was_sent() {
    let mut lan = Lan::started(MERGEABLE);
    lan.refill(64, 1526);
    with_worker(&mut lan, |worker| worker.look_for(Duration::from_millis(2)));
    lan.guest.thread.settle();
    lan.guest.interrupted();
    for seed in [1, 2] {
        lan.send(&Lan::frame(60, seed));
        lan.guest.thread.settle();
        assert_eq!(lan.tx_done(), 1, "each notification arrives");
        assert!(lan.guest.interrupted());
    }
    lan.host_sends(&Lan::frame(60, 3));
    assert_eq!(lan.used(), [72]);
}
