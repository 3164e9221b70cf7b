//! A saved state: the bytes as they are, or frames made of them, so that checksums do not keep what is
//! behind them from being read.
use vmm::checkpoint::{
    Config, Progress, ReceiveError, read_state, receive,
    stream::{Kind, Writer},
};

/// The stream of frames that `input` describes: each is a byte for its kind, two for its length, and its
/// body.
pub fn stream(mut input: &[u8]) -> Vec<u8> {
    let mut to = Writer::begin(Vec::new()).unwrap();
    while let Some(([kind, low, high], rest)) = input.split_first_chunk() {
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
        let (body, rest) = rest.split_at(length);
        match Kind::ALL[usize::from(*kind) % Kind::ALL.len()] {
            Kind::End => to.end(0).unwrap(),
            kind => to.frame(kind, &[body]).unwrap(),
        }
        input = rest;
    }
    to.into_inner()
}

/// Refused by name, or taken.
pub fn entry(input: &[u8]) {
    let bytes = match input.split_first() {
        Some((framed, input)) if framed & 1 != 0 => stream(input),
        _ => input.to_vec(),
    };
    let _ = read_state(&bytes[..]).map_err(|e| e.to_string());
    let allocate = |config: &Config| match machine::memory::allocate(&config.machine.memory) {
        Ok(memory) => Ok(memory),
        Err(_) => Err(ReceiveError::GivenUp),
    };
    let _ = receive(&bytes[..], |_| Ok(()), allocate, &Progress::default());
}
