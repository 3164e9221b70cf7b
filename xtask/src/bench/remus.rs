//! What protecting a machine costs it: how long a checkpoint stops it, and how much less it
//! computes.
//!
//! Linux with one processor computes, and writes pages all over its memory once per period
//! (`xtask/guest/init.rs`). One guest is measured in all manners, in turns; the manners take the
//! places of the monitors in the figures:
//!
//! - nothing: it is not protected;
//! - harvest: its monitor only finds out which pages have changed, in the same rhythm: what any
//!   checkpoint costs at least;
//! - nowhere: its checkpoints are taken and encoded, and sent nowhere;
//! - backup: they are sent to a backup on the same host, which shares its processors.
mod network;

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use qmp::schema::{
    QueryReplication, QueryReplicationEpochs, ReplicationBlackhole, ReplicationEpoch,
    ReplicationStart, ReplicationStatus, ReplicationStop,
};
use serde::{Deserialize, Serialize};
use stories::debian::Debian;

use super::control::Connection;
use super::figures::Figures;
use super::measure::{LIMIT, Turn, send};
use super::monitors::{Found, Guest};
use super::part::Part;
use super::rig::Rig;
use super::run::last_words;
use super::statistics::{median, quantile};
use super::{Message, Metric, Scenario};

/// Turns, if nothing else is wanted.
pub const TURNS: usize = 5;
/// RAM of the guest, MiB.
const MIB: u64 = 512;
/// Until what the beginning of a manner has disturbed is over.
const SETTLE: Duration = Duration::from_millis(1500);
/// Figures of work, one a second, in each turn of each manner.
const SECONDS: usize = 3;
/// How long a protection may take to begin or to end.
const SOON: Duration = Duration::from_secs(30);

/// How the guest is protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Manner {
    /// Not.
    Nothing,
    /// Only what has changed is found out.
    Harvest,
    /// Checkpoints go nowhere.
    Nowhere,
    /// Checkpoints go to a backup.
    Backup,
}

impl Manner {
    /// All, in the order of the figures: ratios are to the first.
    pub const ALL: [Self; 4] = [Self::Harvest, Self::Nothing, Self::Nowhere, Self::Backup];

    /// Its name in the figures.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Harvest => "harvest",
            Self::Nowhere => "nowhere",
            Self::Backup => "backup",
        }
    }

    const fn about(self) -> &'static str {
        match self {
            Self::Nothing => "not protected",
            Self::Harvest => "changed pages are found out, and nothing else",
            Self::Nowhere => "checkpoints are taken and encoded, and sent nowhere",
            Self::Backup => "checkpoints are sent to a backup on the same host",
        }
    }
}

/// What the guest does, and how often it is checkpointed.
struct Load {
    scenario: Scenario,
    pages: u64,
    /// From the guest's writes to the next ones, and from one checkpoint to the next.
    period: Duration,
    /// The guest's time is what its work takes while nothing disturbs it, and checkpoints adapt.
    adapts: bool,
}

const LOADS: [Load; 3] = [
    Load {
        scenario: Scenario::RemusFew,
        pages: 200,
        period: Duration::from_millis(25),
        adapts: false,
    },
    Load {
        scenario: Scenario::RemusMany,
        pages: 2000,
        period: Duration::from_millis(100),
        adapts: false,
    },
    Load {
        scenario: Scenario::RemusAuto,
        pages: 2000,
        period: Duration::from_millis(25),
        adapts: true,
    },
];
/// Milliseconds between two checkpoints that adapt, at most.
const LONGEST: u64 = 200;

/// Measures everything, in `turns` turns.
///
/// # Errors
/// The requesting process has ended, or the measurement is interrupted.
pub fn measure(rig: &Rig, debian: &Debian, found: &Found, turns: usize) -> Result<()> {
    for manner in Manner::ALL {
        let version = format!("{}; {}", manner.about(), found.version()?);
        send(&Message::Monitor { name: manner.name().to_owned(), version })?;
    }
    send(&Message::Plan(LOADS.len() * turns * Manner::ALL.len() + 2 * turns))?;
    for load in &LOADS {
        let result = under(rig, found, load, turns);
        note(rig, load.scenario, result, || last_words(&rig.dir))?;
    }
    let result = network::measure(rig, debian, turns);
    note(rig, Scenario::RemusHosts, result, String::new)
}

/// Reports why a scenario has failed, if it has.
fn note(
    rig: &Rig,
    scenario: Scenario,
    result: Result<()>,
    words: impl FnOnce() -> String,
) -> Result<()> {
    let Err(error) = result else { return Ok(()) };
    rig.interrupt.check()?;
    send(&Message::Failed {
        scenario,
        part: Part::Protection.label().to_owned(),
        monitor: "this monitor".to_owned(),
        error: format!("{error:#}; it said: {}", words()),
    })
}

/// Measures one load: one guest, in all manners in turns.
fn under(rig: &Rig, found: &Found, load: &Load, turns: usize) -> Result<()> {
    let (turn, period) = (Turn::new(rig, found, load.scenario), load.period.as_micros());
    let paced = if load.adapts { " paced=work" } else { "" };
    let what = format!("work pages={} period={period}{paced}", load.pages);
    let mut run = turn.start(&Guest { mib: MIB, ..turn.linux(&what)? })?;
    let (connection, _) = run.connect()?;
    let Connection::Qmp(mut client) = connection else { bail!("not QMP") };
    while run.wait_figure(LIMIT)?.0 != "work" {}
    for number in 0..turns {
        let mut manners = Manner::ALL;
        if number % 2 == 1 {
            manners.reverse();
        }
        for manner in manners {
            rig.interrupt.check()?;
            let step = format!("{}: {}", load.scenario.title(), manner.name());
            send(&Message::Step(step))?;
            let protected = protect(rig, found, &mut client, manner, load)?;
            let sample = |metric, value| {
                let (scenario, monitor) = (load.scenario, manner.name().to_owned());
                send(&Message::Sample { scenario, metric, monitor, value })
            };
            let until = Instant::now() + SETTLE;
            while Instant::now() < until {
                run.wait_figure(SOON)?;
            }
            let after = last(&mut client)?;
            for _ in 0..SECONDS {
                let (name, value, _) = run.wait_figure(SOON)?;
                ensure!(name == "work", "the guest says {name}");
                sample(Metric::Work, value)?;
            }
            for epoch in epochs(&mut client, after)? {
                report(&epoch, load, sample)?;
            }
            if let Some(protected) = protected {
                unprotect(&mut client, protected)?;
            }
        }
    }
    Ok(())
}

/// The figures of one checkpoint. Those with far fewer or more pages than the guest writes per
/// period are not of that size: guest and checkpoints keep time independently.
fn report(
    epoch: &ReplicationEpoch,
    load: &Load,
    sample: impl Fn(Metric, f64) -> Result<()>,
) -> Result<()> {
    let ms = |us: u64| us as f64 / 1e3;
    sample(Metric::Period, ms(epoch.period_us.unwrap_or_default()))?;
    let size = load.pages * 9 / 10..load.pages * 3 / 2 + 100;
    if !load.adapts && !size.contains(&epoch.dirty_pages) {
        return Ok(());
    }
    sample(Metric::DirtyPages, epoch.dirty_pages as f64)?;
    sample(Metric::Pause, ms(epoch.pause_us))?;
    sample(Metric::PausePark, ms(epoch.park_us))?;
    sample(Metric::PauseHarvest, ms(epoch.harvest_us))?;
    sample(Metric::PauseCopy, ms(epoch.copy_us))?;
    sample(Metric::PauseState, ms(epoch.state_us))?;
    if let Some(us) = epoch.encode_us {
        sample(Metric::Encode, ms(us))?;
        let raw = (epoch.dirty_pages * 4096) as f64;
        sample(Metric::WireShare, epoch.wire_bytes as f64 / raw * 100.0)?;
    }
    if let Some(us) = epoch.commit_lag_us {
        sample(Metric::CommitLag, ms(us))?;
    }
    Ok(())
}

/// A protection, with its backup's process if there is one.
struct Protected(Option<Backup>);

struct Backup(std::process::Child);

impl Drop for Backup {
    fn drop(&mut self) {
        // An error here means that it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn protect(
    rig: &Rig,
    found: &Found,
    client: &mut qmp::client::Client,
    manner: Manner,
    load: &Load,
) -> Result<Option<Protected>> {
    let mut start = ReplicationStart {
        interval: (!load.adapts).then_some(load.period.as_millis() as u64),
        max_period: load.adapts.then_some(LONGEST),
        r#unsafe: Some(true),
        ..Default::default()
    };
    let mut protected = Protected(None);
    match manner {
        Manner::Nothing => return Ok(None),
        Manner::Harvest => start.blackhole = Some(ReplicationBlackhole::Harvest),
        Manner::Nowhere => start.blackhole = Some(ReplicationBlackhole::Checkpoint),
        Manner::Backup => {
            let socket = rig.dir.join("backup.sock");
            protected.0 = Some(backup(found, &socket)?);
            start.uri = Some(format!("unix:{}", socket.display()));
        }
    }
    client.execute(&start)?;
    let wanted = [ReplicationStatus::Protected, ReplicationStatus::Blackhole];
    until(client, |state| wanted.contains(&state)).context("the guest is not protected")?;
    Ok(Some(protected))
}

fn unprotect(client: &mut qmp::client::Client, protected: Protected) -> Result<()> {
    client.execute(&ReplicationStop::default())?;
    until(client, |state| state == ReplicationStatus::Off)
        .context("the protection does not end")?;
    drop(protected);
    Ok(())
}

fn until(
    client: &mut qmp::client::Client,
    wanted: impl Fn(ReplicationStatus) -> bool,
) -> Result<()> {
    let deadline = Instant::now() + SOON;
    loop {
        let state = client.execute(&QueryReplication {})?.state;
        if wanted(state) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "it stays {state:?}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// A monitor that waits for a primary at `socket`.
fn backup(found: &Found, socket: &Path) -> Result<Backup> {
    match fs::remove_file(socket) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    let mut command = found.program()?;
    let control = socket.with_extension("qmp");
    command.arg("-qmp").arg(format!("unix:{},server,nowait", control.display()));
    command.arg("-incoming").arg(format!("replicate:unix:{}", socket.display()));
    let said = fs::File::create(socket.with_extension("said"))?;
    command.stdin(Stdio::null()).stdout(said.try_clone()?).stderr(said);
    let backup = Backup(command.spawn().context("cannot start the backup")?);
    let deadline = Instant::now() + SOON;
    while !socket.exists() {
        ensure!(Instant::now() < deadline, "the backup does not listen");
        thread::sleep(Duration::from_millis(5));
    }
    Ok(backup)
}

/// The checkpoints after number `after`.
fn epochs(client: &mut qmp::client::Client, mut after: u64) -> Result<Vec<ReplicationEpoch>> {
    let mut all = Vec::new();
    loop {
        let more = client.execute(&QueryReplicationEpochs { after: Some(after) })?.epochs;
        let Some(last) = more.last() else { return Ok(all) };
        after = last.number;
        all.extend(more);
    }
}

/// The number of the last checkpoint.
fn last(client: &mut qmp::client::Client) -> Result<u64> {
    Ok(epochs(client, 0)?.last().map_or(0, |epoch| epoch.number))
}

/// What has to be reached, one line for each; nothing of what was not measured.
#[must_use]
pub fn verdict(figures: &Figures) -> Vec<String> {
    let of = |scenario, metric, manner: Manner| figures.samples(scenario, metric, manner.name());
    let pause = |scenario: Scenario, manner: Manner, (most, p99): (f64, f64)| {
        let samples = of(scenario, Metric::Pause, manner);
        let (middle, high) = (median(samples)?, quantile(samples, 0.99)?);
        let title = scenario.title();
        let (name, n) = (manner.name(), samples.len());
        let said = format!(
            "pause, {title}, {name}: median {middle:.2} ms (at most {most}), p99 {high:.2} ms (at most {p99}), n = {n}"
        );
        Some(judged(said, middle <= most && high <= p99))
    };
    let floor = |scenario: Scenario| {
        let samples = of(scenario, Metric::PauseHarvest, Manner::Harvest);
        let (middle, n) = (median(samples)?, samples.len());
        Some(format!("  harvest alone, {}: median {middle:.2} ms, n = {n}", scenario.title()))
    };
    let cost = |manner: Manner| {
        let work = |manner| of(Scenario::RemusFew, Metric::Work, manner);
        let (protected, floor) = (work(manner), work(Manner::Harvest));
        let cost = 100.0 - median(protected)? / median(floor)? * 100.0;
        let all = 100.0 - median(protected)? / median(work(Manner::Nothing))? * 100.0;
        let (name, n) = (manner.name(), protected.len());
        let said = format!(
            "cost at 40/s and 200 pages beyond harvesting, {name}: {cost:.1} % (at most 5), {all:.1} % of all work, n = {n}"
        );
        Some(judged(said, cost <= 5.0))
    };
    let adapted = |manner: Manner| {
        let of = |metric, manner| of(Scenario::RemusAuto, metric, manner);
        let protected = of(Metric::Work, manner);
        let lost = 100.0 - median(protected)? / median(of(Metric::Work, Manner::Nothing))? * 100.0;
        let (period, n) = (median(of(Metric::Period, manner))?, protected.len());
        let said = format!(
            "2,000 pages per 25 ms of work, period adapted, {}: {lost:.1} % of all work (at most 15), period {period:.0} ms, n = {n}",
            manner.name()
        );
        Some(judged(said, lost <= 15.0))
    };
    let hosts = |metric, manner| of(Scenario::RemusHosts, metric, manner);
    let lone = || {
        let (alone, held) = (
            hosts(Metric::LoneRequest, Manner::Nothing),
            hosts(Metric::LoneRequest, Manner::Backup),
        );
        let (before, after) = (median(alone)?, median(held)?);
        let (added, n) = (after - before, held.len());
        let said = format!(
            "lone request, period adapted: {after:.2} ms instead of {before:.2}, {added:.2} later (at most 5), n = {n}"
        );
        Some(judged(said, added <= 5.0))
    };
    let failover = || {
        let samples = hosts(Metric::Failover, Manner::Backup);
        let (middle, n) = (median(samples)?, samples.len());
        let most = quantile(samples, 1.0)?;
        let said = format!(
            "kill -9 to the guest running at the backup, time-out 200 ms: median {middle:.0} ms, all at most {most:.0} (at most 500), n = {n}"
        );
        Some(judged(said, most <= 500.0))
    };
    [
        pause(Scenario::RemusMany, Manner::Backup, (1.5, 4.0)),
        pause(Scenario::RemusMany, Manner::Nowhere, (1.5, 4.0)),
        floor(Scenario::RemusMany),
        pause(Scenario::RemusFew, Manner::Backup, (0.5, 2.0)),
        pause(Scenario::RemusFew, Manner::Nowhere, (0.5, 2.0)),
        floor(Scenario::RemusFew),
        cost(Manner::Nowhere),
        cost(Manner::Backup),
        adapted(Manner::Nowhere),
        adapted(Manner::Backup),
        lone(),
        failover(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn judged(mut said: String, good: bool) -> String {
    said.push_str(if good { ": kept" } else { ": MISSED" });
    said
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_judged_by_its_median_and_its_99th_percentile() {
        let mut figures = Figures::default();
        let mut add = |manner: Manner, metric, values: &[f64]| {
            for value in values {
                figures.sample(Scenario::RemusFew, metric, manner.name().to_owned(), *value);
            }
        };
        assert_eq!(verdict(&Figures::default()), [""; 0]);
        add(Manner::Backup, Metric::Pause, &[&[0.4; 95][..], &[2.5; 5]].concat());
        add(Manner::Nowhere, Metric::Pause, &[0.4; 100]);
        add(Manner::Harvest, Metric::Work, &[100.0]);
        add(Manner::Nothing, Metric::Work, &[110.0]);
        add(Manner::Nowhere, Metric::Work, &[94.0]);
        let lines = verdict(&figures);
        let kept: Vec<_> = lines.iter().map(|line| line.ends_with("kept")).collect();
        assert_eq!(kept, [false, true, false], "{lines:?}");
        assert!(lines[2].contains("6.0 %") && lines[2].contains("14.5 %"), "{lines:?}");
    }
}
