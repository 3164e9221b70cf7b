//! Back-ends of disks.
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

super::plain! {
    /// Ask for the disks.
    QueryBlock
}

/// Ask for the disks' I/O statistics.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct QueryBlockstats {
    /// By back-ends rather than devices. A disk is one of each, so the answer is the same.
    pub query_nodes: Option<bool>,
}

/// Ask for the back-ends.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QueryNamedBlockNodes {
    /// Without the back-ends below them, of which there are none.
    pub flat: Option<bool>,
}

/// Create a disk's back-end.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct BlockdevAdd {
    /// Unique name, 1 to 255 bytes.
    pub node_name: String,
    /// Where its data is stored.
    pub file: BlockdevFile,
    /// Image format: `raw`, which is also the default; but without it, an image that looks like
    /// another format is refused.
    pub driver: Option<String>,
    /// Refuse writes.
    pub read_only: Option<bool>,
    /// The host's caching.
    pub cache: Option<BlockdevCache>,
    /// Handling of discards.
    pub discard: Option<BlockdevDiscard>,
    /// Handling of writes of zeroes: only `off`.
    pub detect_zeroes: Option<BlockdevDetectZeroes>,
    /// Requests per second, up to 1000000; 0 is unlimited.
    #[serde(rename = "throttling.iops-total")]
    pub throttling_iops_total: Option<u64>,
    /// Bytes per second; 0 is unlimited.
    #[serde(rename = "throttling.bps-total")]
    pub throttling_bps_total: Option<u64>,
    /// Only `disk`.
    pub media: Option<String>,
    /// The name again, as in StratoVirt.
    pub id: Option<String>,
    /// Backing file of a format that has one; refused.
    pub backing: Option<Value>,
    /// Format-specific options; refused.
    pub options: Option<Value>,
    /// Cache of a qcow2 image, bytes; refused.
    pub l2_cache_size: Option<u64>,
    /// Cache of a qcow2 image, bytes; refused.
    pub refcount_cache_size: Option<u64>,
}

/// Where a back-end's data is stored.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BlockdevFile {
    /// `file` or `host_device`; each accepts both.
    pub driver: Option<String>,
    /// Path of a file or block device.
    pub filename: String,
    /// How requests are carried out.
    pub aio: Option<BlockdevAio>,
}

/// How requests are carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "named by the protocol")]
pub enum BlockdevAio {
    Native,
    IoUring,
    Threads,
    Off,
}

/// The host's caching of a back-end.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct BlockdevCache {
    /// Bypass the page cache.
    pub direct: Option<bool>,
    /// Ignore flushes.
    pub no_flush: Option<bool>,
}

/// Handling of discards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "named by the protocol")]
pub enum BlockdevDiscard {
    Ignore,
    Unmap,
}

/// Handling of writes of zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "named by the protocol")]
pub enum BlockdevDetectZeroes {
    Off,
    On,
    Unmap,
}

/// Remove a back-end that no device uses.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct BlockdevDel {
    /// Its name.
    pub node_name: String,
}

/// Change a disk's size while it is in use. One of the two names is required.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct BlockResize {
    /// Id of the disk.
    pub device: Option<String>,
    /// Name of its back-end.
    pub node_name: Option<String>,
    /// Bytes.
    pub size: u64,
}

/// One item of the reply to [`QueryBlock`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BlockInfo {
    /// Id of the disk.
    pub device: String,
    /// Id or path of the front-end device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qdev: Option<String>,
    /// Always `unknown`, as in QEMU.
    pub r#type: String,
    /// Whether the medium can be removed.
    pub removable: bool,
    /// Whether the guest has locked the tray.
    pub locked: bool,
    /// The medium.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inserted: Option<BlockDeviceInfo>,
    /// Whether a request has failed.
    #[serde(rename = "io-status", skip_serializing_if = "Option::is_none")]
    pub io_status: Option<BlockDeviceIoStatus>,
}

/// Whether a disk works.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "named by the protocol")]
pub enum BlockDeviceIoStatus {
    Ok,
    Failed,
    Nospace,
}

/// A back-end: one item of the reply to [`QueryNamedBlockNodes`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BlockDeviceInfo {
    /// Path.
    pub file: String,
    /// Its name.
    #[serde(rename = "node-name", skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// Refuses writes.
    pub ro: bool,
    /// Image format.
    pub drv: String,
    /// Backing files below.
    pub backing_file_depth: u64,
    /// Encrypted.
    pub encrypted: bool,
    /// Handling of writes of zeroes.
    pub detect_zeroes: BlockdevDetectZeroes,
    /// Limits per second; 0 is unlimited.
    pub bps: u64,
    /// Of reads alone.
    pub bps_rd: u64,
    /// Of writes alone.
    pub bps_wr: u64,
    /// Requests.
    pub iops: u64,
    /// Of reads alone.
    pub iops_rd: u64,
    /// Of writes alone.
    pub iops_wr: u64,
    /// The host's caching.
    pub cache: BlockdevCacheInfo,
    /// Always 0: no threshold.
    pub write_threshold: u64,
    /// The image.
    pub image: ImageInfo,
}

/// The host's caching of a back-end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct BlockdevCacheInfo {
    /// Writes are volatile until a flush.
    pub writeback: bool,
    /// Bypasses the page cache.
    pub direct: bool,
    /// Flushes are ignored.
    pub no_flush: bool,
}

/// An image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    /// Path.
    pub filename: String,
    /// Format.
    pub format: String,
    /// Bytes the guest sees.
    pub virtual_size: u64,
    /// Bytes on the host's disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub actual_size: Option<u64>,
}

/// One item of the reply to [`QueryBlockstats`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct BlockStats {
    /// Id of the disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Id or path of the front-end device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qdev: Option<String>,
    /// Name of its back-end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// The counters.
    pub stats: BlockDeviceStats,
}

/// I/O statistics of a disk since it was plugged in.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[expect(
    missing_docs,
    reason = "named by the protocol; times are nanoseconds; zoned and timed ones stay empty"
)]
pub struct BlockDeviceStats {
    pub rd_bytes: u64,
    pub wr_bytes: u64,
    pub zone_append_bytes: u64,
    pub unmap_bytes: u64,
    pub rd_operations: u64,
    pub wr_operations: u64,
    pub zone_append_operations: u64,
    pub flush_operations: u64,
    pub unmap_operations: u64,
    pub rd_total_time_ns: u64,
    pub wr_total_time_ns: u64,
    pub zone_append_total_time_ns: u64,
    pub flush_total_time_ns: u64,
    pub unmap_total_time_ns: u64,
    pub wr_highest_offset: u64,
    pub rd_merged: u64,
    pub wr_merged: u64,
    pub zone_append_merged: u64,
    pub unmap_merged: u64,
    pub failed_rd_operations: u64,
    pub failed_wr_operations: u64,
    pub failed_zone_append_operations: u64,
    pub failed_flush_operations: u64,
    pub failed_unmap_operations: u64,
    pub invalid_rd_operations: u64,
    pub invalid_wr_operations: u64,
    pub invalid_zone_append_operations: u64,
    pub invalid_flush_operations: u64,
    pub invalid_unmap_operations: u64,
    pub account_invalid: bool,
    pub account_failed: bool,
    pub timed_stats: Vec<Value>,
}
