//! Hot-plug commands that cannot be carried out.
use anyhow::{Result, ensure};
use serde_json::json;
use stories::monitor::{SOON, Vm};

use crate::plug::{
    empty, expect, expect_down, found, marked, refused, unplug, watching, with, with_taps,
};
use crate::stage::{Stage, quits};

/// A hot-plug command that cannot be carried out fails with the cause, and its back-end stays.
#[test]
fn what_a_disk_cannot_be_is_refused() -> Result<()> {
    let stage = Stage::new("refusals")?;
    let image = marked(&stage, "image", 6, 64)?;
    let first = marked(&stage, "first", 7, 64)?;
    let disk = json!({ "drive_id": "first", "path_on_host": first, "read_only": false, "direct": false, "iothread": "own", "num_queues": 2, "queue_size": 128 });
    let config = stage.config("plug", "watch")?;
    let config = with(&config, "rng", &json!({ "random_file": "/dev/urandom" }));
    let vm = Vm::described(config).add("iothread", json!({ "id": "own" })).add("drive", disk);
    let (mut monitor, mut qmp) = stage.start(vm)?;
    monitor.wait_for("ready\n", SOON)?;

    let backend = json!({ "node-name": "x", "file": { "driver": "file", "filename": image } });
    let long = "x".repeat(300);
    for (member, value, says) in [
        ("node-name", json!(""), "'': must not be empty"),
        ("node-name", json!(long), "300 bytes long, at most 255"),
        ("node-name", json!("first"), "first is already registered"),
        ("node-name", json!("rng0"), "rng0 is already registered"),
        ("id", json!("y"), "'id': 'y': must be as node-name"),
        ("detect-zeroes", json!("unmap"), "'detect-zeroes': 'unmap'"),
        ("detect-zeroes", json!("on"), "use off"),
        ("media", json!("cdrom"), "'media': 'cdrom'"),
        ("media", json!("tape"), "must be disk"),
        ("options", json!({ "a": 1 }), "'options'"),
        ("l2-cache-size", json!(65536), "'l2-cache-size': '65536'"),
        ("refcount-cache-size", json!(65536), "'refcount-cache-size': '65536'"),
        ("throttling.iops-total", json!(1_000_001), "'1000001': not in 0..=1000000"),
        ("driver", json!("qcow2"), "'driver': 'qcow2'"),
        ("file", json!({ "filename": "" }), "'file.filename': '': must not be empty"),
    ] {
        refused(&mut qmp, "blockdev-add", with(&backend, member, &value), says)?;
    }
    let mut all = backend.clone();
    for (member, value) in [
        ("id", json!("x")),
        ("detect-zeroes", json!("off")),
        ("media", json!("disk")),
        ("throttling.iops-total", json!(1_000_000)),
    ] {
        all = with(&all, member, &value);
    }
    ensure!(qmp.execute_raw("blockdev-add", all)? == json!({}));

    // A slot that was empty at the start, and one that was not.
    let plain = json!({ "id": "x", "driver": "virtio-blk-mmio", "addr": "0x1" });
    for (member, value, says) in [
        ("iothread", json!("nonexistent"), "'iothread': 'nonexistent': this slot has been on the"),
        ("iothread", json!("own"), "'iothread': 'own'"),
        ("num-queues", json!(99), "'num-queues': '99': must be 1"),
        ("queue-size", json!(7), "'queue-size': '7': must be 256"),
        ("logical_block_size", json!(4096), "'logical_block_size': '4096': must be 512"),
        ("physical_block_size", json!(512), "'physical_block_size': '512': must be 4096"),
        ("host", json!("0000:00:01.0"), "'host': '0000:00:01.0': device passthrough"),
        ("sysfsdev", json!("/sys/x"), "'sysfsdev': '/sys/x': device passthrough"),
        ("chardev", json!("zz"), "'chardev': 'zz': vhost-user"),
        ("romfile", json!("x.rom"), "'romfile': 'x.rom'"),
        ("serial", json!(long), "'serial'"),
        ("mac", json!("52:54:00:00:00:01"), "'mac': '52:54:00:00:00:01': not available for a disk"),
        ("netdev", json!("x"), "'netdev': 'x': not available for a disk"),
        ("mq", json!(true), "'mq': 'true': not available for a disk"),
        ("lun", json!(5), "'lun': '5': addr is 0x1"),
        ("id", json!(""), "'id': '': must not be empty"),
        ("driver", json!("vhost-user-blk-pci"), "Unsupported replaceable device type"),
        ("drive", json!("y"), "no unused back-end is called 'y'"),
    ] {
        refused(&mut qmp, "device_add", with(&plain, member, &value), says)?;
        // The back-end stays.
        let again = json!({ "node-name": "x", "file": { "filename": image } });
        refused(&mut qmp, "blockdev-add", again, "x is already registered")?;
    }
    // The guest has noticed nothing of all that, and the plug without it works.
    ensure!(monitor.unseen().is_empty(), "the guest noticed '{}'", monitor.unseen());
    ensure!(qmp.execute_raw("device_add", plain)? == json!({}));
    expect(&mut monitor, &found(1, 6, 64))?;
    unplug(&mut qmp, "x")?;
    expect(&mut monitor, &empty(1))?;

    // Members that state the default are accepted.
    unplug(&mut qmp, "first")?;
    expect(&mut monitor, &empty(0))?;
    ensure!(qmp.execute_raw("blockdev-add", backend)? == json!({}));
    let slot = json!({ "id": "x", "driver": "virtio-blk-mmio", "addr": "0x0", "drive": "x", "iothread": "own", "num-queues": 2, "queue-size": 128, "logical_block_size": 512, "physical_block_size": 4096, "romfile": "", "share-rw": true, "bus": "virtio-mmio-bus.0", "vectors": 0, "boot_index": 1, "multifunction": true, "disable-modern": true, "serial": "abc" });
    for (member, value, says) in [
        ("iothread", json!("other"), "'iothread': 'other': must be 'own'"),
        ("num-queues", json!(1), "'num-queues': '1': must be 2"),
        ("queue-size", json!(256), "'queue-size': '256': must be 128"),
    ] {
        refused(&mut qmp, "device_add", with(&slot, member, &value), says)?;
    }
    ensure!(qmp.execute_raw("device_add", slot)? == json!({}));
    expect(&mut monitor, &found(0, 6, 64))?;
    quits(&stage, &mut monitor, &mut qmp)
}

#[test]
fn what_a_nic_cannot_be_is_refused() -> Result<()> {
    let mut stage = Stage::new("nicrefusals")?;
    with_taps(&mut stage, "")?;
    let (mut monitor, mut qmp) = watching(&stage, "watch")?;
    let backend = json!({ "id": "back", "ifname": "tap0" });
    for (member, value, says) in [
        ("id", json!(""), "'id': '': must not be empty"),
        ("id", json!("n".repeat(300)), "300 bytes long, at most 255"),
        ("ifname", json!("a/b"), "'ifname': 'a/b'"),
        ("queues", json!(0), "'queues': '0': not in 1..=16"),
        ("queues", json!(17), "'queues': '17': not in 1..=16"),
        ("script", json!("/etc/ifup"), "'script': '/etc/ifup'"),
        ("downscript", json!("/etc/ifdown"), "'downscript': '/etc/ifdown'"),
        ("macnat", json!(true), "'macnat': 'true'"),
        ("dnssearch", json!("example.org"), "'dnssearch': 'example.org'"),
        ("vhost", json!(true), "vhost-net"),
        ("vhostfd", json!("7"), "vhost-net"),
        ("vhostfds", json!("7:8"), "vhost-net"),
        ("chardev", json!("c"), "vhost-user"),
        ("type", json!("user"), "'user' is not supported"),
    ] {
        refused(&mut qmp, "netdev_add", with(&backend, member, &value), says)?;
    }
    let mut all = backend;
    for (member, value) in [
        ("type", json!("tap")),
        ("queues", json!(1)),
        ("script", json!("no")),
        ("downscript", json!("no")),
        ("macnat", json!(false)),
        ("vhost", json!(false)),
    ] {
        all = with(&all, member, &value);
    }
    ensure!(qmp.execute_raw("netdev_add", all)? == json!({}));

    let mac = "52:54:00:00:00:03";
    let plain = json!({ "id": "front", "driver": "virtio-net-mmio", "addr": "0x1", "netdev": "back", "mac": mac });
    for (member, value, says) in [
        ("iothread", json!("x"), "'iothread': 'x'"),
        ("num-queues", json!(2), "'num-queues': '2': must be 1"),
        ("queue-size", json!(512), "'queue-size': '512': must be 256"),
        ("mac", json!("01:00:00:00:00:00"), "'mac': '01:00:00:00:00:00'"),
        ("host", json!("0000:00:01.0"), "'host'"),
        ("chardev", json!("zz"), "'chardev': 'zz'"),
        ("drive", json!("back"), "'drive': 'back': not available for a NIC"),
        ("serial", json!("s"), "'serial': 's': not available for a NIC"),
        ("logical_block_size", json!(512), "'logical_block_size': '512': not available for a NIC"),
        ("netdev", json!("y"), "no unused back-end is called 'y'"),
    ] {
        refused(&mut qmp, "device_add", with(&plain, member, &value), says)?;
    }
    ensure!(monitor.unseen().is_empty(), "the guest noticed '{}'", monitor.unseen());
    ensure!(qmp.execute_raw("device_add", plain)? == json!({}));
    expect(&mut monitor, "nic 1 is up 525400000003\n")?;
    // The tap outlives its device, for the next one.
    unplug(&mut qmp, "front")?;
    expect_down(&mut monitor, 1)?;
    let pci = json!({ "id": "front", "driver": "virtio-net-pci", "bus": "pcie.3", "addr": "0x0", "netdev": "back", "mac": mac, "mq": true, "vectors": 4 });
    ensure!(qmp.execute_raw("device_add", pci)? == json!({}));
    expect(&mut monitor, "nic 0 is up 525400000003\n")?;
    unplug(&mut qmp, "front")?;
    expect_down(&mut monitor, 0)?;
    ensure!(qmp.execute_raw("netdev_del", json!({ "id": "back" }))? == json!({}));
    ensure!(qmp.execute_raw("netdev_add", json!({ "id": "back", "ifname": "tap0" }))? == json!({}));
    quits(&stage, &mut monitor, &mut qmp)
}
