//! A host that reboots starts its domains again: before, while or after the other side decides.
use std::fs;
use std::net::Shutdown;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use stories::replicated::witness::SCRIPT;

use crate::disks::describe;
use crate::protected::{Console, numbers};
use crate::remus::running;
use crate::rig::Rig;
use crate::two::{Stopped, Two, script, until};

/// Everything of this host ends, and what is not on its disk is gone.
fn loses_power(rig: &Rig) -> Result<()> {
    let monitor = rig.pid("web")?;
    let root = rig.file("r");
    let words = ["\0remus-agent\0web\0", "\0remus-receive\0"];
    let mut all = vec![monitor];
    for words in words {
        all.extend(running(&root, words)?);
    }
    for pid in &all {
        rig.signal(*pid, rustix::process::Signal::KILL)?;
    }
    all.iter().try_for_each(|pid| rig.gone(*pid))?;
    // The other side may be connecting again.
    until("a clean start", || Ok(fs::remove_dir_all(root.join("run")).is_ok()))
}

/// What the guest has found on its disk when it was started here.
fn found(rig: &Rig) -> Result<u64> {
    rig.says("web", "tally")?;
    let (console, own) = Console::open(rig, "web")?;
    sleep(Duration::from_millis(100));
    own.shutdown(Shutdown::Both)?;
    let said = console.said()?;
    let line = said.lines().find_map(|line| line.trim().strip_prefix("found "));
    Ok(u64::from_str_radix(line.with_context(|| said.clone())?, 16)?)
}

/// A guest that was shown to have reached a number has found that, or a later one, on its disk.
fn goes_on(rig: &Rig, before: Console) -> Result<()> {
    let (shown, found) = (numbers(&before.said()?)?, found(rig)?);
    let last = shown.last().context("it has said nothing")?;
    ensure!(found >= *last, "{last} was durable, and {found} is on the disk");
    Ok(())
}

/// The image is not the guest's any more, also under another name.
fn is_outdated(rig: &Rig) -> Result<()> {
    let config = rig.config("other.json", "hello", "halt")?;
    let image = rig.file("image");
    let drive = json!([{
        "drive_id": "root", "path_on_host": image, "read_only": false, "direct": false,
    }]);
    describe(&config, &drive)?;
    let (what, hint) = rig.refused(&["create", "other.json"])?;
    let says = ["the other side owns the guest", "was protected with witness"];
    ensure!(says.iter().any(|says| what.contains(says)), "{what}; {hint}");
    Ok(())
}

#[test]
fn a_host_that_reboots_starts_a_guest_only_where_the_other_one_has_not_continued_it() -> Result<()>
{
    let two = Two::with_disk("reboot")?;
    let Two { here, there, .. } = &two;
    let witness = two.witness()?;

    // Before the backup can ask.
    two.protect(here, there, &witness)?;
    here.says("web", "tally")?;
    let (before, _own) = Console::open(here, "web")?;
    let agent = Stopped::agent(there)?;
    loses_power(here)?;
    here.ok(&["start", "web"])?;
    goes_on(here, before)?;
    drop(agent);
    there.wait_replication("web", "state", "abandoned")?;
    ensure!(here.state("web")? == "running");
    there.ok(&["destroy", "-F", "web"])?;
    is_outdated(there)?;

    // At the same time.
    two.protect(here, there, &witness)?;
    loses_power(here)?;
    if here.run(&["start", "web"])?.status.success() {
        there.wait_replication("web", "state", "abandoned")?;
        there.ok(&["destroy", "-F", "web"])?;
        is_outdated(there)?;
        // Afterwards.
        two.protect(here, there, &witness)?;
        loses_power(here)?;
    }
    there.wait_replication("web", "role", "primary")?;
    here.refused(&["start", "web"])?;
    is_outdated(here)?;
    ensure!(there.state("web")? == "running");

    // The backup's host. Its primary may make a new backup there, which gets nothing in this term.
    two.protect(there, here, &witness)?;
    loses_power(here)?;
    there.wait_replication("web", "state", "degraded")?;
    here.refused(&["start", "web"])?;
    ensure!(here.state("web")? != "running");
    here.run(&["destroy", "-F", "web"])?;
    is_outdated(here)?;

    // Both, and only this one comes back: with what its journal holds.
    two.protect(there, here, &witness)?;
    let (before, _own) = Console::open(there, "web")?;
    sleep(Duration::from_millis(300));
    loses_power(there)?;
    loses_power(here)?;
    here.ok(&["start", "web"])?;
    goes_on(here, before)?;
    is_outdated(there)
}

/// A witness that kills the process whose number is in the file `kills`, when a backup has won.
fn deadly(rig: &Rig) -> Result<[String; 2]> {
    fs::write(rig.file("inner"), SCRIPT)?;
    let dir = rig.dir.display();
    let text = format!(
        "sh '{dir}/inner' \"$@\"\nstatus=$?\n\
         [ \"$1 $4\" != 'claim promote' ] || kill -9 $(cat '{dir}/kills') 2>/dev/null\nexit $status"
    );
    let program = script(rig, "deadly", &text)?;
    Ok(["--witness".to_owned(), format!("exec:{}", program.display())])
}

/// The backup dies between the grant and the guest's first step. Its primary, which is alive, keeps
/// the guest, and has it back once the backup's host can tell that it never ran there.
#[test]
fn a_backup_that_dies_with_the_grant_gives_the_guest_back() -> Result<()> {
    let two = Two::with_disk("granted")?;
    let Two { here, there, .. } = &two;
    let witness = deadly(here)?;
    two.protect(here, there, &witness)?;
    here.ok(&["failover", "--planned", "web"])?;
    there.wait_state("web", "running")?;
    two.protect(there, here, &witness)?;
    fs::write(here.file("kills"), here.pid("web")?.to_string())?;
    let link = Stopped::link(here)?;
    let agent = Stopped::agent(there)?;
    here.wait_state("web", "killed")?;
    drop(agent);
    there.wait_replication("web", "state", "fenced")?;
    drop(link);
    let (what, _) = here.refused(&["start", "web"])?;
    ensure!(what.contains("given back to its primary"), "{what}");
    there.wait_replication("web", "state", "degraded")?;
    there.wait_state("web", "running")?;
    there.says("web", "tally")
}
