use std::{io, os::fd::AsRawFd, sync::Arc, thread};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::gate::{Backlog, Gate, Held, Keeper, Room};

const ROOM: Room = Room { bytes: 100, pieces: 10 };

fn gate() -> (Arc<Gate>, Keeper) {
    let (gate, keeper) = Gate::new(ROOM).unwrap();
    keeper.marker().shut();
    (gate, keeper)
}

fn say(gate: &Gate, text: &str) -> Held {
    let copy = |to: &mut [u8]| {
        to.copy_from_slice(text.as_bytes());
        Ok(())
    };
    gate.hold(text.len(), copy).unwrap()
}

fn released(keeper: &mut Keeper, epoch: u64) -> Vec<String> {
    let mut all = Vec::new();
    keeper.release(epoch, |piece| all.push(String::from_utf8(piece.to_vec()).unwrap()));
    all
}

fn has_room(gate: &Gate) -> bool {
    let (epoll, mut event) = (Epoll::new().unwrap(), [EpollEvent::default()]);
    let wanted = EpollEvent::new(EventSet::IN, 0);
    epoll.ctl(ControlOperation::Add, gate.as_raw_fd(), wanted).unwrap();
    epoll.wait(0, &mut event).unwrap() == 1
}

#[test]
fn an_open_gate_keeps_nothing() {
    let (gate, keeper) = Gate::new(ROOM).unwrap();
    assert_eq!(say(&gate, "a"), Held::Open);
    assert_eq!(keeper.gate().backlog(), Backlog::default());
}

#[test]
fn output_leaves_with_the_checkpoint_that_covers_it_and_in_order() {
    let (gate, mut keeper) = gate();
    assert_eq!([say(&gate, "a"), say(&gate, "bb")], [Held::Kept; 2]);
    keeper.marker().mark(1);
    say(&gate, "c");
    keeper.marker().mark(2);
    keeper.marker().mark(3);
    say(&gate, "d");
    assert_eq!(released(&mut keeper, 0), [""; 0]);
    assert_eq!(released(&mut keeper, 1), ["a", "bb"]);
    assert_eq!(released(&mut keeper, 1), [""; 0]);
    assert_eq!(released(&mut keeper, 3), ["c"]);
    // No checkpoint covers the rest yet.
    assert_eq!(released(&mut keeper, u64::MAX), [""; 0]);
    assert_eq!(gate.backlog().pieces, 1);
    keeper.marker().mark(4);
    assert_eq!(released(&mut keeper, 4), ["d"]);
    assert_eq!(gate.backlog(), Backlog::default());
}

#[test]
fn the_first_piece_that_waits_for_a_checkpoint_is_announced() {
    let (gate, mut keeper) = gate();
    let waits = Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
    let announced = || {
        let mut count = [0; 8];
        rustix::io::read(&waits, &mut count).map_or(0, |_| u64::from_ne_bytes(count))
    };
    say(&gate, "before anybody wants to know");
    keeper.signal(waits.clone());
    assert_eq!((announced(), keeper.waits()), (0, true));
    keeper.marker().mark(1);
    assert!(!keeper.waits(), "covered, though not released");
    say(&gate, "a");
    say(&gate, "b");
    assert_eq!((announced(), keeper.waits()), (1, true));
    keeper.marker().mark(2);
    keeper.release(2, |_| {});
    say(&gate, "c");
    assert_eq!(announced(), 1);
}

#[test]
fn a_full_gate_says_when_it_has_room_again() {
    let (gate, mut keeper) = gate();
    for _ in 0..ROOM.pieces {
        assert_eq!(say(&gate, "a"), Held::Kept);
    }
    assert_eq!(say(&gate, "a"), Held::Full);
    assert!(!has_room(&gate));
    keeper.marker().mark(1);
    assert_eq!(released(&mut keeper, 1).len(), ROOM.pieces);
    assert!(has_room(&gate));
    gate.take_room();
    assert!(!has_room(&gate));
    // Nothing has been refused since, so there is no notification.
    assert_eq!(say(&gate, "a"), Held::Kept);
    keeper.discard();
    assert!(!has_room(&gate));
}

#[test]
fn a_piece_larger_than_the_room_passes_alone() {
    let (gate, mut keeper) = gate();
    let large = "x".repeat(ROOM.bytes + 1);
    assert_eq!(say(&gate, "a"), Held::Kept);
    assert_eq!(say(&gate, &large), Held::Full);
    keeper.discard();
    assert_eq!(say(&gate, &large), Held::Kept);
    assert_eq!(say(&gate, "a"), Held::Full);
}

#[test]
fn a_piece_that_cannot_be_copied_is_not_kept() {
    let (gate, mut keeper) = gate();
    say(&gate, "a");
    let failed = gate.hold(3, |_| Err(io::ErrorKind::InvalidInput.into()));
    assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    say(&gate, "b");
    assert_eq!(gate.backlog().bytes, 2);
    keeper.marker().mark(1);
    assert_eq!(released(&mut keeper, 1), ["a", "b"]);
}

#[test]
fn what_is_discarded_never_leaves() {
    let (gate, mut keeper) = gate();
    say(&gate, "a");
    keeper.marker().mark(1);
    say(&gate, "b");
    keeper.discard();
    keeper.marker().mark(2);
    assert_eq!(released(&mut keeper, 2), [""; 0]);
    assert_eq!(gate.backlog(), Backlog::default());
    assert_eq!(say(&gate, "c"), Held::Kept);
}

/// Numbers are produced while the gate is opened again and again: they arrive complete and in
/// order, whether they were kept or not.
#[test]
fn nothing_overtakes_what_was_kept() {
    const LAST: u32 = 20_000;
    let (gate, mut keeper) = Gate::new(Room { bytes: 64, pieces: 7 }).unwrap();
    let out = Arc::new(Mutex::new(Vec::new()));
    let producer = {
        let out = out.clone();
        thread::spawn(move || {
            for n in 0..LAST {
                let copy = |to: &mut [u8]| {
                    to.copy_from_slice(&n.to_le_bytes());
                    Ok(())
                };
                loop {
                    match gate.hold(4, copy).unwrap() {
                        Held::Open => break out.lock().push(n),
                        Held::Kept => break,
                        Held::Full => thread::yield_now(),
                    }
                }
            }
        })
    };
    let write = |piece: &[u8]| out.lock().push(u32::from_le_bytes(piece.try_into().unwrap()));
    let mut epoch = 0;
    while !producer.is_finished() {
        keeper.marker().shut();
        for _ in 0..3 {
            epoch += 1;
            keeper.marker().mark(epoch);
            keeper.release(epoch, write);
        }
        keeper.open(write);
    }
    producer.join().unwrap();
    keeper.open(write);
    assert_eq!(*out.lock(), (0..LAST).collect::<Vec<_>>());
}
