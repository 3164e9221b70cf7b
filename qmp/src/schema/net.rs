//! Network back-ends, and descriptors passed by clients.
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Create a network back-end.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NetdevAdd {
    /// Unique id, 1 to 255 bytes.
    pub id: String,
    /// Kind of back-end: `tap`, which is also the default.
    pub r#type: Option<String>,
    /// Name of an existing tap device.
    pub ifname: Option<String>,
    /// A descriptor of a tap device: its number, or its name from [`Getfd`].
    pub fd: Option<String>,
    /// Several descriptors, joined by `:`.
    pub fds: Option<String>,
    /// Queue pairs, 1 to 16.
    pub queues: Option<u16>,
    /// Whether to use vhost-net; only `false`.
    pub vhost: Option<bool>,
    /// Descriptor of vhost-net, as `fd`; refused.
    pub vhostfd: Option<String>,
    /// Several, joined by `:`; refused.
    pub vhostfds: Option<String>,
    /// Character device of a vhost-user back-end; refused.
    pub chardev: Option<String>,
    /// Script that brings the tap device up; only `no`.
    pub script: Option<String>,
    /// Script that takes it down; only `no`.
    pub downscript: Option<String>,
    /// Search domains for the user-mode back-end; refused.
    pub dnssearch: Option<String>,
    /// Whether to translate MAC addresses; only `false`.
    pub macnat: Option<bool>,
}

/// Remove a network back-end.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NetdevDel {
    /// Its id.
    pub id: String,
}

/// Connect or disconnect a NIC's cable.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SetLink {
    /// Id of the NIC.
    pub name: String,
    /// Connected.
    pub up: bool,
}

/// Close a descriptor that [`Getfd`] named and that is still unused.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Closefd {
    /// The name.
    pub fdname: String,
}

/// Name the descriptor that came with this command or ahead of it (SCM_RIGHTS). At most 32 named
/// descriptors are kept.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Getfd {
    /// The name, 1 to 255 bytes, not beginning with a digit; one given before is replaced.
    pub fdname: String,
}

/// Make the NICs announce themselves, so that switches learn their location: `rounds` times, the
/// first time at once. Replaces announcements that are under way.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AnnounceSelf {
    /// Milliseconds between the first two rounds.
    pub initial: u32,
    /// Most milliseconds between two rounds.
    pub max: u32,
    /// Number of rounds.
    pub rounds: u32,
    /// Milliseconds by which the interval grows each time.
    pub step: u32,
    /// Ids of NICs; all if absent.
    pub interfaces: Option<Vec<String>>,
}
