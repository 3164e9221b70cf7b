//! Protecting a machine by a backup on another host.
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

super::plain! {
    /// Ask for the state of replication.
    QueryReplication
}

/// Protect the machine: copy it to a backup, and hold its output until the backup could continue
/// from there. The reply comes at once; REPLICATION_STATE reports the progress.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ReplicationStart {
    /// The backup: `unix:SOCKET`. If it is left out, REPLICATION_NEEDS asks for each connection.
    pub uri: Option<String>,
    /// Directory with `ca-cert.pem`, `client-cert.pem` and `client-key.pem`: TLS 1.3 is spoken on
    /// each connection. Or `off`: TCP connections to other hosts may be unencrypted.
    pub tls: Option<String>,
    /// With a directory: the name or address that the backup's certificate has to be for. Initially
    /// the address of the connection.
    pub tls_hostname: Option<String>,
    /// Milliseconds from one checkpoint to the next. Initially 200.
    pub interval: Option<u64>,
    /// Instead of `interval`: adapt it to the guest, from 2 to so many milliseconds. A checkpoint
    /// begins as soon as output waits for it, unless checkpoints take more than a tenth of the
    /// guest's time; without output, after 200 ms at most, unless checkpoints take that much.
    pub max_period: Option<u64>,
    /// Stop the guest when a checkpoint is due and the backup has not acknowledged the two before;
    /// otherwise the guest runs on, and the next checkpoint gets larger. Initially false.
    pub timer: Option<bool>,
    /// UUID of the domain, the same at both sides and for all processes; otherwise made up.
    pub lineage: Option<String>,
    /// Identity of the witness that decides which side may run the guest, as the backup knows it.
    pub witness: Option<String>,
    /// Kind of the fence, as the backup knows it, where there is no witness.
    pub fence: Option<String>,
    /// What to do when the backup is lost: `witness` where there is a witness or a fence, otherwise
    /// `stall`.
    pub on_backup_loss: Option<OnBackupLoss>,
    /// What to do when output has been held for `ack-limit`. Initially `solo`.
    pub on_backup_slow: Option<OnBackupSlow>,
    /// Milliseconds from one sign of life to the next, at both sides; a third of
    /// `heartbeat-timeout` at most. Initially a tenth.
    pub heartbeat_interval: Option<u64>,
    /// Milliseconds without a byte from the peer after which it is suspected. Initially 1000.
    pub heartbeat_timeout: Option<u64>,
    /// Milliseconds for which output may be held although the backup is heard. Initially 10,000.
    pub ack_limit: Option<u64>,
    /// Bytes of memory that may be copied aside until the backup has acknowledged them. From three
    /// quarters on the guest is slowed down; beyond it, it is stopped until there is room. Initially
    /// 268,435,456.
    pub max_staging: Option<u64>,
    /// Bytes of output that may be held; likewise. Initially 67,108,864.
    pub max_held: Option<u64>,
    /// Whether memory is sent compressed. Initially true.
    pub compression: Option<bool>,
    /// Whether output, of the network and of consoles, is held until the backup could continue from
    /// it. Initially true; false needs `unsafe`.
    pub network: Option<bool>,
    /// Whether what the guest writes to its disks is sent. Initially true; false needs `unsafe`, and
    /// images that both hosts share: after a failover the guest finds there what it has written after
    /// its last checkpoint.
    pub disks: Option<bool>,
    /// Send nothing and protect nothing, to measure what protection costs. Needs `unsafe`.
    pub blackhole: Option<ReplicationBlackhole>,
    /// Accept what does not protect the machine.
    pub r#unsafe: Option<bool>,
}

/// What is done for a backup that does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ReplicationBlackhole {
    /// Everything but sending: checkpoints are taken and encoded, and output is held until then.
    Checkpoint,
    /// Only finding out which pages have changed: the least that any checkpoint costs.
    Harvest,
}

/// What a primary does when it has lost its backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnBackupLoss {
    /// Ask the witness, or fence the backup, and continue alone.
    Witness,
    /// Hold output until somebody decides.
    Stall,
    /// Stop the guest and end.
    Stop,
    /// Continue alone without asking; only where the backup promotes by hand only.
    Continue,
}

/// What a primary does when its backup is slow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnBackupSlow {
    /// Leave the backup, and continue alone.
    Solo,
    /// Wait.
    Stall,
}

/// Send signs of life by a second path, too, and take them from there: a side is suspected once both
/// paths are silent. For the primary and for the backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ReplicationHeartbeatPath {
    /// Name of a descriptor, which came with getfd on the same connection: a socket for datagrams. A
    /// primary's is connected to where its backup's is bound.
    pub fd: String,
}

/// End the protection: the guest continues here, and its backup ends.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ReplicationStop {
    /// Also where nobody can tell which side has the guest. Unsafe: it may run twice.
    pub force: Option<bool>,
}

/// To a primary: move the guest to the backup. To a backup: take it over without the primary's
/// help.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ReplicationFailover {
    /// Also where nobody can tell which side has the guest. Unsafe: it may run twice.
    pub force: Option<bool>,
}

/// Answer an event REPLICATION_NEEDS.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ReplicationAnswer {
    /// Number of the question.
    pub nonce: u64,
    /// What was needed.
    pub need: ReplicationNeed,
    /// What was found.
    pub result: ReplicationResult,
    /// With `connected`: name of the descriptor, which came with getfd on the same connection: a
    /// connected stream socket, or what is to be read from if there is also `write-fd`.
    pub fd: Option<String>,
    /// With `connected`: name of the descriptor to write to, where it is another one.
    pub write_fd: Option<String>,
    /// With `record`: the record as it is now; absent or null while it is open.
    pub record: Option<ReplicationRecord>,
    /// With `unknown`: why.
    pub reason: Option<String>,
}

/// What a side of replication needs of its agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ReplicationNeed {
    /// A connection to the backup.
    Connect,
    /// The record of a term at the witness.
    Look,
    /// To close a term at the witness, if it is open.
    Claim,
    /// To report to the witness what became of a promotion.
    Settle,
    /// To make sure that the peer does not run.
    Fence,
}

/// How an agent answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ReplicationResult {
    /// Here is a connection.
    Connected,
    /// This is the record.
    Record,
    /// A later term is decided.
    Superseded,
    /// The peer certainly does not run.
    Down,
    /// It could not find out. The question stays open.
    Unknown,
}

/// A witness's record of a term.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ReplicationRecord {
    /// How the term was closed.
    pub word: ReplicationWord,
    /// The side that closed it, or for which it was closed.
    pub side: ReplicationSide,
    /// UUID of that process.
    pub incarnation: String,
    /// With `promote`: what became of it, once that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settled: Option<ReplicationOutcome>,
    /// With `yielded`: UUID of the process that has the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub yielded_to: Option<String>,
}

/// How a term is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ReplicationWord {
    /// The primary continues without a backup.
    Solo,
    /// The backup runs the guest.
    Promote,
    /// A later process starts the guest from its disk.
    Cold,
    /// The guest runs nowhere.
    End,
}

/// A side of a term.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ReplicationSide {
    /// Ran the guest when the term began.
    Primary,
    /// Holds its last checkpoint.
    Backup,
}

/// What became of a promotion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ReplicationOutcome {
    /// The guest runs at the backup.
    Running,
    /// It never ran there.
    Yielded,
}

/// States of a side of replication.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ReplicationStatus {
    /// Nothing is protected.
    #[default]
    Off,
    /// Primary: the backup is greeted.
    Connecting,
    /// The backup is being filled.
    Syncing,
    /// Primary: protected, but the backup may not know it yet.
    Arming,
    /// Primary: output is held until the backup could continue from it.
    Protected,
    /// Primary: checkpoints are taken, and sent nowhere. Nothing is protected.
    Blackhole,
    /// Primary: the backup is suspected.
    Stalled,
    /// The term was won: the guest continues here without a backup.
    Degraded,
    /// Primary: the backup may run the guest, which is parked here.
    Fenced,
    /// Primary: the guest is moving to the backup.
    HandingOver,
    /// Backup: waits for a primary.
    Listening,
    /// Backup: is filled, and may not continue the guest yet.
    Ready,
    /// Backup: could continue the guest.
    Standby,
    /// Backup: the primary is suspected.
    Suspecting,
    /// Backup: about to run the guest.
    Promoting,
    /// Backup: cannot run the guest.
    Unfit,
    /// Backup: the guest is the other side's.
    Abandoned,
    /// Nothing more happens here.
    Over,
}

/// Reply to [`QueryReplication`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ReplicationInfo {
    /// Its state.
    pub state: ReplicationStatus,
    /// Which side this is; absent when nothing is replicated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<ReplicationSide>,
    /// UUID of the domain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lineage: Option<String>,
    /// UUID of this process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incarnation: Option<String>,
    /// The term that it is in, or that the next protection will use.
    pub term: u64,
    /// Number of the last checkpoint: begun at a primary, whole at a backup.
    pub epoch: u64,
    /// Primary: the last checkpoint that the backup has acknowledged.
    pub acked: u64,
    /// UUID of the process that the term binds this one to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
    /// Whether the backup may continue the guest: only a claim ends the term.
    pub armed: bool,
    /// Whether this side has claimed the term, or begun to fence the other one.
    pub claimed: bool,
    /// What it waits for, if its work depends on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting_for: Option<String>,
    /// How often the peer was suspected.
    pub stalls: u64,
    /// Signs of life that did not arrive in time.
    pub missed_beats: u64,
    /// Signs of life that have come by the second path.
    pub second_path_beats: u64,
    /// The longest silence of the peer in the last minute or two, in milliseconds.
    pub largest_gap: u64,
    /// Microseconds for which the last checkpoint stopped the guest.
    pub pause_us: u64,
    /// Pages in the last checkpoint.
    pub dirty_pages: u64,
    /// Bytes of output that are held.
    pub held_bytes: u64,
    /// Microseconds for which the oldest of them has waited.
    pub oldest_us: u64,
    /// What the first write to a page after a checkpoint costs the guest, in nanoseconds, as
    /// measured.
    pub fault_ns: u64,
    /// For how many percent of the time the guest is stopped, because a limit is near.
    pub throttle_percent: u64,
    /// Bytes of memory in checkpoints that are not acknowledged.
    pub staged_bytes: u64,
    /// Bytes sent to the backup.
    pub wire_bytes: u64,
    /// Primary: how far the first copy is, while it is being made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sync: Option<SyncProgress>,
    /// The last failover, if the guest came here by one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_failover: Option<FailoverTimes>,
}

/// How far a copy is. What changes meanwhile is copied once more, so the total may grow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SyncProgress {
    /// Bytes that were copied.
    pub done: u64,
    /// Bytes that are to be copied, those included.
    pub total: u64,
}

/// How long the parts of a failover took, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct FailoverTimes {
    /// From the last sign of life to the suspicion.
    pub detect_us: u64,
    /// From there to the decision.
    pub decide_us: u64,
    /// Of that, loading the state.
    pub apply_us: u64,
    /// From the decision to the guest's first step.
    pub run_us: u64,
}
