//! Clients and the guest stop, resume and end the machine, and each sees what the other has done.
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use qmp::client::Client;
use serde_json::json;
use stories::agent::Story;
use stories::monitor::{Monitor, SOON};

use crate::snapshot::Shape;

fn started(story: &Story, shape: Shape) -> Result<Monitor> {
    let mut guest = shape.vm(story)?.start(&story.paths, &story.dir)?;
    guest.wait_ready()?;
    Ok(guest)
}

fn uptime(guest: &mut Monitor) -> Result<Duration> {
    let shown = guest.sh("cut -d ' ' -f 1 /proc/uptime")?;
    // Background programs may print lines in between.
    let seconds = shown.split_whitespace().find_map(|word| word.parse().ok());
    Ok(Duration::from_secs_f64(seconds.with_context(|| format!("uptime {shown}"))?))
}

pub fn stop_and_cont(story: &Story, shape: Shape) -> Result<()> {
    let mut guest = started(story, shape)?;
    let mut qmp = guest.qmp()?;
    ensure!(qmp.execute_raw("query-status", json!({}))?.get("running") == Some(&json!(true)));
    guest.sh("while :; do echo tick; usleep 100000; done > /dev/console &")?;
    guest.wait_for("tick", SOON)?;

    let began = Instant::now();
    let before = uptime(&mut guest)?;
    ensure!(qmp.execute_raw("stop", json!({}))? == json!({}));
    qmp.wait_event("STOP", SOON)?;
    let status = qmp.execute_raw("query-status", json!({}))?;
    ensure!(
        status.get("running") == Some(&json!(false))
            && status.get("status") == Some(&json!("paused")),
        "{status}"
    );
    // Output from before the guest stopped may still be in transit.
    for _ in 0..30 {
        guest.forget();
        thread::sleep(Duration::from_secs(1));
        if guest.unseen().is_empty() {
            break;
        }
    }
    let pause = Duration::from_secs(3);
    thread::sleep(pause);
    ensure!(guest.unseen().is_empty(), "a stopped guest printed '{}'", guest.unseen());

    ensure!(qmp.execute_raw("cont", json!({}))? == json!({}));
    qmp.wait_event("RESUME", SOON)?;
    guest.wait_for("tick", SOON)?;
    let after = uptime(&mut guest)?;
    let passed = began.elapsed();
    ensure!(after > before, "the guest's clock went from {before:?} back to {after:?}");
    let lived = after - before;
    ensure!(
        lived + pause <= passed,
        "of {passed:?} with a pause of {pause:?} the guest lived {lived:?}"
    );
    let log = guest.sh("dmesg")?;
    for bad in
        ["soft lockup", "Call Trace", "rcu_sched self-detected stall", "clocksource: Marking"]
    {
        ensure!(!log.contains(bad), "the kernel reports '{bad}'");
    }
    Ok(())
}

pub fn reset(story: &Story, shape: Shape) -> Result<()> {
    let mut guest = started(story, shape)?;
    let mut qmp = guest.qmp()?;
    guest.sh("touch /tmp/was-here")?;
    ensure!(qmp.execute_raw("system_reset", json!({}))? == json!({}));
    ensure!(qmp.wait_event("RESET", SOON)?.data.get("guest") == Some(&json!(false)));
    guest.wait_for("guest: init", SOON * 3)?;
    guest.wait_ready()?;
    guest.sh("test ! -e /tmp/was-here")?;
    ensure!(qmp.execute_raw("query-status", json!({}))?.get("status") == Some(&json!("running")));
    Ok(())
}

pub fn reboot(story: &Story, shape: Shape) -> Result<()> {
    let vm = shape.vm(story)?.args(&["-action", "reboot=reset"]);
    let mut guest = vm.start(&story.paths, &story.dir)?;
    guest.wait_ready()?;
    let mut qmp = guest.qmp()?;
    let boots_again = |guest: &mut Monitor, qmp: &mut Client| -> Result<()> {
        let data = qmp.wait_event("RESET", SOON)?.data;
        ensure!(data == json!({ "guest": true, "reason": "guest-reset" }), "{data}");
        guest.wait_for("guest: init", SOON * 3)?;
        guest.wait_ready()
    };
    guest.type_in("reboot -f\n")?;
    boots_again(&mut guest, &mut qmp)?;
    // When no program listens for these keys, the kernel itself acts on them.
    let key = |name: &str| json!({ "type": "qcode", "data": name });
    let keys = json!({ "keys": [key("ctrl"), key("alt"), key("delete")] });
    ensure!(qmp.execute_raw("send-key", keys)? == json!({}));
    boots_again(&mut guest, &mut qmp)?;
    ensure!(qmp.execute_raw("query-status", json!({}))?.get("status") == Some(&json!("running")));
    Ok(())
}

pub fn powerdown(story: &Story, shape: Shape) -> Result<()> {
    let mut guest = started(story, shape)?;
    let mut qmp = guest.qmp()?;
    ensure!(qmp.execute_raw("system_powerdown", json!({}))? == json!({}));
    qmp.wait_event("POWERDOWN", SOON)?;
    guest.wait_for("guest: power button", SOON)?;
    let data = qmp.wait_event("SHUTDOWN", SOON)?.data;
    ensure!(data == json!({ "guest": true, "reason": "guest-shutdown" }), "{data}");
    ensure!(guest.wait_exit()?.code() == Some(0));
    Ok(())
}

pub fn quit(story: &Story, shape: Shape) -> Result<()> {
    let mut guest = started(story, shape)?;
    let mut qmp = guest.qmp()?;
    ensure!(qmp.execute_raw("quit", json!({}))? == json!({}));
    let data = qmp.wait_event("SHUTDOWN", SOON)?.data;
    ensure!(data == json!({ "guest": false, "reason": "host-qmp-quit" }), "{data}");
    qmp.wait_closed(SOON)?;
    ensure!(guest.wait_exit()?.code() == Some(0));
    ensure!(!story.dir.join("qmp.sock").exists(), "the socket's file is left behind");
    Ok(())
}

pub fn poweroff(story: &Story, shape: Shape) -> Result<()> {
    let mut guest = started(story, shape)?;
    let mut qmp = guest.qmp()?;
    guest.type_in("poweroff -f\n")?;
    let data = qmp.wait_event("SHUTDOWN", SOON)?.data;
    ensure!(data == json!({ "guest": true, "reason": "guest-shutdown" }), "{data}");
    ensure!(guest.wait_exit()?.code() == Some(0));
    Ok(())
}

pub fn panic(story: &Story, shape: Shape) -> Result<()> {
    let mut guest = started(story, shape)?;
    let mut qmp = guest.qmp()?;
    guest.type_in("echo c > /proc/sysrq-trigger\n")?;
    guest.wait_for("Kernel panic", SOON)?;
    qmp.wait_event("GUEST_PANICKED", SOON)?;
    Ok(())
}
