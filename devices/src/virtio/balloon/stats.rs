//! Memory statistics of a guest (virtio 1.3, section 5.5.6.3).
use std::time::SystemTime;

/// Statistics of a guest, which may omit any of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stats {
    /// When the guest reported them.
    pub updated: SystemTime,
    values: [Option<u64>; NAMES.len()],
}

/// Bytes of one statistic: a tag and a value.
pub(super) const ENTRY: usize = 10;

/// QEMU's names of the statistics, by tag. Sizes are in bytes.
const NAMES: [&str; 16] = [
    "stat-swap-in",
    "stat-swap-out",
    "stat-major-faults",
    "stat-minor-faults",
    "stat-free-memory",
    "stat-total-memory",
    "stat-available-memory",
    "stat-disk-caches",
    "stat-htlb-pgalloc",
    "stat-htlb-pgfail",
    "stat-oom-kills",
    "stat-alloc-stalls",
    "stat-scan-async",
    "stat-scan-direct",
    "stat-reclaim-async",
    "stat-reclaim-direct",
];

impl Stats {
    /// Parse the entries in `bytes`. Unknown tags are skipped; of two entries with the same tag the
    /// last one counts.
    pub(super) fn parse(bytes: &[u8]) -> Self {
        let mut values = [None; NAMES.len()];
        for entry in bytes.chunks_exact(ENTRY) {
            let Some((tag, value)) = entry.split_first_chunk() else { continue };
            let known = values.get_mut(usize::from(u16::from_le_bytes(*tag)));
            if let (Some(known), Ok(value)) = (known, value.try_into()) {
                *known = Some(u64::from_le_bytes(value));
            }
        }
        Self { updated: SystemTime::now(), values }
    }

    /// Each statistic by its name; `None`: the guest does not report it.
    pub fn each(&self) -> impl Iterator<Item = (&'static str, Option<u64>)> + '_ {
        NAMES.into_iter().zip(self.values)
    }
}
