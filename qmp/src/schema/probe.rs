//! Supported options, devices and types, which clients query before they use them.
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

super::plain! {
    /// Ask for the migration capabilities.
    QueryMigrateCapabilities
    /// Ask for the CPU models.
    QueryCpuDefinitions
    /// Ask for the accelerators.
    QueryAccelerators
}

/// Ask for the types of devices, objects and machines.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QomListTypes {
    /// Only those derived from this one.
    pub implements: Option<String>,
    /// Abstract types, too; they are not listed.
    pub r#abstract: Option<bool>,
}

/// One item of the reply to [`QomListTypes`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ObjectTypeInfo {
    /// Its name.
    pub name: String,
    /// Its parent type.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
}

/// Ask for the properties of a type of device.
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
    /// Its type: `str`, `uint64`, `size` or `bool`.
    pub r#type: String,
}

/// Ask for the keys of the command line's flags.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QueryCommandLineOptions {
    /// Only this flag.
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
    /// The type of its value.
    pub r#type: CommandLineParameterType,
}

/// Type of a key's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "named by the protocol")]
pub enum CommandLineParameterType {
    String,
    Boolean,
    Number,
    Size,
}

/// One item of the reply to [`QueryMigrateCapabilities`], and of the command that sets them.
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
    /// Whether its guests can migrate to any other host.
    pub migration_safe: bool,
    /// Features that this host lacks for it.
    pub unavailable_features: Vec<String>,
    /// Whether it is deprecated.
    pub deprecated: bool,
}

/// Reply to [`QueryAccelerators`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AcceleratorInfo {
    /// The one in use.
    pub enabled: Accelerator,
    /// All that this monitor supports.
    pub present: Vec<Accelerator>,
}

/// What runs vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "named by the protocol")]
pub enum Accelerator {
    Kvm,
}
