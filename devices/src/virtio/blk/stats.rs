//! A disk's counters, for `query-blockstats`.
use std::sync::atomic::{AtomicU64, Ordering};

/// Counters since the disk was plugged in. They wrap at 2^64 and need no order among each other.
#[derive(Debug, Default)]
#[expect(missing_docs, reason = "the names are QMP's")]
pub struct BlockStats {
    pub rd_bytes: AtomicU64,
    pub wr_bytes: AtomicU64,
    pub rd_operations: AtomicU64,
    pub wr_operations: AtomicU64,
    pub flush_operations: AtomicU64,
    pub unmap_operations: AtomicU64,
    pub failed_rd_operations: AtomicU64,
    pub failed_wr_operations: AtomicU64,
    pub failed_flush_operations: AtomicU64,
    pub failed_unmap_operations: AtomicU64,
    /// Invalid chains and requests, which a correct driver does not send.
    pub invalid_operations: AtomicU64,
    /// Requests that the host has not finished.
    pub in_flight: AtomicU64,
}

impl BlockStats {
    /// Reset all to 0, for another disk. Nothing is in flight then.
    pub(super) fn reset(&self) {
        let others = [&self.rd_bytes, &self.wr_bytes, &self.invalid_operations];
        for counter in self.operations().into_iter().chain(others) {
            counter.store(0, Ordering::Relaxed);
        }
    }

    fn operations(&self) -> [&AtomicU64; 8] {
        [
            &self.rd_operations,
            &self.wr_operations,
            &self.flush_operations,
            &self.unmap_operations,
            &self.failed_rd_operations,
            &self.failed_wr_operations,
            &self.failed_flush_operations,
            &self.failed_unmap_operations,
        ]
    }
}

/// Add to a counter that only one thread changes.
pub(super) fn count(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
}
