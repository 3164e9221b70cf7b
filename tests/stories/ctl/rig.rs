//! The set-up of each test: a registry, `stratoctl`, guests.
use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use serde_json::{Value, json};
use stories::agent;
use stories::monitor::{SOON, install};
use stories::paths::Paths;

const GUESTS: [(&str, &[u8]); 5] = [
    ("hello", include_bytes!(concat!(env!("OUT_DIR"), "/hello.elf"))),
    ("fill", include_bytes!(concat!(env!("OUT_DIR"), "/fill.elf"))),
    ("ledger", include_bytes!(concat!(env!("OUT_DIR"), "/ledger.elf"))),
    ("diary", include_bytes!(concat!(env!("OUT_DIR"), "/diary.elf"))),
    ("count", include_bytes!(concat!(env!("OUT_DIR"), "/count.elf"))),
];
/// Address of the counter of the guest `count`.
const COUNTER: u64 = 4 << 20;

/// A registry for one test; afterwards its domains are ended and its files removed.
pub struct Rig {
    pub paths: Paths,
    pub dir: PathBuf,
    monitor: PathBuf,
    stratoctl: PathBuf,
    /// Seconds after which a monitor counts as hung. Large unless the test is about hung monitors:
    /// on a busy host any process may stall for a while.
    pub patience: &'static str,
}

impl Rig {
    pub fn new(story: &str) -> Result<Self> {
        let paths = Paths::of_this_host()?;
        let (monitor, stratoctl) = binaries()?;
        let dir = paths.fresh_scratch(&format!("ctl-{story}"))?;
        Ok(Self { paths, dir, monitor, stratoctl, patience: "30" })
    }

    /// From here on, starts monitors by a shell script, which has `$MONITOR`.
    pub fn by_script(&mut self, script: &str) -> Result<()> {
        let (text, program) = (self.file("monitor.sh"), self.file("monitor"));
        fs::write(&text, format!("#!/bin/sh\nMONITOR='{}'\n{script}\n", self.monitor.display()))?;
        install(&text, &program)?;
        self.monitor = program;
        Ok(())
    }

    /// Makes monitors wait before they start, as long as there is a file `hold`, which this
    /// creates.
    pub fn hold(&mut self) -> Result<()> {
        let hold = self.file("hold");
        fs::write(&hold, "")?;
        if self.monitor != self.file("monitor") {
            let wait = format!("while [ -e '{}' ]; do sleep 0.01; done", hold.display());
            self.by_script(&format!("{wait}\nexec \"$MONITOR\" \"$@\""))?;
        }
        Ok(())
    }

    /// A file in the directory.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// A configuration file for a guest, with the guest beside it by a relative path: 16 MiB, one
    /// vCPU.
    pub fn config(&self, file: &str, guest: &str, words: &str) -> Result<PathBuf> {
        let (_, image) = GUESTS.iter().find(|(name, _)| *name == guest).context("no such guest")?;
        fs::write(self.file(guest), image)?;
        let path = self.file(file);
        let config = json!({
            "boot-source": { "kernel_image_path": guest, "boot_args": words },
            "machine-config": { "vcpu_count": 1, "mem_size": "16M" },
            "serial": { "stdio": true },
        });
        fs::write(&path, config.to_string())?;
        Ok(path)
    }

    /// Wait until a guest has printed `text`, which may be the case already.
    pub fn says(&self, name: &str, text: &str) -> Result<()> {
        let info = self.ok(&["info", name])?;
        let run = info.pointer("/0/run").and_then(Value::as_str).context("no directory")?;
        let console = UnixStream::connect(Path::new(run).join("console.sock"))?;
        console.set_read_timeout(Some(SOON))?;
        let mut said = Vec::new();
        for byte in BufReader::new(console).bytes() {
            said.push(byte.with_context(|| String::from_utf8_lossy(&said).into_owned())?);
            if said.ends_with(text.as_bytes()) {
                return Ok(());
            }
        }
        bail!("it only said {}", String::from_utf8_lossy(&said))
    }

    /// `stratoctl` with `args`, in this registry.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.stratoctl);
        command.env("STRATOCTL_ROOT", self.file("r")).env("STRATOVIRT_BIN", &self.monitor);
        command.env("STRATOCTL_QUERY_TIMEOUT", self.patience).env("STRATOCTL_TOO_SOON", "3600");
        command.args(args).stdin(Stdio::null()).current_dir(&self.dir);
        command
    }

    pub fn run(&self, args: &[&str]) -> Result<Output> {
        let out = self.command(args).output().context("cannot run stratoctl")?;
        let said = String::from_utf8_lossy(&out.stderr);
        ensure!(!said.contains("panicked"), "{args:?}: {said}");
        Ok(out)
    }

    /// Runs a verb that succeeds; returns its JSON.
    pub fn ok(&self, args: &[&str]) -> Result<Value> {
        let out = self.run(&[&["--json"], args].concat())?;
        let said = String::from_utf8_lossy(&out.stderr);
        ensure!(out.status.code() == Some(0), "{args:?} ended with {}: {said}", out.status);
        serde_json::from_slice(&out.stdout).with_context(|| format!("{args:?}"))
    }

    /// Runs a verb that fails; returns its reason and its hint.
    pub fn refused(&self, args: &[&str]) -> Result<(String, String)> {
        let out = self.run(&[&["--json"], args].concat())?;
        let said = String::from_utf8_lossy(&out.stderr);
        ensure!(out.status.code() == Some(1), "{args:?} ended with {}: {said}", out.status);
        ensure!(out.stdout.is_empty());
        let said: Value =
            serde_json::from_str(&said).with_context(|| format!("{args:?}: {said}"))?;
        let text = |key| said.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        Ok((text("error"), text("hint")))
    }

    /// What `list` shows of a domain, if it shows it.
    pub fn listed(&self, name: &str) -> Result<Option<Value>> {
        let Value::Array(rows) = self.ok(&["list"])? else { anyhow::bail!("no list") };
        Ok(rows.into_iter().find(|row| row.get("name") == Some(&json!(name))))
    }

    pub fn state(&self, name: &str) -> Result<String> {
        let row = self.listed(name)?;
        let state = row.as_ref().and_then(|row| row.get("state")).and_then(Value::as_str);
        Ok(state.unwrap_or("absent").to_owned())
    }

    pub fn wait_state(&self, name: &str, state: &str) -> Result<()> {
        let deadline = Instant::now() + SOON;
        loop {
            let now = self.state(name)?;
            if now == state {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "'{name}' is {now}, not {state}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until `list` reports this of a domain's replication.
    pub fn wait_replication(&self, name: &str, key: &str, wanted: &str) -> Result<()> {
        let deadline = Instant::now() + SOON;
        loop {
            let row = self.listed(name)?.with_context(|| format!("'{name}' is not listed"))?;
            if row.pointer(&format!("/replication/{key}")) == Some(&json!(wanted)) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "'{name}': {row}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// The command that receives a protected domain in this registry, as `remus -s ''` runs it, with
    /// these options.
    pub fn receiver(&self, options: &str) -> String {
        let (stratoctl, monitor) = (self.stratoctl.display(), self.monitor.display());
        let root = self.file("r");
        format!(
            "STRATOVIRT_BIN='{monitor}' '{stratoctl}' --root '{}' remus-receive {options}",
            root.display()
        )
    }

    pub fn pid(&self, name: &str) -> Result<i32> {
        let row = self.listed(name)?.context("not listed")?;
        let pid = row.get("pid").and_then(Value::as_i64).context("no process")?;
        Ok(i32::try_from(pid)?)
    }

    pub fn signal(&self, pid: i32, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(pid).context("no process")?;
        match kill_process(pid, signal) {
            // It has ended by itself.
            Err(Errno::SRCH) => Ok(()),
            other => Ok(other?),
        }
    }

    /// Kill the domain's monitor.
    pub fn kill(&self, name: &str) -> Result<()> {
        let pid = self.pid(name)?;
        self.signal(pid, Signal::KILL)?;
        self.gone(pid)
    }

    /// Wait until a process has ended with all its threads: `/proc/PID/exe` disappears with the
    /// first one, before the last one has closed the files.
    pub fn gone(&self, pid: i32) -> Result<()> {
        let number = Pid::from_raw(pid).context("no process id")?;
        let fd = match pidfd_open(number, PidfdFlags::empty()) {
            Err(Errno::SRCH) => return Ok(()),
            other => other?,
        };
        let deadline = Instant::now() + SOON;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&left.try_into()?)) {
                Err(Errno::INTR) => {}
                Ok(0) => bail!("process {pid} has not ended"),
                Ok(_) => return Ok(()),
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// End every process called `name`.
    pub fn clean(&self, name: &str) -> Result<()> {
        if let Ok(pid) = self.pid(name) {
            self.signal(pid, Signal::CONT)?;
        }
        self.run(&["destroy", "-F", name])?;
        self.run(&["delete", "-f", name])?;
        let state = self.state(name)?;
        ensure!(state == "absent", "'{name}' is {state} after all");
        Ok(())
    }

    /// What the guest had counted to in a saved memory.
    pub fn counted(&self, saved: &Path) -> Result<u64> {
        let mut bytes = [0; 8];
        File::open(saved.join("memory"))?.read_exact_at(&mut bytes, COUNTER)?;
        Ok(u64::from_le_bytes(bytes))
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let Ok(Value::Array(rows)) = self.ok(&["list"]) else { return };
        for name in rows.iter().filter_map(|row| row.get("name")?.as_str()) {
            if let Err(error) = self.clean(name) {
                eprintln!("{error:#}");
            }
        }
        // Left behind it would be found and emptied by the next run.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn binaries() -> Result<(PathBuf, PathBuf)> {
    static BUILT: OnceLock<Result<(PathBuf, PathBuf), String>> = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        let both = agent::monitor().and_then(|one| Ok((one, agent::stratoctl()?)));
        both.map_err(|error| format!("{error:#}"))
    });
    built.clone().map_err(|error| anyhow!(error))
}
