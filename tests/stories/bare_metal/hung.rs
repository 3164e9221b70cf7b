//! A disk whose storage hangs, as on a dead NFS server: here a frozen file system. The guest may
//! lose its disk, but nothing else may suffer.
use std::fs;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use qmp::client::Client;
use qmp::schema::{QueryBlockstats, Stop};
use rustix::fs::{FlockOperation, fcntl_lock};
use serde_json::json;
use stories::debian::output;
use stories::frozen::{Frozen, make_file_system};
use stories::held::until;
use stories::monitor::SOON;

use crate::counters::{all_is_well, counting};
use crate::plug::refused;
use crate::snapshot::refusal;
use crate::stage::{Stage, cont, exists, patiently, quits, simple, status, stop};

pub const SAYS: &str = "disk vda has requests that the host has not finished";

/// A file system in the monitor's own mount namespace only, so that it disappears with the monitor.
pub fn with_a_file_system(stage: &mut Stage) -> Result<PathBuf> {
    with_a_file_system_and(stage, "-m", "")
}

/// The same, with what `commands` make in further namespaces.
fn with_a_file_system_and(stage: &mut Stage, namespaces: &str, more: &str) -> Result<PathBuf> {
    let (image, place) = (stage.file("slow.img"), stage.file("slow"));
    make_file_system(&stage.paths, &image)?;
    fs::create_dir(&place)?;
    let disk = place.join("disk");
    let (image, place, file) = (image.display(), place.display(), disk.display());
    let commands = format!("mount -o loop {image} {place}\ntruncate -s 1M {file}\n{more}");
    stage.prepare(namespaces, &commands)?;
    Ok(disk)
}

/// Waits until the guest's next request hangs, and `stop` says so.
pub fn until_it_hangs(qmp: &mut Client) -> Result<()> {
    let deadline = Instant::now() + SOON;
    while Instant::now() < deadline {
        match qmp.execute_raw("stop", json!({})) {
            Ok(_) => {
                cont(qmp)?;
                // On a busy host the guest would not get as far as its next request before it is
                // stopped again.
                thread::sleep(Duration::from_millis(1));
            }
            Err(error) => {
                ensure!(error.to_string().contains(SAYS), "{error}");
                return Ok(());
            }
        }
    }
    bail!("no request hangs")
}

/// Whether writes wait in io_uring (`direct`) or hold the I/O thread itself.
fn hangs_and_comes_back(direct: bool) -> Result<()> {
    let mut stage = Stage::new(if direct { "hung_direct" } else { "hung" })?;
    let disk = with_a_file_system(&mut stage)?;
    let place = disk.parent().context("no directory")?.to_string_lossy().into_owned();
    let vm = stage.vm("blk", "busy")?.add(
        "drive",
        json!({ "drive_id": "vda", "path_on_host": disk, "read_only": false, "direct": direct }),
    );
    let (mut monitor, mut qmp, rounds) = counting(&stage, vm, 1)?;

    let frozen = Frozen::new(monitor.pid(), &place)?;
    until_it_hangs(&mut qmp)?;
    for (command, arguments) in [
        ("device_del", json!({ "id": "vda" })),
        ("system_reset", json!({})),
        ("migrate", json!({ "uri": format!("file:{}", stage.file("saved").display()) })),
    ] {
        refused(&mut qmp, command, arguments, SAYS)?;
        ensure!(status(&mut qmp)? == "running", "after {command}");
    }
    // Queries are answered.
    let mut other = Client::connect(&stage.socket(), SOON)?;
    let disks = other.execute_raw("query-block", json!({}))?;
    ensure!(disks.pointer("/0/device") == Some(&json!("vda")), "{disks}");
    let held = rounds.read()?;
    frozen.thaw()?;

    // Nothing is lost: the guest runs on, stops and runs on again.
    rounds.wait_past(&held)?;
    qmp.take_events();
    stop(&mut qmp)?;
    cont(&mut qmp)?;
    rounds.wait_past(&rounds.read()?)?;
    ensure!(!monitor.unseen().contains("WRONG"), "{}", monitor.unseen());

    let frozen = Frozen::new(monitor.pid(), &place)?;
    until_it_hangs(&mut qmp)?;
    ensure!(qmp.execute_raw("quit", json!({}))? == json!({}));
    let data = qmp.wait_event("SHUTDOWN", SOON)?.data;
    ensure!(data == json!({ "guest": false, "reason": "host-qmp-quit" }), "{data}");
    qmp.wait_closed(SOON)?;
    // The kernel keeps a process until its writes have ended.
    frozen.thaw()?;
    ensure!(monitor.wait_exit()?.code() == Some(0));
    Ok(())
}

#[test]
fn storage_that_hangs_holds_neither_clients_nor_the_end() -> Result<()> {
    hangs_and_comes_back(true)
}

#[test]
fn storage_that_hangs_the_io_thread_holds_neither_clients_nor_the_end() -> Result<()> {
    hangs_and_comes_back(false)
}

#[test]
fn storage_that_is_slow_is_waited_for() -> Result<()> {
    let mut stage = Stage::new("slow")?;
    let disk = with_a_file_system(&mut stage)?;
    let place = disk.parent().context("no directory")?.to_string_lossy().into_owned();
    let vm = stage.vm("blk", "busy")?.disk("vda", &disk, false);
    let (monitor, mut qmp, _) = counting(&stage, vm, 1)?;
    let frozen = Frozen::new(monitor.pid(), &place)?;
    let thaw = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(200));
        frozen.thaw()
    });
    stop(&mut qmp)?;
    thaw.join().map_err(|_| anyhow::anyhow!("the thread has panicked"))??;
    cont(&mut qmp)?;
    all_is_well(&stage, monitor, qmp)
}

/// Requests that the guest's disks have finished.
fn finished(qmp: &mut Client) -> Result<u64> {
    qmp.send_line(r#"{"execute":"query-blockstats"}"#)?;
    finished_event(qmp)
}

fn finished_event(qmp: &mut Client) -> Result<u64> {
    let disks = qmp.receive::<QueryBlockstats>()?;
    Ok(disks.iter().map(|disk| disk.stats.wr_operations).sum())
}

/// Stops the guest; returns how many requests its disks finish meanwhile. All commands are sent at
/// once, so that there is no round trip in between.
fn stops_after(qmp: &mut Client) -> Result<u64> {
    let look = r#"{"execute":"query-blockstats"}"#;
    qmp.send_line(&format!(r#"{look}{{"execute":"stop"}}{look}"#))?;
    let before = finished_event(qmp)?;
    qmp.receive::<Stop>()?;
    Ok(finished_event(qmp)? - before)
}

/// A guest that keeps its queues full of ranges to zero, each of which has to be on the medium.
fn flooded(name: &str, aio: &str) -> Result<()> {
    const DISKS: usize = 8;
    const QUEUE: u64 = 256;
    /// An I/O thread checks its messages after much less work than all that is queued. How much
    /// depends on the storage: each disk's turn is limited by time.
    const SOME: u64 = DISKS as u64 * QUEUE / 2;
    let stage = Stage::new(name)?;
    let mut vm = stage.vm("flood", "")?;
    for disk in 0..DISKS {
        let image = stage.file(&format!("disk{disk}"));
        fs::File::create(&image)?.set_len(64 << 20)?;
        let drive = format!("id=vd{disk},file={},aio={aio}", image.display());
        let device = format!("virtio-blk-device,id=vd{disk},drive=vd{disk}");
        vm = vm.args(&["-drive", &drive, "-device", &device]);
    }
    let (mut monitor, mut qmp) = stage.start(vm)?;
    monitor.wait_for("floods!\n", SOON)?;
    let mut other = Client::connect(&stage.socket(), SOON)?;
    let mut seen = 0;
    for time in 0..10 {
        // The flood has processed the requests that were queued when it last resumed.
        while finished(&mut other)? < seen + QUEUE {}
        ensure!(status(&mut qmp)? == "running");
        let waited = stops_after(&mut qmp)?;
        ensure!(waited < SOME, "stop {time} waited for {waited} requests");
        seen = finished(&mut other)?;
        ensure!(status(&mut qmp)? == "paused");
        cont(&mut qmp)?;
    }
    while finished(&mut other)? < seen + QUEUE {}
    let saved = json!({ "uri": format!("file:{}", stage.file("saved").display()) });
    patiently(&mut qmp, "migrate", &saved)?;
    ensure!(status(&mut other)? == "paused");
    quits(&stage, &mut monitor, &mut qmp)
}

#[test]
fn a_flood_of_ranges_holds_neither_clients_nor_stop_nor_saves_nor_the_end() -> Result<()> {
    flooded("flood", "io_uring")
}

#[test]
fn a_flood_that_the_io_thread_carries_out_itself_holds_them_no_more() -> Result<()> {
    flooded("flood_off", "off")
}

/// Takes a lock as other monitors would; `false` while another process has it.
fn can_be_locked(disk: &Path) -> bool {
    let file = fs::File::options().write(true).open(disk);
    file.is_ok_and(|file| fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive).is_ok())
}

#[test]
fn a_process_that_the_kernel_cannot_end_holds_nothing_but_what_it_waits_for() -> Result<()> {
    let mut stage = Stage::new("unended")?;
    let tap = "ip tuntap add mode tap name tap0 vnet_hdr\nip link set tap0 up";
    let disk = with_a_file_system_and(&mut stage, "-m -n", tap)?;
    let place = disk.parent().context("no directory")?.to_string_lossy().into_owned();
    let sound = stage.file("sound.img");
    fs::write(&sound, vec![0; 1 << 20])?;
    let pidfile = stage.file("pid").display().to_string();
    let vm = stage.vm("blk", "busy")?.add(
        "drive",
        json!({ "drive_id": "vda", "path_on_host": disk, "read_only": false, "direct": false }),
    );
    let vm = vm.disk("vdb", &sound, false).nic("eth0", "tap0", "52:54:00:00:00:01");
    let (mut monitor, mut qmp, _) = counting(&stage, vm.args(&["-pidfile", &pidfile]), 1)?;
    let network = fs::File::open(format!("/proc/{}/ns/net", monitor.pid()))?;
    let network = format!("--net=/proc/{}/fd/{}", std::process::id(), network.as_raw_fd());
    let tap =
        || output(Command::new("nsenter").args([&network, "ip", "-o", "link", "show", "tap0"]));
    let attached = || tap().is_ok_and(|link| !link.contains("NO-CARRIER"));
    until("the tap is attached", attached)?;
    ensure!(!can_be_locked(&sound), "the other disk is free");

    let frozen = Frozen::new(monitor.pid(), &place)?;
    until_it_hangs(&mut qmp)?;
    output(Command::new("kill").arg(monitor.pid().to_string()))?;
    let data = qmp.wait_event("SHUTDOWN", SOON)?.data;
    ensure!(data == json!({ "guest": false, "reason": "host-signal" }), "{data}");
    qmp.wait_closed(SOON)?;
    until("all but what hangs is let go of", || {
        can_be_locked(&sound)
            && !attached()
            && !exists(&stage.socket())
            && !exists(&stage.file("pid"))
    })?;
    // Of the process, only the thread that waits is left.
    let tasks = || fs::read_dir(format!("/proc/{}/task", monitor.pid())).map_or(0, Iterator::count);
    until("the other threads end", || tasks() == 2)?;
    frozen.thaw()?;
    ensure!(monitor.wait_exit()?.code() == Some(0));
    Ok(())
}

/// A save whose target hangs: other clients are answered, the guest stops and runs, the next save
/// fails with the name of what hangs, and the monitor ends.
#[test]
fn a_save_into_storage_that_hangs_holds_neither_the_guest_nor_clients_nor_the_end() -> Result<()> {
    let mut stage = Stage::new("hung_save")?;
    let disk = with_a_file_system(&mut stage)?;
    let place = disk.parent().context("no directory")?.to_string_lossy().into_owned();
    let (mut monitor, mut qmp) = stage.start(stage.vm("count", "registers 1")?)?;
    monitor.wait_for("processors 1", SOON)?;
    let hanging = format!("{place}/saved");
    let save = |uri: String, resume: bool| -> Result<_> {
        let mut client = Client::connect(&stage.socket(), SOON)?;
        let arguments = json!({ "uri": uri, "resume": resume });
        Ok(thread::spawn(move || {
            client.execute_raw("migrate", arguments).err().map(|e| e.to_string())
        }))
    };
    let result_of = |caller: JoinHandle<Option<String>>| {
        caller.join().map_err(|_| anyhow::anyhow!("the caller has panicked"))
    };
    let is = |qmp: &mut Client, status: &str| -> Result<bool> {
        let info = qmp.execute_raw("query-migrate", json!({}))?;
        Ok(info.get("status") == Some(&json!(status)))
    };

    for resume in [true, false] {
        let frozen = Frozen::new(monitor.pid(), &place)?;
        let caller = save(format!("file:{hanging}"), resume)?;
        let deadline = Instant::now() + SOON;
        while !is(&mut qmp, "active")? {
            ensure!(Instant::now() < deadline, "it does not begin");
        }
        // All of this while the target hangs.
        ensure!(status(&mut qmp)? == "running");
        stop(&mut qmp)?;
        ensure!(status(&mut qmp)? == "paused");
        cont(&mut qmp)?;
        simple(&mut qmp, "migrate_cancel")?;
        ensure!(is(&mut qmp, "cancelling")?);
        ensure!(status(&mut qmp)? == "running");
        let other = format!("file:{}", stage.file("other").display());
        let said = result_of(save(other.clone(), resume)?)?.context("a second save got through")?;
        ensure!(said.contains(&hanging) && said.contains("cancelled and hangs"), "{said}");
        ensure!(is(&mut qmp, "cancelling")? && !caller.is_finished());
        // A save with enough patience succeeds when the storage answers.
        let waiting = save(other, true)?;
        frozen.thaw()?;
        let said = result_of(caller)?.context("it was saved although it was cancelled")?;
        ensure!(said.contains("cancelled"), "{said}");
        if let Some(said) = result_of(waiting)? {
            ensure!(said.contains("cancelled and hangs"), "{said}");
        }
    }

    let frozen = Frozen::new(monitor.pid(), &place)?;
    let _caller = save(format!("file:{hanging}"), true)?;
    let deadline = Instant::now() + SOON;
    while !is(&mut qmp, "active")? {
        ensure!(Instant::now() < deadline, "it does not begin");
    }
    qmp.take_events();
    ensure!(qmp.execute_raw("quit", json!({}))? == json!({}));
    let data = qmp.wait_event("SHUTDOWN", SOON)?.data;
    ensure!(data == json!({ "guest": false, "reason": "host-qmp-quit" }), "{data}");
    qmp.wait_closed(SOON)?;
    ensure!(!monitor.unseen().contains("WRONG"), "{}", monitor.unseen());
    // The kernel keeps a process until its calls have ended.
    frozen.thaw()?;
    ensure!(monitor.wait_exit()?.code() == Some(0));
    Ok(())
}

/// A target that is not a directory, or a file that has replaced part of a saved state, is
/// reported, and the monitor does not wait for it.
#[test]
fn a_fifo_in_the_place_of_a_save_is_refused_by_name() -> Result<()> {
    let stage = Stage::new("fifo_save")?;
    let (mut monitor, mut qmp) = stage.start(stage.vm("count", "registers 1")?)?;
    monitor.wait_for("processors 1", SOON)?;
    let fifo = |path: &Path| output(Command::new("mkfifo").arg(path)).map(drop);
    let pipe = stage.file("pipe");
    fifo(&pipe)?;
    let uri = |path: &Path| format!("file:{}", path.display());
    for resume in [true, false] {
        let arguments = json!({ "uri": uri(&pipe), "resume": resume });
        refused(&mut qmp, "migrate", arguments, "cannot save into")?;
        ensure!(status(&mut qmp)? == "running");
    }
    // A base whose files have become FIFOs since, and an older save of the same kind.
    let base = stage.file("base");
    qmp.execute_raw("migrate", json!({ "uri": uri(&base), "resume": true, "track": true }))?;
    let more = json!({ "uri": uri(&stage.file("more")), "resume": true, "incremental": true });
    for name in ["state", "memory"] {
        fs::remove_file(base.join(name))?;
        fifo(&base.join(name))?;
        // Replaced by the first of them.
        let error = qmp.execute_raw("migrate", more.clone()).err().map(|e| e.to_string());
        let error = error.context("a save builds on a FIFO")?;
        ensure!(error.contains("base/state") && error.contains("not a regular file"), "{error}");
        ensure!(status(&mut qmp)? == "running");
    }
    quits(&stage, &mut monitor, &mut qmp)?;
    let said = refusal(&stage, &base, &[])?;
    ensure!(said.contains("base/state") && said.contains("not a regular file"), "{said}");
    Ok(())
}
