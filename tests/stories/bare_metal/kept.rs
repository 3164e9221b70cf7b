//! Saves that include the guest's disks. The guest records in memory what it has written to its
//! disk, page by page, so it notices when the two are not of the same moment.
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use qmp::client::Client;
use qmp::schema::Migrate;
use serde_json::{Value, json};
use stories::archive::make_ext4;
use stories::debian::{Debian, output};
use stories::frozen::Frozen;
use stories::held::{Held, Op, until};
use stories::monitor::{Monitor, SOON, Vm};

use crate::plug::refused;
use crate::snapshot::refusal;
use crate::stage::{Stage, cont, patiently, quits, status, stop};

/// Bytes of the guest's disk.
const DISK: u64 = 16 << 20;

/// A file system for one test, removed with it.
struct Mounted(PathBuf);

impl Mounted {
    fn new(stage: &Stage, kind: &str) -> Result<Self> {
        let (image, place) = (stage.file("fs.img"), stage.file("fs"));
        let lock = stage.paths.lock()?;
        let debian = Debian::get(&stage.paths)?;
        drop(lock);
        if kind == "xfs" {
            // The smallest size allowed; the file is sparse.
            File::create(&image)?.set_len(320 << 20)?;
            output(debian.program("sbin/mkfs.xfs")?.arg("-q").arg(&image))?;
        } else {
            make_ext4(&debian, &image, 256 << 20, None)?;
        }
        fs::create_dir(&place)?;
        output(Command::new("mount").args(["-o", "loop"]).args([&image, &place]))
            .context("cannot mount a file system (this needs root)")?;
        Ok(Self(place))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

fn ledger(stage: &Stage, image: &Path) -> Result<(Monitor, Client)> {
    let file = File::options().write(true).create(true).truncate(false).open(image)?;
    file.set_len(file.metadata()?.len() + DISK)?;
    let vm = stage.vm("ledger", "")?.add(
        "drive",
        json!({ "drive_id": "root", "path_on_host": image, "read_only": false, "direct": false }),
    );
    let log = stage.file("log").display().to_string();
    let (mut monitor, qmp) = stage.start(vm.args(&["-D", &log]))?;
    monitor.wait_for("balanced", SOON)?;
    Ok((monitor, qmp))
}

fn save(qmp: &mut Client, directory: &Path, more: &Value) -> Result<Value> {
    let mut arguments = json!({ "uri": format!("file:{}", directory.display()), "disks": true });
    let members = arguments.as_object_mut().context("no object")?;
    members.extend(more.as_object().into_iter().flatten().map(|(k, v)| (k.clone(), v.clone())));
    patiently(qmp, "migrate", &arguments)?;
    Ok(qmp.execute_raw("query-migrate", json!({}))?)
}

/// The disks in a save.
fn kept(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory)?.map(|entry| Ok(entry?.path()));
    let mut all: Vec<PathBuf> = entries.collect::<Result<_>>()?;
    all.retain(|path| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("disk-")));
    Ok(all)
}

/// A process that resumes from `saved`, with its own disks and control socket in `place`.
fn child(stage: &Stage, saved: &Path, place: &Path, more: &str) -> Result<(Monitor, Client)> {
    let incoming = format!("file:{},disks={}{more}", saved.display(), place.display());
    let own =
        stage.file(&place.file_name().context("no name")?.to_string_lossy()).with_extension("d");
    fs::create_dir_all(&own)?;
    let args = ["-S", "-incoming", &incoming];
    let mut monitor = Vm::described(json!({})).args(&args).start(&stage.paths, &own)?;
    let qmp = monitor.qmp()?;
    Ok((monitor, qmp))
}

/// The disk holds what the guest's memory has recorded, on every check.
fn balances(monitor: &mut Monitor) -> Result<()> {
    for _ in 0..2 {
        monitor.wait_for("balanced", SOON)?;
    }
    ensure!(!monitor.unseen().contains("WRONG"), "{}", monitor.unseen());
    Ok(())
}

fn restored_as_often_as_one_likes(kind: &str) -> Result<()> {
    let mut stage = Stage::new(&format!("kept-{kind}"))?;
    stage.run_by("env STRATOVIRT_LOG_LEVEL=info")?;
    let mounted = Mounted::new(&stage, kind)?;
    let place = |name: &str| mounted.0.join(name);
    let image = place("image");
    let (mut monitor, mut qmp) = ledger(&stage, &image)?;
    let saved = place("saved");
    for _ in 0..3 {
        let info = save(&mut qmp, &saved, &json!({ "resume": true }))?;
        let disk = info.get("disk").context("no disk in query-migrate")?;
        ensure!(disk.get("total") == Some(&json!(DISK)), "{info}");
        ensure!(disk.get("remaining") == Some(&json!(0)), "{info}");
        ensure!(kept(&saved)?.len() == 1, "an earlier save's disk is still there");
        balances(&mut monitor)?;
    }
    let log = fs::read_to_string(stage.file("log"))?;
    let how = if kind == "xfs" { "disk 'root' was cloned" } else { "disk 'root' was copied" };
    ensure!(log.contains(how), "{log}");
    quits(&stage, &mut monitor, &mut qmp)?;

    let before = fs::read(&image)?;
    let mut children = Vec::new();
    for name in ["one", "two", "three"] {
        let (mut monitor, mut qmp) = child(&stage, &saved, &place(name), "")?;
        let blocks = qmp.execute_raw("query-block", json!({}))?;
        let file = blocks.pointer("/0/inserted/file").and_then(Value::as_str).context("no file")?;
        ensure!(Path::new(file) == place(name).join("root.img"), "{blocks}");
        cont(&mut qmp)?;
        balances(&mut monitor)?;
        // Each of them keeps a CPU busy.
        stop(&mut qmp)?;
        children.push((monitor, qmp));
    }
    // A child is saved and restored like any other machine.
    let (monitor, qmp) = children.first_mut().context("none")?;
    cont(qmp)?;
    save(qmp, &place("again"), &json!({ "resume": true }))?;
    balances(monitor)?;
    stop(qmp)?;
    let (mut grandchild, mut its) = child(&stage, &place("again"), &place("four"), ",mapped=off")?;
    cont(&mut its)?;
    balances(&mut grandchild)?;
    its.execute_raw("quit", json!({}))?;
    grandchild.wait_exit()?;
    for (mut monitor, mut qmp) in children {
        if status(&mut qmp)? == "paused" {
            cont(&mut qmp)?;
        }
        balances(&mut monitor)?;
        qmp.execute_raw("quit", json!({}))?;
        monitor.wait_exit()?;
    }
    ensure!(fs::read(&image)? == before, "a child wrote to the disk of its parent");
    Ok(())
}

#[test]
fn a_save_that_copies_its_disks_is_restored_as_often_as_one_likes() -> Result<()> {
    restored_as_often_as_one_likes("ext4")
}

#[test]
fn a_save_that_shares_blocks_with_its_disks_is_restored_as_often_as_one_likes() -> Result<()> {
    restored_as_often_as_one_likes("xfs")
}

#[test]
fn a_stopped_guest_and_one_that_changes_too_much_keep_their_disks_too() -> Result<()> {
    let stage = Stage::new("kept-stopped")?;
    let (mut monitor, mut qmp) = ledger(&stage, &stage.file("image"))?;
    let saved = stage.file("saved");
    for (ways, after) in [
        (json!({ "resume": false }), "paused"),
        (json!({ "resume": true, "track": true }), "running"),
        (json!({ "resume": true, "incremental": true, "track": true }), "running"),
    ] {
        let to = if ways.get("incremental").is_some() { stage.file("more") } else { saved.clone() };
        save(&mut qmp, &to, &ways)?;
        ensure!(status(&mut qmp)? == after, "{ways}");
        let place = stage.file("child");
        let (mut child, mut its) = child(&stage, &to, &place, "")?;
        cont(&mut its)?;
        balances(&mut child)?;
        its.execute_raw("quit", json!({}))?;
        child.wait_exit()?;
        fs::remove_dir_all(&place)?;
        if after == "paused" {
            cont(&mut qmp)?;
            balances(&mut monitor)?;
        }
    }
    quits(&stage, &mut monitor, &mut qmp)
}

#[test]
fn a_kept_disk_needs_a_directory_and_must_be_unchanged() -> Result<()> {
    let stage = Stage::new("kept-place")?;
    let (mut monitor, mut qmp) = ledger(&stage, &stage.file("image"))?;
    let saved = stage.file("saved");
    save(&mut qmp, &saved, &json!({ "resume": false }))?;
    quits(&stage, &mut monitor, &mut qmp)?;

    let said = refusal(&stage, &saved, &[])?;
    ensure!(said.contains("disks=DIR") && said.contains("'root'"), "{said}");
    // Its own image is unchanged, and can be given explicitly.
    let image = stage.file("image").display().to_string();
    let drive = format!("id=root,file={image},direct=off");
    let (mut monitor, mut qmp) = crate::snapshot::restore(
        &stage,
        &saved,
        &["-drive", &drive, "-device", "virtio-blk-device,drive=root,id=root"],
    )?;
    quits(&stage, &mut monitor, &mut qmp)?;

    let taken = stage.file("taken");
    fs::create_dir(&taken)?;
    fs::write(taken.join("root.img"), "precious")?;
    let at = |place: &Path| format!("{},disks={}", saved.display(), place.display());
    let said = refusal(&stage, Path::new(&at(&taken)), &[])?;
    ensure!(said.contains("a directory (disks=) of its own"), "{said}");
    ensure!(fs::read(taken.join("root.img"))? == b"precious");
    let said = refusal(&stage, Path::new(&at(&stage.file("no/such"))), &[])?;
    ensure!(said.contains("its parent must exist"), "{said}");

    let copy = kept(&saved)?.pop().context("none")?;
    File::options().write(true).open(&copy)?.write_all_at(b"x", 4096)?;
    let place = stage.file("place");
    let said = refusal(&stage, Path::new(&at(&place)), &[])?;
    ensure!(said.contains("written since") && said.contains("--force"), "{said}");
    ensure!(!place.exists(), "a refusal leaves a disk behind");
    let (mut monitor, mut qmp) = child(&stage, &saved, &place, ",force=on")?;
    qmp.execute_raw("quit", json!({}))?;
    monitor.wait_exit()?;
    fs::remove_file(&copy)?;
    let said = refusal(&stage, Path::new(&at(&stage.file("other"))), &[])?;
    ensure!(said.contains("which the save keeps"), "{said}");
    Ok(())
}

#[test]
fn a_disk_that_is_being_copied_stays_where_it_is_until_that_is_over_or_given_up() -> Result<()> {
    let stage = Stage::new("kept-held")?;
    // It is read through a file system that does not answer, and its guest does nothing.
    let held = Held::mount(&stage.file("held"), &[("disk", &[7; 1 << 20])])?;
    let _answers = held.until_dropped();
    let other = stage.file("other");
    File::create(&other)?.set_len(1 << 20)?;
    let drive = |id: &str, path: &Path| json!({ "drive_id": id, "path_on_host": path, "read_only": false, "direct": false });
    let vm = stage.vm("hello", "halt")?;
    let (mut monitor, mut qmp) = stage.start(
        vm.add("drive", drive("vda", &held.file("disk"))).add("drive", drive("vdb", &other)),
    )?;
    let saved = stage.file("saved");
    let uri = format!("file:{}", saved.display());
    held.hold(Op::READ);
    let mut saver = monitor.qmp()?;
    let migrate = json!({ "execute": "migrate",
        "arguments": { "uri": uri, "resume": true, "disks": true } });
    saver.send_line(&migrate.to_string())?;
    held.wait_held(Op::READ)?;

    for (command, arguments, says) in [
        ("device_del", json!({ "id": "vda" }), "'vda' cannot be unplugged now"),
        ("device_del", json!({ "id": "vdb" }), "'vdb' cannot be unplugged now"),
        ("block_resize", json!({ "device": "vda", "size": 2 << 20 }), "being saved"),
        ("migrate", json!({ "uri": uri, "disks": true }), "migration process in progress"),
    ] {
        refused(&mut qmp, command, arguments, says)?;
    }
    let info = qmp.execute_raw("query-migrate", json!({}))?;
    ensure!(info.pointer("/disk/remaining") == Some(&json!(2 << 20)), "{info}");
    qmp.execute_raw("system_reset", json!({}))?;
    ensure!(status(&mut qmp)? == "running");
    qmp.execute_raw("migrate_cancel", json!({}))?;
    held.release()?;
    patiently(&mut qmp, "migrate", &json!({ "uri": uri, "resume": true, "disks": true }))?;
    ensure!(kept(&saved)?.len() == 2);
    qmp.execute_raw("device_del", json!({ "id": "vda" }))?;
    quits(&stage, &mut monitor, &mut qmp)
}

#[test]
fn a_save_whose_target_hangs_holds_the_guest_up_for_a_moment_only() -> Result<()> {
    let stage = Stage::new("kept-hung")?;
    let mounted = Mounted::new(&stage, "ext4")?;
    let (image, saved) = (stage.file("image"), mounted.0.join("saved"));
    // Much of the disk is read first, and the guest writes to the part that is read last.
    fs::write(&image, vec![7; 192 << 20])?;
    let (mut monitor, mut qmp) = ledger(&stage, &image)?;
    stop(&mut qmp)?;
    let mut saver = monitor.qmp()?;
    let uri = format!("file:{}", saved.display());
    let arguments = json!({ "uri": uri, "disks": true, "resume": true });
    saver.send_line(&json!({ "execute": "migrate", "arguments": arguments }).to_string())?;
    let mut query = |member: &str| -> Option<Value> {
        qmp.execute_raw("query-migrate", json!({})).ok()?.pointer(member).cloned()
    };
    until("a disk is being copied", || query("/disk/remaining").is_some_and(|n| n != json!(0)))?;
    let frozen = Frozen::new(std::process::id(), &mounted.0.to_string_lossy())?;
    ensure!(query("/status") == Some(json!("active")), "given up while the guest does nothing");
    cont(&mut qmp)?;
    balances(&mut monitor)?;
    let migrating = qmp.execute_raw("query-migrate", json!({}))?;
    ensure!(migrating.get("status") == Some(&json!("cancelling")), "{migrating}");
    frozen.thaw()?;
    let said = saver.receive::<Migrate>().err().context("saved")?.to_string();
    ensure!(said.contains("disk 'root' was not copied for 2 seconds"), "{said}");
    ensure!(!saved.exists(), "what is left of a save that was given up: {saved:?}");
    balances(&mut monitor)?;
    quits(&stage, &mut monitor, &mut qmp)
}
