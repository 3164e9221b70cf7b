//! A registry that was damaged or cannot be written, and verbs that are killed half-way.
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use stories::monitor::SOON;

use crate::rig::Rig;

#[test]
fn a_damaged_record_is_shown_and_does_not_hide_the_others() -> Result<()> {
    let rig = Rig::new("damaged")?;
    rig.config("vm.json", "hello", "halt")?;
    for name in ["a", "b"] {
        rig.ok(&["new", "vm.json", "--name", name])?;
    }
    rig.ok(&["start", "a"])?;
    let record = rig.file("r/state/a/domain.json");
    let whole = fs::read_to_string(&record)?;
    let other = whole.replace("\"version\": 1", "\"version\": 7");
    let cases = [
        ("", "is damaged"),
        (whole.get(..whole.len() / 2).context("a record")?, "is damaged"),
        (other.as_str(), "has version 7; this stratoctl knows 1"),
    ];
    for (text, says) in cases {
        fs::write(&record, text)?;
        let row = rig.listed("a")?.context("not listed")?;
        ensure!(row.get("state") == Some(&json!("running")), "{row}");
        ensure!(row.get("damaged").is_some_and(|said| said.to_string().contains(says)), "{row}");
        ensure!(rig.state("b")? == "registered");
        // What does not need the record works.
        rig.ok(&["pause", "a"])?;
        rig.ok(&["unpause", "a"])?;
        let (what, hint) = rig.refused(&["suspend", "a"])?;
        ensure!(what.contains(says) && hint.contains("delete -f a"), "{what}; {hint}");
    }
    rig.ok(&["destroy", "a"])?;
    let (what, _) = rig.refused(&["start", "a"])?;
    ensure!(what.contains("version 7"), "{what}");
    rig.ok(&["delete", "-f", "a"])?;
    ensure!(rig.state("a")? == "absent");
    Ok(())
}

#[test]
fn a_verb_that_is_killed_leaves_what_the_next_one_can_use() -> Result<()> {
    let rig = Rig::new("interrupted")?;
    rig.config("vm.json", "count", "plain 1")?;
    let config = rig.file("vm.json");
    let config = config.to_str().context("a path")?;
    let mut seen = Vec::new();
    for round in 0..60_u64 {
        // Whatever state it is in, each of these does something in some of them.
        let verbs: [&[&str]; 6] = [
            &["new", config, "--name", "vm"],
            &["start", "vm"],
            &["suspend", "vm"],
            &["resume", "vm"],
            &["rename", "vm", "other"],
            &["destroy", "vm"],
        ];
        let verb = verbs.get(usize::try_from(round)? % verbs.len()).context("a verb")?;
        let mut child = rig.command(verb).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        thread::sleep(Duration::from_micros(round * 7919 % 40_000));
        child.kill()?;
        child.wait()?;
        for name in ["vm", "other"] {
            let state = rig.state(name)?;
            ensure!(state != "killed", "after {verb:?} it is {state}");
            seen.push(state);
        }
        // Both at once would be two of one.
        let here = |name| Ok::<_, anyhow::Error>(rig.state(name)? != "absent");
        ensure!(!(here("vm")? && here("other")?), "after {verb:?} there are two");
        if here("other")? {
            rig.ok(&["rename", "other", "vm"])?;
        }
    }
    rig.clean("vm")?;
    rig.ok(&["new", config, "--name", "vm"])?;
    rig.ok(&["start", "vm"])?;
    rig.clean("vm")?;
    ensure!(seen.iter().any(|state| state == "running"), "{seen:?}");
    Ok(())
}

#[test]
fn an_unmanaged_domain_whose_creator_was_killed_is_whole_or_gone() -> Result<()> {
    let rig = Rig::new("orphan")?;
    rig.config("vm.json", "hello", "halt")?;
    for round in 0..30_u64 {
        let mut child = rig
            .command(&["create", "vm.json"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        thread::sleep(Duration::from_micros(round * 7919 % 50_000));
        child.kill()?;
        child.wait()?;
        let state = rig.state("vm")?;
        ensure!(
            ["absent", "starting", "running", "hung"].contains(&state.as_str()),
            "it is {state}"
        );
        // One that was on its way comes up, and is never forgotten meanwhile.
        let deadline = Instant::now() + SOON;
        while monitors_in(&rig)? > 0 {
            ensure!(
                Instant::now() < deadline,
                "a monitor is left, and 'vm' is {}",
                rig.state("vm")?
            );
            rig.run(&["destroy", "vm"])?;
        }
        ensure!(rig.state("vm")? == "absent");
    }
    Ok(())
}

/// Processes that work in the registry.
fn monitors_in(rig: &Rig) -> Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir("/proc")? {
        // Some end meanwhile; others are no processes.
        if let Ok(directory) = fs::read_link(entry?.path().join("cwd")) {
            count += usize::from(directory.starts_with(rig.file("r")));
        }
    }
    Ok(count)
}

#[test]
fn a_registry_that_cannot_be_written_says_so() -> Result<()> {
    let rig = Rig::new("read-only")?;
    rig.config("vm.json", "hello", "halt")?;
    // A file where a directory has to be is in everybody's way, the super-user's too.
    fs::create_dir_all(rig.file("r"))?;
    fs::write(rig.file("r/state"), "in the way")?;
    let (what, _) = rig.refused(&["new", "vm.json"])?;
    ensure!(what.contains("r/state"), "{what}");
    rig.refused(&["list"])?;
    fs::remove_file(rig.file("r/state"))?;
    rig.ok(&["new", "vm.json"])?;
    let mode = fs::metadata(rig.file("r/state/vm"))?.permissions().mode() & 0o777;
    ensure!(mode == 0o700, "others may look in: {mode:o}");
    Ok(())
}
