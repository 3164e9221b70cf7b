//! Slots are filled and emptied while the guest runs; it is notified by the configuration change
//! interrupt, and then reads the new contents.
use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use qmp::client::Client;
use serde_json::{Value, json};
use stories::monitor::{Monitor, SOON, Vm};

use crate::snapshot::{restore, save};
use crate::stage::{Stage, descriptors, quits, simple};
use crate::talk::Ncat;

/// An image of this many sectors, each beginning with `mark` and its own number.
pub fn marked(stage: &Stage, name: &str, mark: u64, sectors: u64) -> Result<PathBuf> {
    let sector = |number: u64| (mark << 32 | number).to_le_bytes().into_iter().chain([0; 504]);
    let contents: Vec<u8> = (0..sectors).flat_map(sector).collect();
    let path = stage.file(name);
    fs::write(&path, contents)?;
    Ok(path)
}

/// What the guest prints when it finds that image in that slot.
pub fn found(slot: usize, mark: u64, sectors: u64) -> String {
    let word = |number: u64| mark << 32 | number;
    let last = sectors - 1;
    format!(
        "disk {slot:x} has {sectors:x} sectors sector 3 begins with {:x} sector {last:x} begins with {:x}\n",
        word(3),
        word(last)
    )
}

/// What it prints when the slot is empty: there is no sector 3 any more.
pub fn empty(slot: usize) -> String {
    format!("disk {slot:x} has 0 sectors sector 3 has status 1\n")
}

pub fn watching(stage: &Stage, how: &str) -> Result<(Monitor, Client)> {
    let (mut monitor, qmp) = stage.start(stage.vm("plug", how)?)?;
    ensure!(monitor.wait_for("ready\n", SOON)? == "ready\n");
    Ok((monitor, qmp))
}

pub fn expect(monitor: &mut Monitor, text: &str) -> Result<()> {
    let shown = monitor.wait_for("\n", SOON)?;
    ensure!(shown == text, "the guest says '{shown}', not '{text}'");
    Ok(())
}

pub fn expect_down(monitor: &mut Monitor, nic: u32) -> Result<()> {
    let shown = monitor.wait_for("\n", SOON)?;
    ensure!(shown.starts_with(&format!("nic {nic} is down")), "{shown}");
    Ok(())
}

pub fn plug(qmp: &mut Client, id: &str, image: &Path, addr: &str) -> Result<()> {
    let backend = json!({ "node-name": id, "file": { "driver": "file", "filename": image }, "cache": { "direct": true }, "read-only": false });
    ensure!(qmp.execute_raw("blockdev-add", backend)? == json!({}));
    let device = json!({ "id": id, "driver": "virtio-blk-mmio", "addr": addr });
    ensure!(qmp.execute_raw("device_add", device)? == json!({}));
    Ok(())
}

pub fn unplug(qmp: &mut Client, id: &str) -> Result<()> {
    ensure!(qmp.execute_raw("device_del", json!({ "id": id }))? == json!({}));
    let data = qmp.wait_event("DEVICE_DELETED", SOON)?.data;
    ensure!(data == json!({ "device": id, "path": id }), "{data}");
    Ok(())
}

/// The command fails with that message.
pub fn refused(qmp: &mut Client, command: &str, arguments: Value, says: &str) -> Result<()> {
    let error = match qmp.execute_raw(command, arguments) {
        Ok(returned) => anyhow::bail!("{command} returned {returned}"),
        Err(error) => error.to_string(),
    };
    ensure!(error.contains(says), "{command}: {error}");
    Ok(())
}

/// Whether the monitor has that file open.
fn has_open(monitor: &Monitor, file: &Path) -> Result<bool> {
    for descriptor in fs::read_dir(format!("/proc/{}/fd", monitor.pid()))? {
        if fs::read_link(descriptor?.path()).is_ok_and(|target| target == file) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The commands of Kata Containers, in its order: see how `stratovirt.go` of its Go runtime plugs a
/// volume.
#[test]
fn the_way_kata_plugs_a_volume() -> Result<()> {
    let stage = Stage::new("kata")?;
    let first = marked(&stage, "volume1", 0xa1, 128)?;
    let second = marked(&stage, "volume2", 0xb2, 4096)?;
    let vm = stage.vm("plug", "watch")?;
    // Twice: a pod that is killed leaves nothing behind that disturbs the next one.
    for _ in 0..2 {
        let mut monitor = vm.clone().start(&stage.paths, &stage.dir)?;
        drop(monitor.qmp()?);
        monitor.wait_for("ready\n", SOON)?;

        // One connection tests whether the monitor is up, and another one is used from then on.
        let mut ncat = Ncat::connect(&stage)?;
        let greeting: Value = serde_json::from_str(&ncat.sees()?)?;
        let version = greeting.pointer("/QMP/version/qemu").context("no version")?;
        for part in ["major", "minor", "micro"] {
            ensure!(version.get(part).is_some_and(Value::is_u64), "{greeting}");
        }
        ensure!(version.get("major").and_then(Value::as_u64) >= Some(5), "{greeting}");
        ncat.types("{\"execute\":\"qmp_capabilities\"}\n")?;
        ensure!(ncat.sees()? == r#"{"return":{}}"#);
        drop(ncat);
        let mut ncat = Ncat::connect(&stage)?;
        ncat.sees()?;
        ncat.types("{\"execute\":\"qmp_capabilities\"}\n")?;
        ensure!(ncat.sees()? == r#"{"return":{}}"#);

        ncat.types("{\"execute\":\"query-cpus\"}\n")?;
        let cpus: Value = serde_json::from_str(&ncat.sees()?)?;
        ensure!(cpus.pointer("/return/0/CPU") == Some(&json!(0)), "{cpus}");
        let thread = cpus.pointer("/return/0/thread_id").and_then(Value::as_u64);
        let task = format!("/proc/{}/task/{}", monitor.pid(), thread.context("no thread")?);
        ensure!(Path::new(&task).exists(), "{task} does not exist");

        for (image, mark, sectors) in [(&first, 0xa1, 128), (&second, 0xb2, 4096)] {
            let image = image.display();
            ncat.types(&format!(
                r#"{{"arguments":{{"driver":"raw","file":{{"aio":"native","driver":"file","filename":"{image}"}},"node-name":"drive-1f2e","read-only":false}},"execute":"blockdev-add"}}"#
            ))?;
            ncat.types("\n")?;
            ensure!(ncat.sees()? == r#"{"return":{}}"#);
            ncat.types(
                r#"{"arguments":{"addr":"1","drive":"drive-1f2e","driver":"virtio-blk-mmio","id":"drive-1f2e","romfile":""},"execute":"device_add"}"#,
            )?;
            ncat.types("\n")?;
            ensure!(ncat.sees()? == r#"{"return":{}}"#);
            expect(&mut monitor, &found(1, mark, sectors))?;
            ncat.types("{\"arguments\":{\"id\":\"drive-1f2e\"},\"execute\":\"device_del\"}\n")?;
            ncat.sees_event("DEVICE_DELETED", r#"{"device":"drive-1f2e","path":"drive-1f2e"}"#)?;
            ensure!(ncat.sees()? == r#"{"return":{}}"#);
            expect(&mut monitor, &empty(1))?;
        }

        // What cannot be opened, and the clean-up after it.
        ncat.types("{\"arguments\":{\"driver\":\"raw\",\"file\":{\"aio\":\"native\",\"driver\":\"host_device\",\"filename\":\"/no/such/device\"},\"node-name\":\"drive-3c4d\",\"read-only\":false},\"execute\":\"blockdev-add\"}\n")?;
        let refused: Value = serde_json::from_str(&ncat.sees()?)?;
        ensure!(refused.pointer("/error/class") == Some(&json!("GenericError")), "{refused}");
        ncat.types(
            "{\"arguments\":{\"node-name\":\"drive-3c4d\"},\"execute\":\"blockdev-del\"}\n",
        )?;
        ncat.sees()?;
        ncat.types("{\"execute\":\"query-status\"}\n")?;
        ensure!(ncat.sees()?.contains(r#""status":"running""#));
        // Its way to end a pod: the harness sends SIGKILL.
        drop(monitor);
    }
    Ok(())
}

/// As many as StratoVirt's microVM has.
#[test]
fn the_documented_commands_fill_every_slot() -> Result<()> {
    let stage = Stage::new("slots")?;
    fill_every_slot(&stage, stage.vm("plug", "watch")?, 4)
}

/// All interrupts that there are for virtio: 17 slots for disks, one for NICs.
#[test]
fn the_documented_commands_fill_as_many_slots_as_are_asked_for() -> Result<()> {
    let stage = Stage::new("many")?;
    let vm = stage.vm("plug", "watch")?.machine("disk-slots", 17).machine("nic-slots", 1);
    fill_every_slot(&stage, vm, 17)
}

#[test]
fn a_machine_without_slots_has_no_place_for_a_device() -> Result<()> {
    let stage = Stage::new("none")?;
    let vm = stage.vm("plug", "watch")?.machine("disk-slots", 0).machine("nic-slots", 0);
    let (mut monitor, mut qmp) = stage.start(vm)?;
    monitor.wait_for("ready\n", SOON)?;
    for (driver, says) in [
        ("virtio-blk-mmio", "no block slots; start it with some: -machine disk-slots=N"),
        ("virtio-blk-pci", "no block slots"),
        ("virtio-net-mmio", "no net slots; start it with some: -machine nic-slots=N"),
    ] {
        let device = json!({ "id": "x", "driver": driver, "addr": "0" });
        refused(&mut qmp, "device_add", device, says)?;
    }
    quits(&stage, &mut monitor, &mut qmp)
}

/// A saved machine has the slots it was started with, whatever the defaults are where it is
/// restored.
#[test]
fn slots_are_saved_with_the_machine() -> Result<()> {
    let stage = Stage::new("kept")?;
    let image = marked(&stage, "image", 7, 64)?;
    let vm = stage.vm("plug", "watch")?.machine("disk-slots", 6).machine("nic-slots", 1);
    let (mut monitor, mut qmp) = stage.start(vm)?;
    monitor.wait_for("ready\n", SOON)?;
    save(&mut qmp, &stage.file("saved"), false)?;
    quits(&stage, &mut monitor, &mut qmp)?;
    let (mut monitor, mut qmp) = restore(&stage, &stage.file("saved"), &[])?;
    simple(&mut qmp, "cont")?;
    plug(&mut qmp, "drive", &image, "5")?;
    expect(&mut monitor, &found(5, 7, 64))?;
    let device = json!({ "id": "x", "driver": "virtio-net-mmio", "addr": "1" });
    refused(&mut qmp, "device_add", device, "A maximum of 1 net replaceable devices")?;
    quits(&stage, &mut monitor, &mut qmp)
}

fn fill_every_slot(stage: &Stage, vm: Vm, count: usize) -> Result<()> {
    let images = (0..u64::try_from(count)?)
        .map(|slot| marked(stage, &format!("image{slot}"), 0x10 + slot, 64 + slot))
        .collect::<Result<Vec<_>>>()?;
    let (mut monitor, mut qmp) = stage.start(vm)?;
    monitor.wait_for("ready\n", SOON)?;
    for (slot, image) in images.iter().enumerate() {
        plug(&mut qmp, &format!("drive-{slot}"), image, &format!("{slot:#x}"))?;
        let number = u64::try_from(slot)?;
        expect(&mut monitor, &found(slot, 0x10 + number, 64 + number))?;
    }
    let disks = qmp.execute_raw("query-block", json!({}))?;
    ensure!(disks.as_array().is_some_and(|disks| disks.len() == count), "{disks}");

    // Invalid requests are refused, and change nothing.
    let file = json!({ "driver": "file", "filename": images.first() });
    let backend = |name: &str| json!({ "node-name": name, "file": file, "read-only": true });
    refused(&mut qmp, "blockdev-add", backend("drive-0"), "drive-0 is already registered")?;
    let add =
        |id: &str, driver: &str, addr: &str| json!({ "id": id, "driver": driver, "addr": addr });
    refused(
        &mut qmp,
        "device_add",
        add("drive-x", "virtio-blk-mmio", "0"),
        "Failed to find device configuration",
    )?;
    // Read-only and shared with drive-0, it still conflicts with drive-0's lock.
    refused(&mut qmp, "blockdev-add", backend("drive-x"), "image0")?;
    let spare = marked(stage, "spare", 0x99, 64)?;
    let backend =
        json!({ "node-name": "drive-x", "file": { "driver": "file", "filename": spare } });
    ensure!(qmp.execute_raw("blockdev-add", backend)? == json!({}));
    for (driver, addr, says) in [
        ("virtio-blk-mmio", "0", "The slot 0 is occupied already"),
        ("virtio-blk-mmio", &count.to_string(), &format!("A maximum of {count} block")),
        ("virtio-blk-mmio", "-1", "Invalid addr for device drive-x"),
        ("virtio-foo-mmio", "0", "Unsupported replaceable device type"),
        ("virtio-blk-pci", "0", &format!("All {count} block slots are occupied")),
    ] {
        refused(&mut qmp, "device_add", add("drive-x", driver, addr), says)?;
    }
    refused(&mut qmp, "device_del", json!({ "id": "drive-x" }), "Device drive-x not found")?;
    ensure!(qmp.execute_raw("blockdev-del", json!({ "node-name": "drive-x" }))? == json!({}));
    refused(&mut qmp, "blockdev-del", json!({ "node-name": "drive-0" }), "drive-0")?;
    ensure!(monitor.unseen().is_empty(), "the guest noticed '{}'", monitor.unseen());

    for slot in (0..count).rev() {
        unplug(&mut qmp, &format!("drive-{slot}"))?;
        expect(&mut monitor, &empty(slot))?;
    }
    quits(stage, &mut monitor, &mut qmp)
}

#[test]
fn a_slot_filled_and_emptied_again_and_again() -> Result<()> {
    let stage = Stage::new("again")?;
    let images = [marked(&stage, "one", 1, 64)?, marked(&stage, "two", 2, 72)?];
    let (mut monitor, mut qmp) = watching(&stage, "polled")?;
    let before = descriptors(&monitor)?;
    for time in 0..40 {
        let (image, mark, sectors) = match images.get(time % 2) {
            Some(image) if time % 2 == 0 => (image, 1, 64),
            image => (image.context("no image")?, 2, 72),
        };
        plug(&mut qmp, "drive", image, "2")?;
        expect(&mut monitor, &found(2, mark, sectors))?;
        unplug(&mut qmp, "drive")?;
        expect(&mut monitor, &empty(2))?;
    }
    let after = descriptors(&monitor)?;
    ensure!(after <= before, "{before} descriptors became {after}");
    for image in &images {
        ensure!(!has_open(&monitor, image)?, "an image is still open");
    }
    quits(&stage, &mut monitor, &mut qmp)
}

#[test]
fn a_slot_filled_while_the_guest_is_paused() -> Result<()> {
    let stage = Stage::new("still")?;
    let image = marked(&stage, "image", 7, 64)?;
    let (mut monitor, mut qmp) = watching(&stage, "watch")?;
    simple(&mut qmp, "stop")?;
    plug(&mut qmp, "drive", &image, "0")?;
    ensure!(monitor.unseen().is_empty());
    simple(&mut qmp, "cont")?;
    expect(&mut monitor, &found(0, 7, 64))?;
    simple(&mut qmp, "stop")?;
    unplug(&mut qmp, "drive")?;
    simple(&mut qmp, "cont")?;
    expect(&mut monitor, &empty(0))?;
    quits(&stage, &mut monitor, &mut qmp)
}

#[test]
fn a_disk_that_grows() -> Result<()> {
    let stage = Stage::new("grows")?;
    let image = marked(&stage, "image", 7, 64)?;
    let (mut monitor, mut qmp) = watching(&stage, "watch")?;
    plug(&mut qmp, "drive", &image, "0")?;
    expect(&mut monitor, &found(0, 7, 64))?;
    let size = json!({ "device": "drive", "size": 128 * 512 });
    ensure!(qmp.execute_raw("block_resize", size)? == json!({}));
    let grown = "disk 0 has 80 sectors sector 3 begins with 700000003 sector 7f begins with 0\n";
    expect(&mut monitor, grown)?;
    ensure!(fs::metadata(&image)?.len() == 128 * 512);
    let odd = json!({ "device": "drive", "size": 1000 });
    refused(&mut qmp, "block_resize", odd, "must be a multiple of 512")?;
    quits(&stage, &mut monitor, &mut qmp)
}

#[test]
fn each_kind_of_back_end_is_taken_away_by_its_own_command() -> Result<()> {
    let mut stage = Stage::new("kinds")?;
    with_taps(&mut stage, "")?;
    let image = marked(&stage, "image", 7, 64)?;
    let (mut monitor, mut qmp) = watching(&stage, "watch")?;
    let disk = json!({ "node-name": "drive-0", "file": { "driver": "file", "filename": image } });
    ensure!(qmp.execute_raw("blockdev-add", disk)? == json!({}));
    let nodes = qmp.execute_raw("query-named-block-nodes", json!({}))?;
    ensure!(nodes.pointer("/0/node-name") == Some(&json!("drive-0")), "{nodes}");
    ensure!(
        qmp.execute_raw("netdev_add", json!({ "id": "net-0", "ifname": "tap0" }))? == json!({})
    );
    refused(&mut qmp, "netdev_del", json!({ "id": "drive-0" }), "not found")?;
    refused(&mut qmp, "blockdev-del", json!({ "node-name": "net-0" }), "net-0")?;
    ensure!(qmp.execute_raw("blockdev-del", json!({ "node-name": "drive-0" }))? == json!({}));
    ensure!(qmp.execute_raw("netdev_del", json!({ "id": "net-0" }))? == json!({}));
    quits(&stage, &mut monitor, &mut qmp)
}

#[test]
fn no_client_takes_all_descriptors() -> Result<()> {
    let stage = Stage::new("descriptors")?;
    let image = marked(&stage, "image", 7, 64)?;
    let (mut monitor, mut qmp) = watching(&stage, "watch")?;
    let null = fs::File::open("/dev/null")?;
    let named = |n: usize| json!({ "fdname": format!("fd{n}") });
    for n in 0..32 {
        qmp.execute_with_fds("getfd", named(n), &[null.as_fd()])?;
    }
    let more = qmp.execute_with_fds("getfd", named(32), &[null.as_fd()]);
    ensure!(more.is_err_and(|e| e.to_string().contains("closefd")));
    ensure!(qmp.execute_raw("closefd", named(7))? == json!({}));
    refused(&mut qmp, "closefd", named(7), "not found")?;
    qmp.execute_with_fds("getfd", named(32), &[null.as_fd()])?;
    for n in 0..16 {
        let backend = json!({ "node-name": format!("d{n}"), "read-only": true,
            "file": { "driver": "file", "filename": image } });
        ensure!(qmp.execute_raw("blockdev-add", backend)? == json!({}));
    }
    let backend = json!({ "node-name": "d16", "read-only": true,
        "file": { "driver": "file", "filename": image } });
    refused(&mut qmp, "blockdev-add", backend, "16 back-ends are unused already")?;
    quits(&stage, &mut monitor, &mut qmp)
}

/// The monitor in a network namespace of its own, with two taps of that kind.
pub fn with_taps(stage: &mut Stage, kind: &str) -> Result<()> {
    let make = format!("ip tuntap add mode tap {kind} name $tap && ip link set $tap up");
    stage.prepare("-n", &format!("for tap in tap0 tap1; do {make}; done"))
}

#[test]
fn nics_come_up_with_their_address_and_go_down() -> Result<()> {
    let mut stage = Stage::new("nics")?;
    with_taps(&mut stage, "")?;
    let (mut monitor, mut qmp) = watching(&stage, "watch")?;
    let macs = ["52:54:00:00:00:01", "0e:90:df:9f:a8:88"];
    for (slot, mac) in macs.iter().enumerate() {
        let id = format!("net-{slot}");
        let backend = json!({ "id": id, "ifname": format!("tap{slot}") });
        ensure!(qmp.execute_raw("netdev_add", backend.clone())? == json!({}));
        refused(&mut qmp, "netdev_add", backend, &id)?;
        let device = json!({ "id": id, "driver": "virtio-net-mmio", "addr": format!("{slot:#x}"), "mac": mac });
        ensure!(qmp.execute_raw("device_add", device)? == json!({}));
        expect(&mut monitor, &format!("nic {slot} is up {}\n", mac.replace(':', "")))?;
    }
    let missing = json!({ "id": "net-2", "ifname": "tap2" });
    refused(&mut qmp, "netdev_add", missing, "ip tuntap add")?;
    for slot in [1, 0] {
        unplug(&mut qmp, &format!("net-{slot}"))?;
        expect_down(&mut monitor, slot)?;
    }
    // The tap is free again.
    ensure!(
        qmp.execute_raw("netdev_add", json!({ "id": "other", "ifname": "tap0" }))? == json!({})
    );
    ensure!(qmp.execute_raw("netdev_del", json!({ "id": "other" }))? == json!({}));
    quits(&stage, &mut monitor, &mut qmp)
}

#[test]
fn a_tap_that_does_not_fit_one_slot_waits_for_another() -> Result<()> {
    let mut stage = Stage::new("fits")?;
    with_taps(&mut stage, "multi_queue")?;
    // A slot keeps the queues that it had at the start.
    let nic = json!({ "iface_id": "net-0", "host_dev_name": "tap0", "queues": 2 });
    let (mut monitor, mut qmp) = stage.start(stage.vm("plug", "watch")?.add("net", nic))?;
    monitor.wait_for("ready\n", SOON)?;
    unplug(&mut qmp, "net-0")?;
    expect_down(&mut monitor, 0)?;

    let backend = json!({ "id": "both", "ifname": "tap1", "queues": 2 });
    ensure!(qmp.execute_raw("netdev_add", backend)? == json!({}));
    let mac = "52:54:00:00:00:02";
    let into =
        |addr| json!({ "id": "both", "driver": "virtio-net-mmio", "addr": addr, "mac": mac });
    for _ in 0..2 {
        let says = "the tap device has 2 queues, the slot needs 1";
        refused(&mut qmp, "device_add", into("1"), says)?;
    }
    ensure!(qmp.execute_raw("device_add", into("0"))? == json!({}));
    expect(&mut monitor, "nic 0 is up 525400000002\n")?;
    quits(&stage, &mut monitor, &mut qmp)
}

/// The exchange of Kuasar: the back-end has a name of its own and outlives the device.
#[test]
fn the_way_kuasar_plugs_a_volume() -> Result<()> {
    let stage = Stage::new("kuasar")?;
    let image = marked(&stage, "volume", 0xc3, 128)?;
    let other = marked(&stage, "other", 0xd4, 64)?;
    let (mut monitor, mut qmp) = watching(&stage, "watch")?;
    let device = |slot: u32| json!({ "driver": "virtio-blk-pci", "id": format!("virtio-drive-{slot}"), "bus": format!("pcie.{}", slot + 1), "addr": "0x0", "drive": format!("drive-{slot}") });
    let backend = |slot: u32, image: &Path| json!({ "driver": "raw", "read-only": false, "node-name": format!("drive-{slot}"), "cache": { "direct": true }, "file": { "driver": "file", "filename": image } });
    let does = |qmp: &mut Client, command: &str, arguments: Value| -> Result<()> {
        ensure!(qmp.execute_raw(command, arguments)? == json!({}), "{command}");
        Ok(())
    };
    let before = descriptors(&monitor)?;
    // Twice under the same names.
    for _ in 0..2 {
        does(&mut qmp, "blockdev-add", backend(0, &image))?;
        does(&mut qmp, "device_add", device(0))?;
        expect(&mut monitor, &found(0, 0xc3, 128))?;
        let disks = qmp.execute_raw("query-block", json!({}))?;
        ensure!(disks.pointer("/0/device") == Some(&json!("virtio-drive-0")), "{disks}");
        ensure!(disks.pointer("/0/inserted/node-name") == Some(&json!("drive-0")), "{disks}");
        let stats = qmp.execute_raw("query-blockstats", json!({}))?;
        ensure!(stats.pointer("/0/device") == Some(&json!("virtio-drive-0")), "{stats}");
        ensure!(stats.pointer("/0/node-name") == Some(&json!("drive-0")), "{stats}");

        // Neither name can be taken again, and the back-end stays while its device exists.
        let taken = "is already registered";
        refused(&mut qmp, "blockdev-add", backend(0, &other), taken)?;
        let clash = |name: &str| json!({ "node-name": name, "file": { "filename": other } });
        refused(&mut qmp, "blockdev-add", clash("virtio-drive-0"), taken)?;
        refused(&mut qmp, "blockdev-del", json!({ "node-name": "drive-0" }), "is in use")?;
        refused(&mut qmp, "device_del", json!({ "id": "drive-0" }), "not found")?;

        // The second one takes the next slot.
        does(&mut qmp, "blockdev-add", backend(1, &other))?;
        let same = with(&device(1), "id", &json!("virtio-drive-0"));
        refused(&mut qmp, "device_add", same, taken)?;
        does(&mut qmp, "device_add", device(1))?;
        expect(&mut monitor, &found(1, 0xd4, 64))?;

        unplug(&mut qmp, "virtio-drive-0")?;
        expect(&mut monitor, &empty(0))?;
        // It stays, and still belongs to this machine.
        ensure!(has_open(&monitor, &image)?, "the image was closed");
        does(&mut qmp, "device_add", device(0))?;
        expect(&mut monitor, &found(0, 0xc3, 128))?;

        for slot in 0..2u32 {
            unplug(&mut qmp, &format!("virtio-drive-{slot}"))?;
            expect(&mut monitor, &empty(usize::try_from(slot)?))?;
            let name = json!({ "node-name": format!("drive-{slot}") });
            does(&mut qmp, "blockdev-del", name.clone())?;
            refused(&mut qmp, "blockdev-del", name, "no unused back-end is called")?;
        }
        ensure!(!has_open(&monitor, &image)?, "the image is still open");
    }
    let after = descriptors(&monitor)?;
    ensure!(after <= before, "{before} descriptors became {after}");
    quits(&stage, &mut monitor, &mut qmp)
}

/// A save keeps both names of a disk, and their meaning.
#[test]
fn a_saved_machine_keeps_the_names_of_back_ends() -> Result<()> {
    let stage = Stage::new("names")?;
    let image = marked(&stage, "image", 5, 64)?;
    let (mut monitor, mut qmp) = watching(&stage, "watch")?;
    let backend = json!({ "node-name": "back", "file": { "filename": image } });
    qmp.execute_raw("blockdev-add", backend)?;
    let device = json!({ "id": "front", "driver": "virtio-blk-mmio", "addr": "2", "drive": "back", "serial": "first" });
    qmp.execute_raw("device_add", device)?;
    expect(&mut monitor, &found(2, 5, 64))?;
    let saved = stage.file("saved");
    save(&mut qmp, &saved, false)?;
    quits(&stage, &mut monitor, &mut qmp)?;

    let (mut monitor, mut qmp) = restore(&stage, &saved, &[])?;
    let disks = qmp.execute_raw("query-block", json!({}))?;
    ensure!(disks.pointer("/0/device") == Some(&json!("front")), "{disks}");
    ensure!(disks.pointer("/0/inserted/node-name") == Some(&json!("back")), "{disks}");
    for (name, of) in [("device", "front"), ("node-name", "back")] {
        let size = json!({ name: of, "size": 64 * 512 });
        ensure!(qmp.execute_raw("block_resize", size)? == json!({}));
    }
    let two = json!({ "device": "front", "node-name": "other", "size": 512 });
    refused(&mut qmp, "block_resize", two, "Device front not found")?;
    simple(&mut qmp, "cont")?;
    unplug(&mut qmp, "front")?;
    expect(&mut monitor, &empty(2))?;
    let device =
        json!({ "id": "again", "driver": "virtio-blk-mmio", "addr": "3", "drive": "back" });
    ensure!(qmp.execute_raw("device_add", device)? == json!({}));
    expect(&mut monitor, &found(3, 5, 64))?;
    quits(&stage, &mut monitor, &mut qmp)
}

/// Those members with one more, or another value.
pub fn with(arguments: &Value, member: &str, value: &Value) -> Value {
    let mut arguments = arguments.clone();
    if let Value::Object(members) = &mut arguments {
        members.insert(member.to_owned(), value.clone());
    }
    arguments
}
