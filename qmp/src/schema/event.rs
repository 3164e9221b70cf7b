//! Events: what the monitor tells every client unasked.
use std::time::{SystemTime, UNIX_EPOCH};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::MigrationStatus;

/// An event and its data. The data is always there, `{}` if empty, as StratoVirt has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "event", content = "data", rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Event {
    /// The guest has been paused.
    Stop {},
    /// The guest runs again.
    Resume {},
    /// The machine is off; the process ends next, or the machine stays as it is.
    Shutdown {
        /// Whether the guest asked for it.
        guest: bool,
        /// Why.
        reason: ShutdownCause,
    },
    /// The machine has been reset.
    Reset {
        /// Whether the guest asked for it.
        guest: bool,
        /// Why.
        reason: ShutdownCause,
    },
    /// The power button has been pressed.
    Powerdown {},
    /// A device is gone for good.
    DeviceDeleted {
        /// Its id.
        device: String,
        /// Its path in the object tree.
        path: String,
    },
    /// The guest said that it has crashed.
    GuestPanicked {
        /// What the monitor did about it.
        action: GuestPanicAction,
    },
    /// A save has begun, or has come to its end.
    Migration {
        /// Where it is in its life.
        status: MigrationStatus,
    },
    /// A part of the guest's memory is lost.
    MemoryFailure {
        /// Who was told.
        recipient: MemoryFailureRecipient,
        /// What was done about it.
        action: MemoryFailureAction,
        /// How it came about.
        flags: MemoryFailureFlags,
        /// Which part, and why, for people.
        reason: String,
    },
    /// The guest has put memory into its balloon, or taken it out: told once a second at most.
    BalloonChange {
        /// Bytes that are not in the balloon.
        actual: u64,
    },
    /// The same, as StratoVirt calls it.
    BalloonChanged {
        /// Bytes that are not in the balloon.
        actual: u64,
    },
    /// A disk failed a request.
    BlockIoError {
        /// Id of the disk.
        device: String,
        /// Node name of its back-end.
        #[serde(rename = "node-name", default, skip_serializing_if = "Option::is_none")]
        node_name: Option<String>,
        /// What the guest wanted.
        operation: IoOperationType,
        /// What the guest got.
        action: BlockErrorAction,
        /// Whether the host's storage is full.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        nospace: Option<bool>,
        /// The host's error, for people.
        reason: String,
    },
}

/// Why a machine went off or was reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "named by the protocol")]
pub enum ShutdownCause {
    HostError,
    HostQmpQuit,
    HostQmpSystemReset,
    HostSignal,
    GuestShutdown,
    GuestReset,
    GuestPanic,
}

/// What was done about a guest's crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "named by the protocol")]
pub enum GuestPanicAction {
    Pause,
    Poweroff,
    Run,
}

/// Who was told that memory is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "named by the protocol")]
pub enum MemoryFailureRecipient {
    Hypervisor,
    Guest,
}

/// What was done about lost memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "named by the protocol")]
pub enum MemoryFailureAction {
    Ignore,
    Inject,
    Fatal,
    Reset,
}

/// How memory was lost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct MemoryFailureFlags {
    /// Whether the guest was just using it.
    pub action_required: bool,
    /// Whether it happened while another loss was dealt with.
    pub recursive: bool,
}

/// Direction of a disk request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "named by the protocol")]
pub enum IoOperationType {
    Read,
    Write,
}

/// What was done about a disk error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "named by the protocol")]
pub enum BlockErrorAction {
    Ignore,
    Report,
    Stop,
}

/// When an event happened, by the host's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Timestamp {
    /// Seconds since 1970.
    pub seconds: u64,
    /// Microseconds of the current second.
    pub microseconds: u32,
}

impl Timestamp {
    /// This moment; zero if the host's clock is before 1970.
    pub fn now() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { seconds: now.as_secs(), microseconds: now.subsec_micros() }
    }
}
