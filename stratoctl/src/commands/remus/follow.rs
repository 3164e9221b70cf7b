//! What becomes of a command of replication: its reply comes at once, and the rest by events.
use std::time::Duration;

use qmp::{
    client::{Client, ClientError},
    schema::ReplicationStatus,
};
use serde_json::Value;

/// How long to wait for an event before the state is queried again.
const TURN: Duration = Duration::from_millis(100);
/// How the monitor begins to report that a command has failed.
const FAILED: &str = "the command failed: ";

/// A change that was reported.
pub struct Change {
    /// The state after it.
    pub state: ReplicationStatus,
    /// Why, for people.
    pub reason: String,
}

impl Change {
    /// Why the command has failed, if this says so.
    pub fn failure(&self) -> Option<&str> {
        self.reason.strip_prefix(FAILED)
    }
}

/// Wait a moment for the next change.
///
/// # Errors
/// The monitor has hung up.
pub fn next(client: &mut Client) -> Result<Option<Change>, ClientError> {
    let event = match client.next_event(TURN) {
        Ok(event) if event.event == "REPLICATION_STATE" => event,
        Ok(_) | Err(ClientError::Timeout { .. }) => return Ok(None),
        Err(e) => return Err(e),
    };
    let state = event.data.get("state").cloned().map(serde_json::from_value);
    let reason = event.data.get("reason").and_then(Value::as_str).unwrap_or_default();
    Ok(state.and_then(Result::ok).map(|state| Change { state, reason: reason.to_owned() }))
}
