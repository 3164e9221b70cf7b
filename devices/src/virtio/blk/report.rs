//! Reports a disk's errors on the host side.
use std::{fmt::Display, io, sync::Arc, time::Instant};

use super::stats::{BlockStats, count};
use crate::log_limit::{Limit, log_seldom};

/// Called on the I/O thread for a request that the host could not carry out, with the disk's name,
/// the error, and whether the request was a write. A guest can cause any number of errors, so it is
/// called at most once a second for reads, and once a second for writes. The log says how many
/// errors were left out, and the disk's counters include all of them. Must not block.
pub type OnError = Arc<dyn Fn(&str, &io::Error, bool) + Send + Sync>;

/// Reports for one device.
pub(super) struct Reporter {
    name: String,
    on_error: Option<OnError>,
    failed_reads: Limit,
    failed_writes: Limit,
}

impl Reporter {
    pub fn new(on_error: Option<OnError>) -> Self {
        let (failed_reads, failed_writes) = (Limit::new(), Limit::new());
        Self { name: String::new(), on_error, failed_reads, failed_writes }
    }

    /// Report under the disk name `name` from now on; nothing has been reported for it yet.
    pub fn rename(&mut self, name: String) {
        *self = Self { name, ..Self::new(self.on_error.take()) };
    }

    /// The driver made a mistake.
    pub fn invalid(&self, stats: &BlockStats, what: &dyn Display) {
        count(&stats.invalid_operations, 1);
        log_seldom!(warn, "{}: error of the guest's driver: {what}", self.name);
    }

    /// The host could not carry out a request.
    pub fn failed(&self, error: &io::Error, write: bool) {
        self.failed_at(Instant::now(), error, write);
    }

    fn failed_at(&self, now: Instant, error: &io::Error, write: bool) {
        let (what, limit) =
            if write { ("write", &self.failed_writes) } else { ("read", &self.failed_reads) };
        let Some(left_out) = limit.pass(now) else { return };
        log::error!("{}: {what} failed: {error}{left_out}", self.name);
        if let Some(hook) = &self.on_error {
            hook(&self.name, error, write);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use parking_lot::Mutex;

    use super::*;

    #[test]
    fn a_full_disk_is_reported_once_a_second_however_often_the_guest_tries() {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let sink = heard.clone();
        let hook: OnError =
            Arc::new(move |name, _, write| sink.lock().push((name.to_owned(), write)));
        let (mut full, mut other) = (Reporter::new(Some(hook.clone())), Reporter::new(Some(hook)));
        full.rename("vda".into());
        other.rename("vdb".into());
        let begin = Instant::now();
        let error = io::Error::from(io::ErrorKind::StorageFull);
        for ms in 0..3000 {
            full.failed_at(begin + Duration::from_millis(ms), &error, true);
        }
        assert_eq!(*heard.lock(), vec![(String::from("vda"), true); 3]);
        // Neither other errors of this disk nor those of another disk are suppressed.
        let soon = begin + Duration::from_millis(3000 - 1);
        full.failed_at(soon, &error, false);
        other.failed_at(soon, &error, true);
        full.rename("vdc".into());
        full.failed_at(soon, &error, true);
        let heard: Vec<_> = heard.lock().split_off(3);
        let expected = [("vda", false), ("vdb", true), ("vdc", true)];
        assert_eq!(heard, expected.map(|(name, write)| (name.to_owned(), write)));
    }
}
