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
//!
//! Beside them stands a bare loop that has nothing of a monitor ([`floor`]). Other parts measure real
//! work ([`real`]), two hosts in a network ([`network`], [`held`]), and one with a fence ([`local`]).
mod floor;
mod held;
mod local;
mod network;
mod real;
mod verdict;

pub use held::SECONDS;
pub use verdict::verdict;

use std::fs;
use std::path::{Path, PathBuf};
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
use super::measure::{LIMIT, Turn, send};
use super::monitors::{Found, Guest};
use super::part::Part;
use super::rig::Rig;
use super::run::{Run, last_words};
use super::smaps;
use super::{Message, Metric, Scenario};

/// Turns, if nothing else is wanted.
pub const TURNS: usize = 5;
/// The parts, as `--only` has them.
pub const PARTS: [(&str, Scenario); 8] = [
    ("few", Scenario::RemusFew),
    ("many", Scenario::RemusMany),
    ("auto", Scenario::RemusAuto),
    ("unpack", Scenario::RemusUnpack),
    ("database", Scenario::RemusDatabase),
    ("hosts", Scenario::RemusHosts),
    ("held", Scenario::RemusHeld),
    ("local", Scenario::RemusLocal),
];
/// RAM of the guest, MiB.
const MIB: u64 = 512;
/// Until what the beginning of a manner has disturbed is over.
const SETTLE: Duration = Duration::from_millis(1500);
/// Figures of work, one a second, in each turn of each manner.
const FIGURES: usize = 3;
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

/// What is measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Plan {
    /// Turns of each part.
    pub turns: usize,
    /// Seconds for which checkpoints are counted between two hosts.
    pub seconds: u64,
    /// These parts; all, if there are none.
    pub only: Vec<Scenario>,
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
const LONGEST: u64 = 1000;

/// Measures what `plan` says.
///
/// # Errors
/// The requesting process has ended, or the measurement is interrupted.
pub fn measure(rig: &Rig, debian: &Debian, found: &Found, plan: &Plan) -> Result<()> {
    for manner in Manner::ALL {
        let version = format!("{}; {}", manner.about(), found.version()?);
        send(&Message::Monitor { name: manner.name().to_owned(), version })?;
    }
    let version = "a timer stops the guest, and its thread copies what was written".to_owned();
    send(&Message::Monitor { name: floor::NAME.to_owned(), version })?;
    let wanted = |scenario| plan.only.is_empty() || plan.only.contains(&scenario);
    let scenarios: Vec<_> =
        PARTS.into_iter().map(|(_, part)| part).filter(|&part| wanted(part)).collect();
    let steps = |scenario: &Scenario| match scenario {
        Scenario::RemusFew | Scenario::RemusMany => plan.turns * Manner::ALL.len() + 2,
        Scenario::RemusAuto => plan.turns * Manner::ALL.len(),
        Scenario::RemusHosts => 2 * plan.turns,
        Scenario::RemusHeld => 1,
        _ => plan.turns,
    };
    send(&Message::Plan(scenarios.iter().map(steps).sum()))?;
    let turns = plan.turns;
    for scenario in scenarios {
        let load = LOADS.iter().find(|load| load.scenario == scenario);
        let result = match (scenario, load) {
            (_, Some(load)) => under(rig, found, load, turns),
            (Scenario::RemusHosts, _) => network::measure(rig, debian, turns),
            (Scenario::RemusHeld, _) => held::measure(rig, debian, plan.seconds),
            (Scenario::RemusLocal, _) => local::measure(rig, found, turns),
            _ => real::measure(rig, debian, found, scenario, turns),
        };
        note(rig, scenario, result)?;
    }
    Ok(())
}

/// Reports why a scenario has failed, if it has.
fn note(rig: &Rig, scenario: Scenario, result: Result<()>) -> Result<()> {
    let Err(error) = result else { return Ok(()) };
    rig.interrupt.check()?;
    send(&Message::Failed {
        scenario,
        part: Part::Protection.label().to_owned(),
        monitor: "this monitor".to_owned(),
        error: format!("{error:#}; it said: {}", last_words(&rig.dir)),
    })
}

/// A function that reports figures of a scenario in a manner.
fn sampler(scenario: Scenario, name: &'static str) -> impl Fn(Metric, f64) -> Result<()> {
    move |metric, value| {
        send(&Message::Sample { scenario, metric, monitor: name.to_owned(), value })
    }
}

/// Measures one load: one guest, in all manners in turns.
fn under(rig: &Rig, found: &Found, load: &Load, turns: usize) -> Result<()> {
    floor::measure(rig, load)?;
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
            let sample = sampler(load.scenario, manner.name());
            settle(&mut run)?;
            let after = last(&mut client)?;
            for _ in 0..FIGURES {
                let (name, value, _) = run.wait_figure(SOON)?;
                ensure!(name == "work", "the guest says {name}");
                sample(Metric::Work, value)?;
                if let Some(Protected(Some(backup))) = &protected {
                    sample(Metric::BackupMemory, backup.mib_beyond_ram(MIB)?)?;
                }
            }
            for epoch in epochs(&mut client, after)? {
                report(&epoch, load, &sample)?;
            }
            if let Some(protected) = protected {
                unprotect(&mut client, protected)?;
            }
        }
    }
    drop(run);
    floor::measure(rig, load)
}

/// Waits until what has just begun does not disturb the guest any more.
fn settle(run: &mut Run) -> Result<()> {
    let until = Instant::now() + SETTLE;
    while Instant::now() < until {
        run.wait_figure(SOON)?;
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

impl Backup {
    /// MiB of its own memory, when its guest has so many.
    fn mib_beyond_ram(&self, mib: u64) -> Result<f64> {
        let smaps = fs::read_to_string(format!("/proc/{}/smaps", self.0.id()))?;
        Ok(smaps::shares(&smaps, mib << 10)?.private as f64 / 1024.0)
    }
}

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
    let start = ReplicationStart {
        interval: (!load.adapts).then_some(load.period.as_millis() as u64),
        max_period: load.adapts.then_some(LONGEST),
        r#unsafe: Some(true),
        ..Default::default()
    };
    begin(rig, found, client, manner, start)
}

/// Begins a protection in this manner, and otherwise as `start` says.
fn begin(
    rig: &Rig,
    found: &Found,
    client: &mut qmp::client::Client,
    manner: Manner,
    mut start: ReplicationStart,
) -> Result<Option<Protected>> {
    let mut protected = Protected(None);
    match manner {
        Manner::Nothing => return Ok(None),
        Manner::Harvest => start.blackhole = Some(ReplicationBlackhole::Harvest),
        Manner::Nowhere => start.blackhole = Some(ReplicationBlackhole::Checkpoint),
        Manner::Backup => {
            let socket = rig.dir.join("backup.sock");
            protected.0 = Some(backup(found, &socket, "")?);
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

/// A monitor that waits for a primary at `socket`, with more `words` about that.
fn backup(found: &Found, socket: &Path, words: &str) -> Result<Backup> {
    match fs::remove_file(socket) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    let mut command = found.program()?;
    let control = control(socket);
    command.arg("-qmp").arg(format!("unix:{},server,nowait", control.display()));
    command.arg("-incoming").arg(format!("replicate:unix:{}{words}", socket.display()));
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

/// The control socket of the backup at `socket`.
fn control(socket: &Path) -> PathBuf {
    socket.with_extension("qmp")
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
