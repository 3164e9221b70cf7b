//! The keyboard.
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Press keys together and let them go. The keyboard has one combination: ctrl, alt, delete.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct SendKey {
    /// The keys.
    pub keys: Vec<KeyValue>,
    /// How long they are held, milliseconds; they are let go at once.
    pub hold_time: Option<u64>,
}

/// A key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct KeyValue {
    /// How it is named.
    pub r#type: KeyValueKind,
    /// Its name.
    pub data: QKeyCode,
}

/// Ways to name a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "named by the protocol")]
pub enum KeyValueKind {
    Qcode,
}

/// Keys.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "named by the protocol")]
pub enum QKeyCode {
    Alt,
    Ctrl,
    Delete,
}
