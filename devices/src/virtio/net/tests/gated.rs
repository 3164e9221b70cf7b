//! An interface whose output is held back until a checkpoint is acknowledged.
use super::*;
use crate::backend::{
    gate::Room,
    net::gated::{Gated, NetKeeper},
};

fn shut(features: u64, room: Room, header: bool) -> (Lan, NetKeeper) {
    let mut outside = None;
    let mut lan = Lan::over(settings(1), header, |wire| {
        let (gated, keeper) = Gated::with_room(wire, room).unwrap();
        keeper.marker().shut();
        outside = Some(keeper);
        Arc::new(gated)
    });
    lan.guest.start(features);
    (lan, outside.unwrap())
}

const WIDE: Room = Room { bytes: 1 << 20, pieces: 1000 };

#[test]
fn frames_leave_only_with_their_checkpoint_while_the_guest_goes_on() {
    for header in [true, false] {
        let (mut lan, mut keeper) = shut(F_EVENT_IDX, WIDE, header);
        let seen = |lan: &Lan| lan.at_host().map(|frame| frame.last().copied().unwrap());
        let last = |seed| Lan::frame(100, seed).last().copied();
        lan.send(&Lan::frame(100, 1));
        lan.send(&Lan::frame(100, 2));
        assert_eq!(lan.tx_done(), 2, "to the guest they are sent");
        keeper.marker().mark(1);
        lan.send(&Lan::frame(100, 3));
        keeper.marker().mark(2);
        assert_eq!(seen(&lan), None);
        assert_eq!(keeper.backlog().pieces, 3);
        keeper.release(1);
        assert_eq!([seen(&lan), seen(&lan), seen(&lan)], [last(1), last(2), None]);
        lan.send(&Lan::frame(100, 4));
        keeper.open();
        lan.send(&Lan::frame(100, 5));
        assert_eq!([seen(&lan), seen(&lan), seen(&lan)], [last(3), last(4), last(5)]);
        assert_eq!((keeper.dropped(), lan.drops()), (0, (0, 0)));
    }
}

#[test]
fn frames_that_are_discarded_are_never_seen() {
    let (mut lan, mut keeper) = shut(0, WIDE, true);
    lan.send(&Lan::frame(100, 1));
    keeper.marker().mark(1);
    lan.send(&Lan::frame(100, 2));
    keeper.discard();
    keeper.open();
    assert_eq!(lan.at_host(), None);
}

#[test]
fn what_arrives_is_not_held() {
    let (mut lan, _keeper) = shut(MERGEABLE, WIDE, true);
    lan.refill(4, 1526);
    lan.host_sends(&Lan::frame(100, 7));
    assert_eq!(lan.used(), [112]);
}

#[test]
fn a_full_gate_keeps_the_guest_waiting_and_loses_nothing() {
    let (mut lan, mut keeper) = shut(F_EVENT_IDX, Room { bytes: 1 << 20, pieces: 2 }, true);
    for seed in 1..=5 {
        lan.send(&Lan::frame(100, seed));
    }
    assert_eq!(lan.tx_done(), 2);
    let mut seen = Vec::new();
    for epoch in 1..=3 {
        keeper.marker().mark(epoch);
        keeper.release(epoch);
        lan.guest.thread.settle();
        seen.extend(std::iter::from_fn(|| lan.at_host()));
    }
    assert_eq!(seen, (1..=5).map(|seed| Lan::frame(100, seed)).collect::<Vec<_>>());
    assert_eq!(lan.tx_done(), 3);
    assert_eq!(lan.drops(), (0, 0));
}

#[test]
fn an_interface_that_takes_nothing_costs_frames_and_a_bounded_time() {
    let (mut lan, mut keeper) = shut(0, WIDE, true);
    for seed in 0..100 {
        lan.send(&Lan::frame(100, seed));
    }
    keeper.marker().mark(1);
    lan.switches.fault.store(libc::EAGAIN, SeqCst);
    keeper.release(1);
    assert_eq!(keeper.dropped(), 100);
    // One frame was tried again.
    assert_eq!(lan.switches.calls.load(SeqCst), 101);
    assert_eq!(keeper.backlog().pieces, 0);
}
