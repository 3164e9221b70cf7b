//! What becomes of the backup when a side is stopped, is killed, or when the guest does something
//! unusual.
use std::fs;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use stories::agent::Story;
use stories::lab::hosts::{Hosts, Side};
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

fn query(machine: &mut Machine) -> Result<Value> {
    Ok(machine.qmp.execute_raw("query-replication", json!({}))?)
}

fn number(machine: &mut Machine, name: &str) -> Result<u64> {
    let info = query(machine)?;
    info.get(name).and_then(Value::as_u64).with_context(|| format!("no {name} in {info}"))
}

/// Waits until that many more checkpoints are acknowledged.
fn checkpoints(primary: &mut Machine, more: u64) -> Result<()> {
    let (begin, deadline) = (number(primary, "acked")?, Instant::now() + SOON);
    while number(primary, "acked")? < begin + more {
        ensure!(Instant::now() < deadline, "no checkpoints: {}", query(primary)?);
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn wait_for_state(machine: &mut Machine, state: &str) -> Result<()> {
    let deadline = Instant::now() + SOON;
    while query(machine)?.get("state") != Some(&json!(state)) {
        let said = machine.monitor.said();
        ensure!(Instant::now() < deadline, "not {state}: {}, {said}", query(machine)?);
        thread::sleep(Duration::from_millis(5));
    }
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
        wait_for_state(&mut backup, "suspecting")?;
        // Longer than building takes.
        thread::sleep(PROTECTION.timeout);
        drop(stopped);
        wait_for_state(&mut primary, "protected")?;
        checkpoints(&mut primary, 3)?;
        wait_for_state(&mut backup, "standby")?;
        client.check_memory(SOON)?;
    }
    let (uptime, since) = (client.uptime(SOON)?, Instant::now());
    checkpoints(&mut primary, 3)?;
    let rounds = client.check_memory(SOON)?;
    checkpoints(&mut primary, 2)?;
    drop(primary);
    wait_for_state(&mut backup, "suspecting")?;
    backup.qmp.execute_raw("replication-failover", json!({ "force": true }))?;
    wait_for_state(&mut backup, "degraded")?;
    let mut client = Client::connect(&hosts, SOON)?;
    ensure!(client.check_memory(SOON)? >= rounds, "what was told outside is forgotten");
    // The guest's clock has gone on while nobody ran it, as far as the backup can know.
    let (passed, ran) = (since.elapsed(), client.uptime(SOON)?.saturating_sub(uptime));
    let lost = passed.saturating_sub(Duration::from_millis(ran));
    ensure!(lost < PROTECTION.timeout, "the guest has lost {lost:?} of {passed:?}");
    println!("the guest's clock has lost {lost:?} of {passed:?}");
    Ok(())
}

/// A primary that has had no time for 10 s finds its guest elsewhere, and shows nothing of what it
/// had not shown before.
pub fn is_fenced(story: &Story) -> Result<()> {
    let hosts = Hosts::new(&story.debian, 1)?;
    let mut pair = Pair::new(&hosts, &story.paths, &story.dir)?;
    let mut primary = pair.boot(Side::Left)?;
    let mut client = Client::connect(&hosts, BOOT)?;
    client.write(PAGES, 512, 10 * pace(), SOON)?;
    let counter = Counter::start(&hosts.outside, Manner::default())?;
    let mut backup = pair.protect(&mut primary, PROTECTION)?;
    counter.wait(50, SOON)?;
    let rounds = client.check_memory(SOON)?;
    let stopped = Stopped::new(&primary)?;
    thread::sleep(Duration::from_secs(10));
    wait_for_state(&mut backup, "degraded")?;
    counter.wait(50, SOON)?;
    drop(stopped);
    let end = primary.monitor.wait_exit()?;
    ensure!(end.code() == Some(3), "{end}: {}", primary.monitor.said());
    counter.wait(50, SOON)?;
    ensure!(client.check_memory(SOON)? >= rounds, "what was told outside is forgotten");
    let report = counter.finish()?;
    ensure!(report.reconnections == 0, "the connection did not survive");
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
    let full = number(&mut primary, "wire-bytes")?;
    let mut bytes = Vec::new();
    for _ in 0..2 {
        let stopped = Stopped::new(&backup)?;
        primary.agent.forget();
        primary.agent.wait_state("degraded", SOON)?;
        counter.wait(20, SOON)?;
        drop(stopped);
        wait_for_state(&mut backup, "abandoned")?;
        counter.wait(20, SOON)?;
        pair.protect_again(&mut primary, &backup, PROTECTION)?;
        bytes.push(number(&mut primary, "wire-bytes")?);
        counter.wait(20, SOON)?;
    }
    ensure!(bytes.iter().all(|warm| *warm < full / 4), "{full} bytes, then {bytes:?}");
    let rounds = client.check_memory(SOON)?;
    checkpoints(&mut primary, 2)?;
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
    wait_for_state(&mut backup, "abandoned")?;
    drop(backup);
    counter.wait(20, SOON)?;
    // Suspecting, as the witness is out of its reach.
    let mut backup = pair.protect(&mut primary, PROTECTION)?;
    pair.witness.cut(Side::Right, true);
    let stopped = Stopped::new(&primary)?;
    wait_for_state(&mut backup, "suspecting")?;
    thread::sleep(2 * PROTECTION.timeout);
    drop(backup);
    drop(stopped);
    pair.witness.cut(Side::Right, false);
    wait_for_state(&mut primary, "degraded")?;
    counter.wait(20, SOON)?;
    let report = counter.finish()?;
    ensure!(report.reconnections == 0, "the connection did not survive");
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
    checkpoints(&mut primary, 2)?;
    primary.qmp.execute_raw("cont", json!({}))?;
    checkpoints(&mut primary, 2)?;
    Pair::kill(primary, &backup, SOON)?;
    ensure!(status(&mut backup)?.get("status") == Some(&json!("running")));
    client.check_memory(SOON)?;

    let mut primary = backup;
    let mut backup = pair.protect(&mut primary, PROTECTION)?;
    primary.qmp.execute_raw("stop", json!({}))?;
    checkpoints(&mut primary, 2)?;
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
    wait_for_state(&mut primary, "protected")?;
    ensure!(number(&mut primary, "stalls")? == 0, "{}", query(&mut primary)?);
    let mut client = Client::connect(&hosts, SOON)?;
    client.write(PAGES, 512, 10 * pace(), SOON)?;
    client.check_memory(SOON)?;
    checkpoints(&mut primary, 3)?;
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
            query(&mut primary)?.get("lineage").and_then(Value::as_str).map(str::to_owned);
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
        wait_for_state(&mut backup, "abandoned")?;
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
