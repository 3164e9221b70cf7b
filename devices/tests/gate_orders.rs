//! The hand-over of output from a guest to those who release it, in every order in which their
//! threads can run.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]
#[allow(dead_code, reason = "only the hand-over is tried")]
#[path = "../src/backend/gate.rs"]
mod gate;

use std::sync::{Arc, Mutex};

use gate::{Gate, Held, Keeper, Room};
use loom::thread;

/// What the gate uses, as the search has it.
mod sync {
    use loom::sync::MutexGuard;
    pub use loom::sync::atomic::AtomicBool;

    pub struct Mutex<T>(loom::sync::Mutex<T>);

    impl<T: Default> Default for Mutex<T> {
        fn default() -> Self {
            Self(loom::sync::Mutex::new(T::default()))
        }
    }

    impl<T> Mutex<T> {
        pub fn lock(&self) -> MutexGuard<'_, T> {
            self.0.lock().unwrap()
        }
    }
}

/// What others see, in order. Not part of the search.
type Outside = Arc<Mutex<Vec<u8>>>;

fn say(gate: &Gate, outside: &Outside, piece: u8) -> Held {
    let copy = |to: &mut [u8]| {
        to.fill(piece);
        Ok(())
    };
    let held = gate.hold(1, copy).unwrap();
    if held == Held::Open {
        outside.lock().unwrap().push(piece);
    }
    held
}

fn see(outside: &Outside, pieces: &[u8]) {
    outside.lock().unwrap().extend(pieces);
}

fn shut(room: usize) -> (Arc<Gate>, Keeper, Outside) {
    let (gate, keeper) = Gate::new(Room { bytes: room, pieces: room }).unwrap();
    keeper.marker().shut();
    (gate, keeper, Outside::default())
}

#[test]
fn everything_leaves_once_and_in_order_and_nothing_before_its_epoch() {
    loom::model(|| {
        let (gate, mut keeper, outside) = shut(9);
        let (marker, seen) = (keeper.marker(), outside.clone());
        let guest = thread::spawn(move || {
            say(&gate, &seen, 1);
            marker.mark(1);
            say(&gate, &seen, 2);
            marker.mark(2);
            say(&gate, &seen, 3);
        });
        keeper.release(1, |piece| {
            assert_eq!(piece, [1]);
            see(&outside, piece);
        });
        keeper.open(|piece| see(&outside, piece));
        guest.join().unwrap();
        keeper.open(|piece| see(&outside, piece));
        assert_eq!(*outside.lock().unwrap(), [1, 2, 3]);
    });
}

#[test]
fn what_found_no_room_is_told_when_there_is_some() {
    loom::model(|| {
        let (gate, mut keeper, outside) = shut(1);
        assert_eq!(say(&gate, &outside, 1), Held::Kept);
        keeper.marker().mark(1);
        let (guest, seen) = (gate.clone(), outside.clone());
        let guest = thread::spawn(move || say(&guest, &seen, 2));
        keeper.release(1, |piece| see(&outside, piece));
        let full = guest.join().unwrap() == Held::Full;
        let mut told = [0; 8];
        assert_eq!(
            rustix::io::read(&gate, &mut told).is_ok(),
            full,
            "told if and only if it waits"
        );
    });
}

#[test]
fn what_is_discarded_is_gone_and_what_comes_later_is_held() {
    loom::model(|| {
        let (gate, mut keeper, outside) = shut(9);
        let (marker, seen) = (keeper.marker(), outside.clone());
        let guest = thread::spawn(move || {
            say(&gate, &seen, 1);
            marker.mark(1);
            assert_eq!(say(&gate, &seen, 2), Held::Kept);
        });
        keeper.discard();
        guest.join().unwrap();
        keeper.open(|piece| see(&outside, piece));
        let left = outside.lock().unwrap().clone();
        assert!([&[1, 2][..], &[2], &[]].contains(&&left[..]), "{left:?}");
    });
}
