//! The measuring itself, in the process that runs where the guests do.
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;
use std::{env, thread};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::control::{Connection, Verb};
use super::guests::{FIRST_BYTE, HOST_ADDRESS, payload_elf, serve_peer, talker_elf};
use super::monitors::{Form, Found, Guest, OURS, find};
use super::run::Run;
use super::{Message, Metric, Scenario, domains, snapshots};
use crate::debian::Debian;
use crate::host::CONTROL;
use crate::net::Tap;
use crate::paths::{GUEST_KERNEL, Paths};
use crate::{guest, kernel};

/// The argument that makes `compare` measure; a [`Task`] follows.
pub const MEASURE: &str = "--measure";
/// The initramfs without and with modules, by their names under [`Paths::cache`].
pub const INITRAMFS: [&str; 2] = ["compare/bare.cpio", "compare/modules.cpio"];
/// `stratoctl`, likewise.
pub const STRATOCTL: &str = "compare/stratoctl";

/// What every Linux is told: where its console is, and to end rather than hang.
const CMDLINE: &str = "console=ttyS0 reboot=t panic=-1 quiet";
/// Processors that spin when the time to stop them is measured.
const BUSY_VCPUS: u32 = 4;
/// RAM of every guest.
const MIB: u64 = 256;
/// RAM of a large guest.
const LARGE_MIB: u64 = 4096;
/// Times that each save is restored.
const RESTORES: usize = 3;
/// Bytes of the disk; all of it fits into the host's page cache.
const DISK: u64 = 256 << 20;
/// The tap.
const TAP: &str = "compare0";
/// What this namespace's TCP is to send with, and where that is said.
const CONGESTION_CONTROL: (&str, &str) = ("/proc/sys/net/ipv4/tcp_congestion_control", "reno");
/// How long a guest may take to say the next thing, the slowest host included.
const LIMIT: Duration = Duration::from_secs(120);
/// Round trips measured in each run.
const ROUND_TRIPS: usize = 20;
/// Lets a monitor settle: what it does after the guest's first sign of life is not measured.
const SETTLE: Duration = Duration::from_millis(30);

/// What to measure.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Task {
    /// In this order.
    pub scenarios: Vec<Scenario>,
    /// Runs of each monitor in each scenario.
    pub runs: usize,
    /// Seconds for each figure that the guest measures.
    pub seconds: f64,
}

/// Does `task` and says what comes of it.
///
/// # Errors
/// Nothing can be measured; a monitor that fails is only told.
pub fn measure(task: &Task) -> Result<()> {
    let error = Bench::new(task).and_then(|bench| bench.all(task)).err();
    tell(&Message::Done(error.map(|error| format!("{error:#}"))))
}

fn tell(message: &Message) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(&[CONTROL])?;
    serde_json::to_writer(&mut out, message)?;
    out.write_all(b"\n")?;
    out.flush().context("nobody listens any more")
}

/// Everything there is to measure with.
struct Bench {
    monitors: Vec<Found>,
    paths: Paths,
    dir: PathBuf,
    disk: PathBuf,
    seconds: f64,
    _tap: Tap,
}

/// Where the figures of one run go.
struct Sink<'a> {
    scenario: Scenario,
    monitor: &'a str,
}

impl Sink<'_> {
    fn sample(&self, metric: Metric, value: f64) -> Result<()> {
        let (scenario, monitor) = (self.scenario, self.monitor.to_owned());
        tell(&Message::Sample { scenario, metric, monitor, value })
    }

    fn time(&self, metric: Metric, time: Duration) -> Result<()> {
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
}

impl Bench {
    fn new(task: &Task) -> Result<Self> {
        let paths = Paths::from_env()?;
        let debian = Debian::unpacked(&paths);
        let dir = paths.fresh_scratch("compare")?;
        let disk = dir.join("disk.raw");
        // Written, not sparse: what is read later comes from the page cache.
        let mut file = File::create(&disk)?;
        let block = vec![0x5a; 1 << 20];
        for _ in 0..DISK >> 20 {
            file.write_all(&block).context("no room for the disk")?;
        }
        file.sync_all()?;
        let tap = Tap::create(&debian, TAP, HOST_ADDRESS)?;
        // BBR, where it is the host's default, sends by a timer: the timer would be measured then,
        // at less than half of what the monitors can receive.
        let (file, reno) = CONGESTION_CONTROL;
        fs::write(file, reno).with_context(|| format!("cannot write {reno} to {file}"))?;
        serve_peer()?;
        let (monitors, _) = find(&paths, &debian);
        Ok(Self { monitors, paths, dir, disk, seconds: task.seconds, _tap: tap })
    }

    fn all(&self, task: &Task) -> Result<()> {
        tell(&Message::Plan(task.scenarios.len() * task.runs * self.monitors.len()))?;
        for found in &self.monitors {
            let version = found.version().unwrap_or_else(|error| format!("{error:#}"));
            tell(&Message::Monitor { name: found.monitor.name.to_owned(), version })?;
        }
        for &scenario in &task.scenarios {
            let mut failed = vec![false; self.monitors.len()];
            for _ in 0..task.runs {
                // In turns: what disturbs this machine disturbs all of them.
                for (found, failed) in self.monitors.iter().zip(&mut failed) {
                    let monitor = found.monitor.name;
                    tell(&Message::Step(format!("{}: {monitor}", scenario.title())))?;
                    if *failed {
                        continue;
                    }
                    let sink = Sink { scenario, monitor };
                    let result = match scenario {
                        Scenario::Payload => self.payload(found, &sink),
                        Scenario::Snapshots => self.snapshots(found, &sink),
                        Scenario::Domains if monitor == OURS.name => self.domains(&sink),
                        Scenario::Domains => Ok(()),
                        Scenario::Linux | Scenario::Emulated => self.linux(found, &sink),
                    };
                    if let Err(error) = result {
                        *failed = true;
                        let (monitor, error) = (monitor.to_owned(), format!("{error:#}"));
                        tell(&Message::Failed { scenario, monitor, error })?;
                    }
                }
            }
        }
        fs::remove_dir_all(&self.dir).context("cannot clean up")
    }

    fn payload(&self, found: &Found, sink: &Sink<'_>) -> Result<()> {
        let elf = self.payload_elf()?;
        let guest = Guest {
            kernel: self.kernel(found, elf)?,
            initramfs: None,
            cmdline: String::new(),
            vcpus: 1,
            mib: MIB,
            acpi: true,
            devices: Some(self.devices()),
        };
        let mut run = Run::start(found, &guest, &self.dir)?;
        let (mut connection, ready) = run.connect()?;
        let first = run.wait_byte(FIRST_BYTE, LIMIT)?;
        sink.time(Metric::Api, ready)?;
        sink.time(Metric::FirstByte, first)?;
        thread::sleep(SETTLE);
        sink.sample(Metric::Private, run.private_kib(MIB)? as f64)?;
        sink.round_trips(&mut connection, &[(Verb::Status, Metric::Status)])
    }

    fn snapshots(&self, found: &Found, sink: &Sink<'_>) -> Result<()> {
        let elf = self.dir.join("talker.elf");
        if !elf.exists() {
            fs::write(&elf, talker_elf())?;
        }
        let saved = self.dir.join("saved");
        for (mib, restore) in [(MIB, Metric::Restore), (LARGE_MIB, Metric::RestoreLarge)] {
            let guest = Guest {
                kernel: self.kernel(found, elf.clone())?,
                initramfs: None,
                cmdline: String::new(),
                vcpus: 1,
                mib,
                acpi: true,
                devices: None,
            };
            let mut run = Run::start(found, &guest, &self.dir)?;
            let (mut connection, _) = run.connect()?;
            run.wait_byte(FIRST_BYTE, LIMIT)?;
            thread::sleep(SETTLE);
            if restore == Metric::Restore {
                if let Some(pause) = snapshots::save_live(found, &mut connection, &saved)? {
                    sink.time(Metric::LivePause, pause)?;
                }
                let pause = snapshots::save(found, &mut connection, &saved)?;
                sink.time(Metric::SavePause, pause)?;
                let dd = snapshots::dd(&saved, &self.dir.join("dd"))?;
                sink.sample(Metric::SaveRatio, pause.as_secs_f64() / dd.as_secs_f64())?;
            } else {
                snapshots::save(found, &mut connection, &saved)?;
            }
            drop(run);
            for _ in 0..RESTORES {
                let mut run = Run::restore(found, &guest, &saved, &self.dir)?;
                snapshots::go_on(found, &mut run, &saved)?;
                sink.time(restore, run.wait_byte(FIRST_BYTE, LIMIT)?)?;
            }
        }
        Ok(())
    }

    fn domains(&self, sink: &Sink<'_>) -> Result<()> {
        let elf = self.payload_elf()?;
        let stratoctl = self.paths.cache.join(STRATOCTL);
        let times = domains::lists(&stratoctl, &self.paths.stratovirt, &elf, &self.dir)?;
        times.into_iter().try_for_each(|time| sink.time(Metric::List, time))
    }

    /// Boots once for the time alone, once with disk and NIC for most figures, and once more with as
    /// many processors as the kernel can have, all of them busy, to stop them.
    fn linux(&self, found: &Found, sink: &Sink<'_>) -> Result<()> {
        let distribution =
            sink.scenario == Scenario::Emulated || env::var_os(GUEST_KERNEL).is_none();
        let bare = self.linux_guest(found, distribution, "init")?;
        let mut run = Run::start(found, &bare, &self.dir)?;
        let (_, _, init) = run.wait_figure(LIMIT)?;
        sink.time(Metric::Init, init)?;
        drop(run);

        self.cache_disk()?;
        let mut guest = self.linux_guest(found, distribution, "all")?;
        guest.devices = Some(self.devices());
        let mut run = Run::start(found, &guest, &self.dir)?;
        let (_, ready) = run.connect()?;
        sink.time(Metric::Api, ready)?;
        loop {
            let (name, value, at) = run.wait_figure(LIMIT)?;
            match name.as_str() {
                "init" => {
                    sink.time(Metric::InitDevices, at)?;
                    sink.sample(Metric::Private, run.private_kib(MIB)? as f64)?;
                }
                "busy" => break,
                name => {
                    let metric = serde_json::from_value(name.into())
                        .with_context(|| format!("the guest tells of {name}"))?;
                    sink.sample(metric, value)?;
                }
            }
        }
        drop(run);

        let mut busy = self.linux_guest(found, distribution, "busy")?;
        busy.vcpus = if distribution { BUSY_VCPUS } else { 1 };
        let mut run = Run::start(found, &busy, &self.dir)?;
        let (mut connection, _) = run.connect()?;
        while run.wait_figure(LIMIT)?.0 != "busy" {}
        let verbs = [
            (Verb::Stop, Metric::Stop),
            (Verb::Status, Metric::Status),
            (Verb::Cont, Metric::Cont),
        ];
        sink.round_trips(&mut connection, &verbs)
    }

    /// Linux with one processor and without devices, that does `what`: Debian's (`distribution`), or
    /// the one that was given.
    fn linux_guest(&self, found: &Found, distribution: bool, what: &str) -> Result<Guest> {
        let [bare, modules] = INITRAMFS.map(|name| self.paths.cache.join(name));
        let common = format!("{CMDLINE} printk.devkmsg=on bench={what} seconds={}", self.seconds);
        let (kernel, initramfs, cmdline) = if distribution {
            (guest::Kernel::Elf, modules, common)
        } else {
            // What a kernel without kvm-clock has to be told; harmless for others.
            let khz = tsc_khz().context("this host's KVM does not tell the TSC's frequency")?;
            let told = format!("{common} tsc_early_khz={khz} tsc=reliable idle=halt nopti");
            (guest::Kernel::Given, bare, told)
        };
        // What comes from a disk for the first time is not measured.
        fs::read(&initramfs)?;
        Ok(Guest {
            kernel: self.kernel(found, kernel.path(&self.paths))?,
            initramfs: Some(initramfs),
            cmdline,
            vcpus: 1,
            mib: MIB,
            acpi: distribution,
            devices: None,
        })
    }

    fn payload_elf(&self) -> Result<PathBuf> {
        let elf = self.dir.join("payload.elf");
        if !elf.exists() {
            fs::write(&elf, payload_elf())?;
        }
        Ok(elf)
    }

    /// Brings the disk into the page cache in the same way for every guest: how the one before
    /// wrote it decides otherwise in how large pieces it lies there, and so how fast it is read.
    fn cache_disk(&self) -> Result<()> {
        let mut file = File::open(&self.disk)?;
        file.sync_all()?;
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        io::copy(&mut file, &mut io::sink())?;
        Ok(())
    }

    fn devices(&self) -> (PathBuf, String) {
        (self.disk.clone(), TAP.to_owned())
    }

    /// A kernel in the form that a monitor takes, made when it is first asked for; in the page cache.
    fn kernel(&self, found: &Found, elf: PathBuf) -> Result<PathBuf> {
        let image = fs::read(&elf).with_context(|| format!("cannot read {}", elf.display()))?;
        if found.monitor.form == Form::Elf {
            return Ok(elf);
        }
        let name = elf.file_name().context("a kernel without a name")?;
        let flat = self.dir.join(name).with_extension("flat");
        if !flat.exists() {
            fs::write(&flat, kernel::flat(&image)?)?;
        }
        Ok(flat)
    }
}

fn tsc_khz() -> Result<u32> {
    Ok(kvm_ioctls::Kvm::new()?.create_vm()?.create_vcpu(0)?.get_tsc_khz()?)
}
