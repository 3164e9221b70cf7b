//! Commands, their replies and the events, one struct each: the arguments *are* the command.
//!
//! The types are the only definition of the names on the wire: serde reads and writes by them, and
//! `query-qmp-schema` is derived from them (see [`describe`]).
mod balloon;
mod block;
mod cpu;
pub mod describe;
mod device;
mod epochs;
mod event;
mod input;
mod introspect;
mod migrate;
mod net;
mod probe;
mod replication;
mod run_state;

pub use balloon::*;
pub use block::*;
pub use cpu::*;
pub use device::*;
pub use epochs::*;
pub use event::*;
pub use input::*;
pub use introspect::*;
pub use migrate::*;
pub use net::*;
pub use probe::*;
pub use replication::*;
pub use run_state::*;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// A command of the protocol.
pub trait Command: Serialize + DeserializeOwned + JsonSchema {
    /// Name on the wire.
    const NAME: &'static str;
    /// Type of a successful reply.
    type Return: Serialize + DeserializeOwned + JsonSchema;
}

macro_rules! commands {
    ($($name:literal $args:ident -> $ret:ty;)*) => {
        $(impl Command for $args {
            const NAME: &'static str = $name;
            type Return = $ret;
        })*
        /// Every command of the schema, in alphabetical order.
        pub const NAMES: &[&str] = &[$($name),*];

        /// An operation applied to every command.
        #[cfg(any(test, feature = "testing"))]
        pub(crate) trait EachCommand {
            fn command<C: Command>(&mut self);
            fn all(mut self) -> Self where Self: Sized {
                $(self.command::<$args>();)*
                self
            }
        }
    };
}

commands! {
    "announce-self"            AnnounceSelf           -> Empty;
    "balloon"                  Balloon                -> Empty;
    "block_resize"             BlockResize            -> Empty;
    "blockdev-add"             BlockdevAdd            -> Empty;
    "blockdev-del"             BlockdevDel            -> Empty;
    "closefd"                  Closefd                -> Empty;
    "cont"                     Cont                   -> Empty;
    "device-list-properties"   DeviceListProperties   -> Vec<ObjectPropertyInfo>;
    "device_add"               DeviceAdd              -> Empty;
    "device_del"               DeviceDel              -> Empty;
    "getfd"                    Getfd                  -> Empty;
    "human-monitor-command"    HumanMonitorCommand    -> String;
    "migrate"                  Migrate                -> Empty;
    "migrate-set-capabilities" MigrateSetCapabilities -> Empty;
    "migrate-set-parameters"   MigrateSetParameters   -> Empty;
    "migrate_cancel"           MigrateCancel          -> Empty;
    "netdev_add"               NetdevAdd              -> Empty;
    "netdev_del"               NetdevDel              -> Empty;
    "qmp_capabilities"         QmpCapabilities        -> Empty;
    "qom-get"                  QomGet                 -> serde_json::Value;
    "qom-list-types"           QomListTypes           -> Vec<ObjectTypeInfo>;
    "qom-set"                  QomSet                 -> Empty;
    "query-accelerators"       QueryAccelerators      -> AcceleratorInfo;
    "query-balloon"            QueryBalloon           -> BalloonInfo;
    "query-block"              QueryBlock             -> Vec<BlockInfo>;
    "query-blockstats"         QueryBlockstats        -> Vec<BlockStats>;
    "query-chardev"            QueryChardev           -> Vec<ChardevInfo>;
    "query-command-line-options" QueryCommandLineOptions -> Vec<CommandLineOptionInfo>;
    "query-commands"           QueryCommands          -> Vec<CommandInfo>;
    "query-cpu-definitions"    QueryCpuDefinitions    -> Vec<CpuDefinitionInfo>;
    "query-cpus"               QueryCpus              -> Vec<CpuInfo>;
    "query-cpus-fast"          QueryCpusFast          -> Vec<CpuInfoFast>;
    "query-events"             QueryEvents            -> Vec<EventInfo>;
    "query-hotpluggable-cpus"  QueryHotpluggableCpus  -> Vec<HotpluggableCpu>;
    "query-iothreads"          QueryIothreads         -> Vec<IoThreadInfo>;
    "query-kvm"                QueryKvm               -> KvmInfo;
    "query-machines"           QueryMachines          -> Vec<MachineInfo>;
    "query-migrate"            QueryMigrate           -> MigrationInfo;
    "query-migrate-capabilities" QueryMigrateCapabilities -> Vec<MigrationCapabilityStatus>;
    "query-migrate-parameters" QueryMigrateParameters -> MigrationParameters;
    "query-name"               QueryName              -> NameInfo;
    "query-named-block-nodes"  QueryNamedBlockNodes   -> Vec<BlockDeviceInfo>;
    "query-qmp-schema"         QueryQmpSchema         -> Vec<SchemaInfo>;
    "query-replication"        QueryReplication       -> ReplicationInfo;
    "query-replication-epochs" QueryReplicationEpochs -> ReplicationEpochs;
    "query-status"             QueryStatus            -> StatusInfo;
    "query-target"             QueryTarget            -> TargetInfo;
    "query-uuid"               QueryUuid              -> UuidInfo;
    "query-version"            QueryVersion           -> VersionInfo;
    "query-vm-generation-id"   QueryVmGenerationId    -> GuidInfo;
    "quit"                     Quit                   -> Empty;
    "replication-answer"       ReplicationAnswer      -> Empty;
    "replication-failover"     ReplicationFailover    -> Empty;
    "replication-heartbeat-path" ReplicationHeartbeatPath -> Empty;
    "replication-start"        ReplicationStart       -> Empty;
    "replication-stop"         ReplicationStop        -> Empty;
    "send-key"                 SendKey                -> Empty;
    "set_link"                 SetLink                -> Empty;
    "stop"                     Stop                   -> Empty;
    "system_powerdown"         SystemPowerdown        -> Empty;
    "system_reset"             SystemReset            -> Empty;
}

/// `{}`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Empty {}

/// A command without arguments.
macro_rules! plain {
    ($($(#[$doc:meta])* $name:ident)*) => {
        $($(#[$doc])*
        #[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
        #[serde(deny_unknown_fields)]
        pub struct $name {})*
    };
}
use plain;

#[cfg(test)]
mod tests;
