//! Errors for people: the cause, and the command that helps.
use std::fmt;

/// An error for people: the cause, and what to do about it.
#[derive(Debug)]
pub struct Failure {
    what: String,
    hint: Option<String>,
}

impl Failure {
    /// Only the cause.
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), hint: None }
    }

    /// The cause, and what to do about it.
    pub fn hint(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { what: what.into(), hint: Some(hint.into()) }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Failure {}

/// What to do about `error`, if an error in its chain of causes says so.
pub fn hint_of(error: &anyhow::Error) -> Option<&str> {
    let own = error.downcast_ref::<Failure>().and_then(|f| f.hint.as_deref());
    own.or_else(|| {
        error.chain().find_map(|e| e.downcast_ref::<Failure>().and_then(|f| f.hint.as_deref()))
    })
}
