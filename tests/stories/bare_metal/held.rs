//! A file system's server does not answer until the test is over. All other clients get answers
//! meanwhile.
use std::fs;
use std::process::Command;

use anyhow::{Result, ensure};
use qmp::client::Client;
use serde_json::{Value, json};
use stories::debian::output;
use stories::held::{Held, Op, until};
use stories::monitor::{SOON, Vm};

use crate::plug::refused;
use crate::stage::{Stage, cont, exists, quits, simple, status, stop};

const MIB: usize = 1 << 20;

fn add(node: &str, path: &std::path::Path) -> Value {
    json!({ "node-name": node, "file": { "driver": "file", "filename": path }, "cache": { "direct": false } })
}

/// Sends a command and does not wait for its answer.
pub fn send(qmp: &mut Client, command: &str, arguments: &Value) -> Result<()> {
    Ok(qmp.send_line(&json!({ "execute": command, "arguments": arguments }).to_string())?)
}

/// The next line that is not an event.
pub fn answer(qmp: &mut Client) -> Result<Value> {
    loop {
        let line: Value = serde_json::from_str(&qmp.read_line(SOON)?)?;
        if line.get("event").is_none() {
            return Ok(line);
        }
    }
}

#[test]
fn an_image_whose_opening_hangs_holds_no_other_client() -> Result<()> {
    let stage = Stage::new("held_open")?;
    let held = Held::mount(&stage.file("held"), &[("disk", &[7; MIB])])?;
    let sound = stage.file("sound");
    fs::write(&sound, vec![0; MIB])?;
    let (mut monitor, mut other) = stage.start(stage.vm("hello", "")?)?;
    let _guard = held.until_dropped();
    let mut client = Client::connect(&stage.socket(), SOON)?;

    for op in [Op::LOOKUP, Op::GETATTR, Op::OPEN, Op::STATFS] {
        held.hold(op);
        send(&mut client, "blockdev-add", &add("late", &held.file("disk")))?;
        send(&mut client, "query-named-block-nodes", &json!({}))?;
        held.wait_held(op)?;
        stop(&mut other)?;
        ensure!(status(&mut other)? == "paused");
        cont(&mut other)?;
        let disks = other.execute_raw("query-block", json!({}))?;
        ensure!(disks == json!([]), "{disks}");
        let hangs = format!("opening {} has not finished", held.file("disk").display());
        refused(&mut other, "blockdev-add", add("sound", &sound), &hangs)?;
        refused(&mut other, "blockdev-add", add("late", &sound), "'late' is busy: opening")?;
        held.release()?;
        // In order: the second command finds what the first one has done.
        ensure!(answer(&mut client)? == json!({ "return": {} }), "{op:?}");
        let nodes = answer(&mut client)?;
        ensure!(nodes.pointer("/return/0/node-name") == Some(&json!("late")), "{nodes}");
        other.execute_raw("blockdev-del", json!({ "node-name": "late" }))?;
    }
    other.execute_raw("blockdev-add", add("sound", &sound))?;
    quits(&stage, &mut monitor, &mut other)
}

#[test]
fn an_image_whose_resizing_and_closing_hang_holds_no_other_client() -> Result<()> {
    let stage = Stage::new("held_resize")?;
    let held = Held::mount(&stage.file("held"), &[("disk", &[7; MIB])])?;
    let (mut monitor, mut other) = stage.start(stage.vm("hello", "")?)?;
    let _guard = held.until_dropped();
    let mut client = Client::connect(&stage.socket(), SOON)?;
    let disk = json!({ "id": "disk", "driver": "virtio-blk-mmio", "addr": "0x1" });
    other.execute_raw("blockdev-add", add("disk", &held.file("disk")))?;
    other.execute_raw("device_add", disk)?;

    held.hold(Op::SETATTR);
    let resize = json!({ "device": "disk", "size": 2 * MIB });
    send(&mut client, "block_resize", &resize)?;
    held.wait_held(Op::SETATTR)?;
    let disks = other.execute_raw("query-block", json!({}))?;
    ensure!(disks.pointer("/0/inserted/image/virtual-size") == Some(&json!(MIB)), "{disks}");
    refused(&mut other, "device_del", json!({ "id": "disk" }), "'disk' is busy: resizing")?;
    let save = json!({ "uri": format!("file:{}", stage.file("saved").display()) });
    refused(&mut other, "migrate", save, "is in progress")?;
    simple(&mut other, "system_reset")?;
    held.release()?;
    ensure!(answer(&mut client)? == json!({ "return": {} }));
    ensure!(held.contents("disk").len() == 2 * MIB);
    let disks = other.execute_raw("query-block", json!({}))?;
    ensure!(disks.pointer("/0/inserted/image/virtual-size") == Some(&json!(2 * MIB)), "{disks}");

    // The guest sees the disk removed at once, even while its file hangs.
    held.hold(Op::FLUSH);
    other.execute_raw("device_del", json!({ "id": "disk" }))?;
    ensure!(other.wait_event("DEVICE_DELETED", SOON)?.data["device"] == json!("disk"));
    held.wait_held(Op::FLUSH)?;
    ensure!(other.execute_raw("query-block", json!({}))? == json!([]));
    held.release()?;
    quits(&stage, &mut monitor, &mut other)
}

/// Whether `text` is a concatenation of prefixes of `whole`.
fn is_made_of_beginnings(mut text: &str, whole: &str) -> bool {
    while !text.is_empty() {
        let same = text.bytes().zip(whole.bytes()).take_while(|(one, other)| one == other);
        match same.count() {
            0 => return false,
            length => text = text.get(length..).unwrap_or_default(),
        }
    }
    true
}

#[test]
fn a_log_and_a_serial_port_s_file_that_hang_hold_no_client() -> Result<()> {
    let mut stage = Stage::new("held_output")?;
    stage.run_by("env STRATOVIRT_LOG_LEVEL=trace")?;
    let held = Held::mount(&stage.file("held"), &[("serial", b""), ("log", b"")])?;
    let (serial, log) = (held.file("serial"), held.file("log"));
    let (serial, log) = (format!("file,path={}", serial.display()), log.display().to_string());
    let vm = stage.vm("hello", "")?.args(&["-serial", &serial, "-D", &log]);
    let (mut monitor, mut qmp) = stage.start(vm)?;
    let _guard = held.until_dropped();
    let said = "hello\nhalts\n";
    until("the guest's words arrive", || held.contents("serial") == said.as_bytes())?;

    held.hold(Op::WRITE);
    for _ in 0..3 {
        simple(&mut qmp, "system_reset")?;
    }
    held.wait_held(Op::WRITE)?;
    stop(&mut qmp)?;
    ensure!(status(&mut qmp)? == "paused");
    cont(&mut qmp)?;
    ensure!(held.contents("serial") == said.as_bytes(), "nothing was held");
    held.release()?;
    // What the buffer held is complete and in order, up to the end.
    simple(&mut qmp, "system_reset")?;
    until("all that was said arrives", || {
        let all = held.contents("serial");
        all.len() > said.len() && all.ends_with(said.as_bytes())
    })?;
    quits(&stage, &mut monitor, &mut qmp)?;
    // All output of each run, until the next one began.
    let all = String::from_utf8(held.contents("serial"))?;
    ensure!(all.len() > said.len() && is_made_of_beginnings(&all, said), "{all}");
    let log = String::from_utf8(held.contents("log"))?;
    ensure!(log.ends_with('\n') && log.lines().count() > 1, "{log}");
    let is_whole =
        |line: &str| line.starts_with(|c: char| c.is_ascii_digit()) && line.contains(": ");
    ensure!(log.lines().all(is_whole), "{log}");
    Ok(())
}

#[test]
fn a_signal_ends_a_machine_whose_log_hangs() -> Result<()> {
    let mut stage = Stage::new("held_log")?;
    stage.run_by("env STRATOVIRT_LOG_LEVEL=trace")?;
    let held = Held::mount(&stage.file("held"), &[("log", b"")])?;
    let log = held.file("log").display().to_string();
    let pidfile = stage.file("pid").display().to_string();
    let vm = stage.vm("hello", "")?.args(&["-D", &log, "-pidfile", &pidfile]);
    let (mut monitor, mut qmp) = stage.start(vm)?;
    let _guard = held.until_dropped();
    held.hold(Op::WRITE);
    // Each client leaves a line in the log.
    drop(Client::connect(&stage.socket(), SOON)?);
    held.wait_held(Op::WRITE)?;
    output(Command::new("kill").arg(monitor.pid().to_string()))?;
    let data = qmp.wait_event("SHUTDOWN", SOON)?.data;
    ensure!(data == json!({ "guest": false, "reason": "host-signal" }), "{data}");
    qmp.wait_closed(SOON)?;
    until("its names go", || !exists(&stage.socket()) && !exists(&stage.file("pid")))?;
    // The kernel keeps a process until its writes have ended.
    held.release()?;
    ensure!(monitor.wait_exit()?.code() == Some(0));
    Ok(())
}

#[test]
fn the_lock_of_a_disk_that_hangs_names_the_process_that_cannot_end() -> Result<()> {
    let stage = Stage::new("held_disk")?;
    let held = Held::mount(&stage.file("held"), &[("disk", &[0; MIB])])?;
    let disk = |vm: Vm| {
        let path = held.file("disk");
        let aio =
            json!({ "drive_id": "vda", "path_on_host": path, "read_only": false, "direct": false });
        vm.add("drive", aio)
    };
    let (mut monitor, mut qmp) = stage.start(disk(stage.vm("blk", "busy")?))?;
    let _guard = held.until_dropped();
    held.hold(Op::WRITE);
    held.wait_held(Op::WRITE)?;
    output(Command::new("kill").arg(monitor.pid().to_string()))?;
    let data = qmp.wait_event("SHUTDOWN", SOON)?.data;
    ensure!(data == json!({ "guest": false, "reason": "host-signal" }), "{data}");
    qmp.wait_closed(SOON)?;
    let tasks = || fs::read_dir(format!("/proc/{}/task", monitor.pid())).map_or(0, Iterator::count);
    until("the other threads end", || tasks() <= 2)?;

    let place = stage.file("other");
    fs::create_dir(&place)?;
    let mut other = disk(stage.vm("hello", "")?).start(&stage.paths, &place)?;
    ensure!(!other.wait_exit()?.success(), "two machines have one disk");
    let said = other.said_to_its_end()?;
    ensure!(said.contains(&format!("(process {})", monitor.pid())), "{said}");
    held.release()?;
    ensure!(monitor.wait_exit()?.code() == Some(0));
    Ok(())
}
