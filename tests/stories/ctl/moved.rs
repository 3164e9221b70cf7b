//! What becomes of a registered domain whose guest may run, or runs, at its backup.
use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::rig::Rig;
use crate::two::Two;

#[test]
fn a_guest_that_continues_elsewhere_is_not_started_again_and_can_come_back() -> Result<()> {
    let two = Two::new("moved")?;
    let Two { here, there, .. } = &two;
    let witness = two.witness()?;
    two.protect(here, there, &witness)?;
    here.kill("web")?;
    there.wait_state("web", "running")?;
    ensure!(here.state("web")? == "killed");
    let (what, hint) = here.refused(&["start", "web"])?;
    ensure!(what == "the guest of 'web' has moved to its backup", "{what}");
    ensure!(hint.contains("stratoctl remus web HOST") && hint.contains("unprotect -F"), "{hint}");
    ensure!(here.state("web")? == "moved");
    here.refused(&["unprotect", "web"])?;
    ensure!(here.state("web")? == "moved");

    // The same domain is the backup now, and then has the guest again.
    two.protect(there, here, &witness)?;
    there.ok(&["failover", "--planned", "web"])?;
    here.wait_state("web", "running")?;
    here.says("web", "tally")?;
    ensure!(there.state("web")? == "absent");
    // It ended here then, so nothing keeps it from a new start.
    here.kill("web")?;
    here.ok(&["start", "web"])?;
    ensure!(here.listed("web")?.context("not listed")?["replication"] == Value::Null);
    Ok(())
}

#[test]
fn a_guest_that_both_hosts_have_lost_can_be_started() -> Result<()> {
    let two = Two::new("lost")?;
    let Two { here, there, .. } = &two;
    let witness = two.witness()?;
    two.protect(here, there, &witness)?;
    // The backup goes first, so that it continues nothing.
    there.kill("web")?;
    here.kill("web")?;
    here.ok(&["start", "web"])?;
    ensure!(here.state("web")? == "running");
    // The new guest is protected as well as the first one was.
    there.ok(&["destroy", "web"])?;
    two.protect(here, there, &witness)?;
    here.kill("web")?;
    there.wait_state("web", "running")?;
    here.refused(&["start", "web"])?;
    Ok(())
}

#[test]
fn a_backup_continues_a_guest_whose_domain_was_protected_in_an_earlier_life() -> Result<()> {
    let two = Two::new("earlier-life")?;
    let Two { here, there, .. } = &two;
    let witness = two.witness()?;
    two.protect(here, there, &witness)?;
    here.ok(&["unprotect", "web"])?;
    // It would be ready for another protection of the same guest for a while.
    there.ok(&["destroy", "-F", "web"])?;
    here.ok(&["destroy", "web"])?;
    here.ok(&["start", "web"])?;
    two.protect(here, there, &witness)?;
    here.kill("web")?;
    there.wait_state("web", "running")?;
    there.says("web", "tally")
}

#[test]
fn without_a_witness_nobody_knows_where_the_guest_runs() -> Result<()> {
    let here = Rig::new("unwitnessed")?;
    here.config("web.json", "hello", "tally")?;
    here.ok(&["new", "web.json"])?;
    here.ok(&["start", "web"])?;
    let there = Rig::new("unwitnessed-there")?;
    let receive = there.receiver("");
    here.ok(&["remus", "-F", "-i", "25", "-s", "", "web", &receive])?;
    here.kill("web")?;
    let (what, hint) = here.refused(&["start", "web"])?;
    ensure!(what.contains("may run at its backup") && what.contains("no witness"), "{what}");
    ensure!(hint.contains("unprotect -F web"), "{hint}");
    here.ok(&["unprotect", "-F", "web"])?;
    here.ok(&["start", "web"])?;
    Ok(())
}
