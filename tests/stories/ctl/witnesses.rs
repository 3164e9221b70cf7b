//! Witnesses that are not the same, that hang, and that forget.
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use stories::held::{Held, Op};
use stories::replicated::etcd::Cluster;

use crate::two::{Two, replication, script};

fn copy(from: &Path, to: &Path) -> Result<()> {
    let copied = Command::new("cp").arg("-a").args([from, to]).status()?;
    ensure!(copied.success(), "cp: {copied}");
    Ok(())
}

#[test]
fn sides_with_different_witnesses_or_policies_do_not_pair() -> Result<()> {
    let two = Two::new("different")?;
    let Two { here, there, .. } = &two;
    let witness = two.witness()?;
    let dir = here.file("witness");
    // The same directory, but not mounted on the other host.
    let receive = two.receiver(there, &witness);
    let text = format!("mount -t tmpfs none '{}'\nexec env {receive}", dir.display());
    let elsewhere = format!("unshare -m '{}'", script(here, "elsewhere", &text)?.display());
    let fence = ["--fence".to_owned(), "exec:true".to_owned()];
    let other = two.receiver(there, &fence);
    for (decides, command, says) in [
        (&witness, &elsewhere, "different witnesses"),
        (&witness, &other, "different witnesses"),
        (&fence, &receive, "different witnesses"),
        (&fence, &two.receiver(there, &["--fence".to_owned(), "ssh:b".to_owned()]), "a fence of"),
    ] {
        let words = ["remus", "-i", "25", &decides[0], &decides[1], "-s", "", "web", command];
        let (what, hint) = here.refused(&words)?;
        ensure!(what.contains(says), "{command}: {what}; {hint}");
        ensure!(replication(here)? == Value::Null, "{}", replication(here)?);
        there.clean("web")?;
    }
    here.says("web", "tally")
}

#[test]
fn a_witness_whose_storage_hangs_or_answers_twice_grants_a_term_once() -> Result<()> {
    let two = Two::new("hanging")?;
    let Two { here, there, .. } = &two;
    let held = Held::mount(&here.file("witness"), &[])?;
    let _guard = held.until_dropped();
    let witness = two.witness()?;
    two.protect(here, there, &witness)?;
    held.hold(Op::LINK);
    there.kill("web")?;
    held.wait_held(Op::LINK)?;
    sleep(Duration::from_millis(300));
    // It waits, and still answers queries.
    let info = replication(here)?;
    ensure!(info["state"] == "stalled" && info["claimed"] == json!(true), "{info}");
    held.release()?;
    here.wait_replication("web", "state", "degraded")?;
    there.ok(&["destroy", "-F", "web"])?;

    two.protect(here, there, &witness)?;
    held.repeat_links();
    there.kill("web")?;
    here.wait_replication("web", "state", "degraded")?;
    here.says("web", "tally")
}

#[test]
fn a_witness_that_dies_is_waited_for_and_one_that_has_forgotten_stops_the_guest() -> Result<()> {
    let two = Two::new("forgetful")?;
    let Two { here, there, .. } = &two;
    let mut cluster = Cluster::start("forgetful", 1)?;
    let witness = ["--witness".to_owned(), cluster.uri()];
    two.protect(here, there, &witness)?;
    cluster.kill(0)?;
    let (now, old) = (cluster.data(0), here.file("old"));
    copy(&now, &old)?;
    there.kill("web")?;
    here.wait_replication("web", "state", "stalled")?;
    sleep(Duration::from_millis(500));
    let info = replication(here)?;
    ensure!(info["state"] == "stalled" && info["claimed"] == json!(true), "{info}");
    cluster.run(0)?;
    here.wait_replication("web", "state", "degraded")?;
    here.says("web", "tally")?;

    // It dies once more, which changes nothing; then it is restored from the copy.
    cluster.kill(0)?;
    fs::remove_dir_all(&now)?;
    copy(&old, &now)?;
    ensure!(here.state("web")? == "running");
    cluster.run(0)?;
    here.wait_state("web", "paused")?;
    let (what, _) = here.refused(&["unpause", "web"])?;
    ensure!(what.contains("may run at its backup"), "{what}");
    Ok(())
}
