//! What the people on the host's side hear of a disk's trouble.
use std::{
    fmt::Display,
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use super::stats::{BlockStats, count};

/// Called with the device's id, the error, and whether it was a write, on the I/O thread, for each
/// request that the host could not carry out. Must not block.
pub type OnError = Arc<dyn Fn(&str, &io::Error, bool) + Send + Sync>;

/// At most one line in this time.
const QUIET: Duration = Duration::from_secs(1);

/// Logs for one device, at a bounded rate: a guest can make as many mistakes as it likes.
pub(super) struct Reporter {
    id: String,
    on_error: Option<OnError>,
    last: Option<Instant>,
    suppressed: u64,
}

impl Reporter {
    pub fn new(id: &str, on_error: Option<OnError>) -> Self {
        Self { id: id.into(), on_error, last: None, suppressed: 0 }
    }

    /// The driver made a mistake.
    pub fn invalid(&mut self, stats: &BlockStats, what: &dyn Display) {
        count(&stats.invalid_operations, 1);
        if let Some(more) = self.may_speak() {
            log::warn!("{}: the guest's driver sent a {what}{more}", self.id);
        }
    }

    /// The host could not do its part.
    pub fn failed(&mut self, error: &io::Error, write: bool) {
        if let Some(more) = self.may_speak() {
            let what = if write { "write" } else { "read" };
            log::error!("{}: {what} failed: {error}{more}", self.id);
        }
        if let Some(hook) = &self.on_error {
            hook(&self.id, error, write);
        }
    }

    fn may_speak(&mut self) -> Option<Suppressed> {
        let now = Instant::now();
        if self.last.is_some_and(|last| now.duration_since(last) < QUIET) {
            self.suppressed = self.suppressed.saturating_add(1);
            return None;
        }
        self.last = Some(now);
        Some(Suppressed(std::mem::take(&mut self.suppressed)))
    }
}

struct Suppressed(u64);

impl Display for Suppressed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            0 => Ok(()),
            n => write!(f, " ({n} such lines left out)"),
        }
    }
}
