//! The memory balloon.
use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

super::plain! {
    /// Ask how much memory the guest has, as its balloon leaves it.
    QueryBalloon
}

/// Ask the guest to leave itself this much memory, by putting the rest into its balloon. It takes its
/// time, and may not do it: BALLOON_CHANGE tells how far it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// Bytes; more than the guest has means all it has.
    pub value: u64,
}

/// Reply to [`QueryBalloon`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BalloonInfo {
    /// Bytes that are not in the balloon.
    pub actual: u64,
}

/// Ask for a property of an object. There are `guest-stats` and `guest-stats-polling-interval` of a
/// balloon.
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
    /// Each by its name; 2^64 - 1 when the guest does not tell it.
    pub stats: BTreeMap<String, u64>,
    /// When the guest told them, in seconds since 1970; 0: it has told nothing yet.
    pub last_update: u64,
}
