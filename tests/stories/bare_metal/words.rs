//! What clients of StratoVirt and QEMU say beyond the machine's life, and the words that answer them.
use std::fs;

use anyhow::{Context, Result, ensure};
use qmp::client::Client;
use serde_json::json;

use crate::plug::{refused, with_taps};
use crate::stage::{Stage, cont, quits, stop};
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
        let says = format!("Unsupported command: {line}; known are: info block, info cpus");
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

/// Whoever has the image is named, and it is no other machine.
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
        let says = format!("{} is the image of 'data' in this machine already", path.display());
        refused(&mut qmp, "blockdev-add", again, &says)?;
    }
    let unplug = json!({ "id": "data" });
    ensure!(qmp.execute_raw("device_del", unplug)? == json!({}));
    let waits = json!({ "node-name": "waits", "file": { "filename": image } });
    ensure!(qmp.execute_raw("blockdev-add", waits)? == json!({}));
    let again = json!({ "node-name": "again", "file": { "filename": image } });
    refused(&mut qmp, "blockdev-add", again, "the image of 'waits' in this machine already")?;
    quits(&stage, &mut monitor, &mut qmp)?;

    let twice = stage.vm("hello", "halt")?.disk("a", &image, false).disk("b", &link, false);
    let mut monitor = twice.start(&stage.paths, &stage.dir)?;
    ensure!(monitor.wait_exit()?.code() == Some(1));
    let said = monitor.said_to_its_end()?;
    ensure!(said.contains("disk b: ") && said.contains("is the image of disk a, too"), "{said}");
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
