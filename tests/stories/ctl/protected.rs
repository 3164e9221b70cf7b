//! Domains that are protected by a second one on the same host, with real monitors.
use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::rig::Rig;

/// Lines that the guest prints in half a second, at least.
const LINES: usize = 10;

/// What a guest prints, from the beginning, as long as its monitor lives.
pub struct Console(JoinHandle<String>);

impl Console {
    pub fn open(rig: &Rig, name: &str) -> Result<(Self, UnixStream)> {
        let info = rig.ok(&["info", name])?;
        let run = info.pointer("/0/run").and_then(Value::as_str).context("no directory")?;
        let mut stream = UnixStream::connect(Path::new(run).join("console.sock"))?;
        let own = stream.try_clone()?;
        let read = move || {
            let mut said = Vec::new();
            // Killed, its monitor may not close the connection in an orderly way.
            let _ = stream.read_to_end(&mut said);
            String::from_utf8_lossy(&said).into_owned()
        };
        Ok((Self(thread::spawn(read)), own))
    }

    pub fn said(self) -> Result<String> {
        self.0.join().map_err(|_| anyhow::anyhow!("the reader has panicked"))
    }
}

/// The numbers in whole lines of what the guest `hello tally` has printed.
pub fn numbers(said: &str) -> Result<Vec<u64>> {
    let whole = said.rfind('\n').map_or("", |end| &said[..end]);
    let words = whole.lines().filter_map(|line| line.trim().strip_prefix("tally "));
    words
        .map(|word| u64::from_str_radix(word, 16).with_context(|| format!("'{word}' is no number")))
        .collect()
}

/// Starts the domain `web`, whose guest counts aloud.
pub fn count_aloud(rig: &Rig) -> Result<()> {
    rig.config("web.json", "hello", "tally")?;
    rig.ok(&["create", "web.json"])?;
    rig.says("web", "tally")
}

/// Milliseconds of silence that no test waits for: both sides know each other's process.
pub const LONG: &str = "600000";

pub fn protect(rig: &Rig, name: &str) -> Result<()> {
    let said = rig.ok(&["remus", "--local", "-i", "25", "--timeout", LONG, name])?;
    ensure!(said.pointer("/replication/state") == Some(&json!("protected")), "{said}");
    Ok(())
}

/// The report of a protected domain is on paper what its monitor says.
fn reported(rig: &Rig, name: &str) -> Result<()> {
    let report = rig.ok(&["remus-report", name])?;
    let said = |pointer: &str| report.pointer(pointer).with_context(|| format!("{report}"));
    let count = said("/checkpoints")?.as_u64().context("no number")?;
    ensure!(said("/pause-us/count")?.as_u64() > Some(0), "{report}");
    let file = |pointer: &str| -> Result<String> {
        Ok(fs::read_to_string(rig.file(said(pointer)?.as_str().context("no file")?))?)
    };
    let (csv, svg) = (file("/csv")?, file("/svg")?);
    ensure!(csv.starts_with("number,term,epoch,") && csv.lines().count() as u64 == count + 1);
    ensure!(svg.contains(&format!("Protection of {name}")) && svg.contains("StratoVirt-"), "{svg}");
    Ok(())
}

/// Lets the guest of a domain print some lines, and returns them.
pub fn some_numbers(rig: &Rig, name: &str) -> Result<Vec<u64>> {
    let (console, own) = Console::open(rig, name)?;
    thread::sleep(Duration::from_millis(500));
    own.shutdown(std::net::Shutdown::Both)?;
    numbers(&console.said()?)
}

#[test]
fn a_domain_whose_monitor_is_killed_runs_on_and_forgets_nothing_that_it_has_said() -> Result<()> {
    let rig = Rig::new("killed")?;
    count_aloud(&rig)?;
    protect(&rig, "web")?;
    rig.wait_replication("web-backup", "state", "standby")?;
    let table = String::from_utf8(rig.run(&["list"])?.stdout)?;
    ensure!(
        table.contains(" P protected term 1 epoch ") && table.contains(" B standby term 1 "),
        "{table}"
    );
    let (what, hint) = rig.refused(&["unprotect", "web-backup"])?;
    ensure!(what.contains("is the backup") && hint.contains("failover web-backup"), "{what}");

    let (console, _own) = Console::open(&rig, "web")?;
    thread::sleep(Duration::from_millis(500));
    rig.kill("web")?;
    let shown = numbers(&console.said()?)?;
    rig.wait_replication("web-backup", "role", "primary")?;
    rig.wait_state("web-backup", "running")?;
    ensure!(rig.state("web")? == "killed");
    rig.says("web-backup", "tally")?;
    let later = some_numbers(&rig, "web-backup")?;
    let (last, first) = (shown.last().context("nothing")?, later.first().context("nothing")?);
    // The lines of the last checkpoint come again: nobody knows whether they have been shown.
    let goes_on = *first <= last + 1 && later.last() > Some(last);
    ensure!(goes_on, "it has shown {last}, and continues with {later:?}");
    ensure!(shown.len() >= LINES && later.len() >= LINES, "{shown:?}, {later:?}");
    ensure!(later.windows(2).all(|pair| pair[1] == pair[0] + 1), "{later:?}");

    // It is a domain like any other: it can be protected again, and ended.
    let (what, hint) = rig.refused(&["remus-report", "web-backup"])?;
    ensure!(what.contains("no checkpoint") && hint.contains("remus web-backup"), "{what}");
    protect(&rig, "web-backup")?;
    reported(&rig, "web-backup")?;
    rig.kill("web-backup-backup")?;
    rig.wait_replication("web-backup", "state", "degraded")?;
    rig.ok(&["unprotect", "web-backup"])?;
    ensure!(rig.state("web-backup-backup")? == "absent");
    rig.ok(&["pause", "web-backup"])?;
    rig.ok(&["destroy", "web-backup"])?;
    ensure!(rig.state("web-backup")? == "absent");
    Ok(())
}

#[test]
fn a_domain_that_is_unprotected_or_destroyed_leaves_no_backup() -> Result<()> {
    let rig = Rig::new("unprotected")?;
    count_aloud(&rig)?;
    protect(&rig, "web")?;
    rig.ok(&["unprotect", "web"])?;
    ensure!(rig.state("web-backup")? == "absent");
    let row = rig.listed("web")?.context("not listed")?;
    ensure!(row["state"] == "running" && row["replication"] == Value::Null, "{row}");
    protect(&rig, "web")?;
    // Not by accident.
    let (what, hint) = rig.refused(&["destroy", "web"])?;
    ensure!(what.contains("and its backup with it") && hint.contains("destroy -F web"), "{what}");
    let (what, _) = rig.refused(&["destroy", "web-backup"])?;
    ensure!(what.contains("is a backup") && rig.state("web-backup")? == "standby", "{what}");
    rig.ok(&["destroy", "-F", "web"])?;
    ensure!(rig.state("web")? == "absent" && rig.state("web-backup")? == "absent");
    Ok(())
}

#[test]
fn a_guest_moves_to_its_backup_on_the_order_of_either_side() -> Result<()> {
    let rig = Rig::new("moved")?;
    count_aloud(&rig)?;
    protect(&rig, "web")?;
    let moved = rig.ok(&["failover", "--planned", "web"])?;
    ensure!(moved["runs"] == "at the backup", "{moved}");
    rig.wait_state("web-backup", "running")?;
    ensure!(rig.state("web")? == "absent");
    protect(&rig, "web-backup")?;
    let (what, _) = rig.refused(&["failover", "--planned", "web-backup-backup"])?;
    ensure!(what.contains("--planned"), "{what}");
    // An order at the backup may lose against a primary that is alive: then nothing has moved.
    let order = rig.command(&["failover", "web-backup-backup"]).output()?;
    let runs = if order.status.success() { "web-backup-backup" } else { "web-backup" };
    rig.says(runs, "tally")
}

#[test]
fn memory_that_others_may_write_is_not_protected() -> Result<()> {
    let rig = Rig::new("shared-memory")?;
    let path = rig.config("web.json", "hello", "tally")?;
    let mut config: Value = serde_json::from_slice(&fs::read(&path)?)?;
    config["machine-config"]["mem_share"] = json!(true);
    fs::write(&path, config.to_string())?;
    rig.ok(&["create", "web.json"])?;
    let (what, _) = rig.refused(&["remus", "--local", "web"])?;
    ensure!(
        what.contains("memory other processes can map") && what.contains("mem-share"),
        "{what}"
    );
    ensure!(rig.state("web")? == "running" && rig.state("web-backup")? == "absent");
    Ok(())
}
