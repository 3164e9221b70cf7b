//! Every thread of a monitor whose guest may run is behind a system-call filter, however its
//! machine was started and whatever is hot-plugged meanwhile.
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use qmp::client::Client;
use stories::monitor::{Monitor, SOON, Vm};

use crate::plug::{empty, expect, found, marked, plug, unplug};
use crate::snapshot::{restore, save};
use crate::stage::{Stage, quits, simple};
use crate::stream::until_it_listens;

/// Names of the monitor's threads. Each has one filter of its own.
fn confined(monitor: &Monitor) -> Result<Vec<String>> {
    let ours = field(Path::new("/proc/self"), "Seccomp_filters:")?.parse::<u32>()?;
    let mut names = Vec::new();
    for task in fs::read_dir(format!("/proc/{}/task", monitor.pid()))? {
        let task = task?.path();
        if is_kernel(&task)? {
            continue;
        }
        let name = fs::read_to_string(task.join("comm"))?.trim().to_owned();
        ensure!(field(&task, "Seccomp:")? == "2", "{name} has no filter");
        let filters = field(&task, "Seccomp_filters:")?.parse::<u32>()?;
        ensure!(filters == ours + 1, "{name} has {filters} filters where this process has {ours}");
        names.push(name);
    }
    names.sort();
    Ok(names)
}

fn field(process: &Path, name: &str) -> Result<String> {
    let status = fs::read_to_string(process.join("status"))?;
    let value = status.lines().find_map(|line| line.strip_prefix(name));
    Ok(value.with_context(|| format!("no {name} in {}", process.display()))?.trim().to_owned())
}

/// Whether a thread is one of the kernel's own, for io_uring or KVM, which never runs in user mode.
fn is_kernel(task: &Path) -> Result<bool> {
    /// `PF_IO_WORKER` and `PF_USER_WORKER` (linux/sched.h).
    const WORKER: u32 = 0x10 | 0x4000;
    let stat = fs::read_to_string(task.join("stat"))?;
    // The name, in parentheses, may have spaces in it; the flags are the seventh field behind it.
    let flags = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(6));
    Ok(flags.context("no flags")?.parse::<u32>()? & WORKER != 0)
}

fn has(names: &[String], wanted: &[&str]) -> Result<()> {
    for name in wanted {
        ensure!(names.iter().any(|known| known == name), "no {name} among {names:?}");
    }
    Ok(())
}

/// A disk is plugged, read by the guest, and unplugged.
fn plugs(stage: &Stage, monitor: &mut Monitor, qmp: &mut Client) -> Result<()> {
    let image = marked(stage, "image", 7, 64)?;
    plug(qmp, "drive", &image, "1")?;
    expect(monitor, &found(1, 7, 64))?;
    confined(monitor)?;
    unplug(qmp, "drive")?;
    expect(monitor, &empty(1))?;
    confined(monitor)?;
    Ok(())
}

const USUAL: [&str; 5] = ["vcpu0", "io0", "checkpoint", "files0", "files1"];

#[test]
fn every_thread_is_confined_before_the_guest_starts() -> Result<()> {
    let stage = Stage::new("confined")?;
    let (log, serial) = (stage.file("log"), stage.file("serial"));
    let output = format!("file,path={}", serial.display());
    let mut config = stage.config("count", "registers 2")?;
    config.as_object_mut().context("no object")?.remove("serial");
    let vm = Vm::described(config).machine("vcpu_count", 2);
    let args = ["-S", "-iothread", "id=more", "-D", log.to_str().context("not text")?];
    let vm = vm.args(&args).args(&["-serial", &output]);
    let mut monitor = vm.start(&stage.paths, &stage.dir)?;
    let mut qmp = monitor.qmp()?;
    let names = confined(&monitor)?;
    has(&names, &USUAL)?;
    has(&names, &["vcpu1", "more", "log", "output"])?;
    simple(&mut qmp, "cont")?;
    ensure!(confined(&monitor)? == names, "other threads when it runs");
    simple(&mut qmp, "system_reset")?;
    ensure!(confined(&monitor)? == names, "other threads after a reset");
    quits(&stage, &mut monitor, &mut qmp)
}

#[test]
fn every_thread_is_confined_when_disks_are_plugged_and_the_machine_is_restored() -> Result<()> {
    let stage = Stage::new("confined-restored")?;
    let (mut monitor, mut qmp) = stage.start(stage.vm("plug", "watch")?)?;
    monitor.wait_for("ready\n", SOON)?;
    has(&confined(&monitor)?, &USUAL)?;
    plugs(&stage, &mut monitor, &mut qmp)?;
    let saved = stage.file("saved");
    save(&mut qmp, &saved, false)?;
    confined(&monitor)?;
    quits(&stage, &mut monitor, &mut qmp)?;
    for mapped in ["on", "off", "uffd"] {
        let from = format!("{},mapped={mapped}", saved.display());
        let (mut monitor, mut qmp) = restore(&stage, Path::new(&from), &[])?;
        // The first answer comes when the machine is complete.
        simple(&mut qmp, "cont")?;
        let names = confined(&monitor)?;
        has(&names, &USUAL)?;
        plugs(&stage, &mut monitor, &mut qmp)?;
        quits(&stage, &mut monitor, &mut qmp)?;
    }
    Ok(())
}

#[test]
fn every_thread_is_confined_when_the_machine_is_streamed_in() -> Result<()> {
    let source = Stage::new("confined-source")?;
    let (mut monitor, mut qmp) = source.start(source.vm("plug", "watch")?)?;
    monitor.wait_for("ready\n", SOON)?;
    let stage = Stage::new("confined-there")?;
    let socket = stage.file("in");
    let uri = format!("unix:{}", socket.display());
    let vm = Vm::described(serde_json::json!({})).args(&["-S", "-incoming", &uri]);
    let mut there = vm.start(&stage.paths, &stage.dir)?;
    until_it_listens(&socket)?;
    qmp.execute_raw("migrate", serde_json::json!({ "uri": uri }))?;
    confined(&monitor)?;
    quits(&source, &mut monitor, &mut qmp)?;
    let mut qmp = there.qmp()?;
    simple(&mut qmp, "cont")?;
    let names = confined(&there)?;
    has(&names, &USUAL)?;
    ensure!(!names.iter().any(|name| name == "stream"), "{names:?}");
    plugs(&stage, &mut there, &mut qmp)?;
    quits(&stage, &mut there, &mut qmp)
}
