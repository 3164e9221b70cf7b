//! Two hosts, a guest with a disk that writes 200 pages every 25 ms, and checkpoints in the same
//! rhythm. A client outside counts with it, and another has records written to its disk: all that
//! they hear is held until the other host has the checkpoint.
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use qmp::schema::{QueryReplicationEpochs, ReplicationEpoch};
use stories::debian::Debian;
use stories::lab::hosts::{Hosts, Side};
use stories::monitor::SOON;
use stories::replicated::client::Client;
use stories::replicated::counter::{Counter, Manner as Counting};
use stories::replicated::pair::{Pair, Protection};
use stories::replicated::recorder::Recorder;

use super::{Manner, SETTLE, sampler};
use crate::bench::measure::send;
use crate::bench::rig::Rig;
use crate::bench::{Message, Metric, Scenario};

/// Seconds, if nothing else is wanted.
pub const SECONDS: u64 = 15;
const PAGES: u64 = 200;
const PERIOD: Duration = Duration::from_millis(25);
const PROTECTION: Protection = Protection { interval: PERIOD, timeout: Duration::from_millis(500) };
/// Pause of each client after an answer.
const PAUSE: Duration = Duration::from_millis(5);
const DISK: usize = 64 << 20;

/// Measures for so many seconds.
///
/// # Errors
/// The guest is not protected all the time, or what was acknowledged is lost.
pub fn measure(rig: &Rig, debian: &Debian, seconds: u64) -> Result<()> {
    let scenario = Scenario::RemusHeld;
    rig.interrupt.check()?;
    send(&Message::Step(format!("{}: {seconds} s", scenario.title())))?;
    let dir = rig.dir.join("held");
    std::fs::create_dir_all(&dir)?;
    let hosts = Hosts::new(debian, 2)?;
    let mut pair = Pair::new(&hosts, &rig.paths, &dir)?.with_disk(Side::Left, &vec![0; DISK])?;
    let mut primary = pair.boot(Side::Left)?;
    Client::connect(&hosts, SOON)?.write(PAGES, 8, PERIOD, SOON)?;
    let counting = Counting { pause: PAUSE, ..Counting::default() };
    let counter = Counter::start(&hosts.outside, counting)?;
    let recorder = Recorder::start(&hosts.outside, PAUSE)?;
    let _backup = pair.protect(&mut primary, PROTECTION)?;
    thread::sleep(SETTLE);
    let began = primary
        .qmp
        .execute(&QueryReplicationEpochs { after: None })?
        .epochs
        .last()
        .map_or(0, |epoch| epoch.number);
    let end = Instant::now() + Duration::from_secs(seconds);
    let (counted, recorded) = (counter.last(), recorder.acknowledged());
    let mut epochs: Vec<ReplicationEpoch> = Vec::new();
    while Instant::now() < end {
        rig.interrupt.check()?;
        thread::sleep(Duration::from_secs(1));
        let after = epochs.last().map_or(began, |epoch| epoch.number);
        epochs.extend(primary.qmp.execute(&QueryReplicationEpochs { after: Some(after) })?.epochs);
    }
    let state = primary.replication()?;
    ensure!(state.get("state").is_some_and(|state| state == "protected"), "it is {state}");
    ensure!(counter.last() > counted && recorder.acknowledged() > recorded, "the clients wait");
    let report = counter.finish()?;
    ensure!(report.reconnections == 0, "a connection did not survive");
    let sample = sampler(scenario, Manner::Backup.name());
    let (first, last) = epochs.first().zip(epochs.last()).context("no checkpoints")?;
    let time = (last.at_us - first.at_us) as f64 / 1e6;
    sample(Metric::Rate, (epochs.len() - 1) as f64 / time)?;
    let ms = |us: u64| us as f64 / 1e3;
    for epoch in &epochs {
        sample(Metric::Period, ms(epoch.period_us.unwrap_or_default()))?;
        sample(Metric::Pause, ms(epoch.pause_us))?;
        sample(Metric::DirtyPages, epoch.dirty_pages as f64)?;
        if let Some(lag) = epoch.commit_lag_us {
            sample(Metric::CommitLag, ms(lag))?;
        }
    }
    Ok(())
}
