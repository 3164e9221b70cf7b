//! The first frame of each connection: the machine that the primary offers. The backup looks
//! whether that could run on its host before it answers the greeting that follows.
//!
//! ```text
//! kind u32 = 31  length u32  timeout u32, in ms  a stream with only the configuration  crc u32
//! ```
use std::{io, time::Duration};

use state::{Config, Frames, file::write_config, frame::Writer};

const KIND: u32 = 31;
/// Kind and length.
const HEADER: usize = 8;
/// Longest body, in bytes: a configuration of all devices is far smaller.
const LONGEST: usize = 1 << 20;

/// What the primary offers.
pub struct Offer {
    /// Silence after which the other side is suspected, at both sides.
    pub timeout: Duration,
    /// The machine.
    pub config: Config,
}

/// Why bytes are no offer.
#[derive(Debug, thiserror::Error)]
pub enum OfferError {
    #[error("the connection does not begin with an offer: the other side is no primary")]
    Kind,
    #[error("the offer claims {0} bytes; at most {LONGEST} are possible")]
    TooLong(u32),
    #[error("the offer is damaged (checksum)")]
    Checksum,
    #[error("the offer is not valid")]
    Body(#[from] state::FileError),
}

impl Offer {
    /// Its frame.
    ///
    /// # Errors
    /// When the configuration has no saved form.
    pub fn encode(&self) -> io::Result<Vec<u8>> {
        let mut to = Writer::begin(Vec::new())?;
        write_config(&mut to, &self.config)?;
        to.end(0)?;
        let timeout = u32::try_from(self.timeout.as_millis()).unwrap_or(u32::MAX);
        let body = [&timeout.to_le_bytes()[..], &to.into_inner()].concat();
        let length = u32::try_from(body.len()).map_err(io::Error::other)?;
        let mut frame = [&KIND.to_le_bytes()[..], &length.to_le_bytes(), &body].concat();
        frame.extend(crc32fast::hash(&frame).to_le_bytes());
        Ok(frame)
    }

    /// Read an offer from the beginning of `bytes`, and return its length, too; `None` when more
    /// bytes are needed.
    ///
    /// # Errors
    /// When these are not the beginning of an offer.
    pub fn decode(bytes: &[u8]) -> Result<Option<(Self, usize)>, OfferError> {
        let Some((header, rest)) = bytes.split_first_chunk::<HEADER>() else { return Ok(None) };
        let [k0, k1, k2, k3, l0, l1, l2, l3] = *header;
        if u32::from_le_bytes([k0, k1, k2, k3]) != KIND {
            return Err(OfferError::Kind);
        }
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        let size = usize::try_from(length).unwrap_or(usize::MAX);
        if size > LONGEST {
            return Err(OfferError::TooLong(length));
        }
        let (Some(covered), Some(body), Some(crc)) =
            (bytes.get(..HEADER + size), rest.get(..size), rest.get(size..size + 4))
        else {
            return Ok(None);
        };
        if crc32fast::hash(covered).to_le_bytes() != crc {
            return Err(OfferError::Checksum);
        }
        let (timeout, stream) = body.split_first_chunk::<4>().ok_or(OfferError::Kind)?;
        let mut frames = Frames::begin(stream).map_err(state::FileError::from)?;
        let config = frames.config()?;
        frames.end()?;
        let timeout = Duration::from_millis(u32::from_le_bytes(*timeout).into());
        Ok(Some((Self { timeout, config }, HEADER + size + 4)))
    }
}
