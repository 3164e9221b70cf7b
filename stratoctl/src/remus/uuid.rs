//! UUIDs: of lineages and incarnations.
use std::{fmt, fs, io, str::FromStr};

use replication::Lineage;
use serde::{Deserialize, Serialize};

/// A UUID: 36 characters in lower case as text, 128 bits otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Uuid(pub u128);

/// Not a UUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be like 01234567-89ab-cdef-0123-456789abcdef")]
pub struct BadUuid;

impl Uuid {
    /// A random one.
    ///
    /// # Errors
    /// When the host has no random numbers to give.
    pub fn random() -> io::Result<Self> {
        let text = fs::read_to_string("/proc/sys/kernel/random/uuid")?;
        text.trim().parse().map_err(io::Error::other)
    }
}

impl FromStr for Uuid {
    type Err = BadUuid;

    fn from_str(text: &str) -> Result<Self, BadUuid> {
        let dash = |at: usize| matches!(at, 8 | 13 | 18 | 23);
        let fits = |(at, byte): (usize, u8)| match dash(at) {
            true => byte == b'-',
            false => byte.is_ascii_hexdigit(),
        };
        if text.len() != 36 || !text.bytes().enumerate().all(fits) {
            return Err(BadUuid);
        }
        u128::from_str_radix(&text.replace('-', ""), 16).map(Self).map_err(|_| BadUuid)
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Lineage(self.0).fmt(f)
    }
}

impl TryFrom<String> for Uuid {
    type Error = BadUuid;

    fn try_from(text: String) -> Result<Self, BadUuid> {
        text.parse()
    }
}

impl From<Uuid> for String {
    fn from(uuid: Uuid) -> Self {
        uuid.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_number_are_the_same() {
        let text = "01234567-89ab-cdef-0123-456789abcdef";
        let uuid: Uuid = text.parse().unwrap();
        assert_eq!(uuid, Uuid(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef));
        assert_eq!(uuid.to_string(), text);
        assert_eq!(Uuid(1).to_string(), "00000000-0000-0000-0000-000000000001");
        assert_eq!(text.to_uppercase().parse(), Ok(uuid));
        let random = Uuid::random().unwrap();
        assert_eq!(random.to_string().parse(), Ok(random));
        for wrong in ["", "0", &text.replace('-', "_"), &format!("{text}0"), "ä"] {
            assert_eq!(wrong.parse::<Uuid>(), Err(BadUuid), "{wrong}");
        }
    }
}
