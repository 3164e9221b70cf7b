//! Saving the machine's state.
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::MigrationCapabilityStatus;

super::plain! {
    /// Ask how far the save is.
    QueryMigrate
    /// Give up the save that is under way.
    MigrateCancel
    /// Ask for what `migrate-set-parameters` sets.
    QueryMigrateParameters
}

/// Set how saves are made, those under way included. What is left out stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct MigrateSetParameters {
    /// Milliseconds for which a guest that runs on, or moves, may be stopped: a stream goes on to copy
    /// what the guest changes until the rest takes no longer. 30 at first.
    pub downtime_limit: Option<u64>,
}

/// Set what saves into streams can do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrateSetCapabilities {
    /// What is to be on or off: `return-path`, with which the receiver answers, and hands the machine
    /// back if it cannot run it. On by default for `unix:`, off for `fd:` and `exec:`.
    pub capabilities: Vec<MigrationCapabilityStatus>,
}

/// Reply to [`QueryMigrateParameters`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationParameters {
    /// See [`MigrateSetParameters`].
    pub downtime_limit: u64,
}

/// Save the machine's state. The answer comes when it has been saved. After a save into a directory
/// the guest stays paused; after one into a stream, somebody else goes on with it (`postmigrate`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Migrate {
    /// Where to: `file:DIRECTORY`, `unix:SOCKET`, `fd:NAME` (of getfd) or `fd:NUMBER`,
    /// `exec:COMMAND`.
    pub uri: String,
    /// Let a running guest run on: it stops only for what it changes while its memory is copied.
    pub resume: Option<bool>,
    /// Save only what has changed since the save before, which had `track`.
    pub incremental: Option<bool>,
    /// Note what the guest changes from now on, so that the next save can be incremental.
    pub track: Option<bool>,
    /// Keep copies of the disks that the guest can write to with the memory, as they are at that moment:
    /// the save can be restored as often as one likes. Their blocks are shared where the file system can
    /// (FICLONE); elsewhere they are copied while the guest runs. For `file:DIRECTORY`.
    pub disks: Option<bool>,
}

/// Where a save is in its life. `setup` is told before the first one, too, as StratoVirt does it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "named by the protocol")]
pub enum MigrationStatus {
    #[default]
    Setup,
    Active,
    Cancelling,
    Completed,
    Failed,
    Canceled,
}

/// Reply to [`QueryMigrate`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationInfo {
    /// Where the last save is in its life.
    pub status: MigrationStatus,
    /// What has become of guest memory; absent before the first save.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ram: Option<MigrationStats>,
    /// What has become of the disks, in bytes of images; absent when they are not kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<MigrationStats>,
    /// Milliseconds since the save began, or that it took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_time: Option<u64>,
    /// Milliseconds for which the guest stood still, when it runs on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime: Option<u64>,
    /// The same in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_us: Option<u64>,
    /// False while the guest changes memory as quickly as it is copied, and the save waits for that to
    /// end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub converging: Option<bool>,
    /// Directory of the save that an incremental one would build on; absent when none is possible.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// Why the last save failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_desc: Option<String>,
}

/// Guest memory during a save.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationStats {
    /// Bytes written.
    pub transferred: u64,
    /// Bytes still to be looked at.
    pub remaining: u64,
    /// Bytes to look at in all; grows with what the guest changes meanwhile.
    pub total: u64,
    /// Pages that are zero and not written.
    pub duplicate: u64,
    /// Pages written.
    pub normal: u64,
    /// Bytes of a page.
    pub page_size: u64,
}
