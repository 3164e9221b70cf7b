//! Names of domains: each is also the name of a directory.
use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// 1 to 64 letters, digits, `_`, `.`, `+` and `-`, the first a letter or digit (ASCII).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

/// Not a valid name.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{0} is not a valid domain name: 1 to 64 letters, digits, '_', '.', '+' and '-', the first a letter \
     or digit"
)]
pub struct BadName(String);

impl Name {
    /// Length of the longest name, in bytes.
    pub const MAX_BYTES: usize = 64;

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = BadName;

    fn from_str(word: &str) -> Result<Self, BadName> {
        let first = word.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
        let rest = word.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.+-".contains(&b));
        if first && rest && word.len() <= Self::MAX_BYTES {
            return Ok(Self(word.to_owned()));
        }
        // The invalid text must not fill or control the terminal.
        let mut shown: String =
            word.chars().take(Self::MAX_BYTES).flat_map(char::escape_debug).collect();
        if word.chars().nth(Self::MAX_BYTES).is_some() {
            shown.push_str("...");
        }
        Err(BadName(format!("'{shown}'")))
    }
}

impl TryFrom<String> for Name {
    type Error = BadName;

    fn try_from(word: String) -> Result<Self, BadName> {
        word.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_plain_words() {
        for good in ["a", "7", "web-1", "a.b+c_d", &"x".repeat(64)] {
            assert_eq!(good.parse::<Name>().map(String::from).as_deref(), Ok(good));
        }
        let bad = ["", ".", "..", "../x", "-n", ".lock", "a/b", "a b", "a\0b", "ä", "😀", "a\n"];
        let long = "x".repeat(10_240);
        for word in bad.into_iter().chain([long.as_str()]) {
            let said = word.parse::<Name>().expect_err("not a name").to_string();
            assert!(said.contains("not a valid domain name") && said.len() < 512, "{said}");
            assert!(!said.contains(['\0', '\n', '\x1b']), "{said:?}");
        }
    }
}
