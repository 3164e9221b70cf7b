//! What encoding and reading cost for each page. Run with
//! `cargo test --release -p replication --test contents_speed -- --ignored --nocapture`.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs, reason = "a test")]
use std::time::{Duration, Instant};

use replication::{
    Epoch, Frame, Message, Term,
    contents::{Bounds, CACHE, Encoder, Held, PAGE, Page, Reader},
    wire,
};

const PAGES: usize = 2000;
const EPOCHS: u64 = 60;

/// Bytes that are a program's: words of a small vocabulary, numbers that grow.
fn text(random: &mut fastrand::Rng, page: &mut Page) {
    for (number, word) in page.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        word[..8].copy_from_slice(&[0, 0, 1, 0, random.u8(..8), 0, 0x7f, 0]);
        word[8..].copy_from_slice(&(number as u64 * 24).to_le_bytes());
    }
}

/// Change every page for the next epoch.
type Change = fn(&mut fastrand::Rng, &mut Page);

fn measure(name: &str, compress: bool, first: Change, change: Change) {
    let mut random = fastrand::Rng::with_seed(1);
    let mut pages = vec![[0; PAGE]; PAGES];
    pages.iter_mut().for_each(|page| first(&mut random, page));
    let mut encoder = Encoder::new(compress, CACHE);
    let size = 4 * PAGES as u64 * PAGE as u64;
    let max_epoch = size;
    let ram = std::iter::once(0..size).collect();
    let bounds = Bounds { ram, disks: vec![], sections: vec![], max_epoch };
    let mut reader = Reader::new(bounds);
    reader.accept(Term(1), Epoch(0), false);
    let (mut bytes, mut held) = (Vec::new(), Held::new());
    let (mut encode, mut read) = (Vec::new(), Vec::new());
    for epoch in 1..=EPOCHS {
        pages.iter_mut().for_each(|page| change(&mut random, page));
        bytes.clear();
        let began = Instant::now();
        encoder.begin((Term(1), Epoch(epoch)), PAGES as u64, 0, &mut bytes);
        for (number, page) in pages.iter().enumerate() {
            // Scattered, as dirty pages are.
            encoder.page(((number * 4 + number % 3) * PAGE) as u64, page, &mut bytes);
        }
        let digest = encoder.close(&mut bytes);
        encode.push(began.elapsed());
        let message = Message::End { digest };
        bytes.extend(wire::encode(&Frame { term: Term(1), epoch: Epoch(epoch), message }));
        held.clear();
        let (mut rest, began) = (&bytes[..], Instant::now());
        while let Some(event) = reader.next(&mut rest).unwrap() {
            held.take(&event);
        }
        read.push(began.elapsed());
    }
    let middle = |times: &mut Vec<Duration>| {
        // The first epochs touch memory for the first time.
        let mut times = times.split_off(5);
        times.sort();
        let at = |share: usize| times[times.len() * share / 100].as_nanos() / PAGES as u128;
        format!("{:>5} ns (p5 {:>5}, p95 {:>5})", at(50), at(5), at(95))
    };
    let wire = encoder.counters().wire / EPOCHS / PAGES as u64;
    println!(
        "{name:<34} encode {}  read {}  {wire:>5} bytes a page",
        middle(&mut encode),
        middle(&mut read)
    );
}

#[test]
#[ignore = "a measurement"]
fn nanoseconds_for_each_page() {
    let noise: Change = |random, page| {
        for word in page.as_chunks_mut::<8>().0 {
            *word = random.u64(..).to_le_bytes();
        }
    };
    let few: Change = |random, page| (0..8).for_each(|_| page[random.usize(..PAGE)] ^= 0x55);
    let none: Change = |_, _| {};
    measure("zero", true, none, none);
    measure("the same again", true, noise, none);
    measure("8 bytes of noise change", true, noise, few);
    measure("8 bytes of text change", true, text, few);
    measure("text, other each time", true, text, |random, page| {
        page.rotate_left(random.usize(8..64));
        text(random, page);
    });
    measure("noise, other each time", true, noise, noise);
    measure("noise, not compressed (-u)", false, noise, noise);
}
