//! The journal's frames.
//!
//! ```text
//! magic u32  kind u16  disk u16  position u64  term u64  epoch u64  offset u64  length u64  zero u32  crc u32
//! ```
//! Little-endian, 56 bytes; a write has its data behind it. The crc is a CRC-32 (ISO-HDLC) of
//! everything before it and of the data. The position is the frame's own in the ring, so that one of
//! an earlier lap is not mistaken for a new one. `End` makes the frames of an epoch before it whole:
//! its offset is their number, and its length a checksum of their checksums, so that frames of an
//! abandoned attempt to write the same epoch do not fit.
use replication::{Epoch, Term};

const MAGIC: u32 = u32::from_le_bytes(*b"EPOC");
/// Bytes of a frame without data.
pub(crate) const FRAME: usize = 56;
/// Longest data of one frame, in bytes; a longer write takes several.
pub const LONGEST_DATA: usize = 1 << 20;

/// A change to a disk in an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change<'a> {
    /// These bytes were written.
    Write {
        /// The disk, by its number in the guest.
        disk: u16,
        /// First byte.
        offset: u64,
        /// The bytes.
        data: &'a [u8],
    },
    /// This range was discarded or zeroed.
    Zero {
        /// As in a write.
        disk: u16,
        /// As in a write.
        offset: u64,
        /// How many bytes.
        length: u64,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Write,
    Zero,
    End,
}

/// A frame without its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Frame {
    pub kind: Kind,
    pub disk: u16,
    pub position: u64,
    pub term: Term,
    pub epoch: Epoch,
    pub offset: u64,
    pub length: u64,
}

impl Frame {
    /// Bytes of data behind it.
    pub fn data(&self) -> u64 {
        if self.kind == Kind::Write { self.length } else { 0 }
    }

    /// Bytes in the ring.
    pub fn size(&self) -> u64 {
        FRAME as u64 + self.data()
    }

    /// Append it with its data; returns its checksum.
    pub fn encode(&self, data: &[u8], to: &mut Vec<u8>) -> u32 {
        let begin = to.len();
        let kind: u16 = match self.kind {
            Kind::Write => 1,
            Kind::Zero => 2,
            Kind::End => 3,
        };
        to.extend(MAGIC.to_le_bytes());
        to.extend(kind.to_le_bytes());
        to.extend(self.disk.to_le_bytes());
        for n in [self.position, self.term.0, self.epoch.0, self.offset, self.length] {
            to.extend(n.to_le_bytes());
        }
        to.extend([0; 4]);
        let crc = checksum(to.get(begin..).unwrap_or_default(), data);
        to.extend(crc.to_le_bytes());
        to.extend(data);
        crc
    }

    /// The frame and its checksum, which its data have to fit ([`checksum`]).
    pub fn decode(bytes: &[u8; FRAME]) -> Option<(Self, u32)> {
        fn at<const N: usize>(bytes: &[u8], from: usize) -> Option<[u8; N]> {
            bytes.get(from..from + N)?.try_into().ok()
        }
        let number = |n: usize| Some(u64::from_le_bytes(at(bytes, 8 + 8 * n)?));
        let kind = match u16::from_le_bytes(at(bytes, 4)?) {
            1 => Kind::Write,
            2 => Kind::Zero,
            3 => Kind::End,
            _ => return None,
        };
        let frame = Self {
            kind,
            disk: u16::from_le_bytes(at(bytes, 6)?),
            position: number(0)?,
            term: Term(number(1)?),
            epoch: Epoch(number(2)?),
            offset: number(3)?,
            length: number(4)?,
        };
        let known = at(bytes, 0)? == MAGIC.to_le_bytes() && at(bytes, 48)? == [0; 4];
        (known && frame.data() <= LONGEST_DATA as u64)
            .then_some((frame, u32::from_le_bytes(at(bytes, 52)?)))
    }
}

/// Of the bytes of a frame before its checksum, and its data.
pub(crate) fn checksum(frame: &[u8], data: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(frame);
    crc.update(data);
    crc.finalize()
}

/// The checksums of an epoch's frames, one after another.
#[derive(Debug, Clone, Default)]
pub(crate) struct Chain {
    crc: crc32fast::Hasher,
    frames: u64,
}

impl Chain {
    pub fn add(&mut self, crc: u32) {
        self.crc.update(&crc.to_le_bytes());
        self.frames += 1;
    }

    /// The `End` of these frames.
    pub fn end(self, position: u64, term: Term, epoch: Epoch) -> Frame {
        let length = u64::from(self.crc.finalize());
        Frame { kind: Kind::End, disk: 0, position, term, epoch, offset: self.frames, length }
    }
}
