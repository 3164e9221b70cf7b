//! Two machines of which one runs the guest and the other could: they change places at every
//! failover, each time with a new process as the backup.
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use qmp::client::{Client, ReceivedEvent};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::agent::Agent;
use super::certificates;
use super::dialer::Dialer;
use super::machine::{start, vm, waiting};
use super::witness::Witness;
use crate::lab::hosts::{Hosts, Side};
use crate::monitor::{BOOT, Monitor, SOON};
use crate::paths::Paths;

/// Identity of the witness.
const WITNESS: &str = "test";
/// The port of the first backup. Each has one of its own.
const PORT: u16 = 7000;

/// Checkpoints begin as soon as output waits, else after this many milliseconds at most.
pub const ADAPTS: Duration = Duration::ZERO;
const LONGEST: u64 = 200;

/// How a guest is protected.
#[derive(Debug, Clone, Copy)]
pub struct Protection {
    /// From one checkpoint to the next; [`ADAPTS`]: as soon as output waits.
    pub interval: Duration,
    /// Without a byte from the peer, until it is suspected.
    pub timeout: Duration,
}

/// Where the machines are.
pub struct Pair<'a> {
    /// The network.
    pub hosts: &'a Hosts,
    /// Decides who runs the guest.
    pub witness: Arc<Witness>,
    /// Whether the link is encrypted.
    pub tls: bool,
    paths: &'a Paths,
    dir: PathBuf,
    certificates: PathBuf,
    /// Processes started so far.
    count: u16,
    /// The images of the machine's disk at both hosts, if it has one.
    images: Option<[PathBuf; 2]>,
}

/// A process that runs the guest, or waits to.
pub struct Machine {
    /// Its host.
    pub side: Side,
    /// Asked by the test.
    pub qmp: Client,
    /// Answers what the monitor asks, and keeps what it reports.
    pub agent: Agent,
    /// Connects it to its backup, once it has one.
    dialer: Option<Dialer>,
    /// Where its control socket is.
    socket: PathBuf,
    /// The process; killed when dropped.
    pub monitor: Monitor,
}

/// How long the parts of a failover took.
#[derive(Debug, Clone, Copy)]
pub struct Failover {
    /// From the last sign of life to the suspicion, as the monitor says.
    pub detect: Duration,
    /// From there to the decision.
    pub decide: Duration,
    /// Of that, loading the state.
    pub apply: Duration,
    /// From the decision to the guest's first step.
    pub run: Duration,
    /// From the death of the old primary to the event, as seen from outside.
    pub all: Duration,
}

impl Machine {
    /// What its monitor says of replication.
    ///
    /// # Errors
    /// It does not answer.
    pub fn replication(&mut self) -> Result<Value> {
        Ok(self.qmp.execute_raw("query-replication", json!({}))?)
    }

    /// Waits until that is so.
    ///
    /// # Errors
    /// It does not become so in time.
    pub fn wait_until(&mut self, what: &str, is_so: impl Fn(&Value) -> bool) -> Result<Value> {
        let deadline = Instant::now() + SOON;
        loop {
            let info = self.replication()?;
            if is_so(&info) {
                return Ok(info);
            }
            ensure!(Instant::now() < deadline, "{what}: {info}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until replication is in that state.
    ///
    /// # Errors
    /// It does not become so in time.
    pub fn wait_state(&mut self, state: &str) -> Result<Value> {
        let is_so = |info: &Value| info.get("state").and_then(Value::as_str) == Some(state);
        let reached = self.wait_until(state, is_so);
        reached.with_context(|| self.monitor.said())
    }

    /// A number of [`Self::replication`].
    ///
    /// # Errors
    /// There is none of that name.
    pub fn number(&mut self, name: &str) -> Result<u64> {
        let info = self.replication()?;
        info.get(name).and_then(Value::as_u64).with_context(|| format!("no {name} in {info}"))
    }

    /// Waits until that many more checkpoints are acknowledged.
    ///
    /// # Errors
    /// They are not in time.
    pub fn checkpoints(&mut self, more: u64) -> Result<()> {
        let enough = self.number("acked")? + more;
        let acked = |info: &Value| info.get("acked").and_then(Value::as_u64);
        self.wait_until("checkpoints", |info| acked(info) >= Some(enough)).map(|_| ())
    }

    /// Sends its process a signal.
    ///
    /// # Errors
    /// It has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.monitor.pid())?).context("no process")?;
        Ok(kill_process(pid, signal)?)
    }
}

impl<'a> Pair<'a> {
    /// No machine yet; their files will be in `dir`. They speak TLS.
    ///
    /// # Errors
    /// The certificates cannot be written there.
    pub fn new(hosts: &'a Hosts, paths: &'a Paths, dir: &Path) -> Result<Self> {
        let certificates = dir.join("tls");
        certificates::write(&certificates)?;
        let (witness, dir) = (Arc::default(), dir.to_owned());
        Ok(Self { hosts, witness, tls: true, paths, dir, certificates, count: 0, images: None })
    }

    /// With a disk of these contents; only the host that boots the guest has its image.
    ///
    /// # Errors
    /// The image cannot be written.
    pub fn with_disk(self, side: Side, contents: &[u8]) -> Result<Self> {
        let images = [Side::Left, Side::Right].map(|side| self.dir.join(format!("{side:?}.img")));
        let this = Self { images: Some(images), ..self };
        fs::write(this.image(side).context("no image")?, contents)?;
        Ok(this)
    }

    /// The image of the disk at a host, if the machine has one.
    #[must_use]
    pub fn image(&self, side: Side) -> Option<&Path> {
        self.images.as_ref()?.get(side.port()).map(PathBuf::as_path)
    }

    /// From now on the image at a host is this file.
    pub fn put_image(&mut self, side: Side, file: PathBuf) {
        if let Some(place) = self.images.as_mut().and_then(|images| images.get_mut(side.port())) {
            *place = file;
        }
    }

    /// Boots the guest at a host.
    ///
    /// # Errors
    /// It does not come up.
    pub fn boot(&mut self, side: Side) -> Result<Machine> {
        self.boot_with(side, &[])
    }

    /// The same, with more arguments for the monitor.
    ///
    /// # Errors
    /// As [`Self::boot`].
    pub fn boot_with(&mut self, side: Side, args: &[&str]) -> Result<Machine> {
        let dir = self.fresh()?;
        let vm = match self.image(side) {
            Some(image) => vm(self.paths)?.disk("disk", image, false),
            None => vm(self.paths)?,
        };
        let mut monitor = start(vm.args(args), self.hosts, side, self.paths, &dir)?;
        monitor.wait_for("guest: ready", BOOT)?;
        self.machine(side, monitor, &dir)
    }

    /// Starts a backup at the other host and protects the guest by it. Returns the backup, once the
    /// guest is protected.
    ///
    /// # Errors
    /// It is not protected in time.
    pub fn protect(&mut self, primary: &mut Machine, protection: Protection) -> Result<Machine> {
        self.protect_by(primary, protection, Some(WITNESS), Ok)
    }

    /// The same, where nobody but a person lets the backup run the guest.
    ///
    /// # Errors
    /// As [`Self::protect`].
    pub fn protect_by_hand(
        &mut self,
        primary: &mut Machine,
        protection: Protection,
    ) -> Result<Machine> {
        self.protect_by(primary, protection, None, Ok)
    }

    /// The same by a connection to the address that `way` returns for the backup's.
    ///
    /// # Errors
    /// As [`Self::protect`].
    pub fn protect_through(
        &mut self,
        primary: &mut Machine,
        protection: Protection,
        way: impl FnOnce(SocketAddr) -> Result<SocketAddr>,
    ) -> Result<Machine> {
        self.protect_by(primary, protection, Some(WITNESS), way)
    }

    fn protect_by(
        &mut self,
        primary: &mut Machine,
        protection: Protection,
        witness: Option<&str>,
        way: impl FnOnce(SocketAddr) -> Result<SocketAddr>,
    ) -> Result<Machine> {
        let (backup, address) = self.backup_by(primary.side.other(), witness)?;
        self.lead(primary, way(address)?)?;
        self.begin_by(primary, protection, witness, &json!({}))?;
        Self::await_protection(primary, &backup)?;
        Ok(backup)
    }

    /// Starts a process at a host that waits there for a primary; at which address.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn backup(&mut self, side: Side) -> Result<(Machine, SocketAddr)> {
        self.backup_by(side, Some(WITNESS))
    }

    fn backup_by(&mut self, side: Side, witness: Option<&str>) -> Result<(Machine, SocketAddr)> {
        let dir = self.fresh()?;
        let address = SocketAddr::from((side.address(), PORT + self.count));
        let decided = witness.map(|identity| format!(",witness={identity}")).unwrap_or_default();
        let from = format!("replicate:tcp:{address},tls={}{decided}", self.tls());
        let drive = self.image(side).map(|image| format!("id=disk,file={}", image.display()));
        let vm = match &drive {
            Some(drive) => waiting(&from).args(&["-drive", drive]),
            None => waiting(&from),
        };
        let monitor = start(vm, self.hosts, side, self.paths, &dir)?;
        Ok((self.machine(side, monitor, &dir)?, address))
    }

    /// From now on the primary's agent connects to the backup at this address.
    ///
    /// # Errors
    /// Its monitor has ended.
    pub fn lead(&self, primary: &mut Machine, to: SocketAddr) -> Result<()> {
        let host = self.hosts.host(primary.side);
        // The old one ends first: both would answer.
        primary.dialer = None;
        primary.dialer = Some(Dialer::start(&primary.socket, host, to)?);
        Ok(())
    }

    /// Protects the guest again by a backup that it has had before.
    ///
    /// # Errors
    /// It is not protected in time.
    pub fn protect_again(
        &self,
        primary: &mut Machine,
        backup: &Machine,
        protection: Protection,
    ) -> Result<()> {
        self.begin(primary, protection, &json!({}))?;
        Self::await_protection(primary, backup)
    }

    /// Begins to protect the guest by the backup that its agent is led to, and does not wait until it
    /// is protected. `more` are further arguments of `replication-start`.
    ///
    /// # Errors
    /// The monitor refuses it.
    pub fn begin(&self, primary: &mut Machine, protection: Protection, more: &Value) -> Result<()> {
        self.begin_by(primary, protection, Some(WITNESS), more)
    }

    /// Waits until the guest is protected.
    ///
    /// # Errors
    /// It is not in time.
    pub fn await_protection(primary: &Machine, backup: &Machine) -> Result<()> {
        let said =
            || format!("primary: {}\nbackup: {}", primary.monitor.said(), backup.monitor.said());
        let ends = ["protected", "off", "degraded"];
        let state = primary.agent.wait_one_of(&ends, SOON).with_context(said)?;
        ensure!(
            state == "protected",
            "it is {state}, after {:?}\n{}",
            primary.agent.heard(),
            said()
        );
        Ok(())
    }

    /// The certificates, or that there are none, as the monitor has it.
    fn tls(&self) -> String {
        if self.tls { self.certificates.display().to_string() } else { "off".to_owned() }
    }

    fn begin_by(
        &self,
        primary: &mut Machine,
        protection: Protection,
        witness: Option<&str>,
        more: &Value,
    ) -> Result<()> {
        let mut arguments = json!({
            "tls": self.tls(),
            "heartbeat-timeout": protection.timeout.as_millis() as u64,
        });
        let rhythm = match protection.interval {
            ADAPTS => ("max-period", LONGEST),
            interval => ("interval", interval.as_millis() as u64),
        };
        if let Some(arguments) = arguments.as_object_mut() {
            arguments.insert(rhythm.0.to_owned(), json!(rhythm.1));
            arguments.extend(witness.map(|identity| ("witness".to_owned(), json!(identity))));
            arguments.extend(more.as_object().cloned().unwrap_or_default());
        }
        primary.agent.forget();
        primary.qmp.execute_raw("replication-start", arguments)?;
        Ok(())
    }

    /// The directory of the process that was started last.
    fn latest(&self) -> PathBuf {
        self.dir.join(self.count.to_string())
    }

    /// Kills the primary, which cannot do anything about it, and waits until the guest runs at the
    /// backup.
    ///
    /// # Errors
    /// It does not run there in time.
    pub fn kill(primary: Machine, backup: &Machine, limit: Duration) -> Result<Failover> {
        let Machine { monitor, agent, .. } = primary;
        let killed = Instant::now();
        drop(monitor);
        drop(agent);
        let times = |event: &ReceivedEvent| {
            event.data.get("times").filter(|_| event.event == "REPLICATION_FAILOVER").cloned()
        };
        let (at, times) = backup
            .agent
            .wait("the failover", limit, times)
            .with_context(|| format!("backup: {}", backup.monitor.said()))?;
        let part = |name: &str| -> Result<Duration> {
            let value = times.get(name).and_then(Value::as_u64);
            Ok(Duration::from_micros(value.with_context(|| format!("no {name} in {times}"))?))
        };
        Ok(Failover {
            detect: part("detect-us")?,
            decide: part("decide-us")?,
            apply: part("apply-us")?,
            run: part("run-us")?,
            all: at - killed,
        })
    }

    fn machine(&self, side: Side, monitor: Monitor, dir: &Path) -> Result<Machine> {
        let socket = dir.join("qmp.sock");
        let mut qmp = Client::connect(&socket, SOON)?;
        qmp.set_timeout(SOON);
        let agent = Agent::start(&socket, side, &self.witness)?;
        Ok(Machine { side, qmp, agent, dialer: None, socket, monitor })
    }

    /// A directory for one more process.
    fn fresh(&mut self) -> Result<PathBuf> {
        self.count += 1;
        let dir = self.latest();
        fs::create_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(dir)
    }
}
