//! What surrounds a protected domain: the process that answers its monitor, and fences.
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use stories::monitor::SOON;

use crate::rig::Rig;

const LINEAGE: &str = "00000000-0000-0000-0000-000000000007";

/// A registered domain that runs, and is protected as far as the registry knows.
fn protected(rig: &Rig, name: &str, side: &str) -> Result<PathBuf> {
    let file = format!("{name}.json");
    rig.config(&file, "count", "plain 1")?;
    rig.ok(&["new", &file])?;
    rig.ok(&["start", name])?;
    let home = rig.file("r/state").join(name);
    let record = json!({ "version": 1, "side": side, "lineage": LINEAGE });
    fs::write(home.join("remus.json"), record.to_string())?;
    Ok(home)
}

fn mark(home: &Path) -> Result<Value> {
    Ok(serde_json::from_slice(&fs::read(home.join("fence.json"))?)?)
}

fn status(rig: &Rig, args: &[&str]) -> Result<i32> {
    rig.run(args)?.status.code().context("killed")
}

#[test]
fn a_fenced_side_is_down_and_stays_down() -> Result<()> {
    let rig = Rig::new("fenced")?;
    let home = protected(&rig, "web", "backup")?;
    let other = "00000000-0000-0000-0000-000000000008";
    // What is not known here may run elsewhere.
    ensure!(status(&rig, &["fence", other, "3"])? == 4);
    ensure!(status(&rig, &["fence", LINEAGE, "3", "--side", "primary"])? == 4);
    ensure!(rig.state("web")? == "running");

    let pid = rig.pid("web")?;
    // Also one that hangs.
    rig.signal(pid, Signal::STOP)?;
    ensure!(status(&rig, &["fence", LINEAGE, "3"])? == 0);
    rig.gone(pid)?;
    ensure!(mark(&home)?["mark"] == "fenced", "{}", mark(&home)?);
    ensure!(status(&rig, &["fence", LINEAGE, "3"])? == 0, "it is asked again");
    ensure!(status(&rig, &["fence", LINEAGE, "2"])? == 1, "by a side that is late");
    let (what, hint) = rig.refused(&["start", "web"])?;
    ensure!(what.contains("was fenced in term 3") && hint.contains("unprotect -F web"), "{hint}");
    rig.ok(&["unprotect", "-F", "web"])?;
    rig.ok(&["start", "web"])?;
    ensure!(rig.state("web")? == "running");
    Ok(())
}

#[test]
fn a_primary_that_fences_is_not_fenced_and_a_backup_is() -> Result<()> {
    let rig = Rig::new("crossing")?;
    let fencing = json!({ "version": 1, "lineage": LINEAGE, "term": 3, "mark": "fencing" });
    let primary = protected(&rig, "p", "primary")?;
    let backup = protected(&rig, "b", "backup")?;
    for home in [&primary, &backup] {
        fs::write(home.join("fence.json"), fencing.to_string())?;
    }
    // Which of the two is meant?
    ensure!(status(&rig, &["fence", LINEAGE, "3"])? == 4);
    ensure!(status(&rig, &["fence", LINEAGE, "3", "--side", "primary"])? == 1);
    ensure!(rig.state("p")? == "running" && rig.state("b")? == "running");
    ensure!(status(&rig, &["fence", LINEAGE, "3", "--side", "backup"])? == 0);
    ensure!(rig.state("p")? == "running" && rig.state("b")? == "killed");
    // In the next term it may be.
    ensure!(status(&rig, &["fence", LINEAGE, "4", "--side", "primary"])? == 0);
    ensure!(rig.state("p")? == "killed");
    Ok(())
}

/// Waits until `list` says whether a process answers for the domain.
fn answered(rig: &Rig, name: &str, wanted: bool) -> Result<()> {
    let deadline = Instant::now() + SOON;
    loop {
        let row = rig.listed(name)?.context("not listed")?;
        if row.pointer("/replication/agent") == Some(&json!(wanted)) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{row}");
    }
}

/// The processes that answer for the domain.
fn agents(rig: &Rig, name: &str) -> Result<Vec<i32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse() else { continue };
        let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words = String::from_utf8_lossy(&words).into_owned();
        let root = rig.file("r").display().to_string();
        if words.contains(&format!("\0remus-agent\0{name}\0")) && words.contains(&root) {
            found.push(pid);
        }
    }
    Ok(found)
}

#[test]
fn a_protected_domain_has_one_process_that_answers_for_it() -> Result<()> {
    let rig = Rig::new("answered")?;
    let home = protected(&rig, "web", "primary")?;
    answered(&rig, "web", false)?;
    // The next verb starts it.
    rig.ok(&["pause", "web"])?;
    answered(&rig, "web", true)?;
    rig.ok(&["unpause", "web"])?;
    let first = agents(&rig, "web")?;
    ensure!(first.len() == 1, "{first:?}");
    // Its death changes nothing but that.
    rig.signal(first[0], Signal::KILL)?;
    answered(&rig, "web", false)?;
    ensure!(rig.state("web")? == "running");
    rig.ok(&["rename", "web", "other"])?;
    rig.ok(&["pause", "other"])?;
    answered(&rig, "other", true)?;
    rig.ok(&["rename", "other", "web"])?;
    answered(&rig, "web", true)?;
    let second = agents(&rig, "other")?;
    ensure!(second.len() == 1, "{second:?}");
    // It ends with the protection,
    let home = home.with_file_name("web");
    fs::rename(home.join("remus.json"), home.join("was.json"))?;
    rig.gone(second[0])?;
    // and with the monitor.
    fs::rename(home.join("was.json"), home.join("remus.json"))?;
    rig.ok(&["unpause", "web"])?;
    answered(&rig, "web", true)?;
    let third = agents(&rig, "web")?;
    rig.ok(&["destroy", "web"])?;
    rig.gone(third[0])
}
