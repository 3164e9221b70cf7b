//! What becomes of the backup when a side is stopped, is killed, or when the guest does something
//! unusual.
use std::fs;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use stories::agent::Story;
use stories::lab::hosts::{Hosts, Side, TAP};
use stories::monitor::{BOOT, SOON};
use stories::replicated::client::Client;
use stories::replicated::counter::{Counter, Manner};
use stories::replicated::machine::pace;
use stories::replicated::pair::{Machine, Pair, Protection};

const PROTECTION: Protection =
    Protection { interval: Duration::from_millis(25), timeout: Duration::from_millis(300) };
/// Pages that the guest writes again and again.
const PAGES: u64 = 100;

/// Stops the process, as a host does that has no time for it, and lets it go on when dropped.
struct Stopped(u32);

impl Stopped {
    fn new(machine: &Machine) -> Result<Self> {
        signal(machine.monitor.pid(), "STOP")?;
        Ok(Self(machine.monitor.pid()))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // It may have ended.
        let _ = signal(self.0, "CONT");
    }
}

fn signal(pid: u32, name: &str) -> Result<()> {
    let done = Command::new("kill").args([format!("-{name}"), pid.to_string()]).status()?;
    ensure!(done.success(), "kill -{name} {pid}");
    Ok(())
}

fn status(machine: &mut Machine) -> Result<Value> {
    Ok(machine.qmp.execute_raw("query-status", json!({}))?)
}

/// Nobody decides by himself: the backup builds the machine whenever its primary is stopped, and
/// has to put memory back when that continues. In the end it still runs the guest.
pub fn flaps(story: &Story) -> Result<()> {
    let hosts = Hosts::new(&story.debian, 1)?;
    let mut pair = Pair::new(&hosts, &story.paths, &story.dir)?;
    let mut primary = pair.boot(Side::Left)?;
    let mut client = Client::connect(&hosts, BOOT)?;
    client.write(PAGES, 512, 10 * pace(), SOON)?;
    let mut backup = pair.protect_by_hand(&mut primary, PROTECTION)?;
    for _ in 0..3 {
        let stopped = Stopped::new(&primary)?;
        backup.wait_state("suspecting")?;
        // Longer than building takes.
        thread::sleep(PROTECTION.timeout);
        drop(stopped);
        primary.wait_state("protected")?;
        primary.checkpoints(3)?;
        backup.wait_state("standby")?;
        client.check_memory(SOON)?;
    }
    // The other way around.
    let stopped = Stopped::new(&backup)?;
    primary.wait_state("stalled")?;
    drop(stopped);
    primary.wait_state("protected")?;
    primary.checkpoints(3)?;
    backup.wait_state("standby")?;
    let (uptime, since) = (client.uptime(SOON)?, Instant::now());
    primary.checkpoints(3)?;
    let rounds = client.check_memory(SOON)?;
    primary.checkpoints(2)?;
    drop(primary);
    backup.wait_state("suspecting")?;
    backup.qmp.execute_raw("replication-failover", json!({ "force": true }))?;
    backup.wait_state("degraded")?;
    let mut client = Client::connect(&hosts, SOON)?;
    ensure!(client.check_memory(SOON)? >= rounds, "what was told outside is forgotten");
    // The guest's clock has gone on while nobody ran it, as far as the backup can know.
    let (passed, ran) = (since.elapsed(), client.uptime(SOON)?.saturating_sub(uptime));
    let lost = passed.saturating_sub(Duration::from_millis(ran));
    ensure!(lost < PROTECTION.timeout, "the guest has lost {lost:?} of {passed:?}");
    println!("the guest's clock has lost {lost:?} of {passed:?}");
    Ok(())
}

/// The primary claims the term and continues; the backup wakes up, learns it, and needs no more
/// than what has changed to be the backup again.
pub fn is_taken_again(story: &Story) -> Result<()> {
    let hosts = Hosts::new(&story.debian, 1)?;
    let mut pair = Pair::new(&hosts, &story.paths, &story.dir)?;
    let mut primary = pair.boot(Side::Left)?;
    let mut client = Client::connect(&hosts, BOOT)?;
    client.write(PAGES, 512, 10 * pace(), SOON)?;
    let counter = Counter::start(&hosts.outside, Manner::default())?;
    let mut backup = pair.protect(&mut primary, PROTECTION)?;
    let full = primary.number("wire-bytes")?;
    let mut bytes = Vec::new();
    for _ in 0..2 {
        let stopped = Stopped::new(&backup)?;
        primary.agent.forget();
        primary.agent.wait_state("degraded", SOON)?;
        counter.wait(20, SOON)?;
        drop(stopped);
        backup.wait_state("abandoned")?;
        counter.wait(20, SOON)?;
        pair.protect_again(&mut primary, &backup, PROTECTION)?;
        bytes.push(primary.number("wire-bytes")?);
        counter.wait(20, SOON)?;
    }
    ensure!(bytes.iter().all(|warm| *warm < full / 4), "{full} bytes, then {bytes:?}");
    let rounds = client.check_memory(SOON)?;
    primary.checkpoints(2)?;
    Pair::kill(primary, &backup, SOON)?;
    counter.wait(20, SOON)?;
    ensure!(client.check_memory(SOON)? >= rounds, "what was told outside is forgotten");
    let report = counter.finish()?;
    ensure!(report.reconnections == 0, "the connection did not survive");
    println!("{full} bytes at first, then {bytes:?}");
    Ok(())
}

/// In each state that a backup may be killed in, the guest keeps running at its primary.
pub fn is_killed(story: &Story) -> Result<()> {
    let hosts = Hosts::new(&story.debian, 1)?;
    let mut pair = Pair::new(&hosts, &story.paths, &story.dir)?;
    let mut primary = pair.boot(Side::Left)?;
    let counter = Counter::start(&hosts.outside, Manner::default())?;
    counter.wait(20, BOOT)?;
    // Standby.
    let backup = pair.protect(&mut primary, PROTECTION)?;
    primary.agent.forget();
    drop(backup);
    primary.agent.wait_state("degraded", SOON)?;
    counter.wait(20, SOON)?;
    // Abandoned.
    let mut backup = pair.protect(&mut primary, PROTECTION)?;
    let stopped = Stopped::new(&backup)?;
    primary.agent.forget();
    primary.agent.wait_state("degraded", SOON)?;
    drop(stopped);
    backup.wait_state("abandoned")?;
    drop(backup);
    counter.wait(20, SOON)?;
    // Suspecting, as the witness is out of its reach.
    let mut backup = pair.protect(&mut primary, PROTECTION)?;
    pair.witness.cut(Side::Right, true);
    let stopped = Stopped::new(&primary)?;
    backup.wait_state("suspecting")?;
    thread::sleep(2 * PROTECTION.timeout);
    drop(backup);
    drop(stopped);
    pair.witness.cut(Side::Right, false);
    primary.wait_state("degraded")?;
    counter.wait(20, SOON)?;
    let report = counter.finish()?;
    ensure!(report.reconnections == 0, "the connection did not survive");
    Ok(())
}

/// The backup is granted the guest, and cannot run it: somebody else has its tap. It gives the guest
/// back to its primary, which continues where it was stopped.
pub fn gives_back(story: &Story) -> Result<()> {
    let hosts = Hosts::new(&story.debian, 1)?;
    let mut pair = Pair::new(&hosts, &story.paths, &story.dir)?;
    let mut primary = pair.boot(Side::Left)?;
    let counter = Counter::start(&hosts.outside, Manner::default())?;
    counter.wait(20, BOOT)?;
    let mut backup = pair.protect(&mut primary, PROTECTION)?;
    let taken = hosts.host(Side::Right).tap(TAP)?;
    let stopped = Stopped::new(&primary)?;
    backup.wait_state("abandoned")?;
    drop(stopped);
    primary.wait_state("degraded")?;
    counter.wait(20, SOON)?;
    let lineage = primary.replication()?;
    let lineage = lineage.get("lineage").and_then(Value::as_str).context("no lineage")?;
    let record = pair.witness.record(lineage, 1).context("nobody has asked")?;
    ensure!(record.get("settled") == Some(&json!("yielded")), "{record:?}");

    drop(taken);
    pair.protect_again(&mut primary, &backup, PROTECTION)?;
    Pair::kill(primary, &backup, SOON)?;
    counter.wait(20, SOON)?;
    ensure!(counter.finish()?.reconnections == 0, "the connection did not survive");
    Ok(())
}

/// A client has stopped the guest, and only a client lets it run again: wherever it is.
pub fn stays_paused(story: &Story) -> Result<()> {
    let hosts = Hosts::new(&story.debian, 1)?;
    let mut pair = Pair::new(&hosts, &story.paths, &story.dir)?;
    let mut primary = pair.boot(Side::Left)?;
    let mut client = Client::connect(&hosts, BOOT)?;
    client.write(PAGES, 512, 10 * pace(), SOON)?;
    let mut backup = pair.protect(&mut primary, PROTECTION)?;
    primary.qmp.execute_raw("stop", json!({}))?;
    primary.checkpoints(2)?;
    primary.qmp.execute_raw("cont", json!({}))?;
    primary.checkpoints(2)?;
    Pair::kill(primary, &backup, SOON)?;
    ensure!(status(&mut backup)?.get("status") == Some(&json!("running")));
    client.check_memory(SOON)?;

    let mut primary = backup;
    let mut backup = pair.protect(&mut primary, PROTECTION)?;
    primary.qmp.execute_raw("stop", json!({}))?;
    primary.checkpoints(2)?;
    Pair::kill(primary, &backup, SOON)?;
    ensure!(status(&mut backup)?.get("status") == Some(&json!("paused")));
    backup.qmp.execute_raw("cont", json!({}))?;
    client.check_memory(SOON)?;
    Ok(())
}

/// A reboot is the guest's own business: its event waits for the backup, and the protection continues.
pub fn reboots(story: &Story) -> Result<()> {
    let hosts = Hosts::new(&story.debian, 1)?;
    let mut pair = Pair::new(&hosts, &story.paths, &story.dir)?;
    let mut primary = pair.boot_with(Side::Left, &["-action", "reboot=reset"])?;
    let mut client = Client::connect(&hosts, BOOT)?;
    let backup = pair.protect(&mut primary, PROTECTION)?;
    primary.agent.forget();
    client.get("reboot", SOON)?;
    let reset = |event: &qmp::client::ReceivedEvent| (event.event == "RESET").then_some(());
    primary.agent.wait("the reset", SOON, reset)?;
    primary.monitor.wait_for("guest: ready", BOOT)?;
    primary.wait_state("protected")?;
    ensure!(primary.number("stalls")? == 0, "{}", primary.replication()?);
    let mut client = Client::connect(&hosts, SOON)?;
    client.write(PAGES, 512, 10 * pace(), SOON)?;
    client.check_memory(SOON)?;
    primary.checkpoints(3)?;
    Pair::kill(primary, &backup, SOON)?;
    client.check_memory(SOON)?;
    Ok(())
}

/// The guest powers off, its monitor is told to quit, or is ended by a signal: the backup does not
/// bring it back.
pub fn ends(story: &Story) -> Result<()> {
    for way in ["poweroff", "quit", "TERM"] {
        let hosts = Hosts::new(&story.debian, 1)?;
        let dir = story.dir.join(way);
        fs::create_dir(&dir)?;
        let mut pair = Pair::new(&hosts, &story.paths, &dir)?;
        let mut primary = pair.boot(Side::Left)?;
        let mut client = Client::connect(&hosts, BOOT)?;
        let mut backup = pair.protect(&mut primary, PROTECTION)?;
        let lineage =
            primary.replication()?.get("lineage").and_then(Value::as_str).map(str::to_owned);
        match way {
            "poweroff" => drop(client.get("poweroff", SOON)?),
            "quit" => drop(primary.qmp.execute_raw("quit", json!({}))?),
            _ => signal(primary.monitor.pid(), way)?,
        }
        let end = primary.monitor.wait_exit()?;
        ensure!(end.success(), "{way}: {end}: {}", primary.monitor.said());
        let record = pair.witness.record(&lineage.context("no lineage")?, 1);
        let word = record.as_ref().and_then(|record| record.get("word"));
        ensure!(word == Some(&json!("end")), "{way}: {record:?}");
        backup.wait_state("abandoned")?;
        ensure!(status(&mut backup)?.get("status") != Some(&json!("running")));
        let ran = backup.agent.heard().iter().any(|(_, it)| it.event == "REPLICATION_FAILOVER");
        ensure!(!ran, "{way}: the guest runs at the backup");
    }
    Ok(())
}

/// What a process has: descriptors, and KiB of memory of its own.
fn usage(machine: &Machine) -> Result<(usize, u64)> {
    let of = format!("/proc/{}", machine.monitor.pid());
    let rollup = fs::read_to_string(format!("{of}/smaps_rollup"))?;
    let anonymous = rollup.lines().find_map(|line| line.strip_prefix("Anonymous:"));
    let kib = anonymous.and_then(|line| line.trim().strip_suffix(" kB")).context("no Anonymous")?;
    Ok((fs::read_dir(format!("{of}/fd"))?.count(), kib.parse()?))
}

/// There and back again: what is left at the end is what was there at the beginning.
pub fn leaves_nothing(story: &Story) -> Result<()> {
    let hosts = Hosts::new(&story.debian, 1)?;
    let mut pair = Pair::new(&hosts, &story.paths, &story.dir)?;
    let mut primary = pair.boot(Side::Left)?;
    let counter = Counter::start(&hosts.outside, Manner::default())?;
    counter.wait(20, BOOT)?;
    let mut usages = Vec::new();
    for _ in 0..20 {
        let backup = pair.protect(&mut primary, PROTECTION)?;
        counter.wait(5, SOON)?;
        Pair::kill(primary, &backup, SOON)?;
        primary = backup;
        counter.wait(5, SOON)?;
        usages.push(usage(&primary)?);
    }
    let report = counter.finish()?;
    ensure!(report.reconnections == 0, "the connection did not survive");
    // The first two came by one failover each, from a machine that was booted and one that was not.
    let (Some(early), Some(late)) = (usages.get(1), usages.last()) else { return Ok(()) };
    ensure!(late.0 <= early.0, "descriptors: {usages:?}");
    ensure!(late.1 <= early.1 + early.1 / 4, "memory: {usages:?}");
    println!("descriptors and KiB after each failover: {usages:?}");
    Ok(())
}
