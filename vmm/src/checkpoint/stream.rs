//! Frames: the form in which a checkpoint leaves the process.
//!
//! ```text
//! "STRATOCP"  version u32  crc u32
//! kind u32  length u32  body  crc u32       any number of times; the last one is End
//! ```
//! All numbers are little-endian; each crc is a CRC-32 (ISO-HDLC) of all that is before it in the
//! header or the frame. The body of End is a number and the CRC-32 of all frames' crcs before it,
//! so that none can be missing, come twice or in another order. The reader believes nothing: a
//! length is a bound for reading, never a size to allocate.
use std::io::{self, Read, Write};

use crc32fast::Hasher;

const MAGIC: &[u8; 8] = b"STRATOCP";
/// Raised with every change that an older reader would misunderstand.
pub const VERSION: u32 = 2;
/// Longest body. The largest is the list of checksums of 512 GiB of memory, 1 MiB.
const LONGEST: u32 = 16 << 20;
/// Most bytes of all bodies but those with memory in them. 254 vCPUs take about 10 MiB.
const MOST: u64 = 128 << 20;

/// What a frame holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// What the machine was made from.
    Config,
    /// A part of its state, with a name.
    Section,
    /// Checksums of its memory.
    Sums,
    /// The number of the epoch that is complete now.
    End,
    /// A piece of memory.
    Pages,
    /// A piece of memory that has become zero.
    Zeros,
    /// Which ranges of memory are here; the others are where the base says.
    Changed,
    /// A sender that wants answers: who it is.
    Hello,
    /// What it described fits here: memory may come.
    Accept,
    /// It does not, and why.
    Refuse,
    /// All is here and whole; nothing runs.
    Ready,
    /// The sender has let go of the machine: it is the receiver's.
    Go,
    /// It runs, or is stopped, at the receiver.
    Running,
    /// It never will, and why: it is the sender's again.
    Failed,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::Config,
        Self::Section,
        Self::Sums,
        Self::End,
        Self::Pages,
        Self::Zeros,
        Self::Changed,
        Self::Hello,
        Self::Accept,
        Self::Refuse,
        Self::Ready,
        Self::Go,
        Self::Running,
        Self::Failed,
    ];

    fn number(self) -> u32 {
        match self {
            Self::Config => 1,
            Self::Section => 2,
            Self::Sums => 3,
            Self::End => 4,
            Self::Pages => 5,
            Self::Zeros => 6,
            Self::Changed => 7,
            Self::Hello => 8,
            Self::Accept => 9,
            Self::Refuse => 10,
            Self::Ready => 11,
            Self::Go => 12,
            Self::Running => 13,
            Self::Failed => 14,
        }
    }

    /// For messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Config => "the configuration",
            Self::Section => "a section",
            Self::Sums => "the checksums of memory",
            Self::End => "the end",
            Self::Pages | Self::Zeros => "a piece of memory",
            Self::Changed => "the list of changes",
            Self::Hello => "the sender's greeting",
            Self::Accept | Self::Refuse => "the answer to the greeting",
            Self::Ready => "the word that all is there",
            Self::Go => "the word to go on",
            Self::Running | Self::Failed => "the outcome",
        }
    }
}

/// Why a stream cannot be read.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum StreamError {
    #[error("it is no saved state: it does not begin with {:?}", str::from_utf8(MAGIC).unwrap_or(""))]
    NotAState,
    #[error("its header is damaged (checksum)")]
    Header,
    #[error("its format is version {0}; this program reads version {VERSION}")]
    Version(u32),
    #[error("it ends at byte {at}, in the middle of {what}")]
    Truncated { at: u64, what: String },
    #[error("{what} is damaged: it claims {length} bytes, and {LONGEST} is the most")]
    TooLong { what: String, length: u32 },
    #[error("{what} would make its state longer than {MOST} bytes")]
    TooMuch { what: String },
    #[error("{what} is damaged (checksum)")]
    Checksum { what: String },
    #[error("parts are missing, come twice or in another order (checksum over all)")]
    Whole,
    #[error("{what} is of an unknown kind, {kind}")]
    Kind { what: String, kind: u32 },
    #[error("cannot read it")]
    Io(#[source] io::Error),
}

/// Writes frames.
pub struct Writer<W> {
    to: W,
    /// Of the crcs of all frames.
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

    /// Write one frame, whose body is `pieces` one after the other.
    ///
    /// # Errors
    /// When it cannot be written, or is too long.
    pub fn frame(&mut self, kind: Kind, pieces: &[&[u8]]) -> io::Result<()> {
        let length: usize = pieces.iter().map(|piece| piece.len()).sum();
        let length = u32::try_from(length).ok().filter(|n| *n <= LONGEST);
        let length = length.ok_or_else(|| io::Error::other("a part of the state is too long"))?;
        let mut crc = Hasher::new();
        let (kind, length) = (kind.number().to_le_bytes(), length.to_le_bytes());
        for piece in [&kind[..], &length[..]].iter().chain(pieces) {
            crc.update(piece);
            self.to.write_all(piece)?;
        }
        let crc = crc.finalize().to_le_bytes();
        self.all.update(&crc);
        self.to.write_all(&crc)
    }

    /// Say that `epoch` is complete, and let all of it go out.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn end(&mut self, epoch: u64) -> io::Result<()> {
        let all = self.all.clone().finalize();
        self.frame(Kind::End, &[&epoch.to_le_bytes(), &all.to_le_bytes()])?;
        self.to.flush()
    }

    /// Let out what was written.
    ///
    /// # Errors
    /// When it cannot be.
    pub fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }

    /// What it writes to.
    pub fn into_inner(self) -> W {
        self.to
    }
}

/// Reads frames.
pub struct Reader<R> {
    from: R,
    /// Bytes read.
    at: u64,
    /// What was read last, for messages.
    last: String,
    /// Of the crcs of all frames.
    all: Hasher,
    /// Bytes of bodies without memory.
    state: u64,
}

impl<R: Read> Reader<R> {
    /// Read the header.
    ///
    /// # Errors
    /// When it is not that of a stream, or of another version.
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
            other => Err(StreamError::Version(other)),
        }
    }

    /// Read the next frame; its body replaces what is in `body`.
    ///
    /// # Errors
    /// When it is cut off, damaged or unknown.
    pub fn next(&mut self, body: &mut Vec<u8>) -> Result<Kind, StreamError> {
        let what = format!("the part after {}", self.last);
        let (number, length): ([u8; 4], [u8; 4]) = (self.array(&what)?, self.array(&what)?);
        let claimed = u32::from_le_bytes(length);
        if claimed > LONGEST {
            return Err(StreamError::TooLong { what, length: claimed });
        }
        let kind = Kind::ALL.into_iter().find(|k| k.number().to_le_bytes() == number);
        if kind != Some(Kind::Pages) {
            self.state = self.state.saturating_add(claimed.into());
            if self.state > MOST {
                return Err(StreamError::TooMuch { what });
            }
        }
        body.clear();
        let read = self.from.by_ref().take(claimed.into()).read_to_end(body);
        let read = read.map_err(StreamError::Io)? as u64;
        self.at += read;
        let named = match (kind, name(body)) {
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
        let kind = kind.ok_or(StreamError::Kind { what, kind: u32::from_le_bytes(number) })?;
        if kind == Kind::End && body.get(8..) != Some(&self.all.clone().finalize().to_le_bytes()) {
            return Err(StreamError::Whole);
        }
        self.all.update(&crc);
        self.last = if kind == Kind::Section { named } else { kind.name().into() };
        Ok(kind)
    }

    /// Whether there is nothing more.
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

/// The body of a section: the length of its name in one byte, the name, and the rest.
pub fn section(name: &str, rest: &[u8]) -> Vec<u8> {
    let name = name.get(..name.floor_char_boundary(255)).unwrap_or_default();
    let mut body = vec![u8::try_from(name.len()).unwrap_or(0)];
    body.extend(name.as_bytes());
    body.extend(rest);
    body
}

/// Name and rest of a section's body.
pub fn split_section(body: &[u8]) -> Option<(&str, &[u8])> {
    let (length, rest) = body.split_first()?;
    let (name, rest) = rest.split_at_checked(usize::from(*length))?;
    Some((str::from_utf8(name).ok()?, rest))
}

fn name(body: &[u8]) -> Option<&str> {
    split_section(body).map(|(name, _)| name).filter(|name| !name.is_empty())
}
