//! Mistakes with `stratoctl`, and its messages.
use std::fs;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::rig::Rig;

#[test]
fn a_program_that_is_no_monitor() -> Result<()> {
    let rig = Rig::new("true")?;
    rig.config("vm.json", "count", "plain 1")?;
    rig.ok(&["new", "vm.json"])?;
    for start in [&["create", "vm.json", "--name", "other"][..], &["start", "vm"]] {
        let (what, hint) = rig.refused(&[&["--monitor", "/bin/true"], start].concat())?;
        ensure!(what.contains("/bin/true exited without output"), "{what}");
        ensure!(hint.contains("--monitor FILE"), "{hint}");
    }
    ensure!(rig.state("other")? == "absent" && rig.state("vm")? == "registered");
    // A guest that ends before the first query is not an error.
    rig.config("off.json", "hello", "poweroff")?;
    rig.ok(&["create", "off.json"])?;
    Ok(())
}

#[test]
fn a_directory_with_other_things_in_it_is_no_place_for_a_save() -> Result<()> {
    let rig = Rig::new("etc")?;
    rig.config("vm.json", "count", "plain 1")?;
    rig.ok(&["create", "vm.json"])?;
    let etc = rig.file("etc");
    fs::create_dir(&etc)?;
    fs::write(etc.join("passwd"), "root")?;
    fs::write(etc.join("memory"), "of somebody")?;
    for flags in [&["save", "vm", "etc"][..], &["save", "-c", "vm", "etc"]] {
        let (what, hint) = rig.refused(flags)?;
        ensure!(what.contains("contains other files, such as 'passwd'"), "{what}");
        ensure!(hint.contains("a directory of its own"), "{hint}");
    }
    ensure!(fs::read_dir(&etc)?.count() == 2 && rig.state("vm")? == "running");
    // An empty directory is accepted, and so is an earlier save.
    fs::create_dir(rig.file("empty"))?;
    for _ in 0..2 {
        rig.ok(&["save", "-c", "vm", "empty"])?;
    }
    Ok(())
}

#[test]
fn a_restore_speaks_of_its_own_flags() -> Result<()> {
    let rig = Rig::new("moved")?;
    let path = rig.config("vm.json", "count", "plain 1")?;
    let mut config: Value = serde_json::from_slice(&fs::read(&path)?)?;
    let disk = rig.file("data.img");
    fs::write(&disk, [0; 4096])?;
    let drive =
        json!([{ "drive_id": "data", "path_on_host": disk, "read_only": false, "direct": false }]);
    config.as_object_mut().context("no object")?.insert("drive".into(), drive);
    fs::write(&path, config.to_string())?;
    rig.ok(&["create", "vm.json"])?;
    rig.ok(&["save", "vm", "kept"])?;
    fs::rename(&disk, rig.file("moved.img"))?;
    let (what, _) = rig.refused(&["restore", "kept"])?;
    ensure!(what.contains("--disk data=PATH") && !what.contains("-drive"), "{what}");
    rig.ok(&["restore", "kept", "--disk", "data=moved.img"])?;
    rig.ok(&["destroy", "vm"])?;

    fs::rename(rig.file("moved.img"), &disk)?;
    rig.ok(&["new", "vm.json"])?;
    rig.ok(&["start", "vm"])?;
    rig.ok(&["suspend", "vm"])?;
    fs::rename(&disk, rig.file("moved.img"))?;
    let (what, hint) = rig.refused(&["resume", "vm"])?;
    ensure!(what.contains("--disk data=PATH") && hint.contains("stratoctl restore"), "{what}");
    ensure!(rig.state("vm")? == "suspended");
    Ok(())
}

#[test]
fn the_control_socket_takes_paths_from_here_and_lists_commands_only_where_one_is_unknown()
-> Result<()> {
    let rig = Rig::new("here")?;
    rig.config("vm.json", "count", "plain 1")?;
    rig.ok(&["create", "vm.json"])?;
    fs::write(rig.file("data.img"), [0; 4096])?;
    let add = r#"{"node-name":"data","file":{"filename":"data.img"}}"#;
    rig.ok(&["qmp", "vm", "blockdev-add", add])?;
    rig.ok(&["qmp", "vm", "migrate", r#"{"uri":"file:kept","resume":true}"#])?;
    ensure!(rig.file("kept/state").exists());

    let (what, hint) = rig.refused(&["qmp", "vm", "blockdev-add", add])?;
    ensure!(what.contains("already registered") && hint.is_empty(), "{what}; {hint}");
    let (_, hint) = rig.refused(&["qmp", "vm", "query-everything"])?;
    ensure!(hint.contains("stratoctl qmp vm query-commands"), "{hint}");
    Ok(())
}

#[test]
fn a_time_limit_is_a_wait() -> Result<()> {
    let rig = Rig::new("limit")?;
    rig.config("web.json", "hello", "halt")?;
    rig.ok(&["create", "web.json"])?;
    rig.says("web", "halts\n")?;
    for verb in ["reboot", "shutdown"] {
        let (what, hint) = rig.refused(&[verb, "-t", "0.2", "web"])?;
        ensure!(what.contains("'web' is still running"), "{what}");
        ensure!(hint.contains(&format!("stratoctl {verb} -F web")), "{hint}");
    }
    Ok(())
}

/// It waits for events; it does not poll.
#[test]
fn a_wait_costs_the_monitor_next_to_nothing() -> Result<()> {
    let rig = Rig::new("waits")?;
    rig.config("vm.json", "count", "plain 1")?;
    // Registered, so that a `wait` that begins after its end still finds the domain.
    rig.ok(&["new", "vm.json"])?;
    let made = rig.command(&["start", "vm"]).env("STRATOVIRT_LOG_LEVEL", "debug").status()?;
    ensure!(made.success());
    let clients = || -> Result<usize> {
        let log = String::from_utf8(rig.run(&["dmesg", "vm"])?.stdout)?;
        Ok(log.matches("has hung up").count())
    };
    let before = clients()?;
    let (what, _) = rig.refused(&["wait", "vm", "-t", "1.5"])?;
    ensure!(what == "'vm' is still running", "{what}");
    let cost = clients()? - before;
    ensure!(cost < 10, "a wait of a second and a half has connected {cost} times");

    for (state, verb) in [("paused", "pause"), ("running", "unpause"), ("ended", "destroy")] {
        let mut waits = rig.command(&["wait", "vm", state]).stderr(Stdio::piped()).spawn()?;
        rig.ok(&[verb, "vm"])?;
        ensure!(waits.wait()?.success(), "{state}");
    }
    Ok(())
}
