//! Frames: the form in which a checkpoint leaves the process.
//!
//! ```text
//! "STRATOCP"  version u32  crc u32
//! kind u32  length u32  body  crc u32       any number of times; the last one is End
//! ```
//! All numbers are little-endian; each crc is a CRC-32 (ISO-HDLC) of all that is before it in the
//! header or the frame. The reader believes nothing: a length is a bound for reading, never a size
//! to allocate.
use std::io::{self, Read, Write};

const MAGIC: &[u8; 8] = b"STRATOCP";
/// Raised with every change that an older reader would misunderstand.
pub const VERSION: u32 = 1;
/// Longest body. The largest is the list of checksums of 512 GiB of memory, 1 MiB.
const LONGEST: u32 = 16 << 20;

/// What a frame holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// What the machine was made from.
    Config,
    /// A part of its state, with a name.
    Section,
    /// Checksums of its memory.
    Sums,
    /// Nothing: all before it is complete.
    End,
}

impl Kind {
    const ALL: [Self; 4] = [Self::Config, Self::Section, Self::Sums, Self::End];

    fn number(self) -> u32 {
        match self {
            Self::Config => 1,
            Self::Section => 2,
            Self::Sums => 3,
            Self::End => 4,
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
    #[error("{what} is damaged (checksum)")]
    Checksum { what: String },
    #[error("{what} is of an unknown kind, {kind}")]
    Kind { what: String, kind: u32 },
    #[error("cannot read it")]
    Io(#[source] io::Error),
}

/// Begin a stream.
///
/// # Errors
/// When it cannot be written.
pub fn begin(to: &mut impl Write) -> io::Result<()> {
    let mut header = MAGIC.to_vec();
    header.extend(VERSION.to_le_bytes());
    header.extend(crc32fast::hash(&header).to_le_bytes());
    to.write_all(&header)
}

/// Write one frame.
///
/// # Errors
/// When it cannot be written, or is too long.
pub fn frame(to: &mut impl Write, kind: Kind, body: &[u8]) -> io::Result<()> {
    let length = u32::try_from(body.len()).ok().filter(|n| *n <= LONGEST);
    let length = length.ok_or_else(|| io::Error::other("a part of the state is too long"))?;
    let mut crc = crc32fast::Hasher::new();
    for piece in [&kind.number().to_le_bytes()[..], &length.to_le_bytes()[..], body] {
        crc.update(piece);
        to.write_all(piece)?;
    }
    to.write_all(&crc.finalize().to_le_bytes())
}

/// Reads frames.
pub struct Reader<R> {
    from: R,
    /// Bytes read.
    at: u64,
    /// What was read last, for messages.
    last: String,
}

impl<R: Read> Reader<R> {
    /// Read the header.
    ///
    /// # Errors
    /// When it is not that of a stream, or of another version.
    pub fn begin(from: R) -> Result<Self, StreamError> {
        let mut this = Self { from, at: 0, last: "its header".into() };
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

    /// The next frame.
    ///
    /// # Errors
    /// When it is cut off, damaged or unknown.
    pub fn next(&mut self) -> Result<(Kind, Vec<u8>), StreamError> {
        let what = format!("the part after {}", self.last);
        let (kind, length): ([u8; 4], [u8; 4]) = (self.array(&what)?, self.array(&what)?);
        let claimed = u32::from_le_bytes(length);
        if claimed > LONGEST {
            return Err(StreamError::TooLong { what, length: claimed });
        }
        let mut body = Vec::new();
        let read = self.from.by_ref().take(claimed.into()).read_to_end(&mut body);
        let read = read.map_err(StreamError::Io)? as u64;
        self.at += read;
        let named = match (kind, name(&body)) {
            ([2, 0, 0, 0], Some(name)) => format!("section {name:?}"),
            _ => what.clone(),
        };
        if read < claimed.into() {
            return Err(StreamError::Truncated { at: self.at, what: named });
        }
        let crc: [u8; 4] = self.array(&named)?;
        let expected = crc32fast::hash(&[&kind[..], &length[..], &body].concat());
        if u32::from_le_bytes(crc) != expected {
            return Err(StreamError::Checksum { what: named });
        }
        let number = u32::from_le_bytes(kind);
        let Some(kind) = Kind::ALL.into_iter().find(|k| k.number() == number) else {
            return Err(StreamError::Kind { what, kind: number });
        };
        self.last = match kind {
            Kind::Section => named,
            Kind::Config => "the configuration".into(),
            Kind::Sums => "the checksums of memory".into(),
            Kind::End => "the end".into(),
        };
        Ok((kind, body))
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
        let mut bytes = [0; N];
        match self.from.read_exact(&mut bytes) {
            Ok(()) => {
                self.at += N as u64;
                Ok(bytes)
            }
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                Err(StreamError::Truncated { at: self.at, what: what.into() })
            }
            Err(e) => Err(StreamError::Io(e)),
        }
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
