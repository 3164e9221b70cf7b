//! The keyboard.
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Press keys together and release them. The only supported combination is ctrl, alt, delete.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct SendKey {
    /// The keys.
    pub keys: Vec<KeyValue>,
    /// How long they are held, milliseconds; ignored, they are released at once.
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
