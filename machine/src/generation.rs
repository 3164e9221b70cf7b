//! The generation id (Microsoft, "Virtual Machine Generation ID", 2012): 16 bytes of guest memory
//! that change each time a machine is restored, so that two guests restored from the same save do
//! not produce the same random numbers. A reset keeps them.
use std::{fmt, io, ops::Range};

use devices::{Memory, random};
use vm_memory::{Bytes, GuestAddress};

use crate::{boot::BootError, layout};

/// A random UUID (RFC 9562, version 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GenerationId([u8; 16]);

/// Where in guest memory it is.
pub(crate) fn places() -> impl Iterator<Item = Range<u64>> {
    std::iter::once(layout::GENERATION_ID..layout::GENERATION_ID + 16)
}

impl GenerationId {
    /// A new, unique id.
    ///
    /// # Errors
    /// When the host cannot provide random numbers.
    pub(crate) fn random() -> io::Result<Self> {
        let mut bytes: [u8; 16] = random::bytes()?;
        bytes[6] = bytes[6] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        Ok(Self(bytes))
    }

    /// Write it where the guest looks for it.
    ///
    /// # Errors
    /// When there is no memory there.
    pub(crate) fn write(self, memory: &Memory) -> Result<(), BootError> {
        let address = layout::GENERATION_ID;
        memory
            .write_slice(&self.in_memory(), GuestAddress(address))
            .map_err(|source| BootError::Tables { address, source })
    }

    /// The memory layout of a GUID: its first three fields are little-endian.
    fn in_memory(self) -> [u8; 16] {
        let Self([a, b, c, d, e, f, g, h, rest @ ..]) = self;
        let [i, j, k, l, m, n, o, p] = rest;
        [d, c, b, a, f, e, h, g, i, j, k, l, m, n, o, p]
    }
}

/// The usual form of 36 characters.
impl fmt::Display for GenerationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, byte) in self.0.iter().enumerate() {
            if matches!(at, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shown_as_text_and_laid_out_as_a_guid() {
        let id = GenerationId([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
        assert_eq!(id.to_string(), "00010203-0405-0607-0809-0a0b0c0d0e0f");
        assert_eq!(id.in_memory(), [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15]);
    }

    #[test]
    fn each_is_another_and_says_that_it_is_random() {
        let (one, other) = (GenerationId::random().unwrap(), GenerationId::random().unwrap());
        assert_ne!(one, other);
        let text = one.to_string();
        assert_eq!(text.as_bytes()[14], b'4', "version: {text}");
        assert!(b"89ab".contains(&text.as_bytes()[19]), "variant: {text}");
    }
}
