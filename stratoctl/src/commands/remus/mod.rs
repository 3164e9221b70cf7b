//! Protecting domains by replication: the monitors at both ends do it; these verbs start it, steer
//! it, and keep a process that does for a monitor what that may not do itself.
mod agent;
mod alone;
mod cold;
mod fence;
mod follow;
mod leave;
mod migrate;
mod paused;
mod protect;
mod receive;
mod report;
mod syncing;

use qmp::schema::ReplicationSide;
use serde_json::{Value, json};

pub use agent::{agent, revive};
pub use alone::leave_behind;
pub use cold::permit;
pub use fence::{fence, refuse_fenced};
pub use leave::{before_the_end, failover, unprotect};
pub use migrate::migrate;
pub use paused::is_known_to_backup;
pub use protect::remus;
pub use receive::receive;
pub use report::report;

use super::LockedDomain;
use crate::{
    domain::Status,
    registry::{Name, Place},
    remus::protection::Protection,
};

/// What a monitor reports about replication, for `list` and `info`; `None` if the domain is not
/// protected.
pub fn describe(place: &Place, status: &Status) -> Option<Value> {
    let protection = Protection::of(place).ok().flatten()?;
    let mut object = json!({
        "side": protection.side.word(),
        "agent": crate::remus::protection::has_agent(place),
        "witness": protection.witness,
        "fence": protection.fence,
    });
    if let Some(members) = object.as_object_mut() {
        if protection.moved {
            members.insert("moved".to_owned(), json!(true));
        }
        let info = status.replication.as_ref();
        if let Some(info) = info.filter(|info| info.role == Some(ReplicationSide::Primary)) {
            members.insert("lag".to_owned(), json!(info.epoch.saturating_sub(info.acked)));
        }
        if let Value::Object(said) = json!(info) {
            members.extend(said);
        }
    }
    Some(object)
}

/// The report in a few words: `P` or `B`, its state, term and last checkpoint; of a primary, how
/// many checkpoints the backup lags behind, and how long the oldest output that is held has waited.
pub fn summary(report: &Value) -> String {
    let role = report.get("role").or_else(|| report.get("side")).and_then(Value::as_str);
    let mut words = vec![if role == Some("backup") { "B" } else { "P" }.to_owned()];
    match report.get("state").and_then(Value::as_str) {
        None if report.get("moved") == Some(&Value::Bool(true)) => words.push("moved".into()),
        None => words.push("?".into()),
        Some(other) => words.push(other.into()),
    }
    let number = |name| report.get(name).and_then(Value::as_u64).filter(|number| *number > 0);
    if let Some((done, total)) = sync(report) {
        words.push(format!("{} %", done * 100 / total));
    }
    for (name, shown) in [("term", "term"), ("epoch", "epoch"), ("lag", "lag")] {
        words.extend(number(name).map(|number| format!("{shown} {number}")));
    }
    words.extend(number("oldest-us").map(|us| format!("held {} ms", us.div_ceil(1000))));
    words.join(" ")
}

/// How much of the first copy is done, if one is being made: bytes, and of how many.
fn sync(report: &Value) -> Option<(u64, u64)> {
    let sync = report.get("sync")?;
    let number = |name| sync.get(name).and_then(Value::as_u64);
    Some((number("done")?, number("total")?)).filter(|(_, total)| *total > 0)
}

/// The name of the backup of a domain on the same host.
fn backup_name(name: &Name) -> anyhow::Result<Name> {
    const TAIL: &str = "-backup";
    let head: String = name.as_str().chars().take(Name::MAX_BYTES - TAIL.len()).collect();
    Ok(format!("{head}{TAIL}").parse()?)
}

/// A domain whose lock is held by the caller.
fn unlocked(place: Place, status: Status) -> LockedDomain {
    LockedDomain { place, status, lock: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_says_which_side_and_how_far_behind() {
        for (report, shown) in [
            (json!({ "side": "primary" }), "P ?"),
            (json!({ "side": "primary", "moved": true }), "P moved"),
            (json!({ "side": "backup", "state": "standby", "epoch": 69 }), "B standby epoch 69"),
            (
                json!({ "role": "primary", "state": "syncing", "sync": { "done": 1, "total": 4 } }),
                "P syncing 25 %",
            ),
            (json!({ "side": "backup", "role": "primary", "state": "off" }), "P off"),
            (
                json!({ "role": "primary", "state": "protected", "term": 2, "epoch": 70, "lag": 1,
                    "oldest-us": 2500 }),
                "P protected term 2 epoch 70 lag 1 held 3 ms",
            ),
        ] {
            assert_eq!(summary(&report), shown, "{report}");
        }
    }
}
