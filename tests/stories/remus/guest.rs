//! What the other tests build on: the guest and the client that counts do what they say, and notice
//! what they should.
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::json;
use stories::agent::Story;
use stories::lab::hosts::{GUEST_MAC, Hosts, Side};
use stories::lab::line::Impairment;
use stories::monitor::{BOOT, SOON};
use stories::replicated::client::{Client, records_in};
use stories::replicated::counter::{Counter, Manner};
use stories::replicated::machine::{await_incoming, pace, start, vm};
use stories::replicated::probe::Probe;

/// Bytes of the disk.
const DISK: u64 = 1 << 20;
/// How long the network is away.
const AWAY: Duration = Duration::from_millis(300);

pub fn works(story: &Story) -> Result<()> {
    let hosts = Hosts::new(&story.debian, 1)?;
    let image = story.dir.join("disk.img");
    File::create(&image)?.set_len(DISK)?;
    let machine = vm(&story.paths)?.disk("disk", &image, false);
    let mut guest = start(machine, &hosts, Side::Left, &story.paths, &story.dir)?;
    guest.wait_ready()?;
    let mut client = Client::connect(&hosts, BOOT)?;
    ensure!(client.get("nonsense", SOON).is_err());

    let uptime = client.uptime(SOON)?;
    client.write(500, 4096, 5 * pace(), SOON)?;
    let first = client.check_memory(SOON)?;
    let deadline = Instant::now() + SOON;
    while client.check_memory(SOON)? < first + 3 {
        ensure!(Instant::now() < deadline, "the guest does not write");
    }
    client.write(0, 0, Duration::ZERO, SOON)?;
    ensure!(client.check_memory(SOON)? == 0, "an idle guest writes");
    ensure!(client.uptime(SOON)? > uptime);

    for number in 1..=10 {
        ensure!(client.record(SOON)? == number);
    }
    ensure!(client.check_records(SOON)? == 10);
    ensure!(records_in(&fs::read(&image)?) == 10);
    // The guest notices a record that has changed on its disk, and so does the host.
    let file = File::options().read(true).write(true).open(&image)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, 5 * 4096 + 17)?;
    file.write_all_at(&byte.map(|byte| byte ^ 1), 5 * 4096 + 17)?;
    ensure!(client.check_records(SOON).is_err(), "the guest does not notice what is wrong");
    ensure!(records_in(&fs::read(&image)?) == 5);

    let counter = Counter::start(&hosts.outside, Manner::default())?;
    counter.wait(100, SOON)?;
    let probe = Probe::start(&hosts.outside, 2 * pace())?;
    // A network that is away for a time: no connection is lost.
    let cut = Instant::now();
    hosts.front.set_both(Side::Left.port(), Impairment::cut())?;
    std::thread::sleep(AWAY);
    hosts.front.set_both(Side::Left.port(), Impairment::default())?;
    counter.wait(10, SOON)?;
    let report = counter.finish()?;
    let gap = report.longest_gap(cut);
    ensure!(report.reconnections == 0, "the connection did not survive");
    ensure!(gap >= AWAY, "only {gap:?} without an answer");
    let away = probe.longest_gap(cut)?;
    ensure!(away >= AWAY, "only {away:?} without a datagram");
    println!("{} numbers; away for {away:?}, to TCP for {gap:?}", report.steps.len());

    // To a second counter, the first one's numbers are those of somebody else.
    let second = Counter::start(&hosts.outside, Manner::default())?;
    let error = second.wait(1, SOON).err().map(|error| error.to_string());
    ensure!(error.as_ref().is_some_and(|error| error.contains("at most 1")), "{error:?}");
    Ok(())
}

/// The guest moves, and with it everything that it knows; the switch learns it from the guest's
/// own frames.
pub fn migrates(story: &Story) -> Result<()> {
    let hosts = Hosts::new(&story.debian, 1)?;
    let (here, there) = (story.dir.join("here"), story.dir.join("there"));
    fs::create_dir(&here)?;
    fs::create_dir(&there)?;
    let machine = vm(&story.paths)?;
    let mut source = start(machine, &hosts, Side::Left, &story.paths, &here)?;
    source.wait_ready()?;
    let mut client = Client::connect(&hosts, BOOT)?;
    client.write(200, 256, 10 * pace(), SOON)?;
    let counter = Counter::start(&hosts.outside, Manner::default())?;
    counter.wait(100, SOON)?;
    ensure!(hosts.front.port_of(GUEST_MAC) == Some(Side::Left.port()));

    let uri = format!("unix:{}", story.dir.join("move.sock").display());
    let mut target = await_incoming(&uri, &hosts, Side::Right, &story.paths, &there)?;
    let deadline = Instant::now() + SOON;
    while !story.dir.join("move.sock").exists() {
        ensure!(Instant::now() < deadline, "the receiver does not listen: {}", target.said());
        std::thread::sleep(Duration::from_millis(2));
    }
    let probe = Probe::start(&hosts.outside, 2 * pace())?;
    let began = Instant::now();
    source.qmp()?.execute_raw("migrate", json!({ "uri": uri }))?;
    let mut qmp = target.qmp()?;
    let status = qmp.execute_raw("query-status", json!({}))?;
    ensure!(status.get("status") == Some(&json!("running")), "{status}");
    counter.wait(100, SOON)?;
    client.check_memory(SOON)?;
    ensure!(hosts.front.port_of(GUEST_MAC) == Some(Side::Right.port()));
    let report = counter.finish()?;
    ensure!(report.reconnections == 0, "the connection did not survive");
    let (away, gap) = (probe.longest_gap(began)?, report.longest_gap(began));
    println!("{} numbers; away for {away:?}, to TCP for {gap:?}", report.steps.len());
    Ok(())
}
