//! A disk, driven by a correct guest and by one that makes every mistake.
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use qmp::client::Client;
use serde_json::{Value, json};
use stories::debian::output;
use stories::monitor::{Monitor, SOON, Vm};

use crate::counters::{all_is_well, counting, storm};
use crate::plug::refused;
use crate::snapshot::{refusal, restore, save};
use crate::stage::{Stage, cont, descriptors, quits, simple, status};

/// Of the image, in sectors of 512 bytes.
const SECTORS: u64 = 2048;

/// An image of which every sector begins with its own number.
fn numbered(stage: &Stage) -> Result<(PathBuf, Vec<u8>)> {
    let sector = |number: u64| number.to_le_bytes().into_iter().chain([0x5a; 504]);
    let contents: Vec<u8> = (0..SECTORS).flat_map(sector).collect();
    let path = stage.file("disk");
    fs::write(&path, &contents)?;
    Ok((path, contents))
}

/// A machine whose guest drives that image.
fn driving(stage: &Stage, how: &str, read_only: bool) -> Result<(Vm, PathBuf, Vec<u8>)> {
    let (path, contents) = numbered(stage)?;
    Ok((stage.vm("blk", how)?.disk("vda", &path, read_only), path, contents))
}

/// What sector 7 holds once the guest has written it.
fn marked(mut contents: Vec<u8>, mark: u64) -> Result<Vec<u8>> {
    let sector = contents.get_mut(7 * 512..8 * 512).context("a short image")?;
    for (number, word) in (0..).zip(sector.chunks_mut(8)) {
        word.copy_from_slice(&(mark + number).to_le_bytes());
    }
    Ok(contents)
}

/// Waits until the guest is done, while a client sends queries continuously, all of which are
/// answered. Returns the guest's output.
fn done(stage: &Stage, monitor: &mut Monitor) -> Result<String> {
    let over = AtomicBool::new(false);
    let mut asking = Client::connect(&stage.socket(), SOON)?;
    thread::scope(|scope| {
        let asker = scope.spawn(|| -> Result<()> {
            while !over.load(Ordering::Relaxed) {
                ensure!(status(&mut asking)? == "running");
            }
            Ok(())
        });
        let shown = monitor.wait_for("done\n", SOON * 3);
        over.store(true, Ordering::Relaxed);
        asker.join().map_err(|_| anyhow!("the client panicked"))??;
        shown
    })
}

#[test]
fn reads_writes_flushes_and_interrupts() -> Result<()> {
    let stage = Stage::new("blk_works")?;
    let (vm, image, contents) = driving(&stage, "works", false)?;
    let (mut monitor, mut qmp) = stage.start(vm)?;
    let shown = done(&stage, &mut monitor)?;
    ensure!(shown.contains("capacity 800\n"), "{shown}");
    ensure!(shown.contains("the serial number is vda\n"), "{shown}");
    ensure!(fs::read(&image)? == marked(contents, 0xfeed_0000_0000_0000)?, "the image differs");

    let stats = qmp.execute_raw("query-blockstats", json!({}))?;
    let stat = |name: &str| stats.pointer(&format!("/0/stats/{name}")).and_then(Value::as_u64);
    ensure!(stat("wr_bytes") == Some(512) && stat("wr_operations") == Some(1), "{stats}");
    ensure!(stat("flush_operations") == Some(1), "{stats}");
    ensure!(stat("rd_operations") == Some(3 + 8 + 200), "{stats}");
    quits(&stage, &mut monitor, &mut qmp)
}

#[test]
fn what_is_read_only_stays_as_it_is() -> Result<()> {
    let stage = Stage::new("blk_ro")?;
    let (vm, image, contents) = driving(&stage, "read-only", true)?;
    let (mut monitor, mut qmp) = stage.start(vm)?;
    done(&stage, &mut monitor)?;
    quits(&stage, &mut monitor, &mut qmp)?;
    ensure!(fs::read(&image)? == contents, "the image differs");
    Ok(())
}

#[test]
fn a_hostile_driver_does_no_harm_and_the_disk_works_afterwards() -> Result<()> {
    let stage = Stage::new("blk_hostile")?;
    let (vm, image, contents) = driving(&stage, "hostile", false)?;
    let (mut monitor, mut qmp) = stage.start(vm)?;
    monitor.wait_for("capacity 800\n", SOON)?;
    let before = descriptors(&monitor)?;
    done(&stage, &mut monitor)?;
    let after = descriptors(&monitor)?;
    ensure!(after < before + 40, "{before} descriptors became {after}");
    ensure!(fs::read(&image)? == marked(contents, 0xface_0000_0000_0000)?, "the image differs");
    quits(&stage, &mut monitor, &mut qmp)
}

#[test]
fn rings_that_change_while_they_are_read_do_no_harm() -> Result<()> {
    let stage = Stage::new("blk_race")?;
    let (vm, image, contents) = driving(&stage, "race", true)?;
    let (mut monitor, mut qmp) = stage.start(vm.machine("vcpu_count", 2))?;
    done(&stage, &mut monitor)?;
    quits(&stage, &mut monitor, &mut qmp)?;
    ensure!(fs::read(&image)? == contents, "the image differs");
    Ok(())
}

#[test]
fn stop_and_cont_with_requests_in_flight() -> Result<()> {
    let stage = Stage::new("blk_storm")?;
    let (vm, ..) = driving(&stage, "busy", false)?;
    let (monitor, mut qmp, rounds) = counting(&stage, vm, 1)?;
    storm(&mut qmp, &rounds, 200)?;
    all_is_well(&stage, monitor, qmp)
}

#[test]
fn reset_with_requests_in_flight() -> Result<()> {
    let stage = Stage::new("blk_reset")?;
    let (vm, ..) = driving(&stage, "busy", false)?;
    let (mut monitor, mut qmp, rounds) = counting(&stage, vm, 1)?;
    let before = descriptors(&monitor)?;
    for _ in 0..30 {
        simple(&mut qmp, "system_reset")?;
        ensure!(qmp.wait_event("RESET", SOON)?.data.get("guest") == Some(&json!(false)));
        monitor.wait_for("capacity 800\n", SOON)?;
        rounds.wait_past(&[0])?;
    }
    let after = descriptors(&monitor)?;
    ensure!(after < before + 20, "{before} descriptors became {after}");
    all_is_well(&stage, monitor, qmp)
}

fn copied(from: &Path, to: &Path, how: &[&str]) -> Result<()> {
    output(Command::new("cp").args(how).args([from, to])).map(drop)
}

fn until_it_writes(qmp: &mut Client, image: &Path) -> Result<()> {
    let written = || Ok::<_, anyhow::Error>(fs::metadata(image)?.modified()?);
    let before = written()?;
    while written()? == before {
        ensure!(status(qmp)? == "running");
    }
    Ok(())
}

#[test]
fn a_saved_state_is_not_restored_with_a_disk_that_has_changed_since() -> Result<()> {
    const SAYS: &str = "has changed since its machine was saved";
    let stage = Stage::new("blk_generation")?;
    let (vm, image, _) = driving(&stage, "busy", false)?;
    let (mut monitor, mut qmp) = stage.start(vm)?;
    until_it_writes(&mut qmp, &image)?;
    let (early, late) = (stage.file("early"), stage.file("late"));
    save(&mut qmp, &early, true)?;
    until_it_writes(&mut qmp, &image)?;
    save(&mut qmp, &late, false)?;
    quits(&stage, &mut monitor, &mut qmp)?;

    let said = refusal(&stage, &early, &[])?;
    ensure!(said.contains(SAYS) && said.contains("has been changed since"), "{said}");
    ensure!(said.contains(&*image.to_string_lossy()) && said.contains("force=on"), "{said}");

    // It can be restored any number of times, as long as the guest does not run.
    for _ in 0..2 {
        let (mut monitor, mut qmp) = restore(&stage, &late, &[])?;
        quits(&stage, &mut monitor, &mut qmp)?;
    }
    let (copy, plain) = (stage.file("copy"), stage.file("plain copy"));
    copied(&image, &copy, &["--preserve=xattr"])?;
    copied(&image, &plain, &[])?;
    let drive = |path: &Path| format!("id=vda,file={}", path.display());
    let (mut monitor, mut qmp) = restore(&stage, &late, &["-drive", &drive(&copy)])?;
    quits(&stage, &mut monitor, &mut qmp)?;
    let said = refusal(&stage, &late, &["-drive", &drive(&plain)])?;
    ensure!(said.contains(SAYS), "{said}");

    // Once it has run, its disk no longer matches any save.
    let (mut monitor, mut qmp) = restore(&stage, &late, &[])?;
    cont(&mut qmp)?;
    until_it_writes(&mut qmp, &image)?;
    quits(&stage, &mut monitor, &mut qmp)?;
    let said = refusal(&stage, &late, &[])?;
    ensure!(said.contains(SAYS), "{said}");

    // Writes of another program count, too; `force=on` overrides that.
    fs::OpenOptions::new().write(true).open(&copy)?.write_all_at(&[1], 4096)?;
    copied(&copy, &image, &["--preserve=xattr"])?;
    let said = refusal(&stage, &late, &[])?;
    ensure!(said.contains("has been written since"), "{said}");
    let incoming = format!("file:{},force=on", late.display());
    let args = ["-S", "-incoming", &incoming];
    let mut monitor = Vm::described(json!({})).args(&args).start(&stage.paths, &stage.dir)?;
    let mut qmp = monitor.qmp()?;
    quits(&stage, &mut monitor, &mut qmp)
}

#[test]
fn an_image_of_another_format_needs_to_be_called_raw() -> Result<()> {
    const SAYS: &str = "is a qcow2 image";
    let stage = Stage::new("blk_format")?;
    let (image, copy) = (stage.file("image"), stage.file("copy"));
    for path in [&image, &copy] {
        fs::write(path, [b"QFI\xfb", &[0; 4092][..]].concat())?;
    }
    let drive = |path: &Path, more: &str| format!("id=d,file={}{more}", path.display());
    let does_not_start = |vm: Vm| -> Result<()> {
        let mut monitor = vm.start(&stage.paths, &stage.dir)?;
        ensure!(monitor.wait_exit()?.code() == Some(1));
        let said = monitor.said_to_its_end()?;
        ensure!(said.contains(SAYS) && said.contains("qemu-img convert -f qcow2"), "{said}");
        Ok(())
    };
    does_not_start(stage.vm("count", "plain 1")?.args(&["-drive", &drive(&image, "")]))?;
    does_not_start(stage.vm("count", "plain 1")?.disk("d", &image, false))?;

    let vm = stage.vm("count", "plain 1")?.args(&["-drive", &drive(&image, ",format=raw")]);
    let (mut monitor, mut qmp) = stage.start(vm)?;
    let file = json!({ "driver": "file", "filename": copy });
    let add = json!({ "node-name": "copy", "file": file });
    refused(&mut qmp, "blockdev-add", add.clone(), SAYS)?;
    let mut raw = add;
    raw["driver"] = json!("raw");
    qmp.execute_raw("blockdev-add", raw)?;
    qmp.execute_raw("blockdev-del", json!({ "node-name": "copy" }))?;

    // An image that a machine has written to is accepted as raw; one that replaces it is not.
    let saved = stage.file("saved");
    save(&mut qmp, &saved, false)?;
    quits(&stage, &mut monitor, &mut qmp)?;
    let (mut monitor, mut qmp) = restore(&stage, &saved, &[])?;
    quits(&stage, &mut monitor, &mut qmp)?;
    copied(&image, &copy, &["--preserve=xattr"])?;
    let said = refusal(&stage, &saved, &["-drive", &drive(&copy, "")])?;
    ensure!(said.contains(SAYS), "{said}");
    let (mut monitor, mut qmp) =
        restore(&stage, &saved, &["-drive", &drive(&copy, ",format=raw")])?;
    quits(&stage, &mut monitor, &mut qmp)
}
