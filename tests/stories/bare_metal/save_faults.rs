//! The host fails at each step of a save: the error says where, the guest runs on, and the older
//! save is intact.
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use qmp::client::Client;
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use serde_json::{Value, json};
use stories::monitor::{SOON, Vm};

use crate::hostile_snapshot::{contents, resumes};
use crate::snapshot::{counters, counting, save};
use crate::stage::{Stage, quits, status};
use crate::stream::getfd;

/// A save that fails: the error says where, the guest runs on, the older save is intact.
fn fails(qmp: &mut Client, saved: &Path, live: bool, says: &str) -> Result<()> {
    let before = contents(saved)?;
    let uri = format!("file:{}", saved.display());
    let error = match qmp.execute_raw("migrate", json!({ "uri": uri, "resume": live })) {
        Ok(_) => bail!("it was saved"),
        Err(error) => error.to_string(),
    };
    ensure!(error.contains("saved") && error.contains(says), "{error}");
    ensure!(status(qmp)? == "running", "the guest is paused");
    let info = qmp.execute_raw("query-migrate", json!({}))?;
    ensure!(info.get("status") == Some(&json!("failed")), "{info}");
    let reported = info.get("error-desc").and_then(Value::as_str).context("no reason")?;
    ensure!(reported.contains(says), "{info}");
    ensure!(contents(saved)? == before, "the older save has changed");
    Ok(())
}

#[test]
fn a_host_that_fails_at_any_step_of_a_save_leaves_the_older_one() -> Result<()> {
    let mut stage = Stage::new("hostile-fail")?;
    let (plan, library) = (stage.file("plan"), stage.file("fail.so"));
    fs::write(&library, include_bytes!(concat!(env!("OUT_DIR"), "/fail.so")))?;
    fs::write(&plan, "")?;
    stage.run_by(&format!("env FAIL='{}' LD_PRELOAD='{}'", plan.display(), library.display()))?;
    // The preloaded library makes system calls that the monitor's filter does not allow.
    let vm = stage.vm("count", "registers 1")?.args(&["-disable-seccomp"]);
    let (mut monitor, mut qmp) = stage.start(vm)?;
    monitor.wait_for("processors 1", SOON)?;
    let saved = stage.file("saved");
    save(&mut qmp, &saved, true)?;
    let before = counters(&saved, 1)?;
    let errors = [(5, "Input/output error"), (28, "No space left"), (122, "quota exceeded")];
    let steps =
        ["ftruncate", "pwrite", "pwrite 3", "write", "fsync", "fsync 1", "fsync 2", "rename"];
    for (number, step) in steps.into_iter().enumerate() {
        for (errno, says) in errors {
            let (call, skip) = step.split_once(' ').unwrap_or((step, "0"));
            fs::write(&plan, format!("{call} {errno} {skip}"))?;
            fails(&mut qmp, &saved, number % 2 == 0, says)
                .with_context(|| format!("{step}: {says}"))?;
            fs::write(&plan, "")?;
        }
    }
    // The new state is in place already, and is the valid one whatever fails now.
    for step in ["rename 5 1", "fsync 5 3"] {
        fs::write(&plan, step)?;
        let uri = format!("file:{}", saved.display());
        let result = qmp.execute_raw("migrate", json!({ "uri": uri }));
        ensure!(result.is_err(), "{step}: the failure is not reported");
        ensure!(status(&mut qmp)? == "running");
        fs::write(&plan, "")?;
    }
    let own = Stage::new("hostile-fail-on")?;
    resumes(&own, &saved, &before)?;
    save(&mut qmp, &saved, true)?;
    ensure!(!monitor.unseen().contains("WRONG"), "{}", monitor.unseen());
    quits(&stage, &mut monitor, &mut qmp)?;
    resumes(&own, &saved, &before)
}

/// Before a save succeeds, every device checks its state. Here one device refuses a state whose
/// bytes are valid.
#[test]
fn what_could_not_be_restored_does_not_count_as_saved() -> Result<()> {
    let mut stage = Stage::new("hostile-refuse")?;
    let refuses = stage.file("refuses");
    fs::write(&refuses, "")?;
    stage.run_by(&format!("env STRATOVIRT_TEST_REFUSE='{}'", refuses.display()))?;
    let (mut monitor, mut qmp) = stage.start(stage.vm("count", "registers 1")?)?;
    monitor.wait_for("processors 1", SOON)?;
    let base = stage.file("base");
    let uri = format!("file:{}", base.display());
    qmp.execute_raw("migrate", json!({ "uri": uri, "track": true, "resume": true }))?;
    let saved = stage.file("saved");
    let uri = format!("file:{}", saved.display());
    let incremental = json!({ "uri": uri, "incremental": true, "track": true, "resume": true });
    qmp.execute_raw("migrate", incremental.clone())?;
    let older = contents(&saved)?;
    let next = stage.file("next");
    let uri_of_next = format!("file:{}", next.display());
    let incremental =
        json!({ "uri": uri_of_next, "incremental": true, "track": true, "resume": true });
    for device in ["serial0", "disk0", "nic1"] {
        for (way, migrate) in [
            ("suspend", json!({ "uri": uri })),
            ("save", json!({ "uri": uri, "resume": true })),
            ("incremental", incremental.clone()),
            ("stream", json!({ "uri": "fd:out" })),
        ] {
            if way == "stream" {
                getfd(&mut qmp, "out", File::create(stage.file("stream"))?)?;
            }
            fs::write(&refuses, device)?;
            let error = match qmp.execute_raw("migrate", migrate) {
                Ok(_) => bail!("{way}: it was saved"),
                Err(error) => error.to_string(),
            };
            ensure!(error.contains("could not be restored"), "{way}: {error}");
            ensure!(error.contains(device), "{way}: {error}");
            ensure!(status(&mut qmp)? == "running", "{way}: the guest is paused");
            ensure!(contents(&saved)? == older, "{way}: the older save has changed");
            ensure!(!next.exists(), "{way}: a save that does not count is left behind");
            fs::write(&refuses, "")?;
        }
    }
    // The stream has no `End`, so nothing can be started from it.
    let incoming = format!("exec:cat {}", stage.file("stream").display());
    let args = ["-S", "-incoming", &incoming];
    let mut there = Vm::described(json!({})).args(&args).start(&stage.paths, &stage.dir)?;
    ensure!(there.wait_exit()?.code() == Some(1));
    // Nothing that the next save needs is lost.
    let before = counters(&saved, 1)?;
    qmp.execute_raw("migrate", incremental)?;
    quits(&stage, &mut monitor, &mut qmp)?;
    resumes(&stage, &next, &before)
}

/// The same behind the system-call filter, on a file system that is really too small.
#[test]
fn a_full_file_system_leaves_the_guest_running_and_the_older_save_whole() -> Result<()> {
    let mut stage = Stage::new("hostile-full")?;
    let small = stage.file("small");
    fs::create_dir(&small)?;
    let mount = format!("mount -t tmpfs -o size=12m small \"{}\"", small.display());
    stage.prepare("-m", &mount)?;
    let (mut monitor, mut qmp) = stage.start(stage.vm("count", "registers 1")?)?;
    monitor.wait_for("processors 1", SOON)?;
    let uri = format!("file:{}", small.join("saved").display());
    let saves = |qmp: &mut Client| {
        qmp.execute_raw("migrate", json!({ "uri": uri, "resume": true })).map_err(|e| e.to_string())
    };
    // Accessed through the monitor's own mount namespace.
    let inside = PathBuf::from(format!("/proc/{}/root", monitor.pid()));
    let inside = inside.join(small.strip_prefix("/")?);
    saves(&mut qmp).map_err(anyhow::Error::msg)?;
    let saved = inside.join("saved");
    let before = contents(&saved)?;
    // No room is left for a second one.
    let mut filler = File::create(inside.join("filler"))?;
    let filled = std::io::copy(&mut std::io::repeat(1), &mut filler);
    ensure!(filled.is_err(), "a small file system took everything");
    for _ in 0..3 {
        let error = match saves(&mut qmp) {
            Ok(_) => bail!("it was saved"),
            Err(error) => error,
        };
        ensure!(error.contains("must be free there") && error.contains("No space left"), "{error}");
        ensure!(status(&mut qmp)? == "running");
        ensure!(contents(&saved)? == before, "the older save has changed");
    }
    drop(filler);
    fs::remove_file(inside.join("filler"))?;
    saves(&mut qmp).map_err(anyhow::Error::msg)?;
    ensure!(contents(&saved)? != before);
    ensure!(!monitor.unseen().contains("WRONG"), "{}", monitor.unseen());
    quits(&stage, &mut monitor, &mut qmp)
}

/// A limit on the size of files comes as a signal, which ends a process that does not expect it.
#[test]
fn a_limit_on_files_leaves_the_guest_running_and_the_older_save_whole() -> Result<()> {
    let (stage, mut monitor, mut qmp) = counting("hostile-limit", 1)?;
    let saved = stage.file("saved");
    save(&mut qmp, &saved, true)?;
    let before = counters(&saved, 1)?;
    let pid = Pid::from_raw(i32::try_from(monitor.pid())?);
    let none = getrlimit(Resource::Fsize);
    for bytes in [0, 1 << 20, 32 << 20] {
        prlimit(pid, Resource::Fsize, Rlimit { current: Some(bytes), ..none })?;
        for live in [true, false] {
            fails(&mut qmp, &saved, live, "File too large")?;
        }
        prlimit(pid, Resource::Fsize, none)?;
    }
    save(&mut qmp, &saved, true)?;
    ensure!(!monitor.unseen().contains("WRONG"), "{}", monitor.unseen());
    quits(&stage, &mut monitor, &mut qmp)?;
    resumes(&stage, &saved, &before)
}
