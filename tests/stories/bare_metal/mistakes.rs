//! Mistakes in the monitor's files and flags, and the messages on its standard error.
use std::fs;

use anyhow::{Result, ensure};
use serde_json::json;
use stories::monitor::Vm;

use crate::snapshot::{restore, save};
use crate::stage::{Stage, quits, simple};

/// The messages of a machine that does not start.
fn refusal(stage: &Stage, vm: Vm) -> Result<String> {
    let mut monitor = vm.start(&stage.paths, &stage.dir)?;
    let status = monitor.wait_exit()?;
    ensure!(status.code() == Some(1), "it ended with {status}");
    monitor.said_to_its_end()
}

#[test]
fn a_root_disk_that_is_missing_is_not_to_be_made_empty() -> Result<()> {
    let stage = Stage::new("root")?;
    let (root, data) = (stage.file("root.img"), stage.file("data.img"));
    let vm = stage.vm("hello", "halt")?.disk("root", &root, false).disk("data", &data, false);
    let said = refusal(&stage, vm)?;
    let of = |path: &std::path::Path| {
        said.lines().find(|line| line.contains(&*path.to_string_lossy())).unwrap_or_default()
    };
    ensure!(of(&root).contains("it is the guest's root disk"), "{said}");
    ensure!(!of(&root).contains("truncate"), "{said}");
    ensure!(of(&data).contains("truncate -s 1G"), "an empty disk for data will do: {said}");
    Ok(())
}

#[test]
fn files_beside_the_configuration_and_not_where_the_monitor_was_started() -> Result<()> {
    let stage = Stage::new("beside")?;
    let mut config = stage.config("hello", "halt")?;
    config["boot-source"]["kernel_image_path"] = json!("hello");
    let said = refusal(&stage, Vm::described(config))?;
    let there = format!("the file is beside this one: {}", stage.file("hello").display());
    ensure!(said.contains("kernel_image_path") && said.contains(&there), "{said}");
    Ok(())
}

#[test]
fn a_log_level_that_there_is_not() -> Result<()> {
    let mut stage = Stage::new("level")?;
    stage.run_by("env STRATOVIRT_LOG_LEVEL=loud")?;
    let (mut monitor, mut qmp) = stage.start(stage.vm("hello", "halt")?)?;
    let said = monitor.wait_said("warn is used\n")?;
    ensure!(said.contains("STRATOVIRT_LOG_LEVEL: 'loud': must be error, warn, info"), "{said}");
    quits(&stage, &mut monitor, &mut qmp)
}

#[test]
fn a_machine_without_output_is_warned_about() -> Result<()> {
    let stage = Stage::new("deaf")?;
    let mut config = stage.config("hello", "halt")?;
    config.as_object_mut().map(|members| members.remove("serial"));
    let (mut monitor, mut qmp) = stage.start(Vm::described(config))?;
    let said = monitor.wait_said("no serial port and no console")?;
    ensure!(said.contains(":WARN: "), "{said}");
    quits(&stage, &mut monitor, &mut qmp)
}

#[test]
fn a_host_that_does_not_run_every_kernel() -> Result<()> {
    let stage = Stage::new("pvm")?;
    let (mut monitor, mut qmp) = stage.start(stage.vm("hello", "halt")?)?;
    quits(&stage, &mut monitor, &mut qmp)?;
    let said = monitor.said_to_its_end()?;
    let cpus = fs::read_to_string("/proc/cpuinfo")?;
    let flags = cpus.lines().find_map(|line| line.strip_prefix("flags")).unwrap_or_default();
    let able = flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm");
    ensure!(said.contains("a distribution's kernel may hang") != able, "{said}");
    Ok(())
}

/// StratoVirt's own test suite measures restores by the log lines `:INFO: VmConfig` and, for each
/// vCPU, `:INFO: Vcpu`, with times in front.
#[test]
fn the_log_shows_when_a_restore_began_and_when_each_vcpu_ran() -> Result<()> {
    let mut stage = Stage::new("lines")?;
    stage.run_by("env STRATOVIRT_LOG_LEVEL=info")?;
    let vm = stage.vm("count", "plain 2")?.machine("vcpu_count", 2);
    let (mut monitor, mut qmp) = stage.start(vm)?;
    let saved = stage.file("saved");
    save(&mut qmp, &saved, false)?;
    quits(&stage, &mut monitor, &mut qmp)?;

    let (mut monitor, mut qmp) = restore(&stage, &saved, &[])?;
    ensure!(!monitor.said().contains(":INFO: Vcpu"), "it is not to run yet: {}", monitor.said());
    simple(&mut qmp, "quit")?;
    monitor.wait_exit()?;
    let incoming = format!("file:{}", saved.display());
    let vm = Vm::described(json!({})).args(&["-incoming", &incoming]);
    let mut monitor = vm.start(&stage.paths, &stage.dir)?;
    let mut qmp = monitor.qmp()?;
    let said = monitor.wait_said(":INFO: Vcpu: 1 runs")?;
    let times: Vec<_> = said
        .lines()
        .filter(|line| line.contains(":INFO: VmConfig: ") || line.contains(":INFO: Vcpu: "))
        .map(|line| line.split(":INFO").next().unwrap_or_default())
        .collect();
    ensure!(times.len() == 3 && times.is_sorted(), "{said}");
    for time in times {
        // 2026-11-29T15:56:17.123456789Z
        let shape: String =
            time.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
        ensure!(shape == "0000-00-00T00:00:00.000000000Z", "{time}");
    }
    quits(&stage, &mut monitor, &mut qmp)
}

/// The working directory must not matter for absolute paths.
#[test]
fn an_absolute_path_is_not_looked_for_beside_the_file() -> Result<()> {
    let stage = Stage::new("absolute")?;
    let mut config = stage.config("hello", "halt")?;
    config["boot-source"]["kernel_image_path"] = json!("/hello");
    fs::write(stage.file("hello"), "")?;
    let said = refusal(&stage, Vm::described(config))?;
    ensure!(said.contains("/hello") && !said.contains("beside"), "{said}");
    Ok(())
}
