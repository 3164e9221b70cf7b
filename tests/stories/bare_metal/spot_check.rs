//! A block device of the host has no mark, so a saved state recognises it by the contents of some
//! of its blocks.
use std::fs::{self, File};
use std::io::BufReader;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use sha2::{Digest, Sha256};
use state::State;
use stories::loop_device::LoopDevice;
use stories::monitor::{SOON, Vm};

use crate::plug::{found, marked};
use crate::snapshot::{counters, refusal, restore, save};
use crate::stage::{Stage, quits, simple, status};
use crate::stream::getfd;

const MIB: u64 = 1 << 20;
const SECTORS: u64 = 16 * MIB / 512;

/// A saved machine with a disk that is a loop device, and where it was saved.
fn saved(story: &str, direct: bool, readonly: bool) -> Result<(Stage, LoopDevice, PathBuf)> {
    let stage = Stage::new(story)?;
    let device = LoopDevice::new(&marked(&stage, "image", 0xa0, SECTORS)?)?;
    let drive = json!({
        "drive_id": "root", "path_on_host": device.path(), "read_only": readonly, "direct": direct,
    });
    let (mut monitor, mut qmp) = stage.start(stage.vm("plug", "watch")?.add("drive", drive))?;
    monitor.wait_for("ready\n", SOON)?;
    let saved = stage.file("saved");
    save(&mut qmp, &saved, true)?;
    quits(&stage, &mut monitor, &mut qmp)?;
    Ok((stage, device, saved))
}

/// The machine resumes from there, and finds its disk.
fn resumes(stage: &Stage, saved: &Path) -> Result<()> {
    let (mut monitor, mut qmp) = restore(stage, saved, &[])?;
    simple(&mut qmp, "cont")?;
    monitor.type_in("0")?;
    monitor.wait_for(&found(0, 0xa0, SECTORS), SOON)?;
    quits(stage, &mut monitor, &mut qmp)
}

/// Another program writes one byte, bypassing the page cache or not; returns the old one.
fn change(stage: &Stage, device: &LoopDevice, at: u64, byte: u8, direct: bool) -> Result<u8> {
    let mut page = [0; 4096];
    let start = at - at % 4096;
    File::open(device.path())?.read_exact_at(&mut page, start)?;
    let place = page.get_mut(usize::try_from(at % 4096)?).context("no such byte")?;
    let before = std::mem::replace(place, byte);
    let page_file = stage.file("page");
    fs::write(&page_file, page)?;
    let mut dd = Command::new("dd");
    dd.arg(format!("if={}", page_file.display())).arg(format!("of={}", device.path().display()));
    dd.args(["bs=4096", "count=1", "conv=notrunc"]).arg(format!("seek={}", start / 4096));
    dd.args(direct.then_some("oflag=direct"));
    let out = dd.output()?;
    ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    Ok(before)
}

/// The blocks that the save has chosen, as `docs/state-format.md` says.
fn chosen(saved: &Path) -> Result<Vec<u64>> {
    let state = State::read(BufReader::new(File::open(saved.join("state"))?))?;
    let block = |number: u32| -> Result<u64> {
        let hash = Sha256::new().chain_update(state.config.id.0).chain_update(number.to_be_bytes());
        let hash = hash.finalize();
        let first = hash.first_chunk::<8>().context("a short hash")?;
        Ok(u64::from_be_bytes(*first) % (16 * MIB / 4096) * 4096)
    };
    (0..64).map(block).collect()
}

#[test]
fn a_block_device_that_was_changed_is_recognised_where_it_was_looked_at() -> Result<()> {
    let (stage, device, saved) = saved("spot", true, false)?;
    resumes(&stage, &saved)?;
    let chosen = chosen(&saved)?;
    let middle = |at: &u64| (MIB..15 * MIB).contains(at);
    let one = *chosen.iter().find(|at| middle(at)).context("none is in the middle")?;
    for (at, direct) in
        [(4096, true), (MIB - 1, false), (one, true), (one + 4095, false), (16 * MIB - 1, true)]
    {
        let before = change(&stage, &device, at, 0x5a, direct)?;
        let said = refusal(&stage, &saved, &[])?;
        let path = device.path().display().to_string();
        for part in ["disk 'root'", &path, "spot check", "force=on", "--force"] {
            ensure!(said.contains(part), "{at}: {part} is not in: {said}");
        }
        change(&stage, &device, at, before, direct)?;
        // Only the content counts, which is as it was.
        resumes(&stage, &saved).with_context(|| format!("after a change at {at}"))?;
    }
    // A spot check does not cover the whole disk.
    let other = (MIB..15 * MIB).step_by(4096).find(|at| !chosen.contains(at));
    change(&stage, &device, other.context("all are chosen")?, 0x5a, true)?;
    resumes(&stage, &saved)?;
    change(&stage, &device, MIB / 2, 0x5a, true)?;
    ensure!(refusal(&stage, &saved, &[])?.contains("spot check"));
    resumes(&stage, &PathBuf::from(format!("{},force=on", saved.display())))
}

#[test]
fn a_copy_of_a_block_device_is_known_by_its_content() -> Result<()> {
    let (stage, device, saved) = saved("spot-copy", false, false)?;
    let copy = stage.file("copy");
    std::io::copy(&mut File::open(device.path())?, &mut File::create(&copy)?)?;
    let drive = format!("id=root,file={},direct=off", copy.display());
    for changed in [false, true] {
        if changed {
            File::options().write(true).open(&copy)?.write_all_at(&[0x5a], 4096)?;
            ensure!(refusal(&stage, &saved, &["-drive", &drive])?.contains("spot check"));
        } else {
            let (mut monitor, mut qmp) = restore(&stage, &saved, &["-drive", &drive])?;
            quits(&stage, &mut monitor, &mut qmp)?;
        }
    }
    Ok(())
}

#[test]
fn a_block_device_that_is_only_read_is_not_looked_at() -> Result<()> {
    let (stage, device, saved) = saved("spot-read", true, true)?;
    change(&stage, &device, 8192, 0x5a, true)?;
    resumes(&stage, &saved)
}

/// The spot check is part of a machine that is sent.
#[test]
fn a_stream_knows_its_block_device_too() -> Result<()> {
    let stage = Stage::new("spot-stream")?;
    let device = LoopDevice::new(&marked(&stage, "image", 0xa0, SECTORS)?)?;
    let drive = json!({
        "drive_id": "root", "path_on_host": device.path(), "read_only": false, "direct": true,
    });
    let (mut monitor, mut qmp) = stage.start(stage.vm("plug", "watch")?.add("drive", drive))?;
    monitor.wait_for("ready\n", SOON)?;
    let sent = stage.file("sent");
    getfd(&mut qmp, "out", File::create(&sent)?)?;
    ensure!(qmp.execute_raw("migrate", json!({ "uri": "fd:out" }))? == json!({}));
    quits(&stage, &mut monitor, &mut qmp)?;
    let before = change(&stage, &device, MIB - 1, 0x5a, true)?;
    let incoming = format!("exec:cat {}", sent.display());
    let args = ["-S", "-incoming", &incoming];
    let start = || Vm::described(json!({})).args(&args).start(&stage.paths, &stage.dir);
    let mut monitor = start()?;
    ensure!(monitor.wait_exit()?.code() == Some(1));
    let said = monitor.said_to_its_end()?;
    ensure!(said.contains("disk 'root'") && said.contains("spot check"), "{said}");
    change(&stage, &device, MIB - 1, before, true)?;
    let mut monitor = start()?;
    let mut qmp = monitor.qmp()?;
    simple(&mut qmp, "cont")?;
    monitor.type_in("0")?;
    monitor.wait_for(&found(0, 0xa0, SECTORS), SOON)?;
    quits(&stage, &mut monitor, &mut qmp)
}

/// The whole disk is checked while the guest writes to it.
#[test]
fn a_guest_that_writes_meanwhile_runs_on() -> Result<()> {
    for direct in [true, false] {
        let stage = Stage::new(&format!("spot-busy{}", u8::from(direct)))?;
        let sector = |number: u64| number.to_le_bytes().into_iter().chain([0; 504]);
        let contents: Vec<u8> = (0..2048).flat_map(sector).collect();
        let image = stage.file("image");
        fs::write(&image, contents)?;
        let device = LoopDevice::new(&image)?;
        let drive = json!({
            "drive_id": "d", "path_on_host": device.path(), "read_only": false, "direct": direct,
        });
        let (mut monitor, mut qmp) = stage.start(stage.vm("blk", "busy")?.add("drive", drive))?;
        monitor.wait_for("capacity 800\n", SOON)?;
        let mut before = 0;
        for n in 0..5 {
            let saved = stage.file(&format!("saved{n}"));
            save(&mut qmp, &saved, true)?;
            let state = State::read(BufReader::new(File::open(saved.join("state"))?))?;
            let slot = state.sections.devices.iter().find(|section| section.id == "disk0");
            let slot = slot.context("no disk")?.read::<state::device::VirtioMmio>()?;
            let disk = slot.device.read::<state::device::Disk>()?;
            ensure!(disk.spot_check.is_some() && disk.mark.is_none(), "{disk:?}");
            ensure!(status(&mut qmp)? == "running");
            // Wait for one more write: the spot check delays none any more.
            loop {
                save(&mut qmp, &stage.file("later"), true)?;
                let now = counters(&stage.file("later"), 1)?.first().copied().unwrap_or_default();
                if std::mem::replace(&mut before, now) < now {
                    break;
                }
            }
        }
        ensure!(!monitor.unseen().contains("WRONG"), "{}", monitor.unseen());
        quits(&stage, &mut monitor, &mut qmp)?;
    }
    Ok(())
}
