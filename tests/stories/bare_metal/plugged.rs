//! A change to the slots of a running or stopped machine survives every way of saving and of
//! restoring it: {replaced, unplugged, resized, plugged, limited, link set} x {running, stopped} x
//! {saved, suspended, incremental, streamed} x {mapped, copied, uffd}. The guest's drivers have
//! taken every feature that their slots offered at the start, as Linux's do.
use std::fs::File;

use anyhow::{Context, Result, ensure};
use qmp::client::Client;
use serde_json::{Value, json};
use stories::monitor::{Monitor, SOON, Vm};

use crate::plug::{empty, found, marked, unplug, with_taps};
use crate::snapshot::{refusal, restore};
use crate::stage::{Stage, patiently, quits, simple, status};
use crate::stream::getfd;

const MACS: [&str; 2] = ["52:54:00:00:00:09", "52:54:00:00:00:0a"];

/// How a machine is saved.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Way {
    /// The guest runs on, or stays stopped.
    Save,
    /// The save stops it.
    Suspend,
    /// Incremental: the changes since a save that was made before the slots were changed.
    Incremental,
    Stream,
}

const WAYS: [Way; 4] = [Way::Save, Way::Suspend, Way::Incremental, Way::Stream];

/// A slot after its change: the change, what is typed to make the guest check it, and its report.
type Change = (&'static str, &'static str, String);

fn with(mut value: Value, members: &Value) -> Value {
    if let (Some(value), Some(members)) = (value.as_object_mut(), members.as_object()) {
        value.extend(members.clone());
    }
    value
}

fn start(stage: &Stage) -> Result<(Monitor, Client)> {
    let disk = |name: &str, mark, readonly| -> Result<Value> {
        let image = marked(stage, name, mark, 64)?;
        Ok(
            json!({ "drive_id": name, "path_on_host": image, "read_only": readonly, "direct": false }),
        )
    };
    let vm = stage
        .vm("plug", "watch")?
        .add("drive", disk("replaced", 0xa0, true)?)
        .add("drive", disk("unplugged", 0xa1, false)?)
        .add("drive", disk("resized", 0xa2, false)?)
        .nic("net-0", "tap0", MACS[0]);
    let (mut monitor, qmp) = stage.start(vm)?;
    monitor.wait_for("ready\n", SOON)?;
    Ok((monitor, qmp))
}

/// Puts a new disk into a slot.
fn put(
    stage: &Stage,
    qmp: &mut Client,
    name: &str,
    mark: u64,
    addr: &str,
    how: &Value,
) -> Result<()> {
    let file = json!({ "driver": "file", "filename": marked(stage, name, mark, 64)? });
    let backend = with(json!({ "node-name": name, "file": file }), how);
    ensure!(qmp.execute_raw("blockdev-add", backend)? == json!({}));
    let device = json!({ "id": name, "driver": "virtio-blk-mmio", "addr": addr });
    ensure!(qmp.execute_raw("device_add", device)? == json!({}));
    Ok(())
}

/// One change of each kind, to independent slots.
fn change(stage: &Stage, qmp: &mut Client) -> Result<Vec<Change>> {
    // Replaces a read-only disk without discard.
    unplug(qmp, "replaced")?;
    let how = json!({ "read-only": false, "discard": "unmap" });
    put(stage, qmp, "replacement", 0xb0, "0", &how)?;

    unplug(qmp, "unplugged")?;

    let size = json!({ "device": "resized", "size": 128 * 512 });
    ensure!(qmp.execute_raw("block_resize", size)? == json!({}));
    let grown = "disk 2 has 80 sectors sector 3 begins with a200000003 sector 7f begins with 0\n";

    // An empty slot offers discarding and writing; this disk supports neither.
    let how = json!({ "read-only": true, "discard": "ignore", "throttling.iops-total": 1000 });
    put(stage, qmp, "plugged", 0xb3, "3", &how)?;

    ensure!(qmp.execute_raw("set_link", json!({ "name": "net-0", "up": false }))? == json!({}));
    let nic = json!({ "id": "net-1", "ifname": "tap1" });
    ensure!(qmp.execute_raw("netdev_add", nic)? == json!({}));
    let nic = json!({ "id": "net-1", "driver": "virtio-net-mmio", "addr": "1", "mac": MACS[1] });
    ensure!(qmp.execute_raw("device_add", nic)? == json!({}));

    let [mac0, mac1] = MACS.map(|mac| mac.replace(':', ""));
    Ok(vec![
        ("a disk was replaced", "0", found(0, 0xb0, 64)),
        ("a disk was unplugged", "1", empty(1)),
        ("a disk was resized", "2", grown.into()),
        ("a disk with limits was plugged", "3", found(3, 0xb3, 64)),
        ("a link was set", "a", format!("nic 0 is down {mac0}\n")),
        ("a NIC was plugged", "b", format!("nic 1 is up {mac1}\n")),
    ])
}

/// The argument of `-incoming`, for each way of restoring.
fn save(stage: &Stage, qmp: &mut Client, way: Way) -> Result<Vec<String>> {
    let saved = stage.file("saved");
    let uri = format!("file:{}", saved.display());
    let migrate = match way {
        Way::Save => json!({ "uri": uri, "resume": true }),
        Way::Suspend => json!({ "uri": uri }),
        Way::Incremental => json!({ "uri": uri, "incremental": true }),
        Way::Stream => {
            getfd(qmp, "out", File::create(&saved)?)?;
            json!({ "uri": "fd:out" })
        }
    };
    patiently(qmp, "migrate", &migrate)?;
    let info = qmp.execute_raw("query-migrate", json!({}))?;
    ensure!(info.get("status") == Some(&json!("completed")), "{info}");
    Ok(match way {
        Way::Stream => vec![format!("exec:cat {}", saved.display())],
        _ => ["on", "off", "uffd"].map(|mapped| format!("{uri},mapped={mapped}")).into(),
    })
}

/// The guest checks its slots on request, and finds them as they were left.
fn finds(monitor: &mut Monitor, changes: &[Change]) -> Result<()> {
    for (what, key, says) in changes {
        monitor.type_in(key)?;
        monitor.wait_for(says, SOON).with_context(|| format!("{what}: not '{says}'"))?;
    }
    ensure!(!monitor.shown().contains("WRONG"), "{}", monitor.shown());
    Ok(())
}

/// The guest notices the changes by itself, in any order.
fn is_notified(monitor: &mut Monitor, changes: &[Change]) -> Result<()> {
    let mut shown = String::new();
    while let Some(missing) = changes.iter().find(|(_, _, says)| !shown.contains(says)) {
        let line = monitor.wait_for("\n", SOON);
        shown += &line.with_context(|| format!("the guest is not notified that {}", missing.0))?;
    }
    Ok(())
}

fn cell(way: Way, stopped: bool) -> Result<()> {
    let mut stage = Stage::new(&format!("slots-{way:?}-{stopped}").to_lowercase())?;
    with_taps(&mut stage, "")?;
    let (mut monitor, mut qmp) = start(&stage)?;
    if way == Way::Incremental {
        let base = format!("file:{}", stage.file("base").display());
        patiently(&mut qmp, "migrate", &json!({ "uri": base, "track": true, "resume": true }))?;
    }
    if stopped {
        simple(&mut qmp, "stop")?;
    }
    let changes = change(&stage, &mut qmp)?;
    if !stopped {
        finds(&mut monitor, &changes)?;
    }
    let incoming = save(&stage, &mut qmp, way)?;
    let paused = stopped || way != Way::Save;
    ensure!((status(&mut qmp)? == "running") != paused);
    quits(&stage, &mut monitor, &mut qmp)?;
    for incoming in incoming {
        let args = ["-S", "-incoming", &incoming];
        let vm = Vm::described(json!({})).args(&args);
        let mut monitor = vm.start(&stage.paths, &stage.dir)?;
        let mut qmp = monitor.qmp()?;
        simple(&mut qmp, "cont")?;
        if stopped {
            is_notified(&mut monitor, &changes).context(incoming.clone())?;
        }
        finds(&mut monitor, &changes).context(incoming)?;
        quits(&stage, &mut monitor, &mut qmp)?;
    }
    Ok(())
}

#[test]
fn slots_changed_while_the_guest_runs_are_restored_so() -> Result<()> {
    WAYS.into_iter().try_for_each(|way| cell(way, false).with_context(|| format!("{way:?}")))
}

#[test]
fn slots_changed_while_the_guest_is_stopped_are_restored_so() -> Result<()> {
    WAYS.into_iter().try_for_each(|way| cell(way, true).with_context(|| format!("{way:?}")))
}

/// A template is restored as machines whose disks and NICs have other names: if there are as many
/// as were saved, all with new names, they are matched in the order of slots.
#[test]
fn a_template_is_restored_under_other_names() -> Result<()> {
    let mut stage = Stage::new("slots-names")?;
    with_taps(&mut stage, "")?;
    let (mut monitor, mut qmp) = start(&stage)?;
    let changes = change(&stage, &mut qmp)?;
    finds(&mut monitor, &changes)?;
    save(&stage, &mut qmp, Way::Suspend)?;
    quits(&stage, &mut monitor, &mut qmp)?;
    let saved = stage.file("saved");
    let drive = |id: &str, image: &str, more: &str| {
        vec!["-drive".into(), format!("id={id},file={}{more}", stage.file(image).display())]
    };
    let nic = |id: &str, tap: &str| vec!["-netdev".into(), format!("tap,id={id},ifname={tap}")];
    let flags = [
        drive("a", "replacement", ""),
        drive("b", "resized", ""),
        drive("c", "plugged", ",readonly=on"),
        nic("x", "tap1"),
        nic("y", "tap0"),
    ];
    let flags = flags.concat();
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let (mut monitor, mut qmp) = restore(&stage, &saved, &flags)?;
    let disks = qmp.execute_raw("query-block", json!({}))?;
    let names = ["/0/device", "/1/device", "/2/device"].map(|at| disks.pointer(at));
    ensure!(names == [Some(&json!("a")), Some(&json!("b")), Some(&json!("c"))], "{disks}");
    simple(&mut qmp, "cont")?;
    finds(&mut monitor, &changes)?;
    unplug(&mut qmp, "b")?;
    monitor.wait_for(&empty(2), SOON)?;
    quits(&stage, &mut monitor, &mut qmp)?;
    // Fewer, or one with a known name: then they are looked up by name, and not found.
    let said = refusal(&stage, &saved, flags.get(..4).unwrap_or_default())?;
    ensure!(said.contains("no disk 'a'") && said.contains("replacement, resized"), "{said}");
    let mut mixed = flags.clone();
    let other = format!("id=plugged,file={},readonly=on", stage.file("plugged").display());
    if let Some(last) = mixed.get_mut(5) {
        *last = &other;
    }
    let said = refusal(&stage, &saved, &mixed)?;
    ensure!(said.contains("no disk 'a'"), "{said}");
    Ok(())
}
