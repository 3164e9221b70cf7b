//! What answers for a monitor is stopped while the other side decides, and answers late.
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::protected::{Console, numbers, some_numbers};
use crate::two::{Stopped, Two, replication, until};

#[test]
fn a_side_whose_agent_was_stopped_too_long_has_lost_and_shows_nothing_more() -> Result<()> {
    let two = Two::new("late-agents")?;
    let Two { here, there, .. } = &two;
    let witness = two.witness()?;
    two.protect(here, there, &witness)?;
    let (console, _own) = Console::open(here, "web")?;
    let link = Stopped::link(there)?;
    let agent = Stopped::agent(here)?;
    there.wait_replication("web", "role", "primary")?;
    let later = some_numbers(there, "web")?;
    let info = replication(here)?;
    ensure!(info["state"] == "stalled" && info["claimed"] == json!(true), "{info}");
    drop(agent);
    here.wait_state("web", "registered")?;
    let (what, _) = here.refused(&["start", "web"])?;
    ensure!(what.contains("has moved to its backup"), "{what}");
    drop(link);
    let shown = numbers(&console.said()?)?;
    let (last, first) = (shown.last().context("nothing")?, later.first().context("nothing")?);
    ensure!(*first <= last + 1 && later.last() > Some(last), "{last} was shown, then {later:?}");

    // The other way around: the backup's agent is stopped, and the primary continues.
    two.protect(there, here, &witness)?;
    let link = Stopped::link(here)?;
    let agent = Stopped::agent(here)?;
    there.wait_replication("web", "state", "degraded")?;
    here.wait_replication("web", "state", "suspecting")?;
    drop(agent);
    here.wait_replication("web", "state", "abandoned")?;
    drop(link);

    // Both are: when the link is back, there is no way back for either side, and one of them wins.
    two.protect(there, here, &witness)?;
    let link = Stopped::link(here)?;
    let agents = [Stopped::agent(here)?, Stopped::agent(there)?];
    let claimed = |rig| replication(rig).map(|info| info["claimed"] == json!(true));
    until("both claims", || Ok(claimed(here)? && claimed(there)?))?;
    drop(link);
    sleep(Duration::from_millis(600));
    let states = [replication(there)?, replication(here)?].map(|info| info["state"].clone());
    ensure!(states == ["stalled", "suspecting"], "{states:?}");
    drop(agents);
    until("a decision", || {
        let (own, state) = (replication(there)?, replication(here)?["state"].clone());
        let solo = own["state"] == "degraded" && state == "abandoned";
        Ok(solo || own.is_null() && state == "degraded")
    })?;
    let owner = if replication(there)?.is_null() { here } else { there };
    owner.says("web", "tally")
}
