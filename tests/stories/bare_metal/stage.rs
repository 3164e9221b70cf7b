//! The set-up of each test: a directory, the monitor's binary, a guest.
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};
use qmp::client::Client;
use serde_json::{Value, json};
use stories::agent;
use stories::monitor::{Monitor, SOON, Vm, install};
use stories::paths::{Paths, SCRATCH};

/// The guests, embedded in this program, which may be copied to another host.
const GUESTS: [(&str, &[u8]); 13] = [
    ("hello", include_bytes!(concat!(env!("OUT_DIR"), "/hello.elf"))),
    ("count", include_bytes!(concat!(env!("OUT_DIR"), "/count.elf"))),
    ("split", include_bytes!(concat!(env!("OUT_DIR"), "/split.elf"))),
    ("blk", include_bytes!(concat!(env!("OUT_DIR"), "/blk.elf"))),
    ("plug", include_bytes!(concat!(env!("OUT_DIR"), "/plug.elf"))),
    ("generation", include_bytes!(concat!(env!("OUT_DIR"), "/generation.elf"))),
    ("exits", include_bytes!(concat!(env!("OUT_DIR"), "/exits.elf"))),
    ("type", include_bytes!(concat!(env!("OUT_DIR"), "/type.elf"))),
    ("clock", include_bytes!(concat!(env!("OUT_DIR"), "/clock.elf"))),
    ("flood", include_bytes!(concat!(env!("OUT_DIR"), "/flood.elf"))),
    ("ledger", include_bytes!(concat!(env!("OUT_DIR"), "/ledger.elf"))),
    ("balloon", include_bytes!(concat!(env!("OUT_DIR"), "/balloon.elf"))),
    ("net", include_bytes!(concat!(env!("OUT_DIR"), "/net.elf"))),
];

/// A directory for one test, removed afterwards.
pub struct Stage {
    pub paths: Paths,
    pub dir: PathBuf,
}

impl Stage {
    pub fn new(story: &str) -> Result<Self> {
        let paths = if env::var_os(SCRATCH).is_some() {
            Paths::from_env()?
        } else {
            Paths { stratovirt: monitor()?, ..Paths::on_this_machine()? }
        };
        // Short: the control socket's path has to fit into 108 bytes.
        let dir = paths.fresh_scratch(story)?;
        Ok(Self { paths, dir })
    }

    /// A file in the directory.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The guest's file.
    pub fn kernel(&self, guest: &str) -> Result<PathBuf> {
        let (_, image) = GUESTS.iter().find(|(name, _)| *name == guest).context("no such guest")?;
        let path = self.file(guest);
        fs::write(&path, image)?;
        Ok(path)
    }

    /// The configuration file's contents: one vCPU, 32 MiB, a serial port.
    pub fn config(&self, guest: &str, cmdline: &str) -> Result<Value> {
        Ok(json!({
            "boot-source": { "kernel_image_path": self.kernel(guest)?, "boot_args": cmdline },
            "machine-config": { "vcpu_count": 1, "mem_size": 32 << 20 },
            "serial": { "stdio": true },
        }))
    }

    /// A machine with that configuration.
    pub fn vm(&self, guest: &str, cmdline: &str) -> Result<Vm> {
        Ok(Vm::described(self.config(guest, cmdline)?))
    }

    /// Starts a machine, so that nothing happens before there is a client to see it.
    pub fn start(&self, vm: Vm) -> Result<(Monitor, Client)> {
        let mut monitor = vm.args(&["-S"]).start(&self.paths, &self.dir)?;
        let mut qmp = monitor.qmp()?;
        ensure!(status(&mut qmp)? == "paused", "-S has no effect");
        cont(&mut qmp)?;
        Ok((monitor, qmp))
    }

    /// Runs `commands` before the monitor, in a new namespace (`-n` network, `-m` mounts): what
    /// they create disappears with the monitor.
    pub fn prepare(&mut self, namespace: &str, commands: &str) -> Result<()> {
        self.run_by(&format!("unshare {namespace} sh -ec '\n{commands}\nexec \"$0\" \"$@\"'"))
    }

    /// Lets `command`, as a shell reads it, start the monitor: that and its arguments are appended.
    pub fn run_by(&mut self, command: &str) -> Result<()> {
        let (script, program) = (self.file("run.sh"), self.file("run"));
        let monitor = self.paths.stratovirt.display();
        fs::write(&script, format!("#!/bin/sh\nexec {command} '{monitor}' \"$@\"\n"))?;
        install(&script, &program)?;
        self.paths.stratovirt = program;
        Ok(())
    }

    /// The control socket of a machine that has been started here.
    pub fn socket(&self) -> PathBuf {
        self.file("qmp.sock")
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // Left behind it would be found and emptied by the next run.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn monitor() -> Result<PathBuf> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let built = BUILT.get_or_init(|| agent::monitor().map_err(|error| format!("{error:#}")));
    built.clone().map_err(|error| anyhow!(error))
}

/// Runs a command that takes no arguments and returns nothing.
pub fn simple(qmp: &mut Client, command: &str) -> Result<()> {
    let returned = patiently(qmp, command, &json!({}))?;
    ensure!(returned == json!({}), "{command} returned {returned}");
    Ok(())
}

/// A command that waits for the disks: those of this host may be busy for longer than the monitor
/// waits, so it is repeated.
pub fn patiently(qmp: &mut Client, command: &str, arguments: &Value) -> Result<Value> {
    let deadline = Instant::now() + SOON * 3;
    loop {
        match qmp.execute_raw(command, arguments.clone()) {
            Err(e)
                if e.to_string().contains("try again when the storage answers")
                    && Instant::now() < deadline => {}
            other => return Ok(other?),
        }
    }
}

/// `stop`, and the event that comes with it.
pub fn stop(qmp: &mut Client) -> Result<()> {
    simple(qmp, "stop")?;
    ensure!(qmp.wait_event("STOP", SOON)?.data == json!({}));
    Ok(())
}

/// `cont`, and the event that comes with it.
pub fn cont(qmp: &mut Client) -> Result<()> {
    simple(qmp, "cont")?;
    ensure!(qmp.wait_event("RESUME", SOON)?.data == json!({}));
    Ok(())
}

/// `query-status`'s `status`.
pub fn status(qmp: &mut Client) -> Result<String> {
    let info = qmp.execute_raw("query-status", json!({}))?;
    let status = info.get("status").and_then(Value::as_str).context("no status")?.to_owned();
    ensure!(info.get("running") == Some(&json!(status == "running")), "{info}");
    Ok(status)
}

/// The monitor sends SHUTDOWN with that reason, closes the connection and exits with that status.
pub fn ends(
    monitor: &mut Monitor,
    qmp: &mut Client,
    guest: bool,
    reason: &str,
    code: i32,
) -> Result<()> {
    let data = qmp.wait_event("SHUTDOWN", SOON)?.data;
    ensure!(data == json!({ "guest": guest, "reason": reason }), "{data}");
    qmp.take_events();
    qmp.wait_closed(SOON)?;
    let after = qmp.take_events();
    ensure!(after.is_empty(), "after SHUTDOWN came {after:?}");
    let status = monitor.wait_exit()?;
    ensure!(status.code() == Some(code), "the monitor ended with {status}");
    Ok(())
}

/// `quit` works and leaves nothing behind.
pub fn quits(stage: &Stage, monitor: &mut Monitor, qmp: &mut Client) -> Result<()> {
    simple(qmp, "quit")?;
    ends(monitor, qmp, false, "host-qmp-quit", 0)?;
    ensure!(!exists(&stage.socket()), "the socket's file is left behind");
    Ok(())
}

pub fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// How many descriptors the monitor has open.
pub fn descriptors(monitor: &Monitor) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{}/fd", monitor.pid()))?.count())
}
