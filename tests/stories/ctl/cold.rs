//! Domains with a disk that were protected, and whose monitors have all ended: a start asks first who
//! has the guest.
use anyhow::{Result, ensure};
use rustix::process::Signal;
use serde_json::json;

use crate::disks::{image, with_disk};
use crate::protected::{LONG, protect};
use crate::rig::Rig;

/// A registered domain with a disk, protected on this host.
fn protected(story: &str) -> Result<Rig> {
    let rig = with_disk(story, |rig| Ok(json!(image(rig)?)))?;
    rig.ok(&["new", "vm.json"])?;
    rig.ok(&["start", "vm"])?;
    protect(&rig, "vm")?;
    rig.wait_replication("vm-backup", "state", "standby")?;
    Ok(rig)
}

#[test]
fn a_guest_that_both_sides_have_lost_starts_from_its_disk() -> Result<()> {
    let rig = protected("cold")?;
    let (primary, backup) = (rig.pid("vm")?, rig.pid("vm-backup")?);
    // Stopped, the primary does not win the term when its backup goes.
    rig.signal(primary, Signal::STOP)?;
    for pid in [backup, primary] {
        rig.signal(pid, Signal::KILL)?;
        rig.gone(pid)?;
    }
    rig.ok(&["start", "vm"])?;
    ensure!(rig.state("vm")? == "running");
    // The other image is not the guest's any more.
    rig.config("other.json", "count", "registers 1")?;
    let drive = json!([{
        "drive_id": "root", "path_on_host": rig.file("image.backup"),
        "read_only": false, "direct": false,
    }]);
    crate::disks::describe(&rig.file("other.json"), &drive)?;
    let (what, hint) = rig.refused(&["create", "other.json"])?;
    ensure!(what.contains("image.backup") || what.contains("was protected"), "{what}; {hint}");
    ensure!(rig.state("other")? == "absent");
    Ok(())
}

#[test]
fn a_disk_whose_guest_has_moved_is_not_started_from() -> Result<()> {
    let rig = protected("cold-moved")?;
    rig.kill("vm")?;
    rig.wait_state("vm-backup", "running")?;
    rig.refused(&["start", "vm"])?;
    ensure!(rig.state("vm-backup")? == "running");
    // Not under another name, either.
    rig.ok(&["delete", "-f", "vm"])?;
    rig.refused(&["create", "vm.json"])?;
    ensure!(rig.state("vm")? == "absent");
    Ok(())
}

#[test]
fn a_disk_that_both_sides_share_is_left_alone() -> Result<()> {
    let rig = with_disk("shared", |rig| Ok(json!(image(rig)?)))?;
    rig.ok(&["new", "vm.json"])?;
    rig.ok(&["start", "vm"])?;
    let (what, _) = rig.refused(&["remus", "--local", "-d", "vm"])?;
    ensure!(what.starts_with("-d: ") && what.contains("-F"), "{what}");
    rig.ok(&["remus", "--local", "-d", "-F", "-i", "25", "--timeout", LONG, "vm"])?;
    rig.wait_replication("vm-backup", "state", "standby")?;
    rig.kill("vm")?;
    rig.wait_state("vm-backup", "running")?;
    for none in ["image.backup", "image.journal", "image.sidecar"] {
        ensure!(!rig.file(none).exists(), "{none}");
    }
    // No mark says so, but the witness does.
    let (what, _) = rig.refused(&["start", "vm"])?;
    ensure!(what.contains("has moved to its backup"), "{what}");
    Ok(())
}
