//! Numbers and bytes written in hexadecimal for people. As strings they also survive tools that
//! store numbers as floating point, such as jq.
use std::fmt::{self, LowerHex, Write};

use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{Error, Visitor},
};

/// A number, as `"0x1f"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash, PartialOrd, Ord)]
pub struct Hex<T>(pub T);

impl<T> From<T> for Hex<T> {
    fn from(value: T) -> Self {
        Self(value)
    }
}

impl<T: LowerHex> Serialize for Hex<T> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{:#x}", self.0))
    }
}

impl<'de, T: TryFrom<u128>> Deserialize<'de> for Hex<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_str(Text(|text: &str| {
            let value = number(text).and_then(|value| T::try_from(value).ok());
            let bits = size_of::<T>() * 8;
            value
                .map(Self)
                .ok_or_else(|| format!("{text:.40?} is not a number of {bits} bits like \"0x1f\""))
        }))
    }
}

/// Exactly `N` bytes, as `"00ff"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HexArray<const N: usize>(pub [u8; N]);

impl<const N: usize> Serialize for HexArray<N> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&digits(&self.0))
    }
}

impl<'de, const N: usize> Deserialize<'de> for HexArray<N> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let HexBytes(bytes) = HexBytes::deserialize(from)?;
        let length = bytes.len();
        let array = bytes
            .try_into()
            .map_err(|_| D::Error::custom(format_args!("{length} bytes; {N} were expected")))?;
        Ok(Self(array))
    }
}

impl<const N: usize> fmt::Display for HexArray<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&digits(&self.0))
    }
}

impl From<u128> for HexArray<16> {
    fn from(number: u128) -> Self {
        Self(number.to_be_bytes())
    }
}

impl From<HexArray<16>> for u128 {
    fn from(bytes: HexArray<16>) -> Self {
        Self::from_be_bytes(bytes.0)
    }
}

/// Any number of bytes, as `"00ff"`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HexBytes(pub Vec<u8>);

impl Serialize for HexBytes {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&digits(&self.0))
    }
}

impl<'de> Deserialize<'de> for HexBytes {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_str(Text(|text: &str| {
            let (pairs, []) = text.as_bytes().as_chunks::<2>() else {
                return Err("an odd number of hexadecimal digits".to_owned());
            };
            let mut bytes = Vec::with_capacity(pairs.len());
            for [high, low] in pairs {
                let byte = digit(*high).zip(digit(*low)).map(|(high, low)| high << 4 | low);
                bytes.push(byte.ok_or("bytes that are not lower-case hexadecimal")?);
            }
            Ok(Self(bytes))
        }))
    }
}

/// Reads a string in place, without a copy: a saved vCPU has hundreds of numbers.
struct Text<F>(F);

impl<T, F: FnOnce(&str) -> Result<T, String>> Visitor<'_> for Text<F> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
        (self.0)(text).map_err(E::custom)
    }
}

/// The number written as `text`; `None` if it has more than 128 bits.
fn number(text: &str) -> Option<u128> {
    let digits = text.strip_prefix("0x").filter(|digits| !digits.is_empty())?;
    digits.bytes().try_fold(0, |value: u128, byte| {
        let digit = u128::from(digit(byte)?);
        (value >> 124 == 0).then_some(value << 4 | digit)
    })
}

/// One spelling for each value: lower case only.
fn digit(byte: u8) -> Option<u8> {
    match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    }
}

fn digits(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_bytes_come_back_as_they_were() {
        for value in [0, 1, 0x1f, u64::MAX] {
            let text = serde_json::to_string(&Hex(value)).unwrap();
            assert_eq!(serde_json::from_str::<Hex<u64>>(&text).unwrap(), Hex(value), "{text}");
        }
        let bytes = HexArray([0, 0x7f, 0xff]);
        let text = serde_json::to_string(&bytes).unwrap();
        assert_eq!(text, "\"007fff\"");
        assert_eq!(serde_json::from_str::<HexArray<3>>(&text).unwrap(), bytes);
    }

    #[test]
    fn what_is_no_such_number_or_too_long_is_refused() {
        for text in ["1", "\"1\"", "\"0x\"", "\"0xg\"", "\"0x+1\"", "\"0xFF\"", "\"0x100\"", "null"]
        {
            assert!(serde_json::from_str::<Hex<u8>>(text).is_err(), "{text}");
        }
        for (digits, fits) in [("f".repeat(32), true), ("1".repeat(33), false)] {
            let read = serde_json::from_str::<Hex<u128>>(&format!("\"0x{digits}\""));
            assert_eq!(read.is_ok(), fits, "{digits}");
        }
        for text in ["\"0\"", "\"+1\"", "\"FF\"", "\"ffff\"", "\"\"", "[255]"] {
            assert!(serde_json::from_str::<HexArray<1>>(text).is_err(), "{text}");
        }
    }
}
