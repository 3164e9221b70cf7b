//! What the checkpoints of a protected machine cost.
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Ask a primary for its last checkpoints.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QueryReplicationEpochs {
    /// List only checkpoints after the one of this `number`: what follows an earlier reply.
    pub after: Option<u64>,
}

/// Reply to [`QueryReplicationEpochs`]. The distributions are those of the checkpoints that are
/// kept, 8192 at most, whatever `after` was.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ReplicationEpochs {
    /// Microseconds from the beginning of a checkpoint to that of the next one.
    pub period_us: Distribution,
    /// Microseconds for which a checkpoint stopped the guest.
    pub pause_us: Distribution,
    /// Pages that a checkpoint copied.
    pub dirty_pages: Distribution,
    /// Bytes of output that were held when a checkpoint began.
    pub held_bytes: Distribution,
    /// Microseconds of encoding.
    pub encode_us: Distribution,
    /// Microseconds from the end of encoding to the acknowledgement.
    pub ack_us: Distribution,
    /// Microseconds from its beginning to the release of the output that it covers.
    pub commit_lag_us: Distribution,
    /// What was sent since the protection began.
    pub sent: ReplicationSent,
    /// The checkpoints, oldest first, 1000 at most: ask again with the `number` of the last one.
    pub epochs: Vec<ReplicationEpoch>,
}

/// The distribution of a figure.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Distribution {
    /// How many values there are; without any, all others are 0.
    pub count: u64,
    /// Their mean.
    pub mean: u64,
    /// Half of them are not above this.
    pub p50: u64,
    /// 95 of 100 are not above this.
    pub p95: u64,
    /// 99 of 100 are not above this.
    pub p99: u64,
    /// The largest.
    pub max: u64,
}

/// What was sent to a backup: pages by how they were sent, and bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ReplicationSent {
    /// Pages as they are.
    pub raw: u64,
    /// Pages that are zero.
    pub zero: u64,
    /// Pages that had not changed.
    pub same: u64,
    /// Pages as the difference to what was sent before.
    pub delta: u64,
    /// Pages packed by themselves.
    pub lz4: u64,
    /// Bytes of all of it, the machine's state included.
    pub wire: u64,
}

/// A checkpoint.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ReplicationEpoch {
    /// Its number in this process, from 1.
    pub number: u64,
    /// The term.
    pub term: u64,
    /// Its number in the term.
    pub epoch: u64,
    /// When it began, in microseconds of the host's clock since the monitor started.
    pub at_us: u64,
    /// Since the one before began, in microseconds; absent for the first one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub period_us: Option<u64>,
    /// How long it stopped the guest, in microseconds. These four are parts of that.
    pub pause_us: u64,
    /// Until vCPUs and devices had stopped.
    pub park_us: u64,
    /// Finding out which pages had been written.
    pub harvest_us: u64,
    /// Copying them.
    pub copy_us: u64,
    /// Reading the state of devices and vCPUs.
    pub state_us: u64,
    /// Pages that it copied.
    pub dirty_pages: u64,
    /// Bytes of output that were held when it began.
    pub held_bytes: u64,
    /// How long encoding took, in microseconds; absent until it is done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encode_us: Option<u64>,
    /// Bytes that it was on the wire.
    pub wire_bytes: u64,
    /// From the end of encoding to its acknowledgement, in microseconds; absent until then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ack_us: Option<u64>,
    /// From its beginning to the release of its output, in microseconds; absent until then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit_lag_us: Option<u64>,
}
