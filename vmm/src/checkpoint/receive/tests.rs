//! Writing and reading streams: what goes in comes out, and nothing else does.
use std::{io::Read, os::unix::net::UnixStream, sync::Arc, thread, time::Duration};

use machine::memory::{allocate, image as ram};

use state::{
    config::Base,
    file::{write_config, write_sections},
    frame::Writer,
    hex::Hex,
};

use super::{super::tests::*, *};
use crate::checkpoint::{
    Cancel, Peer, SaveError, Sink, Stream, To,
    job::{Checkpointer, First, Job, Order, Step},
    memory_file::Progress,
    save::Source,
};

const WAIT: Duration = Duration::from_secs(60);

fn read(bytes: &[u8]) -> Result<Received, String> {
    read_from(bytes)
}

fn read_from(bytes: impl Read) -> Result<Received, String> {
    let allocate = |wanted: &Description| {
        allocate(&wanted.config.memory).map_err(|e| ReceiveError::NoRoom(why(&e)))
    };
    receive(bytes, |_| Ok(()), allocate, &Progress::default()).map_err(|e| why(&e))
}

fn refusal(bytes: &[u8]) -> String {
    read(bytes).map(|_| ()).expect_err("it was accepted")
}

/// A machine sent in two rounds: `memory(1)`, then a page of zeros at 5 MiB and "later" at the end
/// of memory.
fn sent() -> Vec<u8> {
    let (near, mut far) = UnixStream::pair().unwrap();
    let reader = thread::spawn(move || {
        let mut bytes = Vec::new();
        far.read_to_end(&mut bytes).unwrap();
        bytes
    });
    let memory = memory(1);
    let progress = Progress::default();
    let peer = Peer::reach(To::Fd(near.into()), Cancel::new().unwrap()).unwrap();
    let mut to =
        Box::new(Stream::begin(peer, memory.clone(), &config(5), None, &progress).unwrap());
    to.copy(&Source::Guest(&ram::used(&memory, &[]).unwrap()), &progress).unwrap();
    ram::write(&memory, 5 * MIB, &[0; 4096]).unwrap();
    ram::write(&memory, SIZE - 5, b"later").unwrap();
    let changed = [5 * MIB..5 * MIB + 4096, SIZE - 4096..SIZE];
    to.copy(&Source::Guest(&changed), &progress).unwrap();
    to.finish(config(5), state(5), &progress).unwrap();
    reader.join().unwrap()
}

/// Offsets at which frames begin, and the end.
fn borders(bytes: &[u8]) -> Vec<usize> {
    let mut at = 16;
    let mut borders = vec![0, at];
    while at < bytes.len() {
        let length = u32::from_le_bytes(bytes[at + 4..at + 8].try_into().unwrap());
        at += 12 + usize::try_from(length).unwrap();
        borders.push(at);
    }
    assert_eq!(at, bytes.len());
    borders
}

fn memory_of(received: &Received) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(SIZE).unwrap()];
    ram::read(&received.memory, 0, &mut bytes).unwrap();
    bytes
}

#[test]
fn what_was_sent_is_what_comes() {
    let bytes = sent();
    assert!(bytes.len() < 64 << 10, "pages of zeros are not sent: {}", bytes.len());
    let received = read(&bytes).unwrap();
    assert_eq!((received.config.id, received.sections.clock.nanoseconds), (5.into(), 5));
    let mut expected = vec![0; usize::try_from(SIZE).unwrap()];
    expected[0] = 1;
    let end = expected.len();
    expected[end - 5..].copy_from_slice(b"later");
    assert!(memory_of(&received) == expected);
    // What follows the end is not read: a pipe may carry more.
    read(&[&bytes[..], b"more"].concat()).unwrap();
}

/// A seeded PRNG.
fn random() -> impl FnMut(usize) -> usize {
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    move |below| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        usize::try_from(seed % below as u64).unwrap()
    }
}

#[test]
fn a_stream_cut_off_anywhere_is_refused_by_name() {
    let whole = sent();
    let mut random = random();
    let places = borders(&whole).into_iter().filter(|at| *at < whole.len());
    let places: Vec<_> = places.chain((0..200).map(|_| random(whole.len()))).collect();
    for at in places {
        let error = refusal(&whole[..at]);
        assert!(error.contains(&format!("it ends at byte {at}")), "{at}: {error}");
    }
    let error = refusal(&whole[..whole.len() - 1]);
    assert!(error.contains("section \"virtio-mmio disk0\""), "what came before is named: {error}");
}

#[test]
fn a_stream_with_any_one_bit_flipped_is_refused() {
    let mut bytes = sent();
    let mut random = random();
    let borders = borders(&bytes);
    // Each of the first 40 bytes of every frame, and some others.
    let heads = borders.iter().flat_map(|at| *at..at + 40).filter(|at| *at < bytes.len());
    let places: Vec<_> = heads.chain((0..300).map(|_| random(bytes.len()))).collect();
    for at in places {
        let bit = 1 << random(8);
        bytes[at] ^= bit;
        assert!(read(&bytes).is_err(), "byte {at}, bit {bit}");
        bytes[at] ^= bit;
    }
}

#[test]
fn frames_that_are_missing_come_twice_or_in_another_order_are_refused() {
    let bytes = sent();
    let borders = borders(&bytes);
    let frames: Vec<_> = borders.windows(2).map(|w| &bytes[w[0]..w[1]]).collect();
    // From after the header and the first configuration up to the end.
    for n in 2..frames.len() - 1 {
        let mut missing = frames.clone();
        missing.remove(n);
        let mut twice = frames.clone();
        twice.insert(n, frames[n]);
        for wrong in [missing, twice] {
            assert!(read(&wrong.concat()).is_err(), "frame {n}");
        }
        if n + 2 < frames.len() {
            let mut swapped = frames.clone();
            swapped.swap(n, n + 1);
            assert!(read(&swapped.concat()).is_err(), "frames {n} and {}", n + 1);
        }
    }
    // Two pieces of memory may come in any order: only the checksum over everything shows the swap.
    let mut swapped = frames.clone();
    swapped.swap(2, 3);
    let error = refusal(&swapped.concat());
    assert!(error.contains("reordered (checksum over all)"), "{error}");
}

/// A stream with these frames between the two configurations.
fn with(frames: &[(Kind, Vec<u8>)], last: &Config) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut to = Writer::begin(&mut bytes).unwrap();
    write_config(&mut to, &config(5)).unwrap();
    for (kind, body) in frames {
        to.frame(*kind, &[body]).unwrap();
    }
    write_config(&mut to, last).unwrap();
    write_sections(&mut to, &state(5).into()).unwrap();
    to.end(0).unwrap();
    bytes
}

#[test]
fn pages_outside_of_memory_are_refused() {
    let pages = |at: u64, length: usize| {
        let mut body = at.to_le_bytes().to_vec();
        body.resize(8 + length, 7);
        vec![(Kind::Pages, body)]
    };
    let zeros = |at: u64, length: u64| {
        vec![(Kind::Zeros, [at.to_le_bytes(), length.to_le_bytes()].concat())]
    };
    read(&with(&pages(SIZE - 4096, 4096), &config(5))).unwrap();
    read(&with(&zeros(SIZE - 4096, 4096), &config(5))).unwrap();
    read(&with(&[], &config(5))).unwrap();
    for wrong in [
        pages(SIZE, 4096),
        pages(SIZE - 4096, 8192),
        pages(u64::MAX - 4095, 4096),
        pages(1 << 40, 4096),
        pages(1, 4096),
        pages(0, 4095),
        pages(0, 0),
        pages(0, (1 << 20) + 4096),
        zeros(SIZE, 4096),
        zeros(SIZE - 4096, 8192),
        zeros(0, 64 << 30),
        zeros(0, u64::MAX),
        zeros(0, 0),
        vec![(Kind::Pages, vec![1; 7])],
        vec![(Kind::Zeros, vec![0; 15])],
        vec![(Kind::Zeros, vec![0; 17])],
    ] {
        let error = refusal(&with(&wrong, &config(5)));
        assert!(error.contains("pages at 0x"), "{:?}: {error}", wrong[0].0);
    }
}

#[test]
fn memory_that_comes_again_and_again_has_an_end() {
    let whole: Vec<_> = (0..SIZE / MIB)
        .map(|n| (Kind::Zeros, [(n * MIB).to_le_bytes(), MIB.to_le_bytes()].concat()))
        .collect();
    let often = |times| std::iter::repeat_n(whole.clone(), times).flatten().collect::<Vec<_>>();
    read(&with(&often(64), &config(5))).unwrap();
    let error = refusal(&with(&often(65), &config(5)));
    assert!(error.contains("more than 64 times"), "{error}");
}

#[test]
fn lengths_that_lie_cost_nothing() {
    let mut bytes = sent();
    let second = borders(&bytes)[2];
    bytes[second + 4..second + 8].copy_from_slice(&u32::MAX.to_le_bytes());
    let error = refusal(&bytes);
    assert!(error.contains("claims 4294967295 bytes"), "{error}");
    // More memory than the machine has.
    let mut large = config(5);
    large.machine.memory.size = 1 << 51;
    let mut bytes = Vec::new();
    write_config(&mut Writer::begin(&mut bytes).unwrap(), &large).unwrap();
    let error = refusal(&bytes);
    assert!(error.contains("request less with -m"), "{error}");
}

#[test]
fn a_state_without_end_has_one() {
    let mut bytes = Vec::new();
    let mut to = Writer::begin(&mut bytes).unwrap();
    write_config(&mut to, &config(5)).unwrap();
    write_config(&mut to, &config(5)).unwrap();
    write_sections(&mut to, &state(5).into()).unwrap();
    let head = bytes.len();
    // A part that may be skipped, repeated. A frame does not contain its position in the stream.
    let mut one = Vec::new();
    Writer::begin(&mut one).unwrap().frame(Kind::Changed, &[&[0; 1 << 20]]).unwrap();
    let mut tail = one[16..one.len() - 4].to_vec();
    tail[3] = 0x80;
    tail.extend(crc32fast::hash(&tail).to_le_bytes());
    let from = Endless { head: bytes[..head].to_vec(), tail, at: 0 };
    let error = read_from(from).map(|_| ()).expect_err("it was accepted");
    assert!(error.contains("longer than"), "{error}");
}

/// `head`, followed by `tail` without end.
struct Endless {
    head: Vec<u8>,
    tail: Vec<u8>,
    at: usize,
}

impl Read for Endless {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let rest = match self.at.checked_sub(self.head.len()) {
            None => &self.head[self.at..],
            Some(over) => &self.tail[over % self.tail.len()..],
        };
        let length = rest.len().min(buf.len());
        buf[..length].copy_from_slice(&rest[..length]);
        self.at += length;
        Ok(length)
    }
}

#[test]
fn a_stream_that_ends_as_another_machine_is_refused() {
    let mut other = config(5);
    other.machine.memory.size *= 2;
    for last in [config(6), other] {
        let error = refusal(&with(&[], &last));
        assert!(error.contains("another machine"), "{error}");
    }
    let mut based = config(5);
    based.base = Some(Base { path: "b".into(), id: 1.into(), state: Hex(1) });
    let error = refusal(&with(&[], &based));
    assert!(error.contains("incremental"), "{error}");
}

#[test]
fn what_is_no_stream_at_all_is_refused() {
    let mut random = random();
    let noise: Vec<_> = (0..4096).map(|_| u8::try_from(random(256)).unwrap()).collect();
    for garbage in [&noise[..], b"QEVM\0\0\0\x03", b"{\"QMP\": {}}\n.............", &[0; 100]] {
        let error = refusal(garbage);
        assert!(error.contains("it is not a saved state"), "{error}");
    }
    assert!(refusal(b"").contains("it ends at byte 0"));
}

/// A save under way to the peer at the other end of a socket.
fn save_to(near: UnixStream) -> Job {
    let (thread, save) = Checkpointer::new(Arc::new(|| {}));
    std::thread::spawn(save);
    let (memory, config) = (memory(1), config(5));
    // More than a socket buffers.
    ram::write(&memory, 2 * MIB, &vec![9; 8 << 20]).unwrap();
    let cancel = Cancel::new().unwrap();
    let peer = Peer::reach(To::Fd(near.into()), cancel.clone()).unwrap();
    let cancel = Some(cancel);
    let sent = memory.clone();
    let open = move |progress: &Progress| {
        let stream = Stream::begin(peer, sent, &config, None, progress)?;
        Ok(Box::new(stream) as Box<dyn Sink>)
    };
    let (open, place) = (Box::new(open), String::new());
    let order = Order { open, memory, cancel, place, resume: false, patient: true };
    let mut job = thread.save(order).unwrap();
    assert!(matches!(job.wait(WAIT), Some(Step::Opened)));
    job.copy(First::All(Arc::default()));
    job
}

#[test]
fn a_save_to_somebody_who_never_reads_can_be_cancelled() {
    let (near, far) = UnixStream::pair().unwrap();
    let mut job = save_to(near);
    assert!(job.wait(Duration::from_millis(50)).is_none(), "it has not been read");
    job.cancel();
    let Some(Step::Done(result)) = job.wait(WAIT) else { panic!("it is still running") };
    assert!(matches!(result, Err(SaveError::Cancelled)));
    drop(far);
}

#[test]
fn a_save_to_somebody_who_goes_fails_by_name() {
    let (near, far) = UnixStream::pair().unwrap();
    let mut job = save_to(near);
    drop(far);
    let Some(Step::Done(Err(error))) = job.wait(WAIT) else { panic!("it is still running") };
    assert!(why(&error).contains("the peer has closed the stream"), "{}", why(&error));
}
