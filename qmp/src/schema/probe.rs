//! What the monitor's programs and devices take: asked by clients before they use them.
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

super::plain! {
    /// Ask what a migration can be told to do.
    QueryMigrateCapabilities
    /// Ask for the CPU models.
    QueryCpuDefinitions
    /// Ask what can run vCPUs.
    QueryAccelerators
}

/// Ask for the types of devices, objects and machines.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QomListTypes {
    /// Only those under this one.
    pub implements: Option<String>,
    /// Those of which there are no instances, too; they are not told.
    pub r#abstract: Option<bool>,
}

/// One item of the reply to [`QomListTypes`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ObjectTypeInfo {
    /// Its name.
    pub name: String,
    /// The type above it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
}

/// Ask what a type of device takes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DeviceListProperties {
    /// Its name.
    pub typename: String,
}

/// One item of the reply to [`DeviceListProperties`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ObjectPropertyInfo {
    /// Its name.
    pub name: String,
    /// What it takes: `str`, `uint64`, `size` or `bool`.
    pub r#type: String,
}

/// Ask what the flags of the command line take.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QueryCommandLineOptions {
    /// Only this one.
    pub option: Option<String>,
}

/// One item of the reply to [`QueryCommandLineOptions`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CommandLineOptionInfo {
    /// Its name, without a dash.
    pub option: String,
    /// Its keys.
    pub parameters: Vec<CommandLineParameterInfo>,
}

/// A key of a flag.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CommandLineParameterInfo {
    /// Its name.
    pub name: String,
    /// What it takes.
    pub r#type: CommandLineParameterType,
}

/// What a key of a flag takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "named by the protocol")]
pub enum CommandLineParameterType {
    String,
    Boolean,
    Number,
    Size,
}

/// One item of the reply to [`QueryMigrateCapabilities`], and of what sets them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrationCapabilityStatus {
    /// Its name.
    pub capability: String,
    /// Whether it is on.
    pub state: bool,
}

/// One item of the reply to [`QueryCpuDefinitions`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct CpuDefinitionInfo {
    /// Value of `-cpu`.
    pub name: String,
    /// Its type.
    pub typename: String,
    /// Whether it is the same on all hosts.
    pub r#static: bool,
    /// Whether its guests can go to any other host.
    pub migration_safe: bool,
    /// What this host lacks for it.
    pub unavailable_features: Vec<String>,
    /// Whether it will go away.
    pub deprecated: bool,
}

/// Reply to [`QueryAccelerators`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AcceleratorInfo {
    /// The one in use.
    pub enabled: Accelerator,
    /// All that this monitor knows.
    pub present: Vec<Accelerator>,
}

/// What runs vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "named by the protocol")]
pub enum Accelerator {
    Kvm,
}
