//! Commands of StratoVirt's and QEMU's clients beyond the machine's life cycle, and their answers.
use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use qmp::client::Client;
use serde_json::json;
use stories::monitor::{SOON, Vm};

use crate::plug::{refused, with_taps};
use crate::stage::{Stage, cont, quits, simple, stop};
use crate::talk::Ncat;

fn hmp(qmp: &mut Client, line: &str) -> Result<String> {
    let text = qmp.execute_raw("human-monitor-command", json!({ "command-line": line }))?;
    Ok(text.as_str().context("no text")?.to_owned())
}

#[test]
fn a_balloon_that_is_not_there_is_not_active() -> Result<()> {
    let stage = Stage::new("balloon")?;
    let (mut monitor, mut qmp) = stage.start(stage.vm("hello", "halt")?)?;
    let mut ncat = Ncat::connect(&stage)?;
    ncat.sees()?;
    ncat.types("{\"execute\":\"query-balloon\"}")?;
    ensure!(
        ncat.sees()?
            == r#"{"error":{"class":"DeviceNotActive","desc":"No balloon device has been activated"}}"#
    );
    quits(&stage, &mut monitor, &mut qmp)
}

#[test]
fn the_lines_of_the_human_monitor_that_programs_read() -> Result<()> {
    let mut stage = Stage::new("human")?;
    with_taps(&mut stage, "")?;
    let image = stage.file("image");
    fs::write(&image, [0; 4096])?;
    let vm = stage
        .vm("count", "plain 1")?
        .machine("vcpu_count", 2)
        .args(&["-name", "web"])
        .disk("data", &image, true)
        .nic("net0", "tap0", "52:54:00:00:00:01");
    let (mut monitor, mut qmp) = stage.start(vm)?;
    ensure!(hmp(&mut qmp, "info status")? == "VM status: running\r\n");
    stop(&mut qmp)?;
    ensure!(hmp(&mut qmp, " info  status ")? == "VM status: paused\r\n");
    cont(&mut qmp)?;
    ensure!(hmp(&mut qmp, "info name")? == "web\r\n");
    ensure!(hmp(&mut qmp, "info snapshots")? == "There is no snapshot available.\r\n");
    let version = hmp(&mut qmp, "info version")?;
    ensure!(version.ends_with(")\r\n") && version.contains(" (StratoVirt-"), "{version}");
    let disks = format!(
        "data (data): {} (raw, read-only)\r\n    Attached to:      data\r\n    Cache mode:       \
         writeback, direct\r\n",
        image.display()
    );
    ensure!(hmp(&mut qmp, "info block")? == disks, "{}", hmp(&mut qmp, "info block")?);
    let nics = "net0: index=0,type=nic,model=virtio-net-device,macaddr=52:54:00:00:00:01\r\n \\ net0: \
                index=0,type=tap,ifname=tap0,script=no,downscript=no\r\n";
    ensure!(hmp(&mut qmp, "info network")? == nics, "{}", hmp(&mut qmp, "info network")?);
    let threads = qmp.execute_raw("query-cpus-fast", json!({}))?;
    let thread = |index: usize| threads[index]["thread-id"].as_u64().context("no thread");
    let cpus =
        format!("* CPU #0: thread_id={}\r\n  CPU #1: thread_id={}\r\n", thread(0)?, thread(1)?);
    ensure!(hmp(&mut qmp, "info cpus")? == cpus);
    for line in ["info registers", "savevm x", ""] {
        let says = format!("Unsupported command: {line}; supported are: info balloon, info block");
        refused(&mut qmp, "human-monitor-command", json!({ "command-line": line }), &says)?;
    }
    quits(&stage, &mut monitor, &mut qmp)
}

#[test]
fn questions_about_disks_may_say_how_they_are_meant() -> Result<()> {
    let stage = Stage::new("flat")?;
    let image = stage.file("image");
    fs::write(&image, [0; 4096])?;
    let vm = stage.vm("hello", "halt")?.disk("data", &image, true);
    let (mut monitor, mut qmp) = stage.start(vm)?;
    for (command, member) in
        [("query-named-block-nodes", "flat"), ("query-blockstats", "query-nodes")]
    {
        let plain = qmp.execute_raw(command, json!({}))?;
        ensure!(plain[0]["node-name"] == "data", "{plain}");
        for word in [true, false] {
            ensure!(qmp.execute_raw(command, json!({ member: word }))? == plain, "{command}");
        }
    }
    quits(&stage, &mut monitor, &mut qmp)
}

/// The process that has the image is named, and it is not a machine.
#[test]
fn an_image_that_this_machine_has_itself() -> Result<()> {
    let stage = Stage::new("own")?;
    let (image, link) = (stage.file("image"), stage.file("link"));
    fs::write(&image, [0; 4096])?;
    std::os::unix::fs::symlink(&image, &link)?;
    let vm = stage.vm("hello", "halt")?.disk("data", &image, false);
    let (mut monitor, mut qmp) = stage.start(vm)?;
    for path in [&image, &link] {
        let again = json!({ "node-name": "again", "file": { "filename": path } });
        let says = format!("{} is already the image of 'data' in this machine", path.display());
        refused(&mut qmp, "blockdev-add", again, &says)?;
    }
    let unplug = json!({ "id": "data" });
    ensure!(qmp.execute_raw("device_del", unplug)? == json!({}));
    let waits = json!({ "node-name": "waits", "file": { "filename": image } });
    ensure!(qmp.execute_raw("blockdev-add", waits)? == json!({}));
    let again = json!({ "node-name": "again", "file": { "filename": image } });
    refused(&mut qmp, "blockdev-add", again, "already the image of 'waits' in this machine")?;
    quits(&stage, &mut monitor, &mut qmp)?;

    let twice = stage.vm("hello", "halt")?.disk("a", &image, false).disk("b", &link, false);
    let mut monitor = twice.start(&stage.paths, &stage.dir)?;
    ensure!(monitor.wait_exit()?.code() == Some(1));
    let said = monitor.said_to_its_end()?;
    ensure!(said.contains("disk b: ") && said.contains("is also the image of disk a"), "{said}");
    ensure!(!said.contains("another machine"), "{said}");
    Ok(())
}

#[test]
fn the_driver_is_looked_at_before_what_is_said_to_it() -> Result<()> {
    let stage = Stage::new("driver")?;
    let images = ["one", "two"].map(|name| stage.file(name));
    images.iter().try_for_each(|image| fs::write(image, [0; 4096]))?;
    let (mut monitor, mut qmp) = stage.start(stage.vm("hello", "halt")?)?;
    for arguments in [
        json!({ "driver": "vfio-pci", "id": "gpu", "host": "0000:01:00.0", "bus": "pcie.1" }),
        json!({ "driver": "generic-x86-cpu", "id": "cpu1", "cpu-id": 1 }),
        json!({ "driver": "vhost-user-fs-pci", "id": "fs", "chardev": "c", "tag": "share" }),
        json!({ "driver": "usb-storage", "bogus": [] }),
    ] {
        refused(&mut qmp, "device_add", arguments, "Unsupported replaceable device type: '")?;
    }
    let odd = json!({ "driver": "virtio-blk-mmio", "id": "one", "tag": "share" });
    refused(&mut qmp, "device_add", odd, "Parameter 'tag' is unexpected")?;

    // Without an address, the first slot that is free.
    for (name, image) in ["one", "two"].into_iter().zip(&images) {
        let backend = json!({ "node-name": name, "file": { "filename": image } });
        ensure!(qmp.execute_raw("blockdev-add", backend)? == json!({}));
        let device = json!({ "driver": "virtio-blk-mmio", "id": name, "disable-modern": true });
        ensure!(qmp.execute_raw("device_add", device)? == json!({}));
    }
    let disks = qmp.execute_raw("query-block", json!({}))?;
    let names: Vec<_> =
        disks.as_array().into_iter().flatten().map(|disk| &disk["device"]).collect();
    ensure!(names == [&json!("one"), &json!("two")], "{disks}");
    refused(
        &mut qmp,
        "device_add",
        json!({ "driver": "virtio-blk-mmio", "id": "x", "addr": "0" }),
        "Failed to find device configuration",
    )?;
    quits(&stage, &mut monitor, &mut qmp)
}

/// As libvirt probes QEMU's capabilities: with `-machine none`, without kernel and disks.
#[test]
fn without_a_machine_it_describes_what_is_supported() -> Result<()> {
    let stage = Stage::new("probe")?;
    let vm =
        Vm::described(json!({})).args(&["-S", "-nodefaults", "-machine", "none,accel=kvm:tcg"]);
    let mut monitor = vm.start(&stage.paths, &stage.dir)?;
    let mut qmp = monitor.qmp()?;
    qmp.execute_raw("qmp_capabilities", json!({}))?;
    ensure!(qmp.execute_raw("query-target", json!({}))? == json!({ "arch": "x86_64" }));
    let kvm = qmp.execute_raw("query-kvm", json!({}))?;
    ensure!(kvm == json!({ "enabled": true, "present": true }), "{kvm}");
    let accelerators = qmp.execute_raw("query-accelerators", json!({}))?;
    ensure!(accelerators == json!({ "enabled": "kvm", "present": ["kvm"] }), "{accelerators}");
    ensure!(qmp.execute_raw("query-status", json!({}))?["running"] == false);

    // All commands are listed, also those that need a machine; these fail and say so.
    let commands = qmp.execute_raw("query-commands", json!({}))?;
    let has =
        |name: &str| commands.as_array().is_some_and(|all| all.contains(&json!({ "name": name })));
    ensure!(has("device_add") && has("migrate") && has("quit"), "{commands}");
    let schema = qmp.execute_raw("query-qmp-schema", json!({}))?;
    ensure!(schema.to_string().contains("blockdev-add"));
    for (command, arguments) in
        [("cont", json!({})), ("query-block", json!({})), ("device_del", json!({ "id": "x" }))]
    {
        refused(&mut qmp, command, arguments, "there is no machine (-machine none)")?;
    }

    let names = |list: &serde_json::Value, key: &str| -> Vec<String> {
        let items = list.as_array().into_iter().flatten();
        items.filter_map(|item| Some(item[key].as_str()?.to_owned())).collect()
    };
    let types = qmp.execute_raw("qom-list-types", json!({ "implements": "device" }))?;
    let devices = names(&types, "name");
    ensure!(devices.contains(&"virtio-blk-device".to_owned()), "{types}");
    for device in &devices {
        let properties =
            qmp.execute_raw("device-list-properties", json!({ "typename": device }))?;
        ensure!(names(&properties, "name").contains(&"id".to_owned()), "{device}: {properties}");
    }
    refused(
        &mut qmp,
        "device-list-properties",
        json!({ "typename": "virtio-gpu-pci" }),
        "Device 'virtio-gpu-pci' not found",
    )?;
    let machines = names(&qmp.execute_raw("query-machines", json!({}))?, "name");
    ensure!(machines == ["microvm", "none"], "{machines:?}");
    let cpus = names(&qmp.execute_raw("query-cpu-definitions", json!({}))?, "name");
    ensure!(cpus == ["host"], "{cpus:?}");
    ensure!(qmp.execute_raw("query-migrate-capabilities", json!({}))?.is_array());
    let options = qmp.execute_raw("query-command-line-options", json!({}))?;
    ensure!(names(&options, "option").contains(&"machine".to_owned()), "{options}");
    let machine = qmp.execute_raw("query-command-line-options", json!({ "option": "machine" }))?;
    let keys = names(&machine[0]["parameters"], "name");
    for key in ["type", "accel", "dump-guest-core", "mem-share", "disk-slots"] {
        ensure!(keys.contains(&key.to_owned()), "{key}: {machine}");
    }
    quits(&stage, &mut monitor, &mut qmp)
}

/// Those answers are the same with a machine.
#[test]
fn a_machine_answers_a_prober_in_the_same_way() -> Result<()> {
    let stage = Stage::new("same")?;
    let (mut monitor, mut qmp) = stage.start(stage.vm("hello", "halt")?)?;
    let mut answers = Vec::new();
    for command in ["qom-list-types", "query-command-line-options", "query-cpu-definitions"] {
        answers.push(qmp.execute_raw(command, json!({}))?);
    }
    quits(&stage, &mut monitor, &mut qmp)?;
    let mut monitor =
        Vm::described(json!({})).args(&["-machine", "none"]).start(&stage.paths, &stage.dir)?;
    let mut qmp = monitor.qmp()?;
    for (command, answer) in
        ["qom-list-types", "query-command-line-options", "query-cpu-definitions"]
            .iter()
            .zip(answers)
    {
        ensure!(qmp.execute_raw(command, json!({}))? == answer, "{command}");
    }
    quits(&stage, &mut monitor, &mut qmp)
}

/// A client that listens, as for QEMU's `-qmp unix:PATH`.
#[test]
fn without_server_the_monitor_connects_to_its_client() -> Result<()> {
    let stage = Stage::new("dials")?;
    let socket = stage.file("mine.sock");
    let kernel = stage.kernel("hello")?;
    let start = |socket: &Path| -> Result<std::process::Child> {
        let mut command = Command::new(&stage.paths.stratovirt);
        command
            .arg("-kernel")
            .arg(&kernel)
            .args(["-append", "halt", "-serial", "pty", "-m", "32M"]);
        command.arg("-qmp").arg(format!("unix:{}", socket.display())).stderr(Stdio::piped());
        Ok(command.spawn()?)
    };
    // No client listens: the message says how to make the monitor listen.
    let unconnected = start(&socket)?.wait_with_output()?;
    let said = String::from_utf8(unconnected.stderr)?;
    ensure!(unconnected.status.code() == Some(1) && said.contains(",server,nowait"), "{said}");

    let listener = UnixListener::bind(&socket)?;
    let mut monitor = start(&socket)?;
    let (stream, _) = listener.accept()?;
    let mut qmp = Client::on(stream, SOON)?;
    ensure!(qmp.execute_raw("query-status", json!({}))?["running"] == true);
    stop(&mut qmp)?;
    simple(&mut qmp, "quit")?;
    ensure!(qmp.wait_event("SHUTDOWN", SOON)?.data["reason"] == "host-qmp-quit");
    ensure!(monitor.wait()?.success() && socket.exists(), "the socket is the client's own");
    Ok(())
}
