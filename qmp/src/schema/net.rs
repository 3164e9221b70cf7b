//! Network back-ends and descriptors handed over.
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Create a network back-end.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NetdevAdd {
    /// Unique id, 1 to 255 bytes.
    pub id: String,
    /// Kind of back-end: `tap`, which is also meant if absent.
    pub r#type: Option<String>,
    /// Name of an existing tap device.
    pub ifname: Option<String>,
    /// A descriptor of a tap device: its number, or its name by [`Getfd`].
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

/// Plug a NIC's cable in or out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SetLink {
    /// Id of the NIC.
    pub name: String,
    /// In.
    pub up: bool,
}

/// Close a descriptor that [`Getfd`] gave a name and nobody has used.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Closefd {
    /// The name.
    pub fdname: String,
}

/// Give a name to the descriptor that came with this command or ahead of it (SCM_RIGHTS). At most 32
/// wait under a name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Getfd {
    /// The name, 1 to 255 bytes, not beginning with a digit; one given before is replaced.
    pub fdname: String,
}

/// Have the NICs announce where they are, so that switches learn it: `rounds` times, the first time
/// at once. Takes the place of announcements that are under way.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AnnounceSelf {
    /// Milliseconds between the first two.
    pub initial: u32,
    /// Milliseconds between any two, at most.
    pub max: u32,
    /// How many times.
    pub rounds: u32,
    /// Milliseconds by which the time between two grows.
    pub step: u32,
    /// Ids of NICs; all if absent.
    pub interfaces: Option<Vec<String>>,
}
