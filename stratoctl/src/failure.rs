//! What went wrong, and the command that helps.
use std::fmt;

/// An error for people: what is the matter, and what to do about it.
#[derive(Debug)]
pub struct Failure {
    what: String,
    hint: Option<String>,
}

impl Failure {
    /// Only what is the matter.
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), hint: None }
    }

    /// With what to do.
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

/// What to do about `error`, if anything in its chain of causes knows.
pub fn hint_of(error: &anyhow::Error) -> Option<&str> {
    let own = error.downcast_ref::<Failure>().and_then(|f| f.hint.as_deref());
    own.or_else(|| {
        error.chain().find_map(|e| e.downcast_ref::<Failure>().and_then(|f| f.hint.as_deref()))
    })
}
