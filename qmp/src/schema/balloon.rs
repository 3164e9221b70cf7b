//! The memory balloon.
use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

super::plain! {
    /// Ask how much memory the guest has outside of its balloon.
    QueryBalloon
}

/// Ask the guest to keep only this much memory, by inflating its balloon. This takes time, and the
/// guest may not comply: BALLOON_CHANGE reports the progress.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// Bytes; more than the guest has means all of it.
    pub value: u64,
}

/// Reply to [`QueryBalloon`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BalloonInfo {
    /// Bytes that are not in the balloon.
    pub actual: u64,
}

/// Ask for a property of an object. Supported are `guest-stats`, `guest-stats-polling-interval` and
/// `reclaimed-memory` of a balloon.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QomGet {
    /// The object: `/machine/peripheral/ID`, or the id alone.
    pub path: String,
    /// The property.
    pub property: String,
}

/// Set a property of an object: `guest-stats-polling-interval` of a balloon.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QomSet {
    /// The object: `/machine/peripheral/ID`, or the id alone.
    pub path: String,
    /// The property.
    pub property: String,
    /// Its new value.
    pub value: Value,
}

/// The value of `guest-stats`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct GuestStats {
    /// Each value by its name; 2^64 - 1 when the guest does not report it.
    pub stats: BTreeMap<String, u64>,
    /// When the guest reported them, in seconds since 1970; 0: not yet.
    pub last_update: u64,
}

/// The value of `reclaimed-memory`: what has become of the memory that the guest did not use, in
/// bytes since this process began.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ReclaimedMemory {
    /// Given back to the host. The same memory counts again when it is given back again.
    pub returned: u64,
    /// Still occupied: in a hugetlbfs, in too many pieces, or refused by the host.
    pub refused: u64,
}
