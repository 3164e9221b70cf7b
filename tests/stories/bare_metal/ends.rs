//! Every way in which a guest ends gives the right event and exit status.
use anyhow::{Result, ensure};
use qmp::client::Client;
use serde_json::json;
use stories::monitor::{Monitor, SOON};

use crate::stage::{Stage, cont, ends, quits, simple, status, stop};

/// Starts the guest `hello`, which ends in the given way, and waits until it runs.
fn hello(stage: &Stage, way: &str, args: &[&str]) -> Result<(Monitor, Client)> {
    let (mut monitor, qmp) = stage.start(stage.vm("hello", way)?.args(args))?;
    monitor.wait_for("hello\n", SOON)?;
    Ok((monitor, qmp))
}

#[test]
fn power_off() -> Result<()> {
    let stage = Stage::new("power_off")?;
    let (mut monitor, mut qmp) = hello(&stage, "poweroff", &[])?;
    ends(&mut monitor, &mut qmp, true, "guest-shutdown", 0)?;
    ensure!(monitor.unseen().is_empty(), "it ran after the power was off");
    Ok(())
}

#[test]
fn reset_by_keyboard_controller_acpi_or_triple_fault() -> Result<()> {
    let stage = Stage::new("reset")?;
    for way in ["keyboard-reset", "acpi-reset", "triple-fault"] {
        let (mut monitor, mut qmp) = hello(&stage, way, &[])?;
        ends(&mut monitor, &mut qmp, true, "guest-reset", 0)?;
        ensure!(monitor.unseen().is_empty(), "it ran after the reset");
    }
    Ok(())
}

/// A kernel that cannot report its panic resets the machine. Users who must notice can treat every
/// reset as a failure.
#[test]
fn a_reset_is_a_failure_where_that_is_asked_for() -> Result<()> {
    let stage = Stage::new("failure")?;
    for way in ["keyboard-reset", "acpi-reset", "triple-fault"] {
        let (mut monitor, mut qmp) = hello(&stage, way, &["-action", "reboot=exit-failure"])?;
        ends(&mut monitor, &mut qmp, true, "guest-reset", 1)?;
    }
    let (mut monitor, mut qmp) = hello(&stage, "poweroff", &["-action", "reboot=exit-failure"])?;
    ends(&mut monitor, &mut qmp, true, "guest-shutdown", 0)
}

#[test]
fn reset_reboots_where_that_is_configured() -> Result<()> {
    let stage = Stage::new("reboot")?;
    for way in ["keyboard-reset", "acpi-reset", "triple-fault"] {
        let (mut monitor, mut qmp) = hello(&stage, way, &["-action", "reboot=reset"])?;
        for _ in 0..5 {
            let data = qmp.wait_event("RESET", SOON)?.data;
            ensure!(data.get("guest") == Some(&json!(true)), "{data}");
            monitor.wait_for("hello\n", SOON)?;
        }
        ensure!(status(&mut qmp)? == "running");
        quits(&stage, &mut monitor, &mut qmp)?;
    }
    Ok(())
}

#[test]
fn system_reset_keeps_a_stopped_machine_stopped() -> Result<()> {
    let stage = Stage::new("system_reset")?;
    let (mut monitor, mut qmp) = hello(&stage, "halt", &[])?;
    simple(&mut qmp, "system_reset")?;
    ensure!(qmp.wait_event("RESET", SOON)?.data.get("guest") == Some(&json!(false)));
    monitor.wait_for("hello\n", SOON)?;
    monitor.wait_for("halts\n", SOON)?;
    stop(&mut qmp)?;
    simple(&mut qmp, "system_reset")?;
    qmp.wait_event("RESET", SOON)?;
    ensure!(status(&mut qmp)? == "paused");
    ensure!(monitor.unseen().is_empty(), "it ran although it was stopped");
    cont(&mut qmp)?;
    monitor.wait_for("hello\n", SOON)?;
    quits(&stage, &mut monitor, &mut qmp)
}

#[test]
fn panic() -> Result<()> {
    let stage = Stage::new("panic")?;
    let (mut monitor, mut qmp) = hello(&stage, "panic", &[])?;
    let data = qmp.wait_event("GUEST_PANICKED", SOON)?.data;
    ensure!(data.get("action") == Some(&json!("poweroff")), "{data}");
    ends(&mut monitor, &mut qmp, true, "guest-panic", 1)
}

#[test]
fn an_instruction_that_kvm_cannot_run() -> Result<()> {
    let stage = Stage::new("nowhere")?;
    let (mut monitor, mut qmp) = stage.start(stage.vm("hello", "nowhere")?)?;
    ends(&mut monitor, &mut qmp, false, "host-error", 1)?;
    monitor.wait_said("rip 0xd0000000").map(drop)
}

#[test]
fn a_guest_that_sleeps_forever_still_stops_and_ends() -> Result<()> {
    let stage = Stage::new("asleep")?;
    let (mut monitor, mut qmp) = hello(&stage, "halt", &[])?;
    monitor.wait_for("halts\n", SOON)?;
    for _ in 0..50 {
        stop(&mut qmp)?;
        cont(&mut qmp)?;
    }
    quits(&stage, &mut monitor, &mut qmp)
}

#[test]
fn text_by_a_string_instruction_comes_out_in_order() -> Result<()> {
    let stage = Stage::new("string")?;
    let (mut monitor, _qmp) = hello(&stage, "string", &[])?;
    ensure!(monitor.wait_for("halts\n", SOON)? == "all at once\nhalts\n");
    Ok(())
}

#[test]
fn the_smallest_memory() -> Result<()> {
    let stage = Stage::new("small")?;
    let vm = stage.vm("hello", "poweroff")?.machine("mem_size", 16 << 20);
    let (mut monitor, mut qmp) = stage.start(vm)?;
    monitor.wait_for("hello\n", SOON)?;
    ends(&mut monitor, &mut qmp, true, "guest-shutdown", 0)
}

#[test]
fn memory_above_4_gib() -> Result<()> {
    let stage = Stage::new("large")?;
    let vm = stage.vm("hello", "high")?.machine("mem_size", (3_u64 << 30) + (64 << 20));
    let (mut monitor, _qmp) = stage.start(vm)?;
    monitor.wait_for("high memory holds 600df00d12345678\n", SOON).map(drop)
}
