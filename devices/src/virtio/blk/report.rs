//! What the people on the host's side hear of a disk's trouble.
use std::{fmt::Display, io, sync::Arc};

use super::stats::{BlockStats, count};
use crate::log_limit::log_seldom;

/// Called with the disk's name, the error, and whether it was a write, on the I/O thread, for each
/// request that the host could not carry out. Must not block.
pub type OnError = Arc<dyn Fn(&str, &io::Error, bool) + Send + Sync>;

/// Speaks for one device.
pub(super) struct Reporter {
    name: String,
    on_error: Option<OnError>,
}

impl Reporter {
    pub fn new(on_error: Option<OnError>) -> Self {
        Self { name: String::new(), on_error }
    }

    /// It speaks for the disk `name` from now on.
    pub fn rename(&mut self, name: String) {
        self.name = name;
    }

    /// The driver made a mistake.
    pub fn invalid(&self, stats: &BlockStats, what: &dyn Display) {
        count(&stats.invalid_operations, 1);
        log_seldom!(warn, "{}: the guest's driver made a mistake: {what}", self.name);
    }

    /// The host could not do its part.
    pub fn failed(&self, error: &io::Error, write: bool) {
        let what = if write { "write" } else { "read" };
        log_seldom!(error, "{}: {what} failed: {error}", self.name);
        if let Some(hook) = &self.on_error {
            hook(&self.name, error, write);
        }
    }
}
