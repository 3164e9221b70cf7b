//! The measurement itself, in the process that runs where the guests run.
use std::io::{self, Write};
use std::time::Duration;
use std::{env, thread};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::control::{Connection, Verb};
use super::density::Counts;
use super::guests::FIRST_BYTE;
use super::interrupt::Interrupt;
use super::monitors::{Found, Guest, find};
use super::part::Part;
use super::rig::{MIB, Rig};
use super::run::{Run, last_words};
use super::snapshots::Target;
use super::{
    Message, Metric, Scenario, builds, cpu, density, domains, goals, held, remus, scattered,
    snapshots,
};
use stories::debian::Debian;
use stories::host::CONTROL;
use stories::paths::{GUEST_KERNEL, Paths};

/// The argument that makes `compare` the measuring process; a [`Task`] follows.
pub const MEASURE: &str = "--measure";
/// The initramfs without and with modules, by their names under [`Paths::cache`].
pub const INITRAMFS: [&str; 2] = ["compare/bare.cpio", "compare/modules.cpio"];
/// `stratoctl`, likewise.
pub const STRATOCTL: &str = "compare/stratoctl";

/// Busy processors when the time to stop them is measured.
const BUSY_VCPUS: u32 = 4;
/// RAM of a large guest, MiB.
const LARGE_MIB: u64 = 4096;
/// Times that each save is restored.
const RESTORES: usize = 3;
/// How long a guest may take until its next output, even on the slowest host.
pub const LIMIT: Duration = Duration::from_secs(120);
/// Round trips measured in each run.
const ROUND_TRIPS: usize = 20;
/// Lets a monitor settle: its work right after the guest's first output is not measured.
pub const SETTLE: Duration = Duration::from_millis(30);
/// How long after a guest's first output a monitor's memory is measured: by then this one has given
/// back what only its start needed.
pub const STARTED: Duration = Duration::from_millis(1200);
/// After so many failures a part of a scenario is skipped.
const ATTEMPTS: usize = 2;

/// What to measure.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Task {
    /// What is compared.
    pub subject: Subject,
    /// Seconds for each figure measured by the guest.
    pub seconds: f64,
    /// How many machines there are where many run at once.
    pub counts: Counts,
    /// The other monitors that take part, by the names of their programs; all, if there are none.
    pub peers: Vec<String>,
}

/// What is compared.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Subject {
    /// This monitor and the others: scenarios in this order, and runs of each monitor in each.
    Monitors(Vec<Scenario>, usize),
    /// Two builds of this monitor.
    Builds(builds::Plan),
    /// The figures that have goals.
    Goals(goals::Plan),
    /// This monitor while something is blocked, and how often it is asked.
    Held(usize),
    /// This monitor while it protects a guest.
    Remus(remus::Plan),
}

/// Runs `task` and reports the results.
///
/// # Errors
/// The requesting process has ended; all other errors are only reported.
pub fn measure(task: &Task) -> Result<()> {
    let error = all(task).err();
    send(&Message::Done(error.map(|error| format!("{error:#}"))))
}

fn all(task: &Task) -> Result<()> {
    let paths = Paths::from_env()?;
    let debian = Debian::unpacked(&paths);
    let interrupt = match &task.subject {
        Subject::Monitors(scenarios, _) if scenarios.contains(&Scenario::Density) => {
            Interrupt::watch()?
        }
        Subject::Goals(_) | Subject::Remus(_) => Interrupt::watch()?,
        _ => Interrupt::default(),
    };
    let rig = Rig::new(&paths, &debian, task, interrupt)?;
    let done = match &task.subject {
        Subject::Monitors(scenarios, runs) => {
            let (mut monitors, _) = find(&paths, &debian);
            monitors.retain(|found| {
                let program = found.monitor.program;
                task.peers.is_empty() || found.is_ours() || task.peers.iter().any(|p| p == program)
            });
            introduce(&monitors)?;
            compare(&rig, &monitors.iter().collect::<Vec<_>>(), scenarios, *runs)
        }
        Subject::Goals(plan) => goals::measure(&rig, find(&paths, &debian).0, plan),
        Subject::Builds(plan) => builds::measure(&rig, plan)
            .map_err(|error| anyhow::anyhow!(with_last_words(&rig, &error))),
        Subject::Held(times) => held::measure(&rig, &debian, *times),
        Subject::Remus(plan) => {
            let ours = find(&paths, &debian).0.into_iter().find(Found::is_ours);
            remus::measure(&rig, &debian, &ours.context("this monitor is missing")?, plan)
        }
    };
    rig.clean_up()?;
    done
}

/// Reports which monitors take part.
///
/// # Errors
/// The requesting process has ended.
pub fn introduce(monitors: &[Found]) -> Result<()> {
    monitors.iter().try_for_each(|found| {
        let version = found.version().unwrap_or_else(|error| format!("{error:#}"));
        send(&Message::Monitor { name: found.name.clone(), version })
    })
}

/// Sends a message to the requesting process.
///
/// # Errors
/// It has ended.
pub fn send(message: &Message) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(&[CONTROL])?;
    serde_json::to_writer(&mut out, message)?;
    out.write_all(b"\n")?;
    out.flush().context("the process that asked has ended")
}

/// Measures `scenarios` with `monitors`, `runs` times with each.
///
/// # Errors
/// The requesting process has ended, or the measurement is interrupted.
pub fn compare(rig: &Rig, monitors: &[&Found], scenarios: &[Scenario], runs: usize) -> Result<()> {
    let parts: usize = scenarios.iter().map(|&scenario| Part::of(scenario).len()).sum();
    send(&Message::Plan(parts * runs * monitors.len()))?;
    for &scenario in scenarios {
        let parts = Part::of(scenario);
        let mut failures = vec![0; parts.len() * monitors.len()];
        for run in 0..runs {
            // In turns: what disturbs this machine disturbs all of them.
            let turns =
                parts.iter().flat_map(|part| monitors.iter().map(move |found| (part, found)));
            let mut turns: Vec<_> = turns.zip(&mut failures).collect();
            if run % 2 == 1 {
                // None always comes after the same one, whose processes may still be ending.
                turns.chunks_mut(monitors.len().max(1)).for_each(<[_]>::reverse);
            }
            for ((part, found), failures) in turns {
                rig.interrupt.check()?;
                let label = part.label();
                send(&Message::Step(format!("{}, {label}: {}", scenario.title(), found.name)))?;
                if *failures >= ATTEMPTS {
                    continue;
                }
                if let Err(error) = Turn::new(rig, found, scenario).take(*part) {
                    *failures += 1;
                    let (part, monitor) = (label.to_owned(), found.name.clone());
                    let error = with_last_words(rig, &error);
                    send(&Message::Failed { scenario, part, monitor, error })?;
                }
            }
        }
    }
    Ok(())
}

/// An error, with the monitor's last messages: it may have ended for a reason of its own.
pub fn with_last_words(rig: &Rig, error: &anyhow::Error) -> String {
    match last_words(&rig.dir).as_str() {
        "" => format!("{error:#}"),
        words => format!("{error:#}; it said: {words}"),
    }
}

/// One monitor at its turn.
pub struct Turn<'a> {
    /// Shared by all.
    pub rig: &'a Rig,
    /// Which one.
    pub found: &'a Found,
    scenario: Scenario,
}

impl<'a> Turn<'a> {
    /// The turn of `found` in `scenario`.
    #[must_use]
    pub const fn new(rig: &'a Rig, found: &'a Found, scenario: Scenario) -> Self {
        Self { rig, found, scenario }
    }

    fn take(&self, part: Part) -> Result<()> {
        match part {
            Part::Payload => self.payload(),
            Part::SaveLive => self.save_live(),
            Part::Save => self.save(),
            Part::Restore => self.restores(MIB, Metric::Restore),
            Part::RestoreLarge => self.restores(LARGE_MIB, Metric::RestoreLarge),
            Part::List if self.found.is_ours() => self.list(),
            Part::List => Ok(()),
            Part::Init => self.init(),
            Part::Devices => self.devices("all"),
            Part::Start => self.start_alone(),
            Part::Io => self.devices("small"),
            Part::Busy => self.busy(),
            Part::Scattered => scattered::pauses(self),
            Part::Machines => density::machines(self),
            Part::Clones => density::clones(self),
            // Measured by `remus`, for all of its manners at once.
            Part::Protection => Ok(()),
        }
    }

    /// Starts the monitor with `guest`.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(&self, guest: &Guest) -> Result<Run> {
        Run::start(self.found, guest, &self.rig.dir)
    }

    /// Reports a figure.
    ///
    /// # Errors
    /// The requesting process has ended.
    pub fn sample(&self, metric: Metric, value: f64) -> Result<()> {
        let (scenario, monitor) = (self.scenario, self.found.name.clone());
        send(&Message::Sample { scenario, metric, monitor, value })
    }

    /// Reports a time.
    ///
    /// # Errors
    /// The requesting process has ended.
    pub fn time(&self, metric: Metric, time: Duration) -> Result<()> {
        let unit = match metric.label().1 {
            "us" => 1e6,
            _ => 1e3,
        };
        self.sample(metric, time.as_secs_f64() * unit)
    }

    fn round_trips(&self, connection: &mut Connection, verbs: &[(Verb, Metric)]) -> Result<()> {
        for _ in 0..ROUND_TRIPS {
            for &(verb, metric) in verbs {
                self.time(metric, connection.ask(verb)?)?;
            }
        }
        Ok(())
    }

    fn payload(&self) -> Result<()> {
        let mut run = self.start(&self.rig.payload(self.found)?)?;
        let (mut connection, ready) = run.connect()?;
        let first = run.wait_byte(FIRST_BYTE, LIMIT)?;
        self.time(Metric::Api, ready)?;
        self.time(Metric::FirstByte, first)?;
        thread::sleep(STARTED);
        self.sample(Metric::Private, run.private_kib(MIB)? as f64)?;
        self.round_trips(&mut connection, &[(Verb::Status, Metric::Status)])
    }

    /// Starts a guest only to measure the time.
    fn start_alone(&self) -> Result<()> {
        let mut run = self.start(&self.rig.halting(self.found)?)?;
        self.time(Metric::FirstByte, run.wait_byte(FIRST_BYTE, LIMIT)?)
    }

    /// Starts a guest of `mib` MiB; returns it once it has reported that it runs, with a connection
    /// to its monitor.
    ///
    /// # Errors
    /// It does not start.
    pub fn talking(&self, mib: u64) -> Result<(Run, Connection, Guest)> {
        let guest = Guest { mib, ..self.rig.talker(self.found)? };
        let mut run = self.start(&guest)?;
        let (connection, _) = run.connect()?;
        run.wait_byte(FIRST_BYTE, LIMIT)?;
        thread::sleep(SETTLE);
        Ok((run, connection, guest))
    }

    fn save_live(&self) -> Result<()> {
        if !self.found.monitor.way.is_live() {
            return Ok(());
        }
        let (_run, mut connection, _) = self.talking(MIB)?;
        let saved = self.rig.dir.join("saved");
        let pause = snapshots::save_live(self.found, &mut connection, Target::Directory(&saved))?;
        self.time(Metric::LivePause, pause)
    }

    fn save(&self) -> Result<()> {
        let (_run, mut connection, _) = self.talking(MIB)?;
        let saved = self.rig.dir.join("saved");
        let time = snapshots::save(self.found, &mut connection, &saved)?;
        self.time(Metric::SaveSynced, time)?;
        let dd = snapshots::dd(&saved, &self.rig.dir.join("dd"))?;
        self.sample(Metric::SaveRatio, time.as_secs_f64() / dd.as_secs_f64())
    }

    fn restores(&self, mib: u64, metric: Metric) -> Result<()> {
        let (run, mut connection, guest) = self.talking(mib)?;
        let saved = self.rig.dir.join("saved");
        snapshots::save(self.found, &mut connection, &saved)?;
        drop(run);
        for _ in 0..RESTORES {
            let mut run = Run::restore(self.found, &guest, &saved, &self.rig.dir)?;
            if self.found.monitor.way.is_told_to_resume() {
                let (mut connection, _) = run.connect()?;
                snapshots::resume(self.found, &mut connection, &saved)?;
            }
            self.time(metric, run.wait_byte(FIRST_BYTE, LIMIT)?)?;
        }
        Ok(())
    }

    fn list(&self) -> Result<()> {
        let (elf, stratoctl) = (self.rig.payload_elf()?, self.rig.paths.cache.join(STRATOCTL));
        let times = domains::lists(&stratoctl, &self.rig.paths.stratovirt, &elf, &self.rig.dir)?;
        times.into_iter().try_for_each(|time| self.time(Metric::List, time))
    }

    /// Debian's or the given Linux kernel, with the init's task `what`.
    ///
    /// # Errors
    /// Its file does not exist.
    pub fn linux(&self, what: &str) -> Result<Guest> {
        self.rig.linux(self.found, self.distribution(), what)
    }

    fn distribution(&self) -> bool {
        self.scenario == Scenario::Emulated || env::var_os(GUEST_KERNEL).is_none()
    }

    /// Boots Linux only to measure the time.
    fn init(&self) -> Result<()> {
        let mut run = self.start(&self.linux("init")?)?;
        let (_, _, init) = run.wait_figure(LIMIT)?;
        self.time(Metric::Init, init)
    }

    /// Boots Linux with disk and NIC, for most figures; `what` says which.
    ///
    /// # Errors
    /// It does not boot, or the guest cannot measure.
    pub fn devices(&self, what: &str) -> Result<()> {
        self.rig.cache_disk()?;
        let guest = Guest { devices: Some(self.rig.devices()), ..self.linux(what)? };
        let mut run = self.start(&guest)?;
        let (_, ready) = run.connect()?;
        self.time(Metric::Api, ready)?;
        let mut began = None;
        loop {
            let (name, value, at) = run.wait_figure(LIMIT)?;
            match name.as_str() {
                "init" => {
                    self.time(Metric::InitDevices, at)?;
                    self.sample(Metric::Private, run.private_kib(MIB)? as f64)?;
                }
                "begin" => began = Some((cpu::of(run.pid())?, at)),
                "busy" => return Ok(()),
                name => {
                    let metric: Metric = serde_json::from_value(name.into())
                        .with_context(|| format!("the guest reports {name}"))?;
                    self.sample(metric, value)?;
                    if let (Some((cost, factor)), Some((before, since))) =
                        (metric.cost(), began.take())
                    {
                        let used = cpu::of(run.pid())? - before;
                        let share = used.as_secs_f64() / (at - since).as_secs_f64();
                        self.sample(cost, share / value * factor)?;
                    }
                }
            }
        }
    }

    /// Boots Linux with as many processors as the kernel supports, all busy, to measure `stop`.
    fn busy(&self) -> Result<()> {
        let vcpus = if self.distribution() { BUSY_VCPUS } else { 1 };
        let mut run = self.start(&Guest { vcpus, ..self.linux("busy")? })?;
        let (mut connection, _) = run.connect()?;
        while run.wait_figure(LIMIT)?.0 != "busy" {}
        let verbs = [
            (Verb::Stop, Metric::Stop),
            (Verb::Status, Metric::Status),
            (Verb::Cont, Metric::Cont),
        ];
        self.round_trips(&mut connection, &verbs)
    }
}
