//! Saving the machine's state.
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::MigrationCapabilityStatus;

super::plain! {
    /// Ask for the progress of the save.
    QueryMigrate
    /// Cancel the save that is under way.
    MigrateCancel
    /// Ask for the settings of `migrate-set-parameters`.
    QueryMigrateParameters
}

/// Set parameters of saves, including those under way. Parameters left out stay as they are.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct MigrateSetParameters {
    /// Milliseconds for which a guest that runs on, or moves, may be stopped: a stream keeps
    /// copying what the guest changes until the rest takes no longer. Initially 30.
    pub downtime_limit: Option<u64>,
}

/// Set capabilities of saves into streams.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrateSetCapabilities {
    /// Capabilities to switch on or off: with `return-path`, the receiver answers, and returns the
    /// machine if it cannot run it. On by default for `unix:`, off for `fd:` and `exec:`.
    pub capabilities: Vec<MigrationCapabilityStatus>,
}

/// Reply to [`QueryMigrateParameters`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationParameters {
    /// See [`MigrateSetParameters`].
    pub downtime_limit: u64,
}

/// Save the machine's state. The reply comes when it has been saved. After a save into a directory
/// the guest stays paused; after one into a stream, the receiver resumes it (`postmigrate`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Migrate {
    /// Destination: `file:DIRECTORY`, `unix:SOCKET`, `fd:NAME` (of getfd) or `fd:NUMBER`,
    /// `exec:COMMAND`.
    pub uri: String,
    /// Keep a running guest running: it is stopped only to copy what it changed meanwhile.
    pub resume: Option<bool>,
    /// Save only what has changed since the previous save, which had `track`.
    pub incremental: Option<bool>,
    /// Track what the guest changes from now on, so that the next save can be incremental.
    pub track: Option<bool>,
    /// With the memory, keep copies of the disks that the guest can write to, as they are at that
    /// moment: the save can be restored any number of times. Their blocks are shared if the file
    /// system supports that (FICLONE); otherwise they are copied while the guest runs. For
    /// `file:DIRECTORY`.
    pub disks: Option<bool>,
}

/// Status of a save. `setup` is also reported before the first one, as in StratoVirt.
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
    /// Status of the last save.
    pub status: MigrationStatus,
    /// Progress of guest memory; absent before the first save.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ram: Option<MigrationStats>,
    /// Progress of the disks, in bytes of images; absent when they are not kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<MigrationStats>,
    /// Milliseconds since the save began, or its total duration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_time: Option<u64>,
    /// Milliseconds for which the guest was stopped, if it runs on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime: Option<u64>,
    /// The same in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_us: Option<u64>,
    /// False while the guest changes memory as fast as it is copied, so that the save cannot
    /// finish.
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
    /// Bytes still to be processed.
    pub remaining: u64,
    /// Bytes to process in total; grows with what the guest changes meanwhile.
    pub total: u64,
    /// Pages that are zero and not written.
    pub duplicate: u64,
    /// Pages written.
    pub normal: u64,
    /// Bytes of a page.
    pub page_size: u64,
}
