//! The entry functions of `fuzz/`, with inputs from a seeded PRNG.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs, reason = "a test")]
use ::state::{
    Frames, State,
    file::{write_config, write_sections},
    frame::{Kind, Writer},
};
use config::Description;
use machine::memory::allocate;
use vmm::checkpoint::{Progress, ReceiveError, receive};

#[path = "../../fuzz/src/mutate.rs"]
mod mutate;
#[path = "../../fuzz/src/state.rs"]
mod state;

/// An input from which `state` makes the frames of `stream`, a well-formed one.
fn frames(stream: &[u8]) -> Vec<u8> {
    let mut from = Frames::begin(stream).unwrap();
    let (mut input, mut body) = (vec![1], Vec::new());
    loop {
        let kind = from.take(&mut body).unwrap();
        let number = Kind::ALL.iter().position(|known| *known == kind).unwrap();
        let length = u16::try_from(body.len()).unwrap();
        input.push(u8::try_from(number).unwrap());
        input.extend(length.to_le_bytes());
        input.extend(&body);
        if kind == Kind::End {
            return input;
        }
    }
}

/// What the monitor makes of a stream.
fn received(bytes: &[u8]) -> Result<(), ReceiveError> {
    let give = |description: &Description| {
        allocate(&description.config.memory).map_err(|e| ReceiveError::NoRoom(e.to_string()))
    };
    receive(bytes, |_| Ok(()), give, &Progress::default()).map(drop)
}

#[test]
fn states_that_say_anything() {
    let whole = ::state::testing::state();
    let mut file = Vec::new();
    whole.write(&mut file).unwrap();
    let mut to = Writer::begin(Vec::new()).unwrap();
    write_config(&mut to, &whole.config).unwrap();
    let (at, length) = (4096u64.to_le_bytes(), 8192u64.to_le_bytes());
    to.frame(Kind::Pages, &[&at, &[7; 4096]]).unwrap();
    to.frame(Kind::Zeros, &[&at, &length]).unwrap();
    write_config(&mut to, &whole.config).unwrap();
    write_sections(&mut to, &whole.sections).unwrap();
    to.end(0).unwrap();
    let sent = to.into_inner();

    let (saved, sent, bare) = (frames(&file), frames(&sent), [&[0][..], &file].concat());
    // The seeds are read to their end.
    assert_eq!(State::read(&state::bytes(&saved)[..]).unwrap(), whole);
    state::last_of_stream(&state::bytes(&sent)).unwrap();
    received(&state::bytes(&sent)).unwrap();
    let words = [
        "{",
        "}",
        "[",
        "]",
        "\"",
        ":",
        ",",
        "null",
        "true",
        "18446744073709551615",
        "-1",
        "1e9",
        "\"0x\"",
        "ff",
        "\"kind\"",
        "disk0",
        "vcpu",
    ];
    mutate::hammer(&[saved.clone(), sent.clone(), bare], &words, 5000, state::entry);
    // And what the monitor makes of them.
    mutate::hammer(&[saved, sent], &words, 2000, |input| {
        let _ = received(&state::bytes(input)).map_err(|e| e.to_string());
    });
}
