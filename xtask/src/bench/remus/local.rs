//! A guest and its backup on one host, where the fence `local` decides: how long the guest is away
//! when its monitor is killed.
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use qmp::client::Client;
use qmp::schema::ReplicationStart;
use serde_json::{Value, json};

use super::{LOADS, MIB, Manner, backup, control, sampler, settle, until};
use crate::bench::control::Connection;
use crate::bench::measure::{LIMIT, Turn, send};
use crate::bench::monitors::{Found, Guest};
use crate::bench::rig::Rig;
use crate::bench::{Message, Metric, Scenario};
use qmp::schema::ReplicationStatus;

const SCENARIO: Scenario = Scenario::RemusLocal;
/// Milliseconds without a byte from the primary, until it is suspected of having ended without its
/// connection having been closed.
const TIMEOUT: u64 = 200;
/// How long a failover may take.
const FAILOVER: Duration = Duration::from_secs(20);

/// Measures one failover in each turn.
///
/// # Errors
/// The guest is not protected, or does not go on.
pub fn measure(rig: &Rig, found: &Found, turns: usize) -> Result<()> {
    let [load, ..] = &LOADS;
    let period = load.period.as_micros();
    let what = format!("work pages={} period={period}", load.pages);
    let socket = rig.dir.join("local.sock");
    for _ in 0..turns {
        rig.interrupt.check()?;
        send(&Message::Step(SCENARIO.title().to_owned()))?;
        let turn = Turn::new(rig, found, SCENARIO);
        let mut run = turn.start(&Guest { mib: MIB, ..turn.linux(&what)? })?;
        let (connection, _) = run.connect()?;
        let Connection::Qmp(mut client) = connection else { bail!("not QMP") };
        while run.wait_figure(LIMIT)?.0 != "work" {}
        let _backup = backup(found, &socket, ",fence=local")?;
        let mut agent = Client::connect(&control(&socket), LIMIT)?;
        agent.execute_raw("qmp_capabilities", json!({}))?;
        client.execute(&ReplicationStart {
            uri: Some(format!("unix:{}", socket.display())),
            fence: Some("local".to_owned()),
            interval: Some(load.period.as_millis() as u64),
            heartbeat_timeout: Some(TIMEOUT),
            ..Default::default()
        })?;
        until(&mut client, |state| state == ReplicationStatus::Protected)
            .context("the guest is not protected")?;
        settle(&mut run)?;
        let pid = run.pid();
        let killed = Instant::now();
        drop(run);
        let times = failover(&mut agent, pid)?;
        let sample = sampler(SCENARIO, Manner::Backup.name());
        sample(Metric::Failover, killed.elapsed().as_secs_f64() * 1e3)?;
        for (metric, name) in [
            (Metric::FailoverDetect, "detect-us"),
            (Metric::FailoverApply, "apply-us"),
            (Metric::FailoverRun, "run-us"),
        ] {
            let us = times.get(name).and_then(Value::as_f64).context("a failover without times")?;
            sample(metric, us / 1e3)?;
        }
    }
    Ok(())
}

/// Waits until the guest runs at the backup, and fences its primary, which has been killed and waited
/// for, when the monitor asks for that. Returns how long the parts took.
fn failover(agent: &mut Client, primary: u32) -> Result<Value> {
    let deadline = Instant::now() + FAILOVER;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let event = agent.next_event(left).context("the guest does not go on")?;
        match (event.event.as_str(), event.data.get("need").and_then(Value::as_str)) {
            ("REPLICATION_FAILOVER", _) => {
                return event.data.get("times").cloned().context("a failover without times");
            }
            ("REPLICATION_NEEDS", Some("fence")) => {
                let runs = Path::new(&format!("/proc/{primary}")).exists();
                let result = if runs { "unknown" } else { "down" };
                let nonce = event.data.get("nonce").cloned().unwrap_or_default();
                let answer = json!({ "nonce": nonce, "need": "fence", "result": result });
                agent.execute_raw("replication-answer", answer)?;
            }
            _ => {}
        }
    }
}
