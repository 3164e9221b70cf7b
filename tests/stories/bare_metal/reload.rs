//! A reset reads the kernel file again, while its file system hangs or something else has replaced
//! the file.
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use qmp::client::Client;
use serde_json::json;
use stories::debian::output;
use stories::frozen::Frozen;
use stories::held::{Held, Op};
use stories::monitor::{Monitor, SOON, Vm};

use crate::counters::{all_is_well, counting};
use crate::held::{answer, send};
use crate::hung::{SAYS, until_it_hangs, with_a_file_system};
use crate::meanwhile::{QUESTIONS, is_unanswered, why};
use crate::plug::refused;
use crate::stage::{Stage, cont, ends, quits, simple, status, stop};

/// A guest whose kernel is in a file system that can be blocked.
fn obeying(stage: &Stage, kernel: &Path) -> Result<(Monitor, Client)> {
    let mut config = stage.config("hello", "obey")?;
    *config.pointer_mut("/boot-source/kernel_image_path").context("no kernel")? = json!(kernel);
    let vm = Vm::described(config).args(&["-action", "shutdown=reset"]);
    let (mut monitor, qmp) = stage.start(vm)?;
    monitor.wait_for("waits\n", SOON)?;
    Ok((monitor, qmp))
}

fn held_kernel(stage: &Stage) -> Result<Held> {
    let image = fs::read(stage.kernel("hello")?)?;
    Held::mount(&stage.file("held"), &[("kernel", &image)])
}

#[test]
fn a_kernel_whose_reading_hangs_holds_no_other_client() -> Result<()> {
    let stage = Stage::new("reload_held")?;
    let held = held_kernel(&stage)?;
    let kernel = held.file("kernel");
    let (mut monitor, mut other) = obeying(&stage, &kernel)?;
    let _guard = held.until_dropped();
    let mut client = Client::connect(&stage.socket(), SOON)?;
    let hangs = format!("reading {} has not finished", kernel.display());

    for op in [Op::LOOKUP, Op::OPEN] {
        held.hold(op);
        for _ in 0..2 {
            send(&mut client, "system_reset", &json!({}))?;
            held.wait_held(op)?;
            for _ in 0..QUESTIONS {
                ensure!(status(&mut other)? == "running");
            }
            is_unanswered(&mut client)?;
            let said = answer(&mut client)?;
            ensure!(why(&said).contains(&hangs), "{said}");
            // The guest has not noticed.
            ensure!(status(&mut other)? == "running" && monitor.unseen().is_empty());
            stop(&mut other)?;
            cont(&mut other)?;
        }
        held.release()?;
        // A reset that has timed out is not carried out later.
        ensure!(monitor.unseen().is_empty());
        other.take_events();
        simple(&mut client, "system_reset")?;
        other.wait_event("RESET", SOON)?;
        monitor.wait_for("waits\n", SOON)?;
    }
    quits(&stage, &mut monitor, &mut other)
}

/// The guest cannot run on, so it waits; but clients do not wait, and the wait is bounded.
#[test]
fn a_guest_that_resets_itself_waits_for_its_kernel_alone() -> Result<()> {
    let stage = Stage::new("reload_guest")?;
    let held = held_kernel(&stage)?;
    let kernel = held.file("kernel");
    let (mut monitor, mut qmp) = obeying(&stage, &kernel)?;
    let _guard = held.until_dropped();
    let hangs = format!("reading {} has not finished", kernel.display());

    held.hold(Op::OPEN);
    simple(&mut qmp, "system_powerdown")?;
    held.wait_held(Op::OPEN)?;
    for _ in 0..QUESTIONS {
        ensure!(status(&mut qmp)? == "running");
    }
    refused(&mut qmp, "stop", json!({}), &hangs)?;
    held.release()?;
    let data = qmp.wait_event("RESET", SOON)?.data;
    ensure!(data == json!({ "guest": true, "reason": "guest-shutdown" }), "{data}");
    monitor.wait_for("waits\n", SOON)?;
    stop(&mut qmp)?;
    cont(&mut qmp)?;

    held.hold(Op::OPEN);
    simple(&mut qmp, "system_powerdown")?;
    held.wait_held(Op::OPEN)?;
    let data = qmp.wait_event("SHUTDOWN", SOON)?.data;
    ensure!(data == json!({ "guest": false, "reason": "host-error" }), "{data}");
    qmp.wait_closed(SOON)?;
    held.release()?;
    ensure!(monitor.wait_exit()?.code() == Some(1));
    let said = monitor.said_to_its_end()?;
    ensure!(said.contains(&hangs), "{said}");
    Ok(())
}

#[test]
fn a_kernel_that_is_no_file_any_more_leaves_the_guest_as_it_is() -> Result<()> {
    let stage = Stage::new("reload_fifo")?;
    let kernel = stage.kernel("hello")?;
    let image = fs::read(&kernel)?;
    let path = stage.file("other");
    fs::write(&path, &image)?;
    let (mut monitor, mut qmp) = obeying(&stage, &path)?;
    let is_refused = |qmp: &mut Client, says: &str| -> Result<()> {
        refused(qmp, "system_reset", json!({}), says)?;
        ensure!(status(qmp)? == "running");
        let events = qmp.take_events();
        ensure!(events.iter().all(|e| e.event != "RESET"), "{events:?}");
        Ok(())
    };
    fs::remove_file(&path)?;
    is_refused(&mut qmp, "cannot be opened")?;
    output(Command::new("mkfifo").arg(&path))?;
    is_refused(&mut qmp, "a FIFO, not a regular file")?;
    fs::remove_file(&path)?;
    fs::write(&path, "no kernel")?;
    is_refused(&mut qmp, "cannot reload the kernel")?;
    fs::write(&path, &image)?;
    simple(&mut qmp, "system_reset")?;
    monitor.wait_for("waits\n", SOON)?;
    // A guest that resets itself cannot continue without its kernel.
    fs::remove_file(&path)?;
    output(Command::new("mkfifo").arg(&path))?;
    qmp.take_events();
    simple(&mut qmp, "system_powerdown")?;
    ends(&mut monitor, &mut qmp, false, "host-error", 1)
}

/// First for its kernel and then for a disk.
#[test]
fn a_reset_waits_for_one_thing_after_the_other() -> Result<()> {
    let mut stage = Stage::new("reload_both")?;
    let disk = with_a_file_system(&mut stage)?;
    let place = disk.parent().context("no directory")?.to_string_lossy().into_owned();
    let image = fs::read(stage.kernel("blk")?)?;
    let held = Held::mount(&stage.file("held"), &[("kernel", &image)])?;
    let mut config = stage.config("blk", "busy")?;
    *config.pointer_mut("/boot-source/kernel_image_path").context("no kernel")? =
        json!(held.file("kernel"));
    let vm = Vm::described(config).disk("vda", &disk, false);
    let (monitor, mut other, rounds) = counting(&stage, vm, 1)?;
    let _guard = held.until_dropped();
    let frozen = Frozen::new(monitor.pid(), &place)?;
    until_it_hangs(&mut other)?;

    held.hold(Op::OPEN);
    let mut client = Client::connect(&stage.socket(), SOON)?;
    send(&mut client, "system_reset", &json!({}))?;
    held.wait_held(Op::OPEN)?;
    held.release()?;
    for _ in 0..QUESTIONS {
        ensure!(status(&mut other)? == "running");
    }
    is_unanswered(&mut client)?;
    let said = answer(&mut client)?;
    ensure!(why(&said).contains(SAYS), "{said}");
    let before = rounds.read()?;
    frozen.thaw()?;
    rounds.wait_past(&before)?;
    other.take_events();
    simple(&mut client, "system_reset")?;
    other.wait_event("RESET", SOON)?;
    rounds.wait_past(&[0])?;
    all_is_well(&stage, monitor, other)
}
