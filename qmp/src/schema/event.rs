//! Events, which the monitor sends to every client without a request.
use std::time::{SystemTime, UNIX_EPOCH};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    FailoverTimes, MigrationStatus, ReplicationNeed, ReplicationOutcome, ReplicationSide,
    ReplicationStatus, ReplicationWord,
};

/// An event and its data. The data is always there, `{}` if empty, as in StratoVirt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "event", content = "data", rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Event {
    /// The guest has been paused.
    Stop {},
    /// The guest runs again.
    Resume {},
    /// The machine is off; the process ends next, or the machine stays halted.
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
    /// The guest reported that it has crashed.
    GuestPanicked {
        /// The monitor's reaction.
        action: GuestPanicAction,
    },
    /// A save has changed its status.
    Migration {
        /// The new status.
        status: MigrationStatus,
    },
    /// A part of the guest's memory is lost.
    MemoryFailure {
        /// Who was notified.
        recipient: MemoryFailureRecipient,
        /// The monitor's reaction.
        action: MemoryFailureAction,
        /// How it happened.
        flags: MemoryFailureFlags,
        /// Which part, and why, in readable form.
        reason: String,
    },
    /// The guest has inflated or deflated its balloon; sent once a second at most.
    BalloonChange {
        /// Bytes that are not in the balloon.
        actual: u64,
    },
    /// The same, under StratoVirt's name.
    BalloonChanged {
        /// Bytes that are not in the balloon.
        actual: u64,
    },
    /// Replication has changed its state.
    ReplicationState {
        /// The new state.
        state: ReplicationStatus,
        /// The state before.
        previous: ReplicationStatus,
        /// The term.
        term: u64,
        /// The last checkpoint.
        epoch: u64,
        /// Why.
        reason: String,
    },
    /// A side of replication asks its agent, which answers with `replication-answer`. The question
    /// comes again, under the same number, until it is answered.
    ReplicationNeeds {
        /// Number of the question.
        nonce: u64,
        /// What is needed.
        need: ReplicationNeed,
        /// UUID of the domain.
        lineage: String,
        /// The term that it is about.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        term: Option<u64>,
        /// With `claim`: how the term is to be closed.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        word: Option<ReplicationWord>,
        /// With `claim`: for which side.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        side: Option<ReplicationSide>,
        /// With `claim`: UUID of the process for which it is closed.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        incarnation: Option<String>,
        /// With `settle`: UUID of the process that was promoted.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        winner: Option<String>,
        /// With `settle`: what became of it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        to: Option<ReplicationOutcome>,
        /// With `settle` and `yielded`: UUID of the process that has the guest.
        #[serde(rename = "yielded-to", default, skip_serializing_if = "Option::is_none")]
        yielded_to: Option<String>,
    },
    /// The guest runs here now, from the last checkpoint of another process.
    ReplicationFailover {
        /// The first term that it may be protected in from here.
        term: u64,
        /// The checkpoint.
        epoch: u64,
        /// How long it took.
        times: FailoverTimes,
    },
    /// A disk failed a request.
    BlockIoError {
        /// Id of the disk.
        device: String,
        /// Node name of its back-end.
        #[serde(rename = "node-name", default, skip_serializing_if = "Option::is_none")]
        node_name: Option<String>,
        /// The guest's request.
        operation: IoOperationType,
        /// The guest's result.
        action: BlockErrorAction,
        /// Whether the host's storage is full.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        nospace: Option<bool>,
        /// The host's error, in readable form.
        reason: String,
    },
}

/// Why a machine was shut down or reset.
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

/// The reaction to a guest's crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "named by the protocol")]
pub enum GuestPanicAction {
    Pause,
    Poweroff,
    Run,
}

/// Who was notified of lost memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "named by the protocol")]
pub enum MemoryFailureRecipient {
    Hypervisor,
    Guest,
}

/// The reaction to lost memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "named by the protocol")]
pub enum MemoryFailureAction {
    Ignore,
    Inject,
    Fatal,
    Reset,
}

/// Circumstances of lost memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct MemoryFailureFlags {
    /// Whether the guest was accessing it.
    pub action_required: bool,
    /// Whether it happened during the handling of another loss.
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

/// The reaction to a disk error.
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
    /// The current time; zero if the host's clock is before 1970.
    pub fn now() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { seconds: now.as_secs(), microseconds: now.subsec_micros() }
    }
}
