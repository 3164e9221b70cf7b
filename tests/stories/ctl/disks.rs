//! The disks of a saved domain: unchanged, copied to another place, or forced by the user.
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use stories::loop_device::LoopDevice;

use crate::rig::Rig;

/// A registry, and `vm.json` with this disk in its directory.
pub fn with_disk(story: &str, disk: impl FnOnce(&Rig) -> Result<Value>) -> Result<Rig> {
    let rig = Rig::new(story)?;
    let path = rig.config("vm.json", "count", "registers 1")?;
    let drive = json!([{
        "drive_id": "root", "path_on_host": disk(&rig)?, "read_only": false, "direct": false,
    }]);
    describe(&path, &drive)?;
    Ok(rig)
}

/// Give the machine that a file describes these disks.
pub fn describe(file: &Path, drives: &Value) -> Result<()> {
    let mut config: Value = serde_json::from_slice(&fs::read(file)?)?;
    config.as_object_mut().context("no object")?.insert("drive".into(), drives.clone());
    Ok(fs::write(file, config.to_string())?)
}

/// An image in the registry's directory.
pub fn image(rig: &Rig) -> Result<std::path::PathBuf> {
    let path = rig.file("image");
    File::create(&path)?.set_len(8 << 20)?;
    Ok(path)
}

/// Another program writes to it.
fn change(disk: &Path) -> Result<()> {
    let file = File::options().write(true).open(disk)?;
    file.write_all_at(&[0x5a], 4096)?;
    Ok(file.sync_all()?)
}

/// The restore is refused with a helpful message, and succeeds with `--force`.
fn by_force_only(rig: &Rig, disk: &Path, says: &str) -> Result<()> {
    let path = disk.display().to_string();
    rig.ok(&["create", "vm.json"])?;
    rig.ok(&["save", "vm", "kept"])?;
    // Nothing has changed yet.
    rig.ok(&["restore", "kept", "-p"])?;
    rig.ok(&["destroy", "vm"])?;
    change(disk)?;
    let (what, _) = rig.refused(&["restore", "kept"])?;
    for part in ["disk", &path, says, "--force", "--disk ID=COPY"] {
        ensure!(what.contains(part), "{part} is not in: {what}");
    }
    ensure!(rig.state("vm")? == "absent");
    rig.ok(&["restore", "kept", "--force"])?;
    ensure!(rig.state("vm")? == "running");
    rig.ok(&["destroy", "vm"])?;

    rig.ok(&["new", "vm.json"])?;
    rig.ok(&["start", "vm"])?;
    rig.ok(&["suspend", "vm"])?;
    File::options().write(true).open(disk)?.write_all_at(&[0xa5], 4096)?;
    let (what, _) = rig.refused(&["resume", "vm"])?;
    ensure!(what.contains(says) && what.contains("--force"), "{what}");
    ensure!(rig.state("vm")? == "suspended");
    rig.ok(&["resume", "vm", "--force"])?;
    ensure!(rig.state("vm")? == "running");
    Ok(())
}

#[test]
fn an_image_that_was_changed_since_is_taken_by_force_only() -> Result<()> {
    let rig = with_disk("force", |rig| Ok(json!(image(rig)?)))?;
    by_force_only(&rig, &rig.file("image"), "has been written since")
}

#[test]
fn a_block_device_that_was_changed_since_is_taken_by_force_only() -> Result<()> {
    let mut device = None;
    let rig = with_disk("force-block", |rig| {
        let device = device.insert(LoopDevice::new(&image(rig)?)?);
        Ok(json!(device.path()))
    })?;
    let device = device.context("no device")?;
    by_force_only(&rig, device.path(), "spot check")?;
    // The device can be detached when no process has it open.
    rig.clean("vm")
}

#[test]
fn a_copy_that_looks_like_another_format_can_be_called_raw() -> Result<()> {
    let rig = with_disk("called-raw", |rig| Ok(json!(image(rig)?)))?;
    rig.ok(&["create", "vm.json"])?;
    rig.ok(&["save", "vm", "kept"])?;
    let copied = Command::new("cp")
        .arg("--preserve=xattr")
        .args([rig.file("image"), rig.file("copy")])
        .status()?;
    ensure!(copied.success());
    File::options().write(true).open(rig.file("copy"))?.write_all_at(b"QFI\xfb", 0)?;
    let (what, _) = rig.refused(&["restore", "kept", "--disk", "root=copy"])?;
    ensure!(what.contains("qcow2") && what.contains("--disk ID=PATH,format=raw"), "{what}");
    for wrong in ["root=copy,format=qcow2", "root=copy,readonly=on"] {
        let out = rig.run(&["restore", "kept", "--disk", wrong])?;
        let said = String::from_utf8_lossy(&out.stderr);
        ensure!(out.status.code() == Some(2), "{wrong} ended with {}: {said}", out.status);
        ensure!(said.contains("ID=PATH,format=raw"), "{said}");
    }
    rig.ok(&["restore", "kept", "--disk", "root=copy,format=raw"])?;
    ensure!(rig.state("vm")? == "running");
    Ok(())
}
