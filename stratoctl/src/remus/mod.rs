//! Replication (Remus): the part that the confined monitor cannot do itself. It dials, asks the
//! witness and runs fences; it decides nothing.
//!
//! ```text
//! serve    answers a monitor's needs       wire     needs and answers as JSON
//! witness  who has won a term              fence    makes sure that the peer does not run
//! dial     connects to the backup          protection   what the registry keeps of all this
//! beats    the second path
//! ```
pub mod beats;
pub mod bounded;
pub mod dial;
pub mod fence;
pub mod protection;
pub mod serve;
pub mod tls;
pub mod uuid;
pub mod wire;
pub mod witness;

/// Why there is no answer. The question may have had its effect nevertheless, so it is repeated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unknown(String);

impl Unknown {
    /// With the cause, as a text for people.
    pub fn new(why: impl Into<String>) -> Self {
        Self(why.into())
    }
}
