//! A saved state: the raw bytes, or frames made from them, so that wrong checksums do not keep the
//! contents from being read.
#![allow(dead_code, reason = "each target needs a part of it")]
use state::{
    FileError, Frames, State,
    frame::{Kind, Writer},
};

/// The stream of frames that `input` describes: for each frame, a byte for its kind, two for its
/// length, and its body.
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

/// The bytes of the file or stream that `input` describes.
pub fn bytes(input: &[u8]) -> Vec<u8> {
    match input.split_first() {
        Some((framed, input)) if framed & 1 != 0 => stream(input),
        _ => input.to_vec(),
    }
}

/// An input from which [`bytes`] makes the frames of `stream`, which is well-formed.
pub fn frames(stream: &[u8]) -> Vec<u8> {
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

/// Read the part of a stream that follows its memory.
pub fn last_of_stream(bytes: &[u8]) -> Result<(), FileError> {
    let mut frames = Frames::begin(bytes)?;
    frames.config()?;
    let mut body = Vec::new();
    loop {
        match frames.take(&mut body)? {
            Kind::Pages | Kind::Zeros => {}
            kind => break frames.put_back(kind, std::mem::take(&mut body)),
        }
    }
    frames.config()?;
    frames.sections()?;
    frames.end()
}

/// Refused with a named error, or read; and what was read is written again in a form that reads the
/// same.
pub fn entry(input: &[u8]) {
    let bytes = bytes(input);
    let _ = last_of_stream(&bytes).map_err(|e| e.to_string());
    let Ok(state) = State::read(&bytes[..]).map_err(|e| e.to_string()) else { return };
    let mut again = Vec::new();
    state.write(&mut again).unwrap();
    assert_eq!(State::read(&again[..]).unwrap(), state);
}
