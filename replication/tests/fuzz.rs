//! Runs the entry functions of `fuzz/` with inputs from a seeded PRNG.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs, reason = "a test")]
#[path = "../../fuzz/src/mutate.rs"]
mod mutate;
#[path = "../../fuzz/src/replication_contents.rs"]
mod replication_contents;

use replication::{
    Epoch, Frame, Message, Term,
    contents::{Encoder, Operation, PAGE, Write},
    wire,
};

/// What a real sender sends, as an input.
fn seed(epochs: u64) -> Vec<u8> {
    let mut encoder = Encoder::new(true, 1 << 20);
    let (mut sent, mut page) = (Vec::new(), [7; PAGE]);
    for epoch in 1..=epochs {
        encoder.begin((Term(1), Epoch(epoch)), 9, 0, &mut sent);
        page[usize::try_from(epoch).unwrap()] = 1;
        encoder.page(epoch * 4096, &page, &mut sent);
        encoder.page(0, &page, &mut sent);
        encoder.zeros(1 << 32, 4, &mut sent);
        encoder.section("vcpu0", b"{}", &mut sent).unwrap();
        let write =
            Write { disk: 0, operation: Operation::Write, offset: 512, length: 4, data: b"data" };
        encoder.disk(&write, &mut sent);
        let digest = encoder.close(&mut sent);
        let message = Message::End { digest };
        sent.extend(wire::encode(&Frame { term: Term(1), epoch: Epoch(epoch), message }));
    }
    // Without checksums, which `entry` adds.
    let mut input = vec![0];
    let mut rest = &sent[..];
    while let Some(length) = rest.get(4..8).map(|four| u32::from_le_bytes(four.try_into().unwrap()))
    {
        let all = 12 + usize::try_from(length).unwrap();
        input.extend(u16::try_from(all - 12).unwrap().to_le_bytes());
        input.push(rest[0]);
        input.extend(&rest[8..all - 4]);
        rest = &rest[all..];
    }
    input
}

#[test]
fn contents_of_epochs_that_a_peer_sends() {
    let seeds = [1, 3].map(seed);
    mutate::hammer("replication_contents", &seeds, 20_000, replication_contents::entry);
}
