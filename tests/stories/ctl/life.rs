//! The life of an unmanaged and of a managed domain.
use std::fs;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use qmp::client::Client;
use rustix::process::Signal;
use serde_json::{Value, json};
use stories::bounds::SIGNAL;
use stories::frozen::{Frozen, make_file_system};
use stories::held::{Held, Op, until};
use stories::monitor::SOON;

use crate::rig::Rig;

#[test]
fn an_unmanaged_domain_is_removed_when_it_ends() -> Result<()> {
    let rig = Rig::new("unmanaged")?;
    rig.config("web.json", "count", "plain 1")?;
    let checked = rig.ok(&["create", "-n", "web.json"])?;
    ensure!(checked == json!({ "name": "web", "valid": true }), "{checked}");
    ensure!(rig.state("web")? == "absent", "a check has started it");

    let made = rig.ok(&["create", "web.json"])?;
    ensure!(made == json!({ "name": "web", "id": 1, "state": "running" }), "{made}");
    let row = rig.listed("web")?.context("not listed")?;
    for (key, value) in [
        ("id", json!(1)),
        ("state", json!("running")),
        ("managed", json!(false)),
        ("vcpus", json!(1)),
        ("memory", json!(16 << 20)),
    ] {
        ensure!(row.get(key) == Some(&value), "{key}: {row}");
    }
    ensure!(row.get("rss").and_then(Value::as_u64).is_some_and(|rss| rss > 0), "{row}");
    ensure!(row.get("uptime").and_then(Value::as_f64).is_some(), "{row}");
    let table = String::from_utf8(rig.run(&["list"])?.stdout)?;
    let lines: Vec<_> = table.lines().collect();
    ensure!(lines.len() == 2 && table.contains("web   1   running"), "{table}");

    rig.ok(&["pause", "web"])?;
    ensure!(rig.state("web")? == "paused");
    rig.ok(&["pause", "web"])?;
    rig.ok(&["unpause", "web"])?;
    ensure!(rig.state("web")? == "running");
    let (what, hint) = rig.refused(&["delete", "web"])?;
    ensure!(what.contains("not a registered domain") && hint.contains("destroy web"), "{what}");
    let (what, hint) = rig.refused(&["pause", "wbe"])?;
    ensure!(what.contains("no domain 'wbe'") && hint.contains("did you mean 'web'"), "{hint}");
    let (what, _) = rig.refused(&["create", "web.json"])?;
    ensure!(what.contains("a domain 'web' already"), "{what}");
    let pid = rig.pid("web")?;
    rig.ok(&["destroy", "web"])?;
    rig.gone(pid)?;
    ensure!(rig.state("web")? == "absent");
    let left: Vec<_> = fs::read_dir(rig.file("r/run"))?.collect::<Result<_, _>>()?;
    ensure!(left.len() == 1, "only the directory of locks is left: {left:?}");
    Ok(())
}

#[test]
fn a_guest_that_powers_off_ends_its_domain() -> Result<()> {
    let rig = Rig::new("ends")?;
    let off = rig.config("off.json", "hello", "poweroff")?;
    rig.ok(&["create", "off.json"])?;
    rig.wait_state("off", "absent")?;
    rig.ok(&["new", "off.json"])?;
    rig.ok(&["start", "off"])?;
    rig.wait_state("off", "registered")?;
    fs::remove_file(off)?;
    // The registered configuration is a copy, which later changes of the file do not affect.
    rig.ok(&["start", "off", "-p"])?;
    rig.ok(&["unpause", "off"])?;
    rig.ok(&["wait", "off"])?;
    rig.ok(&["delete", "off"])?;
    Ok(())
}

#[test]
fn a_guest_that_reboots_continues_in_the_same_monitor() -> Result<()> {
    let rig = Rig::new("reboots")?;
    rig.config("again.json", "hello", "keyboard-reset")?;
    rig.ok(&["create", "again.json"])?;
    let pid = rig.pid("again")?;
    for _ in 0..5 {
        ensure!(rig.state("again")? == "running" && rig.pid("again")? == pid);
    }
    rig.clean("again")?;
    rig.ok(&["create", "again.json", "--on-reboot", "destroy"])?;
    rig.wait_state("again", "absent")
}

#[test]
fn a_managed_domain_stays_until_it_is_deleted() -> Result<()> {
    let rig = Rig::new("managed")?;
    rig.config("vm.json", "count", "plain 1")?;
    rig.ok(&["new", "vm.json", "--name", "db"])?;
    ensure!(rig.state("db")? == "registered");
    for round in 0..3 {
        rig.ok(&["start", "db"])?;
        let (what, hint) = rig.refused(&["delete", "db"])?;
        ensure!(what == "'db' is running" && hint.contains("shutdown -w db"), "{what} {hint}");
        rig.ok(&["rename", "db", "db2"])?;
        ensure!(rig.state("db")? == "absent" && rig.state("db2")? == "running");
        rig.ok(&["pause", "db2"])?;
        rig.ok(&["rename", "db2", "db"])?;
        if round == 1 {
            rig.kill("db")?;
            ensure!(rig.state("db")? == "killed");
            let (_, hint) = rig.refused(&["pause", "db"])?;
            ensure!(hint.contains("info db"), "{hint}");
            // It can be started again at once.
            rig.ok(&["start", "db"])?;
        }
        rig.ok(&["destroy", "db"])?;
        ensure!(rig.state("db")? == "registered");
    }
    rig.ok(&["new", "vm.json", "--name", "other"])?;
    let (what, _) = rig.refused(&["rename", "db", "other"])?;
    ensure!(what.contains("a domain 'other' already"), "{what}");
    rig.ok(&["delete", "db"])?;
    ensure!(rig.state("db")? == "absent");
    Ok(())
}

#[test]
fn the_console_is_a_socket_beside_the_others() -> Result<()> {
    let rig = Rig::new("socket")?;
    rig.config("vm.json", "hello", "halt")?;
    let made = rig.ok(&["create", "vm.json", "-p"])?;
    ensure!(made.get("state") == Some(&json!("paused")), "{made}");
    UnixStream::connect(rig.file("r/run/vm/console.sock"))?;
    let info = rig.ok(&["info", "vm"])?;
    let kernel = info.pointer("/0/config/boot-source/kernel_image_path");
    ensure!(kernel == Some(&json!(rig.file("hello"))), "{info}");
    Ok(())
}

#[test]
fn a_registry_may_lie_deeper_than_a_socket_can() -> Result<()> {
    let rig = Rig::new("deep")?;
    rig.config("vm.json", "hello", "halt")?;
    let root = rig.file(&"deep/".repeat(40));
    let root = root.to_str().context("a path")?;
    for (make, name) in [("create", "a"), ("new", "b")] {
        rig.ok(&["--root", root, make, "vm.json", "--name", name])?;
    }
    rig.ok(&["--root", root, "start", "b"])?;
    for name in ["a", "b"] {
        rig.ok(&["--root", root, "pause", name])?;
        rig.ok(&["--root", root, "destroy", name])?;
    }
    Ok(())
}

#[test]
fn a_domain_that_cannot_start_says_why_and_is_not_there() -> Result<()> {
    let rig = Rig::new("no-start")?;
    rig.config("vm.json", "hello", "halt")?;
    fs::remove_file(rig.file("hello"))?;
    let (what, _) = rig.refused(&["create", "-n", "vm.json"])?;
    ensure!(what.contains("kernel_image_path") && what.contains("No such file"), "{what}");
    let (what, _) = rig.refused(&["create", "vm.json"])?;
    ensure!(what.contains("'vm' does not start") && what.contains("No such file"), "{what}");
    ensure!(rig.state("vm")? == "absent");
    rig.ok(&["new", "vm.json"])?;
    rig.refused(&["start", "vm"])?;
    ensure!(rig.state("vm")? == "registered");
    let (what, hint) = rig.refused(&["--monitor", "./none", "start", "vm"])?;
    ensure!(what.contains("cannot run the monitor") && hint.contains("--monitor"), "{what}");

    fs::write(rig.file("bad.json"), r#"{"machine-config": {"vcpu_count": 1000000}, "x": 1}"#)?;
    let (what, _) = rig.refused(&["new", "bad.json"])?;
    ensure!(what.contains("1000000") && what.contains('x') && what.contains("kernel"), "{what}");
    for name in ["../x", "", &"x".repeat(10_240), "😀", "-n", ".lock"] {
        let out = rig.run(&["new", "vm.json", &format!("--name={name}")])?;
        ensure!(out.status.code() == Some(2), "'{name}' is a name");
    }
    Ok(())
}

#[test]
fn a_monitor_that_hangs_is_shown_as_hung_and_can_be_ended() -> Result<()> {
    let mut rig = Rig::new("hung")?;
    rig.patience = "2";
    rig.config("vm.json", "hello", "halt")?;
    rig.ok(&["create", "vm.json"])?;
    let pid = rig.pid("vm")?;
    rig.signal(pid, Signal::STOP)?;
    ensure!(rig.state("vm")? == "hung");
    let (what, hint) = rig.refused(&["pause", "vm"])?;
    ensure!(what.contains("does not answer") && hint.contains("destroy vm"), "{what}");
    rig.signal(pid, Signal::CONT)?;
    rig.wait_state("vm", "running")?;
    rig.signal(pid, Signal::STOP)?;
    rig.ok(&["destroy", "vm"])?;
    rig.gone(pid)?;
    ensure!(rig.state("vm")? == "absent");
    // A monitor that has removed its socket may take long to end, but it is not starting.
    rig.ok(&["create", "vm.json"])?;
    fs::remove_file(rig.file("r/run/vm/qmp.sock"))?;
    ensure!(rig.state("vm")? == "ending");
    Ok(())
}

#[test]
fn a_monitor_that_the_kernel_cannot_end_is_shown_as_ending() -> Result<()> {
    let rig = Rig::new("ending")?;
    let held = Held::mount(&rig.file("held"), &[("disk", &[0; 1 << 20])])?;
    let config = rig.config("vm.json", "hello", "halt")?;
    let mut described: Value = serde_json::from_str(&fs::read_to_string(&config)?)?;
    let disk = held.file("disk");
    described["drive"] =
        json!([{ "drive_id": "disk", "path_on_host": disk, "read_only": false, "direct": false }]);
    fs::write(&config, described.to_string())?;
    rig.ok(&["new", "vm.json"])?;
    rig.ok(&["start", "vm"])?;
    let pid = rig.pid("vm")?;
    let _guard = held.until_dropped();
    // Closing a file waits for this.
    held.hold(Op::FLUSH);
    rig.signal(pid, Signal::TERM)?;
    rig.wait_state("vm", "ending")?;
    held.wait_held(Op::FLUSH)?;
    let stat = || fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    until("only a process id is left", || stat().contains(") Z "))?;
    ensure!(rig.state("vm")? == "ending" && rig.pid("vm")? == pid);
    let (what, hint) = rig.refused(&["start", "vm"])?;
    ensure!(what.contains("is still ending") && hint.contains("`stratoctl info vm`"), "{what}");
    // Its disk has no requests in flight, so another machine can use it.
    rig.ok(&["create", "vm.json", "--name", "other"])?;
    held.release()?;
    rig.ok(&["destroy", "other"])?;
    rig.gone(pid)?;
    ensure!(rig.state("vm")? == "registered");
    rig.ok(&["start", "vm"])?;
    Ok(())
}

#[test]
fn a_monitor_whose_save_hangs_ends_within_its_bound_and_is_shown_as_ending() -> Result<()> {
    let mut rig = Rig::new("ending-save")?;
    let (image, place) = (rig.file("image"), rig.file("slow"));
    make_file_system(&rig.paths, &image)?;
    fs::create_dir(&place)?;
    let mount = format!("mount -o loop {} {}", image.display(), place.display());
    let program = format!("{mount}; exec \"$0\" \"$@\"");
    rig.by_script(&format!("exec unshare -m sh -ec '{program}' \"$MONITOR\" \"$@\""))?;
    rig.config("vm.json", "hello", "halt")?;
    rig.ok(&["new", "vm.json"])?;
    rig.ok(&["start", "vm"])?;
    let pid = rig.pid("vm")?;
    let frozen = Frozen::new(pid.unsigned_abs(), &place.to_string_lossy())?;
    let socket = rig.file("r/state/vm/run/qmp.sock");
    let (mut saves, mut qmp) = (Client::connect(&socket, SOON)?, Client::connect(&socket, SOON)?);
    let uri = format!("file:{}", place.join("saved").display());
    saves.send_line(&json!({ "execute": "migrate", "arguments": { "uri": uri } }).to_string())?;
    let hangs = || {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        let mut stats =
            tasks.map(|t| fs::read_to_string(t.path().join("stat")).unwrap_or_default());
        stats.any(|stat| stat.contains("(checkpoint) D "))
    };
    until("the save hangs", hangs)?;

    let asked = Instant::now();
    rig.signal(pid, Signal::TERM)?;
    let data = qmp.wait_event("SHUTDOWN", SOON)?.data;
    ensure!(data == json!({ "guest": false, "reason": "host-signal" }), "{data}");
    qmp.wait_closed(SOON)?;
    let stat = || fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    until("only a process id is left", || stat().contains(") Z "))?;
    let took = asked.elapsed();
    ensure!(took < SIGNAL, "it has taken {took:?}");
    ensure!(rig.state("vm")? == "ending" && rig.pid("vm")? == pid);
    let (what, hint) = rig.refused(&["start", "vm"])?;
    ensure!(what.contains("is still ending") && hint.contains("`stratoctl info vm`"), "{what}");
    frozen.thaw()?;
    rig.gone(pid)?;
    ensure!(rig.state("vm")? == "registered");
    Ok(())
}

#[test]
fn what_is_kept_makes_way_for_a_fresh_start() -> Result<()> {
    let rig = Rig::new("renames")?;
    for (file, word, flag, state) in [
        ("off.json", "poweroff", "--on-poweroff", "off"),
        ("bad.json", "panic", "--on-crash", "crashed"),
    ] {
        rig.config(file, "hello", word)?;
        let args = [file, "--name", "vm", flag, "rename-restart"];
        for make in ["new", "create"] {
            rig.ok(&[&[make], &args[..]].concat())?;
            if make == "new" {
                rig.ok(&["start", "vm"])?;
            }
            // After the automatic restart it ends again too soon, and is kept until the user starts
            // it.
            rig.wait_state("vm-1", state)?;
            rig.wait_state("vm", state)?;
            let pid = rig.pid("vm")?;
            let said = rig.ok(&["start", "vm", "-p"])?;
            ensure!(said.get("kept") == Some(&json!("vm-2")), "{said}");
            ensure!(rig.state("vm-2")? == state && rig.pid("vm-2")? == pid);
            ensure!(rig.state("vm")? == "paused" && rig.pid("vm")? != pid);
            for name in ["vm", "vm-1", "vm-2"] {
                rig.clean(name)?;
            }
        }
    }
    Ok(())
}
