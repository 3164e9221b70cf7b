//! Properties and features of the monitor.
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

super::plain! {
    /// Ask for the version.
    QueryVersion
    /// Ask for the names of all commands.
    QueryCommands
    /// Ask for the names of all events.
    QueryEvents
    /// Ask for the types of all commands and events.
    QueryQmpSchema
    /// Ask for the VM's name.
    QueryName
    /// Ask for the VM's UUID.
    QueryUuid
    /// Ask for the generation id, which changes each time the machine is restored.
    QueryVmGenerationId
    /// Ask for the architecture.
    QueryTarget
    /// Ask for the machine types.
    QueryMachines
    /// Ask whether KVM is used.
    QueryKvm
    /// Ask for the I/O threads.
    QueryIothreads
    /// Ask for the character devices.
    QueryChardev
}

/// A line for QEMU's human monitor; the reply is text. Supported are `info balloon`, `info block`,
/// `info cpus`, `info name`, `info network`, `info snapshots`, `info status` and `info version`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct HumanMonitorCommand {
    /// The line.
    pub command_line: String,
    /// The vCPU that it is about; ignored, as no line is about one.
    pub cpu_index: Option<u64>,
}

/// Negotiate capabilities. Optional here, and may be repeated.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QmpCapabilities {
    /// Capabilities to enable, out of the greeting's (which has none).
    pub enable: Option<Vec<String>>,
}

/// Reply to [`QueryVersion`], and part of the greeting.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VersionInfo {
    /// The QEMU version whose protocol this is.
    pub qemu: VersionTriple,
    /// This program.
    pub package: String,
}

impl VersionInfo {
    /// This program's version. Clients (Kata Containers) require major 5 or newer.
    pub fn own() -> Self {
        Self {
            qemu: VersionTriple { micro: 0, minor: 0, major: 9 },
            package: concat!("StratoVirt-", env!("CARGO_PKG_VERSION")).into(),
        }
    }
}

/// A version number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "named by the protocol")]
pub struct VersionTriple {
    pub micro: u32,
    pub minor: u32,
    pub major: u32,
}

/// One item of the reply to [`QueryCommands`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CommandInfo {
    /// Its name.
    pub name: String,
}

/// One item of the reply to [`QueryEvents`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct EventInfo {
    /// Its name.
    pub name: String,
}

/// One item of the reply to [`QueryQmpSchema`]: a command, an event or a type. Its members depend
/// on `meta-type`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct SchemaInfo {
    /// Its name, by which others refer to it.
    pub name: String,
    /// Its kind.
    pub meta_type: SchemaMetaType,
    /// Of a command or event: type of the arguments or data.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub arg_type: Option<String>,
    /// Of a command: type of the reply.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ret_type: Option<String>,
    /// Of a builtin: its JSON type.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub json_type: Option<String>,
    /// Of an array: type of the items.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub element_type: Option<String>,
    /// Of an object: its members. Of an enum: its values.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub members: Option<Vec<SchemaMember>>,
    /// Of an enum: its values again, as QEMU had them before 6.2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub values: Option<Vec<String>>,
}

/// Kinds of [`SchemaInfo`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "named by the protocol")]
pub enum SchemaMetaType {
    Builtin,
    Enum,
    Array,
    Object,
    Command,
    Event,
}

/// A member of an object, or a value of an enum (which only has a name).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SchemaMember {
    /// Its name.
    pub name: String,
    /// Its type.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub r#type: Option<String>,
    /// Null if the member is optional.
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Value>")]
    pub default: Option<Value>,
}

/// Distinguishes a member that is null from an absent one.
fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

/// Reply to [`QueryName`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NameInfo {
    /// The name; absent if there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// Reply to [`QueryUuid`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct UuidInfo {
    /// The usual 36 characters; all zero if there is none.
    #[serde(rename = "UUID")]
    pub uuid: String,
}

/// Reply to [`QueryVmGenerationId`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct GuidInfo {
    /// The usual 36 characters.
    pub guid: String,
}

/// Reply to [`QueryTarget`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TargetInfo {
    /// The architecture.
    pub arch: super::SysEmuTarget,
}

/// Reply to [`QueryKvm`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct KvmInfo {
    /// In use.
    pub enabled: bool,
    /// KVM is available.
    pub present: bool,
}

/// One item of the reply to [`QueryMachines`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct MachineInfo {
    /// Value of `-machine`.
    pub name: String,
    /// Whether it is the default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub is_default: Option<bool>,
    /// Most vCPUs.
    pub cpu_max: u32,
    /// Whether vCPUs can be plugged in.
    pub hotpluggable_cpus: bool,
    /// Whether `-numa` works.
    pub numa_mem_supported: bool,
    /// Whether it is deprecated.
    pub deprecated: bool,
    /// Whether the guest finds ACPI tables.
    pub acpi: bool,
}

/// One item of the reply to [`QueryIothreads`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct IoThreadInfo {
    /// Its id.
    pub id: String,
    /// Host thread id.
    pub thread_id: u64,
    /// Longest busy wait, nanoseconds; 0 is none.
    pub poll_max_ns: u64,
    /// How the busy wait grows.
    pub poll_grow: u64,
    /// How it shrinks.
    pub poll_shrink: u64,
    /// Most requests per batch; 0 is the engine's choice.
    pub aio_max_batch: u64,
}

/// One item of the reply to [`QueryChardev`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ChardevInfo {
    /// Its id.
    pub label: String,
    /// Its back-end, in readable form: `pty:/dev/pts/3`.
    pub filename: String,
    /// Whether a front-end device is attached.
    pub frontend_open: bool,
}
