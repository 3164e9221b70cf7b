use std::fs::File;

use super::*;
use crate::medium::Medium;

fn image(bytes: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_at(0, bytes).unwrap();
    file
}

/// Bring `to` up to `from` as the two sides do; returns the pieces that were sent.
fn sync(from: &File, to: &File) -> Vec<u64> {
    let size = Image::size(from).unwrap();
    let set = Set::new(size);
    let (mut mine, mut theirs) = (Hasher::default(), Hasher::default());
    for first in (0..count(size)).step_by(3) {
        let batch = first..(first + 3).min(count(size));
        let mine = mine.hash(from, batch.clone()).unwrap();
        insert_differing(&set, first, &mine, &theirs.hash(to, batch).unwrap());
    }
    let mut sent = Vec::new();
    let mut next = 0;
    while let Some(piece) = set.take(next) {
        let bytes = bytes_of(piece, size);
        let mut data = vec![0; (bytes.end - bytes.start) as usize];
        from.read_at(bytes.start, &mut data).unwrap();
        to.write_at(bytes.start, &data).unwrap();
        sent.push(piece);
        next = piece + 1;
    }
    assert!(set.is_empty());
    sent
}

#[test]
fn only_pieces_that_differ_are_sent() {
    let mut rng = fastrand::Rng::with_seed(1);
    for tail in [0, 1, 512, PIECE - 1] {
        let size = 9 * PIECE + tail;
        let mut bytes = vec![0; size as usize];
        // Empty, full, and with a single byte at its end.
        bytes[PIECE as usize..3 * PIECE as usize].fill_with(|| rng.u8(..));
        bytes[4 * PIECE as usize - 1] = 1;
        let from = image(&bytes);
        let mut other = bytes.clone();
        let mut expected = vec![];
        for (at, piece) in
            [(PIECE - 1, 0), (PIECE, 1), (4 * PIECE - 1, 3), (size - 1, size / PIECE)]
        {
            other[at as usize] ^= 0x80;
            expected.push(piece.min(count(size) - 1));
        }
        let to = image(&other);
        assert_eq!(sync(&from, &to), expected, "{size} bytes");
        let mut result = vec![0; size as usize];
        to.read_at(0, &mut result).unwrap();
        assert!(result == bytes);
        assert_eq!(sync(&from, &to), [0; 0], "nothing is left");
    }
}

#[test]
fn hashes_are_those_of_blake3() {
    let bytes: Vec<u8> = (0..PIECE + 5).map(|n| n as u8).collect();
    let hashes = Hasher::default().hash(&image(&bytes), 0..3).unwrap();
    let expected = [&bytes[..PIECE as usize], &bytes[PIECE as usize..], &[]];
    assert_eq!(hashes, expected.map(|piece| *blake3::hash(piece).as_bytes()));
    let zero = Hasher::default().hash(&image(&vec![0; PIECE as usize]), 0..1).unwrap();
    assert_eq!(zero, [*blake3::hash(&vec![0; PIECE as usize]).as_bytes()]);
}

#[test]
fn a_piece_that_is_written_while_it_is_sent_is_sent_again() {
    let set = Set::new(200 * PIECE + 1);
    set.insert_bytes(PIECE - 1..PIECE + 1);
    set.insert_bytes(64 * PIECE..64 * PIECE);
    set.insert_bytes(200 * PIECE..u64::MAX);
    set.insert(201);
    assert_eq!(set.len(), 3);
    assert_eq!((set.take(0), set.take(1), set.take(2)), (Some(0), Some(1), Some(200)));
    set.insert_bytes(0..1);
    assert_eq!((set.take(1), set.take(0), set.take(0)), (None, Some(0), None));
    let empty = Set::new(0);
    empty.insert_bytes(0..u64::MAX);
    assert!(empty.is_empty());
}

#[test]
fn no_write_is_lost_between_two_threads() {
    const PIECES: u64 = 96;
    let set = Set::new(PIECES * PIECE);
    let contents: Vec<AtomicU64> = (0..PIECES).map(|_| AtomicU64::new(0)).collect();
    let mut copy = vec![0; PIECES as usize];
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut rng = fastrand::Rng::with_seed(2);
            for value in 1..200_000 {
                let piece = rng.u64(..PIECES);
                set.insert(piece);
                contents[piece as usize].store(value, Ordering::Relaxed);
                set.insert(piece);
            }
        });
        loop {
            let last = writer.is_finished();
            while let Some(piece) = set.take(0) {
                copy[piece as usize] = contents[piece as usize].load(Ordering::Relaxed);
            }
            if last {
                break;
            }
        }
    });
    let contents: Vec<u64> = contents.iter().map(|n| n.load(Ordering::Relaxed)).collect();
    assert_eq!(copy, contents);
}
