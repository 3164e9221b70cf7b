//! A machine is saved, and restored in other processes: any number of times, with its hot-plugged
//! devices. If something that it needs is missing, the restore fails.
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use qmp::client::{Client, ClientError};
use serde_json::{Value, json};
use stories::monitor::{Monitor, SOON, Vm};

use crate::stage::{Stage, patiently, quits, simple, status};

/// The guests' `COUNTERS`.
const COUNTERS: u64 = 4 << 20;

/// The counters in a saved memory file, where RAM below 3 GiB is at its own address.
pub fn counters(saved: &Path, count: u64) -> Result<Vec<u64>> {
    let memory = File::open(saved.join("memory"))?;
    (0..count)
        .map(|number| {
            let mut bytes = [0; 8];
            memory.read_exact_at(&mut bytes, COUNTERS + number * 4096)?;
            Ok(u64::from_le_bytes(bytes))
        })
        .collect()
}

pub fn save(qmp: &mut Client, directory: &Path, resume: bool) -> Result<Value> {
    let uri = format!("file:{}", directory.display());
    let returned = patiently(qmp, "migrate", &json!({ "uri": uri, "resume": resume }))?;
    ensure!(returned == json!({}), "{returned}");
    let info = qmp.execute_raw("query-migrate", json!({}))?;
    ensure!(info.get("status") == Some(&json!("completed")), "{info}");
    Ok(info)
}

/// A process that resumes from `saved`, paused at first.
pub fn restore(stage: &Stage, saved: &Path, args: &[&str]) -> Result<(Monitor, Client)> {
    let incoming = format!("file:{}", saved.display());
    let args = [&["-S", "-incoming", &incoming], args].concat();
    let mut monitor = Vm::described(json!({})).args(&args).start(&stage.paths, &stage.dir)?;
    let qmp = monitor.qmp()?;
    Ok((monitor, qmp))
}

/// The messages of a process that fails before it has a control socket.
pub fn refusal(stage: &Stage, saved: &Path, args: &[&str]) -> Result<String> {
    let incoming = format!("file:{}", saved.display());
    let args = [&["-S", "-incoming", &incoming], args].concat();
    let mut monitor = Vm::described(json!({})).args(&args).start(&stage.paths, &stage.dir)?;
    let status = monitor.wait_exit()?;
    let said = monitor.said_to_its_end()?;
    ensure!(status.code() == Some(1), "it ended with {status}: {said}");
    ensure!(!said.contains("panicked"), "{said}");
    Ok(said)
}

pub fn counting(story: &str, cpus: u64) -> Result<(Stage, Monitor, Client)> {
    let stage = Stage::new(story)?;
    let vm = stage.vm("count", &format!("registers {cpus}"))?.machine("vcpu_count", cpus);
    let (mut monitor, qmp) = stage.start(vm)?;
    monitor.wait_for(&format!("processors {cpus}"), SOON)?;
    Ok((stage, monitor, qmp))
}

/// Saved repeatedly while all its processors are in the middle of accesses; each time it resumes,
/// no counter has gone back and every value that a processor read was right.
fn resumes(story: &str, cpus: u64, mapped: &str) -> Result<()> {
    let (stage, mut monitor, mut qmp) = counting(story, cpus)?;
    let mut before = vec![0; usize::try_from(cpus)?];
    for round in 0..10u64 {
        // At another moment each time.
        thread::sleep(Duration::from_micros(1 << round));
        let saved = stage.file(&format!("saved{round}"));
        save(&mut qmp, &saved, false)?;
        ensure!(status(&mut qmp)? == "paused");
        let counted = counters(&saved, cpus)?;
        ensure!(counted.iter().zip(&before).all(|(now, before)| now >= before), "{counted:?}");
        before = counted;
        ensure!(!monitor.unseen().contains("WRONG"), "{}", monitor.unseen());
        quits(&stage, &mut monitor, &mut qmp)?;
        let incoming = format!("file:{},mapped={mapped}", saved.display());
        let args = ["-S", "-incoming", &incoming];
        monitor = Vm::described(json!({})).args(&args).start(&stage.paths, &stage.dir)?;
        qmp = monitor.qmp()?;
        simple(&mut qmp, "cont")?;
    }
    // They all run on.
    let deadline = Instant::now() + SOON;
    let last = stage.file("last");
    loop {
        save(&mut qmp, &last, false)?;
        if counters(&last, cpus)?.iter().zip(&before).all(|(now, before)| now > before) {
            break;
        }
        ensure!(Instant::now() < deadline, "counters stay at {before:?}");
        simple(&mut qmp, "cont")?;
    }
    ensure!(!monitor.unseen().contains("WRONG"), "{}", monitor.unseen());
    quits(&stage, &mut monitor, &mut qmp)
}

#[test]
fn one_processor_resumes_in_ten_processes() -> Result<()> {
    resumes("snap-one", 1, "on")
}

#[test]
fn two_processors_resume_in_ten_processes_from_verified_memory() -> Result<()> {
    resumes("snap-two", 2, "off")
}

#[test]
fn one_state_is_restored_ten_times_and_stays_as_it_is() -> Result<()> {
    let (stage, mut monitor, mut qmp) = counting("snap-many", 1)?;
    let saved = stage.file("saved");
    save(&mut qmp, &saved, false)?;
    quits(&stage, &mut monitor, &mut qmp)?;
    let read = |name| fs::read(saved.join(name));
    let (state, memory) = (read("state")?, read("memory")?);
    for _ in 0..10 {
        let (mut monitor, mut qmp) = restore(&stage, &saved, &[])?;
        simple(&mut qmp, "cont")?;
        let again = stage.file("again");
        save(&mut qmp, &again, false)?;
        ensure!(counters(&again, 1)? >= counters(&saved, 1)?);
        ensure!(!monitor.unseen().contains("WRONG"), "{}", monitor.unseen());
        quits(&stage, &mut monitor, &mut qmp)?;
    }
    ensure!(read("state")? == state && read("memory")? == memory, "a guest wrote to its template");
    Ok(())
}

#[test]
fn a_guest_that_runs_on_during_its_save_stops_for_the_rest_only() -> Result<()> {
    let (stage, mut monitor, mut qmp) = counting("snap-live", 2)?;
    let saved = stage.file("saved");
    for _ in 0..5 {
        let info = save(&mut qmp, &saved, true)?;
        ensure!(info.get("downtime").is_some(), "{info}");
        ensure!(status(&mut qmp)? == "running");
    }
    quits(&stage, &mut monitor, &mut qmp)?;
    // With checksums: what was copied while the guest ran and what was copied afterwards must be
    // consistent.
    let (mut monitor, mut qmp) = restore(&stage, &saved, &[])?;
    simple(&mut qmp, "cont")?;
    let again = stage.file("again");
    save(&mut qmp, &again, true)?;
    ensure!(counters(&again, 2)? >= counters(&saved, 2)?);
    ensure!(!monitor.unseen().contains("WRONG"), "{}", monitor.unseen());
    quits(&stage, &mut monitor, &mut qmp)
}

/// The guest writes to pages all over its memory, each in another block of the saved file. Its
/// writes during the buffering and writing of these pages must not show in the save.
#[test]
fn a_guest_that_dirties_scattered_pages_is_saved_as_it_was_at_one_moment() -> Result<()> {
    let stage = Stage::new("snap-scattered")?;
    let vm = stage.vm("count", "scattered 2")?;
    let vm = vm.machine("vcpu_count", 2).machine("mem_size", 256_u64 << 20);
    let (mut monitor, mut qmp) = stage.start(vm)?;
    monitor.wait_for("processors 2", SOON)?;
    let at = |n: usize| stage.file(&format!("saved{n}"));
    let scattered = |saved: &Path| -> Result<Vec<u64>> {
        let memory = File::open(saved.join("memory"))?;
        let page = |number: u64| {
            let mut bytes = [0; 8];
            memory.read_exact_at(&mut bytes, (6 << 20) + number * (512 << 10))?;
            Ok(u64::from_le_bytes(bytes))
        };
        (0..448).map(page).collect()
    };
    qmp.take_events();
    for n in 0..4 {
        let uri = format!("file:{}", at(n).display());
        let arguments =
            json!({ "uri": uri, "resume": true, "track": true, "incremental": n % 2 == 1 });
        qmp.execute_raw("migrate", arguments)?;
        let info = qmp.execute_raw("query-migrate", json!({}))?;
        ensure!(info.get("downtime-us").and_then(Value::as_u64).is_some_and(|us| us > 0), "{info}");
        ensure!(info.get("converging") == Some(&json!(true)), "{info}");
        ensure!(status(&mut qmp)? == "running");
        if n % 2 == 0 {
            // At one moment the guest is in the middle of one round over all pages at most.
            let pages = scattered(&at(n))?;
            let border = pages.iter().position(|page| *page != pages[0]).unwrap_or(pages.len());
            let (done, rest) = pages.split_at(border);
            ensure!(rest.iter().all(|page| page + 1 == done[0]), "{pages:?}");
        }
    }
    let reported: Vec<_> = qmp.take_events().into_iter().map(|event| event.event).collect();
    ensure!(
        reported.iter().all(|name| name == "MIGRATION"),
        "an internal pause of the monitor is reported: {reported:?}"
    );
    ensure!(!monitor.unseen().contains("WRONG"), "{}", monitor.unseen());
    quits(&stage, &mut monitor, &mut qmp)?;

    for (n, mapped) in [(0, "on"), (1, "on"), (1, "uffd"), (2, "off"), (3, "off")] {
        let incoming = format!("file:{},mapped={mapped}", at(n).display());
        let vm = Vm::described(json!({})).args(&["-S", "-incoming", &incoming]);
        let mut monitor = vm.start(&stage.paths, &stage.dir)?;
        let mut qmp = monitor.qmp()?;
        simple(&mut qmp, "cont")?;
        let (one, whole) = (stage.file("one"), stage.file("whole"));
        save(&mut qmp, &one, true)?;
        let deadline = Instant::now() + SOON;
        // It goes through all of its pages, and finds in each what it wrote.
        while counters(&whole, 1)
            .map_or(true, |now| counters(&one, 1).is_ok_and(|one| now[0] < one[0] + 3))
        {
            ensure!(Instant::now() < deadline, "it does not continue");
            save(&mut qmp, &whole, true)?;
        }
        ensure!(!monitor.unseen().contains("WRONG"), "{n}: {}", monitor.unseen());
        fs::remove_dir_all(&whole)?;
        quits(&stage, &mut monitor, &mut qmp)?;
    }
    Ok(())
}

#[test]
fn a_disk_that_was_plugged_in_is_there_and_may_lie_elsewhere() -> Result<()> {
    let (stage, mut monitor, mut qmp) = counting("snap-disk", 1)?;
    let image = stage.file("image");
    File::create(&image)?.set_len(1 << 20)?;
    let file = json!({ "driver": "file", "filename": image });
    qmp.execute_raw("blockdev-add", json!({ "node-name": "extra", "file": file }))?;
    let device = json!({ "id": "extra", "driver": "virtio-blk-mmio", "addr": "3" });
    qmp.execute_raw("device_add", device)?;
    let saved = stage.file("saved");
    save(&mut qmp, &saved, false)?;
    quits(&stage, &mut monitor, &mut qmp)?;

    let moved = stage.file("moved");
    fs::rename(&image, &moved)?;
    let said = refusal(&stage, &saved, &[])?;
    ensure!(said.contains("disk 'extra'") && said.contains("-drive id=extra,file="), "{said}");
    let drive = format!("id=extra,file={}", moved.display());
    let (mut monitor, mut qmp) = restore(&stage, &saved, &["-drive", &drive])?;
    let disks = qmp.execute_raw("query-named-block-nodes", json!({}))?;
    let path = disks.pointer("/0/file").and_then(Value::as_str).context("no disk")?;
    ensure!(Path::new(path) == moved, "{disks}");
    simple(&mut qmp, "cont")?;
    simple(&mut qmp, "stop")?;
    quits(&stage, &mut monitor, &mut qmp)?;

    File::options().write(true).open(&moved)?.set_len(2 << 20)?;
    let said = refusal(&stage, &saved, &["-drive", &drive])?;
    ensure!(
        said.contains("1048576") && said.contains("2097152"),
        "both sizes are reported: \
                                                                   {said}"
    );
    let said = refusal(&stage, &saved, &["-m", "64M"])?;
    ensure!(said.contains("leave -m out"), "{said}");
    let said = refusal(&stage, &saved, &["-machine", "disk-slots=8"])?;
    ensure!(said.contains("has 4 slots for disks") && said.contains("asks for 8"), "{said}");
    // If the numbers were equal, it would replace the saved one.
    let other = format!("id=other,file={}", moved.display());
    let said = refusal(&stage, &saved, &["-drive", &other, "-drive", &drive])?;
    ensure!(said.contains("no disk 'other'") && said.contains("extra"), "{said}");
    Ok(())
}

#[test]
fn a_save_that_cannot_be_leaves_the_guest_running() -> Result<()> {
    let (stage, mut monitor, mut qmp) = counting("snap-fail", 1)?;
    let uri = format!("file:{}", stage.file("no/such/place").display());
    for uri in [uri.as_str(), "file:", "nonsense", "tcp:127.0.0.1:1"] {
        ensure!(qmp.execute_raw("migrate", json!({ "uri": uri })).is_err(), "{uri} was accepted");
        ensure!(status(&mut qmp)? == "running");
    }
    quits(&stage, &mut monitor, &mut qmp)
}

/// Saved in full, then repeatedly incrementally, live and stopped; each save can be restored
/// together with its bases.
fn builds_on(story: &str, word: &str, mib: u64) -> Result<()> {
    let stage = Stage::new(story)?;
    let vm = stage.vm("count", &format!("{word} 2"))?;
    let vm = vm.machine("vcpu_count", 2).machine("mem_size", mib << 20);
    let (mut monitor, mut qmp) = stage.start(vm)?;
    monitor.wait_for("processors 2", SOON)?;
    let at = |n: usize| stage.file(&format!("saved{n}"));
    let uri = |n: usize| format!("file:{}", at(n).display());
    let refused = qmp.execute_raw("migrate", json!({ "uri": uri(0), "incremental": true }));
    let said = refused.err().map(|e| e.to_string()).unwrap_or_default();
    ensure!(said.contains("there is no base save") && said.contains("track"), "{said}");
    for n in 0..5 {
        let arguments = json!({
            "uri": uri(n), "incremental": n > 0, "track": true, "resume": n % 2 == 0,
        });
        qmp.execute_raw("migrate", arguments)?;
        let info = qmp.execute_raw("query-migrate", json!({}))?;
        let base = info.get("base").and_then(Value::as_str).context("no base")?;
        ensure!(Path::new(base).canonicalize()? == at(n).canonicalize()?, "{info}");
        if status(&mut qmp)? == "paused" {
            simple(&mut qmp, "cont")?;
        }
        // A save that fails loses nothing that the next one needs.
        let lost = format!("file:{}", stage.file("no/such/place").display());
        let lost = json!({ "uri": lost, "incremental": true, "track": true });
        ensure!(qmp.execute_raw("migrate", lost).is_err());
        let mut other = Client::connect(&stage.socket(), SOON)?;
        let cancelled = json!({
            "uri": format!("file:{}", stage.file(&format!("given-up{n}")).display()),
            "incremental": true, "track": true, "resume": true,
        });
        let caller = thread::spawn(move || other.execute_raw("migrate", cancelled).is_ok());
        simple(&mut qmp, "migrate_cancel")?;
        // It may have succeeded before: then the next one builds on it.
        caller.join().map_err(|_| anyhow::anyhow!("the caller has panicked"))?;
        thread::sleep(Duration::from_millis(20));
    }
    ensure!(!monitor.unseen().contains("WRONG"), "{}", monitor.unseen());
    quits(&stage, &mut monitor, &mut qmp)?;

    for n in 0..5 {
        for mapped in ["on", "off", "uffd"] {
            let incoming = format!("file:{},mapped={mapped}", at(n).display());
            let args = ["-S", "-incoming", &incoming];
            let vm = Vm::described(json!({})).args(&args);
            let mut monitor = vm.start(&stage.paths, &stage.dir)?;
            let mut qmp = monitor.qmp()?;
            simple(&mut qmp, "cont")?;
            // Saved in full, including pages that were not touched yet.
            let (one, whole) = (stage.file("one"), stage.file("whole"));
            save(&mut qmp, &one, true)?;
            let deadline = Instant::now() + SOON;
            loop {
                save(&mut qmp, &whole, true)?;
                let (before, now) = (counters(&one, 2)?, counters(&whole, 2)?);
                ensure!(!monitor.unseen().contains("WRONG"), "{n}: {}", monitor.unseen());
                if now.iter().zip(&before).all(|(now, before)| *now > before + 300) {
                    break;
                }
                ensure!(Instant::now() < deadline, "counters go from {before:?} to {now:?}");
            }
            quits(&stage, &mut monitor, &mut qmp)?;
            let (mut monitor, mut qmp) = restore(&stage, &whole, &[])?;
            simple(&mut qmp, "cont")?;
            save(&mut qmp, &one, true)?;
            ensure!(!monitor.unseen().contains("WRONG"), "{n}: {}", monitor.unseen());
            quits(&stage, &mut monitor, &mut qmp)?;
        }
    }
    // The base is saved again: saves that build on it can no longer be restored.
    let (mut monitor, mut qmp) = restore(&stage, &at(0), &[])?;
    save(&mut qmp, &at(0), false)?;
    quits(&stage, &mut monitor, &mut qmp)?;
    let said = refusal(&stage, &at(1), &[])?;
    ensure!(
        said.contains("saved0") && said.contains("has been replaced by a later save"),
        "{said}"
    );
    Ok(())
}

#[test]
fn saves_build_on_each_other() -> Result<()> {
    builds_on("builds", "rings", 64)
}

#[test]
fn saves_build_on_each_other_above_four_gibibytes() -> Result<()> {
    builds_on("builds-far", "far", 4608)
}

#[test]
fn a_guest_that_has_rebooted_is_saved_as_it_is_then() -> Result<()> {
    let stage = Stage::new("builds-reset")?;
    let vm = stage.vm("count", "rings 1")?;
    let (mut monitor, mut qmp) = stage.start(vm)?;
    monitor.wait_for("processors 1", SOON)?;
    let (first, second) = (stage.file("first"), stage.file("second"));
    let arguments = json!({ "uri": format!("file:{}", first.display()), "track": true });
    qmp.execute_raw("migrate", arguments)?;
    simple(&mut qmp, "cont")?;
    simple(&mut qmp, "system_reset")?;
    monitor.wait_for("processors 1", SOON)?;
    let uri = format!("file:{}", second.display());
    qmp.execute_raw("migrate", json!({ "uri": uri, "incremental": true, "resume": true }))?;
    // Without `track` it is the last one.
    let info = qmp.execute_raw("query-migrate", json!({}))?;
    ensure!(info.get("base").is_none(), "{info}");
    quits(&stage, &mut monitor, &mut qmp)?;
    for mapped in ["on", "off", "uffd"] {
        let incoming = format!("file:{},mapped={mapped}", second.display());
        let args = ["-S", "-incoming", &incoming];
        let vm = Vm::described(json!({})).args(&args);
        let mut monitor = vm.start(&stage.paths, &stage.dir)?;
        let mut qmp = monitor.qmp()?;
        simple(&mut qmp, "cont")?;
        let (one, other) = (stage.file("one"), stage.file("other"));
        save(&mut qmp, &one, true)?;
        let deadline = Instant::now() + SOON;
        while counters(&one, 1)? >= {
            save(&mut qmp, &other, true)?;
            counters(&other, 1)?
        } {
            ensure!(Instant::now() < deadline, "the guest is paused");
        }
        ensure!(!monitor.unseen().contains("WRONG"), "{}", monitor.unseen());
        quits(&stage, &mut monitor, &mut qmp)?;
    }
    Ok(())
}

#[test]
fn memory_that_is_damaged_never_reaches_a_guest_that_runs_already() -> Result<()> {
    let stage = Stage::new("damaged")?;
    let vm = stage.vm("count", "wide 1")?.machine("mem_size", 2_u64 << 30);
    let (mut monitor, mut qmp) = stage.start(vm)?;
    monitor.wait_for("processors 1", SOON)?;
    let saved = stage.file("saved");
    save(&mut qmp, &saved, false)?;
    quits(&stage, &mut monitor, &mut qmp)?;
    // The last block is filled last.
    let memory = File::options().read(true).write(true).open(saved.join("memory"))?;
    memory.write_all_at(b"damage", (2 << 30) - 4096)?;
    let says = "0x7fe00000 to 0x80000000 is damaged";
    let incoming = format!("file:{},mapped=uffd", saved.display());
    let args = ["-incoming", &incoming];
    let mut monitor = Vm::described(json!({})).args(&args).start(&stage.paths, &stage.dir)?;
    let mut qmp = monitor.qmp()?;
    ensure!(status(&mut qmp)? == "running");
    let lost = qmp.wait_event("MEMORY_FAILURE", SOON)?.data;
    ensure!(lost.get("action") == Some(&json!("fatal")), "{lost}");
    let reason = lost.get("reason").and_then(Value::as_str).unwrap_or_default();
    ensure!(reason.contains(says) && reason.contains("memory"), "{lost}");
    crate::stage::ends(&mut monitor, &mut qmp, false, "host-error", 1)?;
    let said = monitor.said_to_its_end()?;
    ensure!(said.contains(says), "{said}");
    // Detected at once when the guest itself touches it.
    memory.write_all_at(&[0; 6], (2 << 30) - 4096)?;
    memory.write_all_at(b"damage", COUNTERS + 8)?;
    let mut monitor = Vm::described(json!({})).args(&args).start(&stage.paths, &stage.dir)?;
    let status = monitor.wait_exit()?;
    ensure!(status.code() == Some(1), "it ended with {status}");
    let said = monitor.said_to_its_end()?;
    ensure!(said.contains("0x400000 to 0x600000 is damaged"), "{said}");
    ensure!(!monitor.shown().contains("WRONG"), "{}", monitor.shown());
    // A file that is truncated while it is in use; repeated where all of it has been read by then.
    memory.write_all_at(&[0; 6], COUNTERS + 8)?;
    let mut end = Vec::new();
    (&memory).seek(SeekFrom::Start((2 << 30) - 4096))?;
    (&memory).read_to_end(&mut end)?;
    for _ in 0..100 {
        let mut monitor = Vm::described(json!({})).args(&args).start(&stage.paths, &stage.dir)?;
        let mut qmp = monitor.qmp()?;
        memory.set_len((2 << 30) - 4096)?;
        if loses_memory(&monitor, &mut qmp)? {
            return crate::stage::ends(&mut monitor, &mut qmp, false, "host-error", 1);
        }
        quits(&stage, &mut monitor, &mut qmp)?;
        memory.write_all_at(&end, (2 << 30) - 4096)?;
    }
    bail!("memory was always read before the file was truncated");
}

/// Whether the monitor reports lost memory, or else has read all of it.
fn loses_memory(monitor: &Monitor, qmp: &mut Client) -> Result<bool> {
    let deadline = Instant::now() + SOON;
    loop {
        let reads = has_thread(monitor, "prefetch");
        match qmp.wait_event("MEMORY_FAILURE", Duration::from_millis(100)) {
            Ok(_) => return Ok(true),
            Err(ClientError::Timeout { .. }) if !reads => return Ok(false),
            Err(ClientError::Timeout { .. }) if Instant::now() < deadline => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Whether the monitor has a thread of this name.
fn has_thread(monitor: &Monitor, name: &str) -> bool {
    let tasks = fs::read_dir(format!("/proc/{}/task", monitor.pid())).into_iter().flatten();
    let names =
        tasks.flatten().filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
    names.into_iter().any(|comm| comm.trim() == name)
}
