//! Messages as bytes.
//!
//! ```text
//! kind u32  length u32  term u64  epoch u64  body  crc u32
//! ```
//! Little-endian; the length is that of term, epoch and body together, and bounds reading, never an
//! allocation; the crc is a CRC-32 (ISO-HDLC) of everything before it. Pages, sections and disk
//! writes have frames of their own, and are not read here.
use std::ops::RangeInclusive;

use crate::{
    identity::{Digest, Epoch, Incarnation, Lineage, Pair, Term},
    message::{Accept, Fault, Frame, Hello, Memory, Message, Refusal},
    settings::{Agreement, Arbiter},
};

/// Longest frame that is one of these messages, in bytes.
pub const LONGEST: usize = 160;
/// Kind, length and crc.
const AROUND: usize = 12;

/// Why bytes are no message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// More bytes are needed.
    #[error("it ends in the middle of a frame")]
    Truncated,
    /// The length is more than any message has.
    #[error("a frame of kind {kind} claims {length} bytes")]
    TooLong {
        /// Its kind.
        kind: u32,
        /// What it claims.
        length: u32,
    },
    /// The checksum does not fit.
    #[error("a frame of kind {0} is damaged (checksum)")]
    Checksum(u32),
    /// The kind is none of these.
    #[error("a frame is of an unknown kind, {0}")]
    Kind(u32),
    /// The body is too short, too long, or has an invalid value.
    #[error("the body of a frame of kind {0} is not valid")]
    Body(u32),
}

/// The bytes of a frame.
#[must_use]
pub fn encode(frame: &Frame) -> Vec<u8> {
    let mut body = Vec::with_capacity(LONGEST);
    put(&mut body, frame.term.0);
    put(&mut body, frame.epoch.0);
    let kind = message(&mut body, frame.message);
    self::frame(kind, &body)
}

/// Read one frame from the beginning of `bytes`, and return its length, too.
///
/// # Errors
/// [`WireError::Truncated`] when more bytes are needed, else what is wrong with these.
pub fn decode(bytes: &[u8]) -> Result<(Frame, usize), WireError> {
    let (kind, body, all) = unframe(bytes, KINDS, LONGEST - AROUND)?;
    let frame = Bytes(body).frame(kind).ok_or(WireError::Body(kind))?;
    Ok((frame, all))
}

/// A frame of any kind around `body`.
#[must_use]
pub fn frame(kind: u32, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
    let mut bytes = Vec::with_capacity(body.len() + AROUND);
    bytes.extend(kind.to_le_bytes());
    bytes.extend(length.to_le_bytes());
    bytes.extend(body);
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    bytes
}

/// The kind and the body, of at most `longest` bytes, of the frame at the beginning of `bytes`, and
/// the length of all of it. It has to be one of `kinds`.
///
/// # Errors
/// As [`decode`].
pub fn unframe(
    bytes: &[u8],
    kinds: RangeInclusive<u32>,
    longest: usize,
) -> Result<(u32, &[u8], usize), WireError> {
    let mut rest = Bytes(bytes);
    let (Some(kind), Some(length)) = (rest.u32(), rest.u32()) else {
        return Err(WireError::Truncated);
    };
    if !kinds.contains(&kind) {
        return Err(WireError::Kind(kind));
    }
    let size = usize::try_from(length).unwrap_or(usize::MAX);
    if size > longest {
        return Err(WireError::TooLong { kind, length });
    }
    let all = size + AROUND;
    let (Some(covered), Some(body), Some(mut crc)) =
        (bytes.get(..all - 4), bytes.get(8..all - 4), bytes.get(all - 4..all).map(Bytes))
    else {
        return Err(WireError::Truncated);
    };
    if crc.u32() != Some(crc32fast::hash(covered)) {
        return Err(WireError::Checksum(kind));
    }
    Ok((kind, body, all))
}

/// The kinds of these messages.
const KINDS: RangeInclusive<u32> = 8..=22;

fn put(bytes: &mut Vec<u8>, number: u64) {
    bytes.extend(number.to_le_bytes());
}

fn put_id(bytes: &mut Vec<u8>, id: u128) {
    bytes.extend(id.to_le_bytes());
}

/// Append a message's body; its kind.
fn message(body: &mut Vec<u8>, message: Message) -> u32 {
    match message {
        Message::Hello(hello) => {
            put_id(body, hello.lineage.0);
            put_id(body, hello.incarnation.0);
            body.push(u8::from(hello.bound.is_some()));
            put_id(body, hello.bound.map_or(0, |bound| bound.0));
            body.push(hello.claimed.into());
            agreement(body, hello.agreement);
            8
        }
        Message::Accept(accept) => {
            put_id(body, accept.incarnation.0);
            put(body, accept.digest.0);
            let held = accept.memory.map_or([0; 3], |m| [m.term.0, m.epoch.0, m.digest.0]);
            body.push(u8::from(accept.memory.is_some()));
            held.iter().for_each(|number| put(body, *number));
            agreement(body, accept.agreement);
            9
        }
        Message::Refuse(refusal) => {
            body.push(REFUSALS.iter().position(|known| *known == refusal).unwrap_or(0) as u8);
            10
        }
        Message::End { digest } => {
            put(body, digest.0);
            11
        }
        Message::Ack => 12,
        Message::Nack(fault) => {
            body.push(FAULTS.iter().position(|known| *known == fault).unwrap_or(0) as u8);
            13
        }
        Message::Armed(pair) => {
            put_id(body, pair.primary.0);
            put_id(body, pair.backup.0);
            14
        }
        Message::Beat { claimed, unfit, probe } => {
            body.extend([u8::from(claimed), u8::from(unfit)]);
            put(body, probe);
            15
        }
        Message::Release => 16,
        Message::Running => 17,
        Message::Bye { end } => {
            body.push(end.into());
            18
        }
        Message::Ended => 19,
        Message::Sync { base } => {
            body.push(u8::from(base.is_some()));
            put(body, base.map_or(0, |epoch| epoch.0));
            20
        }
        Message::Compare { disk, piece } => {
            body.extend(disk.to_le_bytes());
            put(body, piece);
            21
        }
        Message::Piece { disk, piece, hash } => {
            body.extend(disk.to_le_bytes());
            put(body, piece);
            body.extend(hash);
            22
        }
    }
}

const REFUSALS: [Refusal; 6] = [
    Refusal::Busy,
    Refusal::Lineage,
    Refusal::Term,
    Refusal::Stranger,
    Refusal::Claimed,
    Refusal::Agreement,
];

const FAULTS: [Fault; 2] = [Fault::Frame, Fault::Disk];

fn agreement(body: &mut Vec<u8>, agreement: Agreement) {
    let (kind, identity) = match agreement.arbiter {
        Arbiter::Witness(identity) => (1, identity),
        Arbiter::Fence(identity) => (2, identity),
        Arbiter::None => (0, Digest(0)),
    };
    body.push(kind);
    put(body, identity.0);
    put(body, agreement.machine.0);
}

/// Bytes that are read from the front.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*first)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn incarnation(&mut self) -> Option<Incarnation> {
        self.take().map(u128::from_le_bytes).map(Incarnation)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take().map(|[byte]| byte)
    }

    fn flag(&mut self) -> Option<bool> {
        match self.byte()? {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }

    fn one_of<T: Copy>(&mut self, all: &[T]) -> Option<T> {
        all.get(usize::from(self.byte()?)).copied()
    }

    fn agreement(&mut self) -> Option<Agreement> {
        let (kind, identity) = (self.byte()?, Digest(self.u64()?));
        let arbiter = match kind {
            0 if identity == Digest(0) => Arbiter::None,
            1 => Arbiter::Witness(identity),
            2 => Arbiter::Fence(identity),
            _ => return None,
        };
        Some(Agreement { arbiter, machine: Digest(self.u64()?) })
    }

    fn hello(&mut self) -> Option<Hello> {
        let lineage = Lineage(self.take().map(u128::from_le_bytes)?);
        let incarnation = self.incarnation()?;
        let (is_bound, bound) = (self.flag()?, self.incarnation()?);
        let bound = match (is_bound, bound.0) {
            (true, _) => Some(bound),
            (false, 0) => None,
            (false, _) => return None,
        };
        let (claimed, agreement) = (self.flag()?, self.agreement()?);
        Some(Hello { lineage, incarnation, bound, claimed, agreement })
    }

    fn memory(&mut self) -> Option<Option<Memory>> {
        let (is_some, term, epoch, digest) = (self.flag()?, self.u64()?, self.u64()?, self.u64()?);
        let held = Memory { term: Term(term), epoch: Epoch(epoch), digest: Digest(digest) };
        let empty = [term, epoch, digest] == [0; 3];
        (is_some || empty).then_some(is_some.then_some(held))
    }

    /// The whole body; nothing may be left.
    fn frame(&mut self, kind: u32) -> Option<Frame> {
        let (term, epoch) = (Term(self.u64()?), Epoch(self.u64()?));
        let message = match kind {
            8 => Message::Hello(self.hello()?),
            9 => Message::Accept(Accept {
                incarnation: self.incarnation()?,
                digest: Digest(self.u64()?),
                memory: self.memory()?,
                agreement: self.agreement()?,
            }),
            10 => Message::Refuse(self.one_of(&REFUSALS)?),
            11 => Message::End { digest: Digest(self.u64()?) },
            12 => Message::Ack,
            13 => Message::Nack(self.one_of(&FAULTS)?),
            14 => {
                let primary = self.incarnation()?;
                Message::Armed(Pair { primary, backup: self.incarnation()? })
            }
            15 => Message::Beat { claimed: self.flag()?, unfit: self.flag()?, probe: self.u64()? },
            16 => Message::Release,
            17 => Message::Running,
            18 => Message::Bye { end: self.flag()? },
            19 => Message::Ended,
            20 => {
                let (is_some, epoch) = (self.flag()?, self.u64()?);
                (is_some || epoch == 0).then_some(())?;
                Message::Sync { base: is_some.then_some(Epoch(epoch)) }
            }
            21 => Message::Compare { disk: self.u16()?, piece: self.u64()? },
            22 => Message::Piece { disk: self.u16()?, piece: self.u64()?, hash: self.take()? },
            _ => return None,
        };
        self.0.is_empty().then_some(Frame { term, epoch, message })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(random: &mut fastrand::Rng) -> Frame {
        let arbiters =
            [Arbiter::None, Arbiter::Witness(Digest(random.u64(..))), Arbiter::Fence(Digest(7))];
        let arbiter = arbiters[random.usize(..3)];
        let agreement = Agreement { arbiter, machine: Digest(random.u64(..)) };
        let incarnation = Incarnation(random.u128(..));
        let digest = Digest(random.u64(..));
        let memory = random.bool().then(|| Memory {
            term: Term(random.u64(..)),
            epoch: Epoch(random.u64(..)),
            digest: Digest(random.u64(..)),
        });
        let message = match random.u8(..15) {
            0 => Message::Hello(Hello {
                lineage: Lineage(random.u128(..)),
                incarnation,
                bound: random.bool().then(|| Incarnation(random.u128(..))),
                claimed: random.bool(),
                agreement,
            }),
            1 => Message::Accept(Accept { incarnation, digest, memory, agreement }),
            2 => Message::Refuse(REFUSALS[random.usize(..REFUSALS.len())]),
            3 => Message::End { digest },
            4 => Message::Ack,
            5 => Message::Nack(FAULTS[random.usize(..FAULTS.len())]),
            6 => Message::Armed(Pair { primary: incarnation, backup: Incarnation(3) }),
            7 => Message::Beat {
                claimed: random.bool(),
                unfit: random.bool(),
                probe: random.u64(..),
            },
            8 => Message::Release,
            9 => Message::Running,
            10 => Message::Bye { end: random.bool() },
            11 => Message::Ended,
            12 => Message::Compare { disk: random.u16(..), piece: random.u64(..) },
            13 => Message::Piece {
                disk: random.u16(..),
                piece: random.u64(..),
                hash: std::array::from_fn(|_| random.u8(..)),
            },
            _ => Message::Sync { base: random.bool().then(|| Epoch(random.u64(..))) },
        };
        Frame { term: Term(random.u64(..)), epoch: Epoch(random.u64(..)), message }
    }

    #[test]
    fn what_is_written_is_read_and_nothing_else() {
        let mut random = fastrand::Rng::with_seed(1);
        for _ in 0..5000 {
            let frame = any(&mut random);
            let bytes = encode(&frame);
            assert!(bytes.len() <= LONGEST, "{frame:?} has {} bytes", bytes.len());
            assert_eq!(decode(&bytes), Ok((frame, bytes.len())));
            for cut in 0..bytes.len() {
                assert_eq!(decode(&bytes[..cut]), Err(WireError::Truncated));
            }
            let mut damaged = bytes.clone();
            damaged[random.usize(..bytes.len())] ^= 1 << random.u8(..8);
            assert!(decode(&damaged).is_err(), "one bit of {frame:?}");
        }
    }

    #[test]
    fn a_right_checksum_makes_no_message_of_any_bytes() {
        let mut random = fastrand::Rng::with_seed(2);
        for _ in 0..100_000 {
            let body: Vec<u8> =
                (0..random.usize(..LONGEST - AROUND)).map(|_| random.u8(..4)).collect();
            let kind = random.u32(0..28);
            let mut bytes = [kind.to_le_bytes(), (body.len() as u32).to_le_bytes()].concat();
            bytes.extend(body);
            bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
            if let Ok((frame, length)) = decode(&bytes) {
                assert_eq!(encode(&frame), bytes[..length], "one form for each message");
            }
        }
        let huge = [8u32.to_le_bytes(), u32::MAX.to_le_bytes()].concat();
        assert_eq!(decode(&huge), Err(WireError::TooLong { kind: 8, length: u32::MAX }));
    }
}
