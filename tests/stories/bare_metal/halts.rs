//! A machine that is kept after its guest has ended can be inspected, saved and reset, and nothing
//! else.
use std::io::Read;
use std::os::unix::net::UnixStream;

use anyhow::{Result, ensure};
use qmp::client::Client;
use serde_json::{Value, json};
use stories::monitor::{Monitor, SOON, Vm};

use crate::stage::{Stage, cont, descriptors, ends, quits, simple, status, stop};

fn hello(stage: &Stage, way: &str, args: &[&str]) -> Result<(Monitor, Client)> {
    let (mut monitor, qmp) = stage.start(stage.vm("hello", way)?.args(args))?;
    monitor.wait_for("hello\n", SOON)?;
    Ok((monitor, qmp))
}

/// The names of the events up to STOP, and their data.
fn until_stop(qmp: &mut Client) -> Result<Vec<(String, Value)>> {
    let stop = qmp.wait_event("STOP", SOON)?;
    let mut events: Vec<_> = qmp.take_events().into_iter().map(|e| (e.event, e.data)).collect();
    events.push((stop.event, stop.data));
    Ok(events)
}

/// The machine has stopped in `state`, and accepts only the commands that make sense there.
fn is_halted(qmp: &mut Client, state: &str) -> Result<()> {
    ensure!(status(qmp)? == state, "it is {}", status(qmp)?);
    for command in ["cont", "system_powerdown"] {
        let refused = qmp.execute_raw(command, json!({}));
        let text = refused.err().map(|e| e.to_string()).unwrap_or_default();
        ensure!(text.contains("system_reset") && text.contains("quit"), "{command}: {text}");
    }
    simple(qmp, "stop")?;
    ensure!(status(qmp)? == state);
    qmp.execute_raw("query-cpus", json!({}))?;
    let events = qmp.take_events();
    ensure!(events.is_empty(), "events although nothing has happened: {events:?}");
    Ok(())
}

/// Boots again from being halted: paused at first, as with QEMU.
fn is_reset(monitor: &mut Monitor, qmp: &mut Client) -> Result<()> {
    simple(qmp, "system_reset")?;
    ensure!(qmp.wait_event("RESET", SOON)?.data.get("guest") == Some(&json!(false)));
    ensure!(status(qmp)? == "paused");
    ensure!(monitor.unseen().is_empty(), "it ran although it was not resumed");
    cont(qmp)?;
    monitor.wait_for("hello\n", SOON).map(drop)
}

#[test]
fn after_a_power_off() -> Result<()> {
    let stage = Stage::new("halt_off")?;
    for args in [&["-action", "shutdown=pause"][..], &["-no-shutdown"]] {
        let (mut monitor, mut qmp) = hello(&stage, "poweroff", args)?;
        let before = descriptors(&monitor)?;
        for _ in 0..3 {
            let events = until_stop(&mut qmp)?;
            let shutdown = json!({ "guest": true, "reason": "guest-shutdown" });
            ensure!(events == [("SHUTDOWN".into(), shutdown), ("STOP".into(), json!({}))]);
            is_halted(&mut qmp, "shutdown")?;
            is_reset(&mut monitor, &mut qmp)?;
        }
        until_stop(&mut qmp)?;
        ensure!(descriptors(&monitor)? == before, "a reset leaks descriptors");
        quits(&stage, &mut monitor, &mut qmp)?;
    }
    Ok(())
}

#[test]
fn after_a_reboot() -> Result<()> {
    let stage = Stage::new("halt_reboot")?;
    for (way, action) in [
        ("keyboard-reset", "reboot=pause"),
        ("acpi-reset", "shutdown=pause,reboot=shutdown"),
        ("triple-fault", "reboot=pause"),
    ] {
        let (mut monitor, mut qmp) = hello(&stage, way, &["-action", action])?;
        let events = until_stop(&mut qmp)?;
        let reset = json!({ "guest": true, "reason": "guest-reset" });
        ensure!(events == [("SHUTDOWN".into(), reset), ("STOP".into(), json!({}))], "{events:?}");
        is_halted(&mut qmp, "shutdown")?;
        is_reset(&mut monitor, &mut qmp)?;
        until_stop(&mut qmp)?;
        quits(&stage, &mut monitor, &mut qmp)?;
    }
    Ok(())
}

#[test]
fn after_a_panic() -> Result<()> {
    let stage = Stage::new("halt_panic")?;
    let (mut monitor, mut qmp) = hello(&stage, "panic", &["-action", "panic=pause"])?;
    for _ in 0..2 {
        let events = until_stop(&mut qmp)?;
        let panicked = json!({ "action": "pause" });
        ensure!(events == [("GUEST_PANICKED".into(), panicked), ("STOP".into(), json!({}))]);
        is_halted(&mut qmp, "guest-panicked")?;
        is_reset(&mut monitor, &mut qmp)?;
    }
    until_stop(&mut qmp)?;
    quits(&stage, &mut monitor, &mut qmp)
}

#[test]
fn after_an_instruction_that_kvm_cannot_run() -> Result<()> {
    let stage = Stage::new("halt_kvm")?;
    let (mut monitor, mut qmp) =
        stage.start(stage.vm("hello", "nowhere")?.args(&["-action", "panic=pause"]))?;
    let events = until_stop(&mut qmp)?;
    ensure!(events == [("STOP".into(), json!({}))], "{events:?}");
    is_halted(&mut qmp, "internal-error")?;
    monitor.wait_said("rip 0xd0000000")?;
    simple(&mut qmp, "system_reset")?;
    cont(&mut qmp)?;
    ensure!(qmp.wait_event("STOP", SOON)?.data == json!({}));
    quits(&stage, &mut monitor, &mut qmp)
}

#[test]
fn reset_reboots_it_whatever_has_ended_it() -> Result<()> {
    let stage = Stage::new("restarts")?;
    for (way, action, reason) in [
        ("poweroff", "shutdown=reset", "guest-shutdown"),
        ("panic", "panic=reset", "guest-panic"),
        ("nowhere", "panic=reset", "host-error"),
    ] {
        let (_monitor, mut qmp) =
            stage.start(stage.vm("hello", way)?.args(&["-action", action]))?;
        for _ in 0..3 {
            let data = qmp.wait_event("RESET", SOON)?.data;
            ensure!(data == json!({ "guest": reason != "host-error", "reason": reason }), "{data}");
        }
        let panicked = qmp.take_events().into_iter().find(|e| e.event == "GUEST_PANICKED");
        ensure!(panicked.is_some() == (way == "panic"));
        ensure!(panicked.is_none_or(|e| e.data == json!({ "action": "run" })));
        ensure!(status(&mut qmp)? == "running");
        simple(&mut qmp, "quit")?;
    }
    Ok(())
}

#[test]
fn as_the_file_says_for_domains() -> Result<()> {
    let stage = Stage::new("domain")?;
    let domain = |way: &str, key: &str, what: &str| -> Result<(Monitor, Client)> {
        let mut config = stage.config("hello", way)?;
        if let Value::Object(config) = &mut config {
            config.insert("domain".into(), json!({ key: what }));
        }
        stage.start(Vm::described(config))
    };
    for (way, key, state) in [
        ("poweroff", "on_poweroff", "shutdown"),
        ("keyboard-reset", "on_reboot", "shutdown"),
        ("triple-fault", "on_reboot", "shutdown"),
        ("panic", "on_crash", "guest-panicked"),
        ("triple-fault", "on_crash", "guest-panicked"),
        ("nowhere", "on_crash", "internal-error"),
    ] {
        for what in ["preserve", "rename-restart"] {
            let (mut monitor, mut qmp) = domain(way, key, what)?;
            until_stop(&mut qmp)?;
            is_halted(&mut qmp, state)?;
            quits(&stage, &mut monitor, &mut qmp)?;
        }
        let (mut monitor, mut qmp) = domain(way, key, "restart")?;
        for _ in 0..2 {
            qmp.wait_event("RESET", SOON)?;
        }
        simple(&mut qmp, "quit")?;
        // Otherwise the next one's client may connect to this one's socket.
        monitor.wait_exit()?;
        let (mut monitor, mut qmp) = domain(way, key, "destroy")?;
        let (guest, reason, status) = match (key, state) {
            ("on_poweroff", _) => (true, "guest-shutdown", 0),
            ("on_reboot", _) => (true, "guest-reset", 0),
            // A reboot, where crashes are not kept.
            _ if way == "triple-fault" => (true, "guest-reset", 0),
            (_, "guest-panicked") => (true, "guest-panic", 1),
            _ => (false, "host-error", 1),
        };
        ends(&mut monitor, &mut qmp, guest, reason, status)?;
    }
    Ok(())
}

#[test]
fn it_can_be_saved_and_is_still_over_when_it_is_restored() -> Result<()> {
    let stage = Stage::new("halt_save")?;
    let (mut monitor, mut qmp) = hello(&stage, "panic", &["-action", "panic=pause"])?;
    until_stop(&mut qmp)?;
    let saved = format!("file:{}", stage.file("saved").display());
    for resume in [false, true] {
        qmp.execute_raw("migrate", json!({ "uri": saved, "resume": resume }))?;
        qmp.take_events();
        is_halted(&mut qmp, "guest-panicked")?;
    }
    quits(&stage, &mut monitor, &mut qmp)?;
    let args = ["-incoming", &saved, "-action", "panic=pause"];
    let vm = Vm::described(json!({ "boot-source": { "boot_args": "panic" } }));
    let mut monitor = vm.args(&args).start(&stage.paths, &stage.dir)?;
    let mut qmp = monitor.qmp()?;
    ensure!(status(&mut qmp)? == "guest-panicked");
    // A client that connects early gets the event that the machine has arrived.
    qmp.take_events();
    is_halted(&mut qmp, "guest-panicked")?;
    is_reset(&mut monitor, &mut qmp)?;
    until_stop(&mut qmp)?;
    quits(&stage, &mut monitor, &mut qmp)
}

#[test]
fn its_last_output_can_still_be_read() -> Result<()> {
    let stage = Stage::new("last_words")?;
    let socket = stage.file("console.sock");
    let serial = format!("socket,path={},server,nowait,replay=4K", socket.display());
    let vm = stage.vm("hello", "panic")?.args(&["-serial", &serial, "-action", "panic=pause"]);
    let (mut monitor, mut qmp) = stage.start(vm)?;
    until_stop(&mut qmp)?;
    for _ in 0..3 {
        let mut console = UnixStream::connect(&socket)?;
        console.set_read_timeout(Some(SOON))?;
        let mut said = [0; 6];
        console.read_exact(&mut said)?;
        ensure!(said == *b"hello\n", "{said:?}");
    }
    quits(&stage, &mut monitor, &mut qmp)?;
    ensure!(!crate::stage::exists(&socket));
    // A machine that was stopped before loses nothing.
    let (mut monitor, mut qmp) = hello(&stage, "halt", &["-action", "panic=pause"])?;
    stop(&mut qmp)?;
    cont(&mut qmp)?;
    quits(&stage, &mut monitor, &mut qmp)
}
