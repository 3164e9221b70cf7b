//! The error of a command.
use serde::{Deserialize, Serialize};

/// QMP error classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "named by the protocol")]
pub enum ErrorClass {
    GenericError,
    CommandNotFound,
    DeviceNotActive,
    DeviceNotFound,
    KVMMissingCap,
}

/// Longest description, bytes: a client's input is quoted, not returned in full.
const MAX_DESC: usize = 1024;

/// The one error type a handler may return.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{desc}")]
pub struct Error {
    class: ErrorClass,
    desc: String,
}

impl Error {
    /// An error of `class`.
    pub fn new(class: ErrorClass, desc: impl Into<String>) -> Self {
        let mut desc = desc.into();
        if desc.len() > MAX_DESC {
            desc.truncate(desc.floor_char_boundary(MAX_DESC));
            desc.push_str("...");
        }
        Self { class, desc }
    }

    /// An error of the generic class.
    pub fn text(desc: impl Into<String>) -> Self {
        Self::new(ErrorClass::GenericError, desc)
    }

    /// [`Error::text`] from any error, with the whole chain of causes.
    pub fn generic(error: &dyn std::error::Error) -> Self {
        let mut desc = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            desc += &format!(": {cause}");
            source = cause.source();
        }
        Self::text(desc)
    }

    /// Its class.
    pub fn class(&self) -> ErrorClass {
        self.class
    }
}
