//! Counters of a network interface.
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Counters of one direction, as the guest sees it. Read from any thread.
#[derive(Debug, Default)]
pub struct Counters {
    /// Frames passed on.
    pub packets: AtomicU64,
    /// Their bytes, without virtio headers.
    pub bytes: AtomicU64,
    /// Frames and buffers dropped.
    pub drops: AtomicU64,
}

/// Counters of an interface.
#[derive(Debug, Default)]
pub struct NetStats {
    /// Host to guest.
    pub rx: Counters,
    /// Guest to host.
    pub tx: Counters,
}

impl Counters {
    pub(super) fn passed(&self, bytes: usize) {
        self.packets.fetch_add(1, Relaxed);
        self.bytes.fetch_add(bytes as u64, Relaxed);
    }

    pub(super) fn dropped(&self) {
        self.drops.fetch_add(1, Relaxed);
    }
}
