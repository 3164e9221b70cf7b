//! The run state, and commands that change it.
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

super::plain! {
    /// Let the guest run.
    Cont
    /// Pause the guest.
    Stop
    /// End the process at once.
    Quit
    /// Reset the machine.
    SystemReset
    /// Press the power button.
    SystemPowerdown
    /// Ask for the run state.
    QueryStatus
}

/// Reply to [`QueryStatus`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct StatusInfo {
    /// Whether vCPUs run.
    pub running: bool,
    /// Always false; older clients need the member.
    pub singlestep: bool,
    /// The run state.
    pub status: RunState,
}

impl StatusInfo {
    /// The reply for `status`.
    pub fn new(status: RunState) -> Self {
        Self { running: status == RunState::Running, singlestep: false, status }
    }
}

/// Run states of the protocol that this monitor can be in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "named by the protocol")]
pub enum RunState {
    Prelaunch,
    Running,
    Paused,
    Inmigrate,
    Postmigrate,
    Shutdown,
    InternalError,
    IoError,
    GuestPanicked,
}
