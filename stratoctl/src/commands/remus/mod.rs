//! Protecting domains by replication: the monitors at both ends do it; these verbs start it, steer
//! it, and keep a process that does for a monitor what that may not do itself.
mod agent;
mod cold;
mod fence;
mod follow;
mod leave;
mod migrate;
mod protect;
mod receive;

use qmp::{client::Client, schema::QueryReplication};
use serde_json::{Value, json};

pub use agent::{agent, revive};
pub use cold::permit;
pub use fence::{fence, refuse_fenced};
pub use leave::{before_the_end, failover, unprotect};
pub use migrate::migrate;
pub use protect::remus;
pub use receive::receive;

use super::LockedDomain;
use crate::{
    registry::{Name, Place},
    remus::protection::Protection,
};

/// What a monitor reports about replication, for `list` and `info`; `None` if the domain is not
/// protected.
pub fn report(place: &Place, client: Option<&mut Client>) -> Option<Value> {
    let protection = Protection::of(place).ok().flatten()?;
    let mut object = json!({
        "side": protection.side.word(),
        "agent": crate::remus::protection::has_agent(place),
        "witness": protection.witness,
        "fence": protection.fence,
    });
    let reply = client.and_then(|client| client.execute(&QueryReplication {}).ok());
    if let (Some(members), Value::Object(reply)) = (object.as_object_mut(), json!(reply)) {
        members.extend(reply);
    }
    Some(object)
}

/// The report in a few words: `P` or `B`, its state unless it is the usual one, the last checkpoint,
/// and the lag, that is, how long the oldest output that is held has waited.
pub fn summary(report: &Value) -> String {
    let role = report.get("role").or_else(|| report.get("side")).and_then(Value::as_str);
    let mut words = vec![if role == Some("backup") { "B" } else { "P" }.to_owned()];
    match report.get("state").and_then(Value::as_str) {
        None => words.push("?".into()),
        Some("protected" | "standby") => {}
        Some(other) => words.push(other.into()),
    }
    let number = |name| report.get(name).and_then(Value::as_u64).filter(|number| *number > 0);
    words.extend(number("epoch").map(|epoch| format!("epoch {epoch}")));
    words.extend(number("oldest-us").map(|us| format!("{} ms", us.div_ceil(1000))));
    words.join(" ")
}

/// The name of the backup of a domain on the same host.
fn backup_name(name: &Name) -> anyhow::Result<Name> {
    const TAIL: &str = "-backup";
    let head: String = name.as_str().chars().take(Name::MAX_BYTES - TAIL.len()).collect();
    Ok(format!("{head}{TAIL}").parse()?)
}

/// A domain whose lock is held by the caller.
fn unlocked(place: Place, status: crate::domain::Status) -> LockedDomain {
    LockedDomain { place, status, lock: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_says_which_side_and_how_far_behind() {
        for (report, shown) in [
            (json!({ "side": "primary" }), "P ?"),
            (json!({ "side": "backup", "state": "standby", "epoch": 69 }), "B epoch 69"),
            (json!({ "side": "backup", "role": "primary", "state": "off" }), "P off"),
            (
                json!({ "role": "primary", "state": "protected", "epoch": 70, "oldest-us": 2500 }),
                "P epoch 70 3 ms",
            ),
        ] {
            assert_eq!(summary(&report), shown, "{report}");
        }
    }
}
