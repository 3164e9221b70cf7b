//! What the people on the host's side hear of a disk's trouble.
use std::{fmt::Display, io, sync::Arc};

use super::stats::{BlockStats, count};
use crate::log_limit::log_seldom;

/// Called with the device's id, the error, and whether it was a write, on the I/O thread, for each
/// request that the host could not carry out. Must not block.
pub type OnError = Arc<dyn Fn(&str, &io::Error, bool) + Send + Sync>;

/// Speaks for one device.
pub(super) struct Reporter {
    id: String,
    on_error: Option<OnError>,
}

impl Reporter {
    pub fn new(id: &str, on_error: Option<OnError>) -> Self {
        Self { id: id.into(), on_error }
    }

    /// The driver made a mistake.
    pub fn invalid(&self, stats: &BlockStats, what: &dyn Display) {
        count(&stats.invalid_operations, 1);
        log_seldom!(warn, "{}: the guest's driver made a mistake: {what}", self.id);
    }

    /// The host could not do its part.
    pub fn failed(&self, error: &io::Error, write: bool) {
        let what = if write { "write" } else { "read" };
        log_seldom!(error, "{}: {what} failed: {error}", self.id);
        if let Some(hook) = &self.on_error {
            hook(&self.id, error, write);
        }
    }
}
