//! The contents of epochs, sent, received and applied: what arrives is what was sent, and nothing
//! else arrives.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs, reason = "a test")]
use std::collections::HashMap;

use replication::{
    Digest, Epoch, Frame, Message, Term,
    contents::{
        Bounds, CACHE, Change, Counters, Counts, Encoder, Event, Held, Operation, PAGE, PIECE,
        Page, Reader, Refused, Write, chain,
    },
    wire::{self, WireError},
};

const TERM: Term = Term(7);
const HIGH: u64 = 1 << 32;
const NAMES: [&str; 3] = ["vcpu0", "blk-disk", "nothing"];

fn bounds() -> Bounds {
    Bounds {
        ram: vec![0..200 * 4096, HIGH..HIGH + 100 * 4096],
        disks: vec![1 << 20, 64 << 20],
        sections: NAMES.map(String::from).into(),
        max_epoch: 4 << 20,
    }
}

/// The address of each page of these.
fn addresses() -> Vec<u64> {
    let pages = |range: &std::ops::Range<u64>| range.clone().step_by(PAGE).collect::<Vec<_>>();
    bounds().ram.iter().flat_map(pages).collect()
}

type Memory = HashMap<u64, Page>;

/// Pages of the kinds that matter: random, text, zero, and small changes of what was there.
fn change(random: &mut fastrand::Rng, page: &mut Page) {
    match random.u8(..8) {
        0 => page.fill_with(|| random.u8(..)),
        1 => page.fill_with(|| b"the quick brown fox"[random.usize(..19)]),
        2 => page.fill(0),
        3 => {}
        4 => page.fill(random.u8(..)),
        _ => (0..random.usize(1..40)).for_each(|_| page[random.usize(..PAGE)] = random.u8(..)),
    }
}

fn apply(held: &Held, memory: &mut Memory) {
    for change in held.changes() {
        match change {
            Change::Page(address, page) => *memory.get_mut(&address).unwrap() = *page,
            Change::Delta(address, difference) => {
                let page = memory.get_mut(&address).unwrap();
                page.iter_mut().zip(difference).for_each(|(byte, other)| *byte ^= other);
            }
            Change::Zeros(address, pages) => (0..pages)
                .for_each(|page| *memory.get_mut(&(address + page * 4096)).unwrap() = [0; PAGE]),
        }
    }
}

fn end(epoch: Epoch) -> Vec<u8> {
    let message = Message::End { digest: Digest(epoch.0) };
    wire::encode(&Frame { term: TERM, epoch, message })
}

/// One epoch with these pages, and its `End`.
fn epoch(encoder: &mut Encoder, epoch: u64, pages: &[(u64, &Page)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    encoder.begin((TERM, Epoch(epoch)), pages.len() as u64, 0, &mut bytes);
    pages.iter().for_each(|(address, page)| encoder.page(*address, page, &mut bytes));
    encoder.close(&mut bytes);
    bytes.extend(end(Epoch(epoch)));
    bytes
}

fn accepted() -> Reader {
    let mut reader = Reader::new(bounds());
    reader.accept(TERM, Epoch(0), false);
    reader
}

/// How many epochs come to their end in `bytes`.
fn read(reader: &mut Reader, mut bytes: &[u8]) -> Result<usize, Refused> {
    let mut ends = 0;
    while let Some(event) = reader.next(&mut bytes)? {
        let is_end = matches!(event, Event::Message(Frame { message: Message::End { .. }, .. }));
        ends += usize::from(is_end);
    }
    assert!(bytes.is_empty());
    Ok(ends)
}

/// A frame of any kind with any body, in this term and epoch.
fn frame(kind: u32, epoch: u64, body: &[&[u8]]) -> Vec<u8> {
    let numbers = [TERM.0.to_le_bytes(), epoch.to_le_bytes()].concat();
    let body = [&numbers[..], &body.concat()].concat();
    let mut bytes = [&kind.to_le_bytes()[..], &(body.len() as u32).to_le_bytes(), &body].concat();
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    bytes
}

/// `Begin` of an epoch of many pages.
fn begin(serial: u32, epoch: u64) -> Vec<u8> {
    let fields = [&serial.to_le_bytes()[..], &1000u64.to_le_bytes(), &[0; 8]];
    frame(32, epoch, &fields)
}

/// The first frames of epoch 1.
fn refused(frames: &[Vec<u8>]) -> Refused {
    let mut reader = accepted();
    let error = read(&mut reader, &[&begin(1, 1)[..], &frames.concat()].concat()).unwrap_err();
    assert_eq!(reader.next(&mut &[][..]), Err(error), "it stays refused");
    error
}

#[test]
fn what_is_sent_arrives_with_one_epoch_not_yet_applied_and_over_several_connections() {
    let mut total = Counters::default();
    for seed in 0..30 {
        let mut random = fastrand::Rng::with_seed(seed);
        let all = addresses();
        let mut here: Memory = all.iter().map(|at| (*at, [0; PAGE])).collect();
        let mut there = here.clone();
        // A small cache forgets often.
        let cache = [CACHE, 40 * PAGE, 0][random.usize(..3)];
        let compress = seed % 5 != 4;
        let mut encoder = Encoder::new(compress, cache);
        let (mut reader, mut bytes) = (accepted(), Vec::new());
        let mut unapplied: Option<(Held, Memory)> = None;
        for number in 1..60 {
            if random.u8(..10) == 0 {
                encoder.forget();
                reader = Reader::new(bounds());
                reader.accept(TERM, Epoch(number - 1), false);
            }
            bytes.clear();
            let count = random.usize(..120);
            let dirty = random.choose_multiple(all.iter().copied(), count);
            encoder.begin((TERM, Epoch(number)), dirty.len() as u64, number, &mut bytes);
            for at in &dirty {
                let page = here.get_mut(at).unwrap();
                change(&mut random, page);
                encoder.page(*at, page, &mut bytes);
            }
            let long = vec![number as u8; random.usize(..PIECE * 2)];
            encoder.section(NAMES[1], &long, &mut bytes).unwrap();
            encoder.section(NAMES[2], b"", &mut bytes).unwrap();
            let write = Write {
                disk: 1,
                operation: Operation::Write,
                offset: 512,
                length: 9,
                data: b"ninebytes",
            };
            let length = long.len().max(1) as u64;
            let data = &[&long[..], &[1][long.len().min(1)..]].concat()[..];
            encoder.disk(&write, &mut bytes);
            encoder.disk(&Write { length, data, ..write }, &mut bytes);
            let trim = Write { operation: Operation::Discard, length: 4096, data: b"", ..write };
            encoder.disk(&trim, &mut bytes);
            encoder.close(&mut bytes);
            bytes.extend(end(Epoch(number)));

            let mut held = Held::new();
            let (mut is_whole, mut rest) = (false, &bytes[..]);
            while !rest.is_empty() {
                let (mut piece, left) = rest.split_at(random.usize(1..=rest.len().min(100_000)));
                rest = left;
                while let Some(event) = reader.next(&mut piece).unwrap() {
                    held.take(&event);
                    is_whole |= matches!(event, Event::Message(_));
                }
            }
            assert!(is_whole);
            assert_eq!(held.sections().collect::<Vec<_>>(), [(1, &long[..]), (2, &[][..])]);
            let writes: Vec<_> = held.writes().collect();
            assert_eq!((writes[0], *writes.last().unwrap()), (write, trim));
            let written = writes[1..writes.len() - 1].iter().flat_map(|write| write.data);
            assert!(written.eq(data));
            // The epoch before is applied only now.
            if let Some((earlier, expected)) = unapplied.replace((held, here.clone())) {
                apply(&earlier, &mut there);
                assert!(there == expected, "seed {seed}, before epoch {number}");
            }
        }
        let counters = encoder.counters();
        total.delta += counters.delta;
        total.lz4 += counters.lz4;
        total.same += counters.same;
        if !compress {
            assert_eq!((counters.delta, counters.lz4, counters.same), (0, 0, 0));
        }
        assert!(counters.raw > 0 && counters.zero > 0, "{counters:?}");
    }
    assert!(total.delta > 1000 && total.lz4 > 1000 && total.same > 100, "{total:?}");
}

#[test]
fn differences_make_an_epoch_small() {
    let mut random = fastrand::Rng::with_seed(1);
    let mut page = [0; PAGE];
    page.fill_with(|| random.u8(..));
    let mut encoder = Encoder::new(true, CACHE);
    let first = epoch(&mut encoder, 1, &[(0, &page)]);
    page[100] ^= 1;
    let second = epoch(&mut encoder, 2, &[(0, &page)]);
    let third = epoch(&mut encoder, 3, &[(0, &page)]);
    assert!(first.len() > PAGE && second.len() < 300 && third.len() < 250, "{}", second.len());
    let Counters { raw, delta, same, wire, .. } = encoder.counters();
    assert_eq!((raw, delta, same), (1, 1, 1));
    let ends: usize = (1..=3).map(|number| end(Epoch(number)).len()).sum();
    assert_eq!(wire as usize + ends, first.len() + second.len() + third.len());
    assert_eq!(read(&mut accepted(), &[first, second, third].concat()), Ok(3));
}

#[test]
fn every_bit_and_every_byte_counts() {
    let mut random = fastrand::Rng::with_seed(2);
    let mut encoder = Encoder::new(true, CACHE);
    let mut page = [3; PAGE];
    page[..40].fill_with(|| random.u8(..));
    let first = epoch(&mut encoder, 1, &[(0, &page), (4096, &[0; PAGE])]);
    page[9] ^= 9;
    let mut bytes = Vec::new();
    encoder.begin((TERM, Epoch(2)), 9, 0, &mut bytes);
    encoder.page(0, &page, &mut bytes);
    encoder.section(NAMES[0], b"state", &mut bytes).unwrap();
    let write = Write { disk: 0, operation: Operation::Write, offset: 0, length: 4, data: b"data" };
    encoder.disk(&write, &mut bytes);
    encoder.close(&mut bytes);
    bytes.extend(end(Epoch(2)));
    let both = [first, bytes].concat();
    assert_eq!(read(&mut accepted(), &both), Ok(2));
    for bit in 0..both.len() * 8 {
        let mut damaged = both.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        // A length that became larger makes the reader wait for more; what follows then does not
        // fit, either.
        let result = read(&mut accepted(), &damaged);
        assert!(!matches!(result, Ok(2)), "bit {bit}");
        if let Ok(ends) = result {
            damaged.extend([0; 600_000]);
            assert!(read(&mut accepted(), &damaged).is_err(), "bit {bit}, {ends}");
        }
    }
    for cut in 0..both.len() {
        assert!(matches!(read(&mut accepted(), &both[..cut]), Ok(0 | 1)), "{cut} bytes");
    }
}

#[test]
fn no_frame_can_be_missing_repeated_or_reordered() {
    let mut encoder = Encoder::new(true, CACHE);
    let mut frames = Vec::new();
    let mut put = |write: &mut dyn FnMut(&mut Encoder, &mut Vec<u8>)| {
        let mut bytes = Vec::new();
        write(&mut encoder, &mut bytes);
        frames.push(bytes);
    };
    put(&mut |encoder, to| encoder.begin((TERM, Epoch(1)), 9, 0, to));
    put(&mut |encoder, to| encoder.section(NAMES[0], b"a", to).unwrap());
    put(&mut |encoder, to| encoder.section(NAMES[1], b"b", to).unwrap());
    put(&mut |_, to| to.extend(frame(32 | 1 << 31, 1, &[b"from a later version"])));
    let trim = Write { disk: 0, operation: Operation::Zero, offset: 0, length: 4096, data: b"" };
    put(&mut |encoder, to| encoder.disk(&trim, to));
    put(&mut |encoder, to| encoder.disk(&trim, to));
    put(&mut |encoder, to| {
        encoder.close(to);
    });
    put(&mut |_, to| to.extend(end(Epoch(1))));
    // The encoder knows no optional frames.
    assert_eq!(read(&mut accepted(), &frames.concat()), Err(Refused::Whole));
    frames.remove(3);
    assert_eq!(read(&mut accepted(), &frames.concat()), Ok(1));
    for at in 0..frames.len() {
        for other in 0..frames.len() {
            let mut changed = frames.clone();
            match other.cmp(&at) {
                std::cmp::Ordering::Less => changed.swap(at, other),
                std::cmp::Ordering::Equal => drop(changed.remove(at)),
                std::cmp::Ordering::Greater => changed.insert(other, frames[at].clone()),
            }
            let result = read(&mut accepted(), &changed.concat());
            let is_cut = at == frames.len() - 1 && at == other;
            assert!(result.is_err() || (is_cut && result == Ok(0)), "{at}, {other}: {result:?}");
        }
    }
    // Again, over the same connection or in another term.
    let twice = [frames.concat(), frames.concat()].concat();
    let error = Refused::Epoch { expected: Epoch(2), got: Epoch(1) };
    assert_eq!(read(&mut accepted(), &twice), Err(error));
    let mut reader = Reader::new(bounds());
    assert_eq!(read(&mut reader, &frames.concat()), Err(Refused::Outside(32)));
    let mut reader = Reader::new(bounds());
    reader.accept(Term(8), Epoch(0), false);
    let error = Refused::Term { expected: Term(8), got: TERM };
    assert_eq!(read(&mut reader, &frames.concat()), Err(error));
}

fn page(address: u64, length: u16, bytes: &[u8]) -> Vec<u8> {
    frame(33, 1, &[&address.to_le_bytes(), &length.to_le_bytes(), bytes])
}

fn zeros(address: u64, pages: u64) -> Vec<u8> {
    frame(34, 1, &[&address.to_le_bytes(), &pages.to_le_bytes()])
}

fn delta(address: u64, base: u32) -> Vec<u8> {
    let packed = lz4_flex::block::compress(&[0; PAGE]);
    let length = packed.len() as u16;
    let fields = [&address.to_le_bytes()[..], &base.to_le_bytes(), &length.to_le_bytes(), &packed];
    frame(35, 1, &fields)
}

#[test]
fn pages_are_memory_and_come_once() {
    let whole = |address| page(address, 4096, &[1; PAGE]);
    let none = |address, pages| Refused::NotMemory { address, pages };
    assert_eq!(refused(&[whole(200 * 4096)]), none(200 * 4096, 1));
    assert_eq!(refused(&[whole(u64::MAX - 4095)]), none(u64::MAX - 4095, 1));
    assert_eq!(refused(&[whole(HIGH - 4096)]), none(HIGH - 4096, 1));
    assert_eq!(refused(&[whole(8)]), Refused::Unaligned(8));
    assert_eq!(refused(&[whole(0), whole(0)]), Refused::Twice(0));
    assert_eq!(refused(&[whole(8192), zeros(0, 9)]), Refused::Twice(8192));
    assert_eq!(refused(&[zeros(0, 201)]), none(0, 201));
    assert_eq!(refused(&[zeros(0, 0)]), none(0, 0));
    assert_eq!(refused(&[zeros(0, u64::MAX)]), none(0, u64::MAX));
    assert_eq!(refused(&[zeros(4096, 1 << 52)]), none(4096, 1 << 52));
    // What is packed is one page, neither less nor more.
    for size in [0, 4095, 4097, 1 << 20] {
        let packed = lz4_flex::block::compress(&vec![1; size]);
        let bomb = page(0, packed.len() as u16, &packed);
        assert_eq!(
            refused(&[bomb]),
            if size > 1 << 19 { Refused::Body(33) } else { Refused::Packed(0) }
        );
    }
    assert_eq!(refused(&[page(0, 0, b"")]), Refused::Packed(0));
    assert_eq!(refused(&[page(0, 4097, &[0; 4097])]), Refused::Body(33));
    assert_eq!(refused(&[page(0, 4096, &[0; 4095])]), Refused::Body(33));
    assert_eq!(refused(&[frame(33, 1, &[])]), Refused::Body(33));
}

#[test]
fn a_difference_needs_what_this_connection_sent_last() {
    assert_eq!(refused(&[delta(0, 1)]), Refused::Base { address: 0, base: 1, last: 0 });
    assert_eq!(refused(&[delta(0, 0)]), Refused::Base { address: 0, base: 0, last: 0 });
    assert_eq!(refused(&[zeros(0, 1), delta(0, 1)]), Refused::Twice(0));
    // Right, with the page of a round; not with one in between.
    let mut encoder = Encoder::new(true, CACHE);
    let mut changed = [1; PAGE];
    let mut sent = vec![epoch(&mut encoder, 1, &[(0, &changed)])];
    changed[7] = 3;
    sent.push(epoch(&mut encoder, 2, &[(0, &changed)]));
    let mut reader = accepted();
    assert_eq!(read(&mut reader, &sent.concat()), Ok(2));
    // Not the last contents.
    let rounds = |base| {
        let mut reader = Reader::new(bounds());
        reader.accept(TERM, Epoch(0), true);
        let whole = page(0, 4096, &[1; PAGE]);
        let rounds = [begin(1, 1), whole.clone(), begin(2, 1), whole, begin(3, 1), delta(0, base)];
        read(&mut reader, &rounds.concat())
    };
    assert_eq!(rounds(2), Ok(0));
    assert_eq!(rounds(1), Err(Refused::Base { address: 0, base: 1, last: 2 }));
    assert_eq!(rounds(3), Err(Refused::Base { address: 0, base: 3, last: 2 }));
    // Nor what another connection sent.
    let mut reader = Reader::new(bounds());
    reader.accept(TERM, Epoch(1), false);
    assert!(matches!(read(&mut reader, &sent[1]), Err(Refused::Serial { expected: 1, got: 2 })));
}

#[test]
fn an_epoch_needs_no_more_than_allowed() {
    let some = Bounds { max_epoch: 10 * 4096, ..bounds() };
    let sent = |pages: u64| {
        let mut encoder = Encoder::new(true, CACHE);
        let page = [1; PAGE];
        let pages: Vec<_> = (0..pages).map(|number| (number * 4096, &page)).collect();
        epoch(&mut encoder, 1, &pages)
    };
    let read_by = |filling, bytes: &[u8]| {
        let mut reader = Reader::new(some.clone());
        reader.accept(TERM, Epoch(0), filling);
        read(&mut reader, bytes)
    };
    assert_eq!(read_by(false, &sent(9)), Ok(1));
    assert_eq!(read_by(false, &sent(10)), Err(Refused::TooMuch(10 * 4096)));
    assert_eq!(read_by(true, &sent(200)), Ok(1));
    // More pages than announced.
    let short = frame(32, 1, &[&1u32.to_le_bytes(), &2u64.to_le_bytes(), &[0; 8]]);
    let bytes = [short, zeros(0, 2), zeros(8192, 1)].concat();
    assert_eq!(read_by(false, &bytes), Err(Refused::TooMany(2)));
    // Optional frames have an end, too.
    let optional = frame(1 << 31, 1, &[&[0; 4096]]);
    let error = refused(&vec![optional; 2000]);
    assert_eq!(error, Refused::TooMuch(4 << 20));
}

fn section(name: &[u8], total: u32, offset: u32, bytes: &[u8]) -> Vec<u8> {
    let (total, offset) = (total.to_le_bytes(), offset.to_le_bytes());
    frame(36, 1, &[&[name.len() as u8], name, &total, &offset, bytes])
}

#[test]
fn sections_are_known_and_whole() {
    assert_eq!(refused(&[section(b"other", 1, 0, b"a")]), Refused::SectionName);
    assert_eq!(refused(&[section(&[b'a'; 65], 1, 0, b"a")]), Refused::SectionName);
    let first = section(b"vcpu0", 2, 0, b"a");
    for wrong in [
        section(b"vcpu0", 2, 0, b"a"),
        section(b"vcpu0", 2, 2, b""),
        section(b"vcpu0", 2, 1, b"ab"),
        section(b"vcpu0", 3, 1, b"b"),
        section(b"blk-disk", 1, 0, b"b"),
        zeros(0, 1),
        frame(38, 1, &[&[0; 32]]),
    ] {
        assert_eq!(refused(&[first.clone(), wrong]), Refused::Section);
    }
    let whole = section(b"vcpu0", 1, 0, b"a");
    assert_eq!(refused(&[whole.clone(), whole]), Refused::Section);
    assert_eq!(refused(&[section(b"vcpu0", 17 << 20, 0, b"a")]), Refused::Section);
    let mut encoder = Encoder::new(true, 0);
    let long = vec![0; (16 << 20) + 1];
    assert_eq!(encoder.section("vcpu0", &long, &mut Vec::new()), Err(Refused::Section));
    let name = "a".repeat(65);
    assert_eq!(encoder.section(&name, b"", &mut Vec::new()), Err(Refused::SectionName));
}

fn disk(disk: u16, op: u8, sequence: u32, (offset, length): (u64, u64), data: &[u8]) -> Vec<u8> {
    let (offset, length) = (offset.to_le_bytes(), length.to_le_bytes());
    frame(37, 1, &[&disk.to_le_bytes(), &[op], &sequence.to_le_bytes(), &offset, &length, data])
}

#[test]
fn disk_writes_are_in_order_and_inside() {
    let outside = |offset, length| Refused::OutsideDisk { disk: 0, offset, length };
    assert_eq!(refused(&[disk(2, 0, 0, (0, 1), b"a")]), Refused::NoDisk(2));
    assert_eq!(refused(&[disk(0, 0, 1, (0, 1), b"a")]), Refused::Sequence { expected: 0, got: 1 });
    assert_eq!(refused(&[disk(0, 0, 0, (1 << 20, 1), b"a")]), outside(1 << 20, 1));
    assert_eq!(refused(&[disk(0, 1, 0, (1, u64::MAX), b"")]), outside(1, u64::MAX));
    assert_eq!(refused(&[disk(0, 1, 0, (1, 0), b"")]), outside(1, 0));
    assert_eq!(refused(&[disk(0, 0, 0, (0, 2), b"a")]), Refused::Body(37));
    assert_eq!(refused(&[disk(0, 1, 0, (0, 1), b"a")]), Refused::Body(37));
    assert_eq!(refused(&[disk(0, 3, 0, (0, 1), b"")]), Refused::Body(37));
}

#[test]
fn other_frames_are_messages_or_refused() {
    let unknown = frame(77, 1, &[b"?"]);
    assert_eq!(refused(&[unknown]), Refused::Message(WireError::Kind(77)));
    let huge = [33u32.to_le_bytes(), u32::MAX.to_le_bytes()].concat();
    assert_eq!(refused(&[huge]), Refused::TooLong { kind: 33, length: u32::MAX });
    let huge = [(1u32 << 31).to_le_bytes(), u32::MAX.to_le_bytes()].concat();
    assert_eq!(refused(&[huge]), Refused::TooLong { kind: 1 << 31, length: u32::MAX });
    let mut damaged = frame(5 | 1 << 31, 1, &[b"skipped"]);
    damaged[30] ^= 1;
    assert_eq!(refused(&[damaged]), Refused::Checksum(5 | 1 << 31));
    let early = end(Epoch(1));
    assert_eq!(refused(&[early]), Refused::Epoch { expected: Epoch(1), got: Epoch(1) });
    // Messages may come at any time.
    let beat = Frame {
        term: Term(3),
        epoch: Epoch(9),
        message: Message::Beat { claimed: false, unfit: true, probe: 0 },
    };
    let bytes = [wire::encode(&beat), begin(1, 1), wire::encode(&beat)].concat();
    let (mut reader, mut bytes) = (accepted(), &bytes[..]);
    assert_eq!(reader.next(&mut bytes), Ok(Some(Event::Message(beat))));
    assert!(matches!(reader.next(&mut bytes), Ok(Some(Event::Begin { pages: 1000, .. }))));
    assert_eq!(reader.next(&mut bytes), Ok(Some(Event::Message(beat))));
    assert_eq!(reader.next(&mut bytes), Ok(None));
}

#[test]
fn while_it_is_filled_an_epoch_has_rounds() {
    let mut encoder = Encoder::new(true, CACHE);
    let mut bytes = Vec::new();
    for round in 1..4 {
        encoder.begin((TERM, Epoch(1)), 300, 0, &mut bytes);
        encoder.zeros(0, 200, &mut bytes);
        encoder.page(HIGH, &[round; PAGE], &mut bytes);
    }
    let digest = encoder.close(&mut bytes);
    bytes.extend(end(Epoch(1)));
    let read_by = |filling, bytes: &[u8]| {
        let mut reader = Reader::new(bounds());
        reader.accept(TERM, Epoch(0), filling);
        let counts = std::iter::from_fn({
            let (reader, mut rest) = (&mut reader, bytes);
            move || match reader.next(&mut rest) {
                Ok(Some(Event::Close(counts))) => Some(Ok(Some(counts))),
                Ok(Some(_)) => Some(Ok(None)),
                Ok(None) => None,
                Err(refused) => Some(Err(refused)),
            }
        });
        counts.take(100).find_map(Result::transpose)
    };
    let counts = Counts { pages: 3, zeros: 600, sections: 0, writes: 0 };
    assert_eq!(read_by(true, &bytes), Some(Ok(counts)));
    let second = Refused::Epoch { expected: Epoch(2), got: Epoch(1) };
    assert_eq!(read_by(false, &bytes), Some(Err(second)));
    // The digest is that of all frames.
    let (mut crcs, mut rest) = (Vec::new(), &bytes[..]);
    while !rest.is_empty() {
        let length = 12 + u32::from_le_bytes(*rest[4..].first_chunk().unwrap()) as usize;
        crcs.push(u32::from_le_bytes(*rest[length - 4..].first_chunk().unwrap()));
        rest = &rest[length..];
    }
    crcs.truncate(crcs.len() - 2);
    assert_eq!(chain(Digest(0), crcs), digest);
}
