//! `stratoctl` with many domains, used as people do: each command is a process of its own.
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

/// Domains that are listed.
const DOMAINS: usize = 100;
/// RAM of each: the guest is loaded at 16 MiB.
const MEMORY: &str = "32M";
/// Times that they are listed.
const LISTS: usize = 10;

/// Starts domains with the guest `kernel`, measures `list` repeatedly, and ends them.
///
/// # Errors
/// A verb fails.
pub fn lists(stratoctl: &Path, monitor: &Path, kernel: &Path, dir: &Path) -> Result<Vec<Duration>> {
    let rig = Rig { stratoctl, monitor, root: dir.join("registry") };
    let config = dir.join("domain.json");
    let guest = json!({
        "boot-source": { "kernel_image_path": kernel },
        "machine-config": { "vcpu_count": 1, "mem_size": MEMORY },
    });
    fs::write(&config, guest.to_string())?;
    let config = config.to_str().context("a path that is not UTF-8")?;
    let names: Vec<String> = (0..DOMAINS).map(|number| format!("domain-{number}")).collect();
    let measure = || -> Result<Vec<Duration>> {
        for name in &names {
            rig.verb(&["create", config, "--name", name])?;
        }
        (0..LISTS)
            .map(|_| {
                let began = Instant::now();
                let table = rig.verb(&["list"])?;
                let time = began.elapsed();
                let running = table.lines().filter(|line| line.contains(" running ")).count();
                ensure!(running == DOMAINS, "{running} of {DOMAINS} domains run");
                Ok(time)
            })
            .collect()
    };
    let times = measure();
    // End them all, even if one of them fails to end.
    let ended: Vec<_> = names.iter().map(|name| rig.verb(&["destroy", name])).collect();
    let times = times?;
    ended.into_iter().try_for_each(|ended| ended.map(drop))?;
    Ok(times)
}

struct Rig<'a> {
    stratoctl: &'a Path,
    monitor: &'a Path,
    root: PathBuf,
}

impl Rig<'_> {
    fn verb(&self, words: &[&str]) -> Result<String> {
        let mut command = Command::new(self.stratoctl);
        command.arg("--root").arg(&self.root).arg("--monitor").arg(self.monitor);
        let out = command.args(words).stdin(Stdio::null()).output().context("no stratoctl")?;
        let said = String::from_utf8_lossy(&out.stderr);
        ensure!(out.status.success(), "{words:?}: {}", said.trim());
        Ok(String::from_utf8(out.stdout)?)
    }
}
