//! Ids and names.
use std::{
    borrow::{Borrow, Cow},
    fmt,
    ops::Deref,
    str::FromStr,
};

use super::ValueError;

/// Id of a device, a back-end, an I/O thread or another object, or the name of the machine: 1 to
/// 255 bytes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id(Cow<'static, str>);

impl Id {
    /// Most bytes.
    pub const MAX: usize = 255;

    /// One of this program's own words, in a `const`.
    ///
    /// # Panics
    /// When `word` is no id.
    pub(crate) const fn fixed(word: &'static str) -> Self {
        assert!(!word.is_empty() && word.len() <= Self::MAX);
        Self(Cow::Borrowed(word))
    }

    /// The word.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Deref for Id {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for Id {
    fn borrow(&self) -> &str {
        self
    }
}

impl FromStr for Id {
    type Err = ValueError;

    fn from_str(word: &str) -> Result<Self, ValueError> {
        word.to_owned().try_into()
    }
}

impl TryFrom<String> for Id {
    type Error = ValueError;

    fn try_from(word: String) -> Result<Self, ValueError> {
        text(&word, Self::MAX)?;
        Ok(Self(word.into()))
    }
}

impl From<Id> for String {
    fn from(Id(word): Id) -> Self {
        word.into_owned()
    }
}

impl PartialEq<str> for Id {
    fn eq(&self, word: &str) -> bool {
        **self == *word
    }
}

impl PartialEq<&str> for Id {
    fn eq(&self, word: &&str) -> bool {
        **self == **word
    }
}

impl PartialEq<String> for Id {
    fn eq(&self, word: &String) -> bool {
        **self == **word
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Name of a tap, valid for a Linux network interface (`dev_valid_name`): 1 to 15 bytes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TapName(String);

impl TapName {
    /// Most bytes: `IFNAMSIZ` less the terminator.
    pub const MAX: usize = 15;

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TapName {
    type Err = ValueError;

    fn from_str(word: &str) -> Result<Self, ValueError> {
        let name = text(word, Self::MAX)?;
        let bad = |c: char| matches!(c, '/' | ':' | '%') || c.is_whitespace();
        match name == "." || name == ".." || name.contains(bad) {
            true => Err(ValueError::NoInterfaceName),
            false => Ok(Self(name.to_owned())),
        }
    }
}

impl TryFrom<String> for TapName {
    type Error = ValueError;

    fn try_from(name: String) -> Result<Self, ValueError> {
        name.parse()
    }
}

impl From<TapName> for String {
    fn from(TapName(name): TapName) -> Self {
        name
    }
}

impl fmt::Display for TapName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A text of 1 to `most` bytes.
///
/// # Errors
/// When it is empty or too long, or has a NUL character.
pub fn text(word: &str, most: usize) -> Result<&str, ValueError> {
    match word.len() {
        0 => Err(ValueError::Empty),
        length if length > most => Err(ValueError::TooLong(length, most)),
        _ if word.contains('\0') => Err(ValueError::Nul),
        _ => Ok(word),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_has_1_to_255_bytes_and_no_nul() {
        for word in ["a", "disk 0", "ü", &"x".repeat(255)] {
            assert_eq!(word.parse::<Id>().unwrap(), word);
        }
        let says = |word: &str| Id::try_from(word.to_owned()).unwrap_err().to_string();
        assert_eq!(says(""), "must not be empty");
        assert_eq!(says(&"x".repeat(256)), "256 bytes long, at most 255 are allowed");
        assert_eq!(says("a\0b"), "must not contain a NUL character");
    }

    #[test]
    fn a_tap_has_a_name_that_linux_takes() {
        for name in ["tap0", "a", "fifteen-bytes-x"] {
            assert_eq!(name.parse::<TapName>().unwrap().as_str(), name);
        }
        for name in ["", ".", "..", "a/b", "a:b", "a%d", "a b", "a\0", "sixteen-bytes-xy"] {
            assert!(name.parse::<TapName>().is_err(), "{name:?}");
        }
    }
}
