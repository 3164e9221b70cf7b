//! Frames: the byte format of a file or stream.
//!
//! ```text
//! "STRATOCP"  version u32  crc u32
//! kind u32  length u32  body  crc u32       any number of times; the last one is End
//! ```
//! All numbers are little-endian; each crc is a CRC-32 (ISO-HDLC) of everything before it in the
//! header or the frame. The body of End is a number and the CRC-32 of all frames' crcs before it,
//! so that no frame can be missing, duplicated or reordered unnoticed. A reader trusts nothing: a
//! length is a bound for reading, never a size to allocate.
//!
//! A kind with bit 31 set is optional: a reader that does not know it skips the frame. Any other
//! unknown kind is an error.
use std::io::{self, Read, Write};

use crc32fast::Hasher;

use crate::section;

const MAGIC: &[u8; 8] = b"STRATOCP";
/// Raised when the format of frames itself changes. Their contents have versions of their own: see
/// [`Saved::VERSION`](crate::Saved::VERSION).
pub const VERSION: u32 = 3;
/// Longest body. The largest is the list of checksums of 512 GiB of memory, 1 MiB.
const MAX_BODY: u32 = 16 << 20;
/// Most bytes of all frames except those with memory in them. 254 vCPUs take about 10 MiB.
const MAX_STATE: u64 = 128 << 20;
/// Bytes of a frame in addition to its body.
const AROUND: u64 = 12;
/// Kinds with this bit may be skipped.
const OPTIONAL: u32 = 1 << 31;

/// The kind of a frame's contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The machine's configuration: a [`Section`](crate::Section) as JSON.
    Config,
    /// A part of its state: a [`Section`](crate::Section) as JSON.
    Section,
    /// Checksums of its memory.
    Sums,
    /// The number of the epoch that is now complete.
    End,
    /// A piece of memory.
    Pages,
    /// A piece of memory that has become zero.
    Zeros,
    /// Which ranges of memory are in this save; the others are in its base.
    Changed,
    /// A sender that expects answers: its identity.
    Hello,
    /// The receiver can run the described machine: memory may follow.
    Accept,
    /// It cannot; the reason.
    Refuse,
    /// Everything has arrived intact; nothing runs yet.
    Ready,
    /// The sender has given the machine up: the receiver now owns it.
    Go,
    /// The machine runs, or is stopped, at the receiver.
    Running,
    /// It will never run there; the reason. The sender owns it again.
    Failed,
}

/// All kinds, with their numbers and their names in messages.
const KINDS: [(Kind, u32, &str); 14] = [
    (Kind::Config, 1, "the configuration"),
    (Kind::Section, 2, "a section"),
    (Kind::Sums, 3, "the checksums of memory"),
    (Kind::End, 4, "the end"),
    (Kind::Pages, 5, "a piece of memory"),
    (Kind::Zeros, 6, "a piece of memory"),
    (Kind::Changed, 7, "the list of changes"),
    (Kind::Hello, 8, "the sender's greeting"),
    (Kind::Accept, 9, "the answer to the greeting"),
    (Kind::Refuse, 10, "the answer to the greeting"),
    (Kind::Ready, 11, "the readiness message"),
    (Kind::Go, 12, "the hand-over message"),
    (Kind::Running, 13, "the outcome"),
    (Kind::Failed, 14, "the outcome"),
];

impl Kind {
    /// All kinds.
    pub const ALL: [Self; KINDS.len()] = {
        let mut all = [Self::Config; KINDS.len()];
        let mut rest: &[(Self, u32, &str)] = &KINDS;
        let mut to: &mut [Self] = &mut all;
        while let ([(kind, ..), others @ ..], [first, left @ ..]) = (rest, to) {
            *first = *kind;
            (rest, to) = (others, left);
        }
        all
    };

    fn of(number: u32) -> Option<Self> {
        KINDS.iter().find(|(_, known, _)| *known == number).map(|(kind, ..)| *kind)
    }

    fn row(self) -> (u32, &'static str) {
        let row = KINDS.iter().find(|(kind, ..)| *kind == self);
        row.map_or((0, "nothing"), |(_, number, name)| (*number, name))
    }

    /// The name, for messages.
    pub fn name(self) -> &'static str {
        self.row().1
    }
}

/// Why a stream cannot be read.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the error messages describe them")]
pub enum StreamError {
    #[error("it is not a saved state: it does not begin with {:?}", str::from_utf8(MAGIC).unwrap_or(""))]
    NotAState,
    #[error("its header is damaged (checksum)")]
    Header,
    #[error(
        "its format is version {0}; this program reads version {VERSION}, and nothing older can be \
         converted: restore it with the stratovirt that wrote it, shut its guest down there, and start \
         the guest with this one"
    )]
    Older(u32),
    #[error(
        "its format is version {0}; this program reads version {VERSION}: restore it with the newer \
         stratovirt that wrote it"
    )]
    Newer(u32),
    #[error("it ends at byte {at}, in the middle of {what}")]
    Truncated { at: u64, what: String },
    #[error("{what} is damaged: it claims {length} bytes; at most {MAX_BODY} are allowed")]
    TooLong { what: String, length: u32 },
    #[error("{what} would make its state longer than {MAX_STATE} bytes")]
    TooMuch { what: String },
    #[error("{what} is damaged (checksum)")]
    Checksum { what: String },
    #[error("parts are missing, duplicated or reordered (checksum over all)")]
    Whole,
    #[error("{what} is of an unknown kind, {kind}")]
    Kind { what: String, kind: u32 },
    #[error("cannot read it")]
    Io(#[source] io::Error),
}

/// Writes frames.
pub struct Writer<W> {
    to: W,
    /// Checksum of the crcs of all frames.
    all: Hasher,
}

impl<W: Write> Writer<W> {
    /// Begin a stream.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn begin(mut to: W) -> io::Result<Self> {
        let mut header = MAGIC.to_vec();
        header.extend(VERSION.to_le_bytes());
        header.extend(crc32fast::hash(&header).to_le_bytes());
        to.write_all(&header)?;
        Ok(Self { to, all: Hasher::new() })
    }

    /// Write one frame, whose body is the concatenation of `pieces`.
    ///
    /// # Errors
    /// When it cannot be written, or is too long.
    pub fn frame(&mut self, kind: Kind, pieces: &[&[u8]]) -> io::Result<()> {
        let length: usize = pieces.iter().map(|piece| piece.len()).sum();
        let length = u32::try_from(length).ok().filter(|n| *n <= MAX_BODY);
        let length = length.ok_or_else(|| io::Error::other("a part of the state is too long"))?;
        let mut crc = Hasher::new();
        let (kind, length) = (kind.row().0.to_le_bytes(), length.to_le_bytes());
        for piece in [&kind[..], &length[..]].iter().chain(pieces) {
            crc.update(piece);
            self.to.write_all(piece)?;
        }
        let crc = crc.finalize().to_le_bytes();
        self.all.update(&crc);
        self.to.write_all(&crc)
    }

    /// Write that `epoch` is complete, and flush.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn end(&mut self, epoch: u64) -> io::Result<()> {
        let all = self.all.clone().finalize();
        self.frame(Kind::End, &[&epoch.to_le_bytes(), &all.to_le_bytes()])?;
        self.to.flush()
    }

    /// Flush what was written.
    ///
    /// # Errors
    /// When it cannot be flushed.
    pub fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }

    /// The underlying writer.
    pub fn into_inner(self) -> W {
        self.to
    }
}

/// Reads frames.
pub struct Reader<R> {
    from: R,
    /// Bytes read.
    at: u64,
    /// The last frame read, for messages.
    last: String,
    /// Checksum of the crcs of all frames.
    all: Hasher,
    /// Bytes of all bodies read so far, except those with memory.
    state: u64,
}

impl<R: Read> Reader<R> {
    /// Read the header.
    ///
    /// # Errors
    /// When it is not a stream header, or has another version.
    pub fn begin(from: R) -> Result<Self, StreamError> {
        let last = "its header".into();
        let mut this = Self { from, at: 0, last, all: Hasher::new(), state: 0 };
        let magic: [u8; 8] = this.array("its header")?;
        if magic != *MAGIC {
            return Err(StreamError::NotAState);
        }
        let version: [u8; 4] = this.array("its header")?;
        let crc: [u8; 4] = this.array("its header")?;
        let expected = crc32fast::hash(&[&magic[..], &version[..]].concat());
        if u32::from_le_bytes(crc) != expected {
            return Err(StreamError::Header);
        }
        match u32::from_le_bytes(version) {
            VERSION => Ok(this),
            older @ 0..VERSION => Err(StreamError::Older(older)),
            newer => Err(StreamError::Newer(newer)),
        }
    }

    /// Read the next frame of a known kind; its body replaces the contents of `body`.
    ///
    /// # Errors
    /// When it is truncated, damaged, or of an unknown kind that is not optional.
    pub fn next(&mut self, body: &mut Vec<u8>) -> Result<Kind, StreamError> {
        loop {
            if let Some(kind) = self.frame(body)? {
                return Ok(kind);
            }
        }
    }

    /// Read the next frame; `None` for one that may be skipped.
    fn frame(&mut self, body: &mut Vec<u8>) -> Result<Option<Kind>, StreamError> {
        let what = format!("the part after {}", self.last);
        let (number, length): ([u8; 4], [u8; 4]) = (self.array(&what)?, self.array(&what)?);
        let claimed = u32::from_le_bytes(length);
        if claimed > MAX_BODY {
            return Err(StreamError::TooLong { what, length: claimed });
        }
        let kind = Kind::of(u32::from_le_bytes(number));
        if kind != Some(Kind::Pages) {
            self.state = self.state.saturating_add(AROUND + u64::from(claimed));
            if self.state > MAX_STATE {
                return Err(StreamError::TooMuch { what });
            }
        }
        body.clear();
        let read = self.from.by_ref().take(claimed.into()).read_to_end(body);
        let read = read.map_err(StreamError::Io)? as u64;
        self.at += read;
        let named = match (kind, section::peek(body)) {
            (Some(Kind::Section), Some(name)) => format!("section {name:?}"),
            _ => what.clone(),
        };
        if read < claimed.into() {
            return Err(StreamError::Truncated { at: self.at, what: named });
        }
        let crc: [u8; 4] = self.array(&named)?;
        let mut expected = Hasher::new();
        [&number[..], &length[..], body].iter().for_each(|piece| expected.update(piece));
        if u32::from_le_bytes(crc) != expected.finalize() {
            return Err(StreamError::Checksum { what: named });
        }
        let number = u32::from_le_bytes(number);
        if kind.is_none() && number & OPTIONAL == 0 {
            return Err(StreamError::Kind { what, kind: number });
        }
        if kind == Some(Kind::End)
            && body.get(8..) != Some(&self.all.clone().finalize().to_le_bytes())
        {
            return Err(StreamError::Whole);
        }
        self.all.update(&crc);
        if let Some(kind) = kind {
            self.last = if kind == Kind::Section { named } else { kind.name().into() };
        }
        Ok(kind)
    }

    /// Whether the end of the input has been reached.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn exhausted(&mut self) -> Result<bool, StreamError> {
        let read = self.from.by_ref().take(1).read_to_end(&mut Vec::new());
        Ok(read.map_err(StreamError::Io)? == 0)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], StreamError> {
        let mut bytes = Vec::with_capacity(N);
        self.from.by_ref().take(N as u64).read_to_end(&mut bytes).map_err(StreamError::Io)?;
        self.at += bytes.len() as u64;
        bytes.try_into().map_err(|_| StreamError::Truncated { at: self.at, what: what.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stream of frames with these numbers and bodies, which may be of unknown kinds.
    fn stream(frames: &[(u32, &[u8])]) -> Vec<u8> {
        let mut bytes = Writer::begin(Vec::new()).unwrap().into_inner();
        let mut all = Hasher::new();
        for (number, body) in frames {
            let length = u32::try_from(body.len()).unwrap().to_le_bytes();
            let mut frame = [&number.to_le_bytes()[..], &length, body].concat();
            if let (4, Some(sum)) = (*number, frame.last_chunk_mut::<4>()) {
                *sum = all.clone().finalize().to_le_bytes();
            }
            let crc = crc32fast::hash(&frame).to_le_bytes();
            all.update(&crc);
            bytes.extend(frame);
            bytes.extend(crc);
        }
        bytes
    }

    fn kinds(bytes: &[u8]) -> Result<Vec<Kind>, StreamError> {
        let (mut reader, mut body, mut kinds) = (Reader::begin(bytes)?, Vec::new(), Vec::new());
        while kinds.last() != Some(&Kind::End) {
            kinds.push(reader.next(&mut body)?);
        }
        assert!(reader.exhausted()?);
        Ok(kinds)
    }

    #[test]
    fn what_is_optional_and_not_known_is_skipped_and_still_counts_for_the_checksum() {
        let end: &[u8] = &[0; 12];
        let optional = (OPTIONAL | 77, &b"later"[..]);
        let read = kinds(&stream(&[(1, b"c"), optional, (5, b"p"), optional, (4, end)]));
        assert_eq!(read.unwrap(), [Kind::Config, Kind::Pages, Kind::End]);
        let error = kinds(&stream(&[(1, b"c"), (77, b"later"), (4, end)])).unwrap_err();
        assert!(matches!(error, StreamError::Kind { kind: 77, .. }), "{error}");
        // Optional or not, it cannot be removed unnoticed.
        let (with, without) =
            (stream(&[(1, b"c"), optional, (4, end)]), stream(&[(1, b"c"), (4, end)]));
        let cut = [&without[..without.len() - 24], &with[with.len() - 24..]].concat();
        assert!(matches!(kinds(&cut), Err(StreamError::Whole)));
    }

    #[test]
    fn optional_frames_have_an_end() {
        /// The same bytes repeated without end.
        struct Again(Vec<u8>, usize);
        impl Read for Again {
            fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
                let rest = &self.0[self.1..];
                let length = rest.len().min(buf.len());
                buf[..length].copy_from_slice(&rest[..length]);
                self.1 = (self.1 + length) % self.0.len();
                Ok(length)
            }
        }
        let header = stream(&[]);
        let frame = stream(&[(OPTIONAL, &[0; 1 << 20])]).split_off(header.len());
        let mut reader = Reader::begin(Read::chain(&header[..], Again(frame, 0))).unwrap();
        let error = reader.next(&mut Vec::new()).unwrap_err();
        assert!(matches!(error, StreamError::TooMuch { .. }), "{error}");
    }

    #[test]
    fn another_version_is_refused_by_its_number() {
        for (version, says) in [
            (2u32, "version 2; this program reads version 3, and nothing older"),
            (4, "version 4; this program reads version 3: restore it with the newer"),
        ] {
            let mut header = [&MAGIC[..], &version.to_le_bytes()].concat();
            header.extend(crc32fast::hash(&header).to_le_bytes());
            let error = Reader::begin(&header[..]).err().unwrap().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
