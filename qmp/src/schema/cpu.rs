//! vCPUs.
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

super::plain! {
    /// Ask for the vCPUs, as in QEMU before version 6; container runtimes still use it.
    QueryCpus
    /// Ask for the vCPUs.
    QueryCpusFast
    /// Ask for the places of present and possible vCPUs.
    QueryHotpluggableCpus
}

/// The place of a vCPU.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct CpuInstanceProperties {
    /// Socket of the machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket_id: Option<u32>,
    /// Die of the socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub die_id: Option<u32>,
    /// Cluster of the die.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_id: Option<u32>,
    /// Core of the cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub core_id: Option<u32>,
    /// Thread of the core.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub thread_id: Option<u32>,
}

/// One item of the reply to [`QueryCpus`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CpuInfo {
    /// Index of the vCPU.
    #[serde(rename = "CPU")]
    pub cpu: u32,
    /// Architecture.
    pub arch: CpuInfoArch,
    /// Whether it is the monitor's default vCPU; true for all, as in StratoVirt.
    pub current: bool,
    /// Whether the guest has halted it, as far as the monitor knows.
    pub halted: bool,
    /// Its place.
    pub props: CpuInstanceProperties,
    /// Path in the object tree.
    pub qom_path: String,
    /// Host thread id.
    pub thread_id: u64,
}

/// Architectures of [`CpuInfo`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "named by the protocol")]
pub enum CpuInfoArch {
    X86,
}

/// One item of the reply to [`QueryCpusFast`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct CpuInfoFast {
    /// Index of the vCPU.
    pub cpu_index: u32,
    /// Path in the object tree.
    pub qom_path: String,
    /// Host thread id.
    pub thread_id: u64,
    /// Its place.
    pub props: CpuInstanceProperties,
    /// Architecture.
    pub target: SysEmuTarget,
}

/// Architectures of the protocol that this monitor can emulate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "named by the protocol")]
pub enum SysEmuTarget {
    #[serde(rename = "x86_64")]
    X86_64,
}

/// One item of the reply to [`QueryHotpluggableCpus`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct HotpluggableCpu {
    /// Its place.
    pub props: CpuInstanceProperties,
    /// Path in the object tree; absent while there is no vCPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qom_path: Option<String>,
    /// Driver for `device_add`.
    pub r#type: String,
    /// How many vCPUs one `device_add` would add.
    pub vcpus_count: u32,
}
