//! A backup that is alive and slow: its link, or its storage. What the guest has shown outside is
//! still what the backup can continue from, and memory stays within its limits.
use std::env;
use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use stories::agent::Story;
use stories::held::{Held, Op};
use stories::lab::hosts::{Hosts, Side};
use stories::lab::line::Impairment;
use stories::lab::switch::Direction;
use stories::monitor::{BOOT, SOON};
use stories::replicated::client::Client;
use stories::replicated::counter::{Counter, Manner};
use stories::replicated::machine::pace;
use stories::replicated::pair::{Machine, Pair, Protection};
use stories::replicated::recorder::Recorder;

const PROTECTION: Protection =
    Protection { interval: Duration::from_millis(25), timeout: Duration::from_millis(500) };
/// Numbers that show that the guest is running.
const SOME: usize = 20;
/// Bits per second of a link that is too slow for the guest: 1 MB.
const RATE: u64 = 8_000_000;
/// The variable that says for how many seconds it is, and how long otherwise.
const SECONDS: &str = "STORIES_SLOW_SECONDS";
const USUALLY: u64 = 4;
/// Bytes of memory that the primary copies aside at most.
const STAGING: u64 = 2 << 20;
/// Bytes of the disk.
const DISK: usize = 4 << 20;
const EIO: i32 = 5;
const ENOSPC: i32 = 28;

/// Bytes of memory of its own that a process has.
fn memory(machine: &Machine) -> Result<u64> {
    let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", machine.monitor.pid()))?;
    let line = rollup.lines().find_map(|line| line.strip_prefix("Anonymous:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")).context("no Anonymous")?;
    Ok(kib.parse::<u64>()? << 10)
}

fn number(info: &Value, name: &str) -> u64 {
    info.get(name).and_then(Value::as_u64).unwrap_or_default()
}

/// The guest writes more than the link takes: checkpoints become rare and output late, the guest is
/// slowed down, and nobody is suspected. With the link as it was, all of that is over.
pub fn link_is_slow(story: &Story) -> Result<()> {
    let seconds = env::var(SECONDS).ok().map(|text| text.parse()).transpose().context(SECONDS)?;
    let time = Duration::from_secs(seconds.unwrap_or(USUALLY));
    let hosts = Hosts::new(&story.debian, 1)?;
    // What a link has taken still arrives, however slow it is: it takes little at a time.
    hosts.host(Side::Left).set("net/ipv4/tcp_wmem", "4096 16384 65536")?;
    let mut pair = Pair::new(&hosts, &story.paths, &story.dir)?;
    let mut primary = pair.boot(Side::Left)?;
    let mut client = Client::connect(&hosts, BOOT)?;
    let counter = Counter::start(&hosts.outside, Manner::default())?;
    let (mut backup, address) = pair.backup(Side::Right)?;
    pair.lead(&mut primary, address)?;
    pair.begin(&mut primary, PROTECTION, &json!({ "max-staging": STAGING, "ack-limit": 60_000 }))?;
    Pair::await_protection(&primary, &backup)?;
    counter.wait(SOME, SOON)?;
    client.write(150, 4096, 5 * pace(), SOON)?;
    let (acked, own, theirs) = (primary.number("acked")?, memory(&primary)?, memory(&backup)?);

    hosts.link.set(Side::Left.port(), Direction::Up, Impairment::rate(RATE))?;
    let (since, before) = (Instant::now(), counter.last());
    let (mut epochs, mut numbers, mut throttled, mut oldest) = (0, 0, 0, 0);
    while since.elapsed() < time || epochs == 0 || numbers == 0 || throttled == 0 {
        let info = primary.replication()?;
        ensure!(since.elapsed() < time + SOON, "{epochs} checkpoints, {numbers} numbers, {info}");
        ensure!(info.get("state") == Some(&json!("protected")), "{info}");
        ensure!(info.get("claimed") == Some(&json!(false)), "{info}");
        ensure!(number(&info, "staged-bytes") <= STAGING, "{info}");
        throttled = throttled.max(number(&info, "throttle-percent"));
        oldest = oldest.max(number(&info, "oldest-us"));
        (epochs, numbers) = (number(&info, "acked") - acked, counter.last() - before);
        sleep(Duration::from_millis(20));
    }
    println!("{time:?}: {epochs} checkpoints, {numbers} numbers, throttled up to {throttled} %");
    println!("output was up to {oldest} us old");
    ensure!(oldest > PROTECTION.interval.as_micros() as u64, "{oldest}");
    for (machine, before) in [(&primary, own), (&backup, theirs)] {
        let now = memory(machine)?;
        // Two epochs in the one and one in the other, the pages that the deltas are to, and buffers.
        ensure!(now <= before + (16 << 20), "{before} bytes of memory, then {now}");
    }
    let info = backup.replication()?;
    ensure!(info.get("state") == Some(&json!("standby")), "{info}");

    hosts.link.set(Side::Left.port(), Direction::Up, Impairment::default())?;
    primary.wait_until("full speed", |info| number(info, "throttle-percent") == 0)?;
    primary.checkpoints(10)?;
    ensure!(primary.number("stalls")? == 0, "{}", primary.replication()?);
    let rounds = client.check_memory(SOON)?;
    Pair::kill(primary, &backup, SOON)?;
    counter.wait(SOME, SOON)?;
    ensure!(client.check_memory(SOON)? >= rounds, "what was told outside is forgotten");
    ensure!(counter.finish()?.reconnections == 0, "the connection did not survive");
    Ok(())
}

/// The guest records on a disk whose copy hangs, is full, or breaks.
struct Storage<'a> {
    pair: Pair<'a>,
    primary: Machine,
    recorder: Recorder,
}

impl Storage<'_> {
    /// Protected by a new backup.
    fn protect(&mut self, more: &Value) -> Result<Machine> {
        let (backup, address) = self.pair.backup(Side::Right)?;
        self.pair.lead(&mut self.primary, address)?;
        self.pair.begin(&mut self.primary, PROTECTION, more)?;
        Pair::await_protection(&self.primary, &backup)?;
        self.recorder.wait(2, SOON)?;
        self.primary.agent.forget();
        Ok(backup)
    }

    /// The primary has continued alone, as `reason` says.
    fn goes_on_alone(&mut self, reason: &str) -> Result<()> {
        let agent = &self.primary.agent;
        agent.wait(reason, SOON, |event| {
            let said = event.data.get("reason").and_then(Value::as_str);
            said.filter(|said| said.contains(reason)).map(|_| ())
        })?;
        self.primary.wait_state("degraded")?;
        self.recorder.wait(2, SOON)
    }
}

/// The backup's storage has no room, hangs, fails before and after an acknowledgement: the guest
/// continues each time, and every record is on the disk that it continues from in the end.
pub fn storage_fails(story: &Story) -> Result<()> {
    let hosts = Hosts::new(&story.debian, 1)?;
    let held = Held::mount(&story.dir.join("held"), &[])?;
    let pair = Pair::new(&hosts, &story.paths, &story.dir)?;
    let mut pair = pair.with_disk(Side::Left, &[0; DISK])?;
    let (image, journal) = ("disk.img", "disk.img.journal");
    pair.put_image(Side::Right, held.file(image));
    let primary = pair.boot(Side::Left)?;
    let recorder = Recorder::start(&hosts.outside, 5 * pace())?;
    recorder.wait(2, BOOT)?;
    let mut scene = Storage { pair, primary, recorder };
    let _guard = held.until_dropped();

    // No room for the journal.
    held.fail(Op::FALLOCATE, journal, ENOSPC);
    let (backup, address) = scene.pair.backup(Side::Right)?;
    scene.pair.lead(&mut scene.primary, address)?;
    scene.pair.begin(&mut scene.primary, PROTECTION, &json!({}))?;
    scene.primary.agent.wait("a refusal", SOON, |event| {
        let reason = event.data.get("reason").and_then(Value::as_str);
        reason.filter(|reason| reason.contains("No space left")).map(|_| ())
    })?;
    scene.primary.wait_state("off")?;
    scene.recorder.wait(2, SOON)?;
    drop(backup);
    held.mend();

    // Hangs, and the primary waits for it.
    let limit = 500;
    let mut backup = scene.protect(&json!({ "ack-limit": limit, "on-backup-slow": "stall" }))?;
    held.hold(Op::FSYNC);
    held.wait_held(Op::FSYNC)?;
    sleep(Duration::from_millis(2 * limit));
    let info = scene.primary.replication()?;
    ensure!(info.get("state") == Some(&json!("protected")), "{info}");
    ensure!(number(&info, "oldest-us") >= 1000 * limit, "{info}");
    ensure!(number(&info, "stalls") == 0, "{info}");
    held.release()?;
    scene.recorder.wait(2, SOON)?;
    backup.wait_state("standby")?;
    drop(backup);
    scene.goes_on_alone("the term was won")?;

    // Hangs for longer than output may wait.
    let slow = json!({ "ack-limit": limit });
    let mut backup = scene.protect(&slow)?;
    held.hold(Op::FSYNC);
    scene.goes_on_alone("ack-limit")?;
    held.release()?;
    backup.wait_state("abandoned")?;
    scene.pair.begin(&mut scene.primary, PROTECTION, &slow)?;
    Pair::await_protection(&scene.primary, &backup)?;
    scene.recorder.wait(2, SOON)?;

    // Breaks after it has acknowledged.
    scene.primary.agent.forget();
    held.fail(Op::WRITE, image, EIO);
    scene.goes_on_alone("not fit to run the guest")?;
    backup.wait_state("abandoned")?;
    ensure!(backup.monitor.said().contains("Input/output error"), "{}", backup.monitor.said());
    drop(backup);
    held.mend();

    // Has no room for what it is to acknowledge.
    let backup = scene.protect(&slow)?;
    held.fail(Op::WRITE, journal, ENOSPC);
    scene.goes_on_alone("could not hold an epoch")?;
    // That is not found out again and again.
    sleep(Duration::from_millis(600));
    let said = backup.monitor.said();
    ensure!(said.matches("an earlier write has failed").count() < 3, "{said}");
    drop(backup);
    held.mend();

    let backup = scene.protect(&slow)?;
    let Storage { primary, recorder, .. } = scene;
    let mut client = Client::connect(&hosts, SOON)?;
    recorder.wait(2, SOON)?;
    Pair::kill(primary, &backup, SOON)?;
    recorder.wait(2, SOON)?;
    let (acknowledged, found) = (recorder.finish(), client.check_records(SOON)?);
    ensure!(found >= acknowledged, "{found} records of {acknowledged}");
    Ok(())
}
