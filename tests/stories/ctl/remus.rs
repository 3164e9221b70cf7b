//! What surrounds a protected domain: the process that answers its monitor, the way to its backup,
//! and fences.
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use stories::monitor::SOON;

use crate::rig::Rig;
use crate::stand_in::{StandIn, incoming};

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
    running(&rig.file("r"), &format!("\0remus-agent\0{name}\0"))
}

/// The processes of the registry at `root` that have these words, each of which ends with a NUL
/// character, on their command line.
pub fn running(root: &Path, words: &str) -> Result<Vec<i32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse() else { continue };
        let all = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let all = String::from_utf8_lossy(&all).into_owned();
        if all.contains(words) && all.contains(&format!("\0{}\0", root.display())) {
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

/// What the stand-in has got as the answer to its question `nonce`.
fn answer(monitor: &StandIn, nonce: u64) -> Result<Value> {
    let deadline = Instant::now() + SOON;
    loop {
        let all = monitor.told("replication-answer");
        if let Some(answer) = all.iter().find(|answer| answer.get("nonce") == Some(&json!(nonce))) {
            return Ok(answer.clone());
        }
        ensure!(Instant::now() < deadline, "no answer to {nonce}: {all:?}");
    }
}

#[test]
fn both_sides_may_be_on_one_host() -> Result<()> {
    let mut rig = Rig::new("local")?;
    rig.config("web.json", "count", "plain 1")?;
    StandIn::install(&mut rig)?;
    let (monitor, _) = StandIn::new(&rig.dir, "web")?;
    let (_backup, replica) = StandIn::new(&rig.dir, "web-backup")?;
    rig.ok(&["create", "web.json"])?;
    rig.ok(&["remus", "--local", "web"])?;
    let uuid = rig.ok(&["info", "web"])?;
    let uuid = uuid.pointer("/0/uuid").and_then(Value::as_str).context("no UUID")?.to_owned();
    let start = monitor.told("replication-start");
    let witness = start[0]["witness"].as_str().context("no witness")?;
    let lineage = start[0]["lineage"].as_str().context("no lineage")?;
    ensure!(lineage != uuid && witness.starts_with("dir:"), "{start:?}");
    let source = incoming(&rig, "web-backup")?;
    ensure!(source == format!("replicate:unix:replica.sock,witness={witness}"), "{source}");

    monitor.needs(&json!({ "nonce": 1, "need": "connect", "lineage": uuid }));
    let connected = answer(&monitor, 1)?;
    ensure!(connected["result"] == "connected", "{connected}");
    replica.accept()?;
    // The witness keeps what it is told, for both sides.
    let claim = json!({ "nonce": 2, "need": "claim", "lineage": uuid, "term": 1, "word": "solo",
        "side": "primary", "incarnation": LINEAGE });
    monitor.needs(&claim);
    let record = json!({ "word": "solo", "side": "primary", "incarnation": LINEAGE });
    ensure!(answer(&monitor, 2)?["record"] == record);
    monitor.needs(&json!({ "nonce": 3, "need": "fence", "lineage": uuid, "term": 1 }));
    ensure!(answer(&monitor, 3)?["reason"] == "there is no fence");

    let table = String::from_utf8(rig.run(&["list"])?.stdout)?;
    ensure!(table.contains("REMUS") && table.contains(" P protected epoch 9 lag 9\n"), "{table}");
    let (what, hint) = rig.refused(&["remus", "--local", "web"])?;
    ensure!(what.contains("protected already") && hint.contains("unprotect web"), "{what}");
    ensure!(rig.state("web-backup")? == "running");
    rig.ok(&["unprotect", "web"])?;
    ensure!(rig.listed("web")?.context("not listed")?.get("replication") == Some(&Value::Null));
    Ok(())
}

#[test]
fn a_backup_is_reached_through_a_command_and_again() -> Result<()> {
    let mut rig = Rig::new("received")?;
    rig.config("web.json", "count", "plain 1")?;
    StandIn::install(&mut rig)?;
    let (monitor, _) = StandIn::new(&rig.dir, "web")?;
    let (_backup, replica) = StandIn::new(&rig.dir, "other")?;
    rig.ok(&["create", "web.json"])?;
    // The command as ssh would run it on the other host, with a registry of its own.
    let stratoctl = rig.command(&[]).get_program().to_string_lossy().into_owned();
    let elsewhere = rig.file("elsewhere").display().to_string();
    let line = format!("{stratoctl} --root {elsewhere} remus-receive --name other");
    rig.ok(&["remus", "-F", "-s", "", "web", &line])?;
    for nonce in 1..=2 {
        monitor.needs(&json!({ "nonce": nonce, "need": "connect", "lineage": LINEAGE }));
        let connected = answer(&monitor, nonce)?;
        ensure!(connected["result"] == "connected", "{connected}");
        replica.accept()?;
    }
    ensure!(incoming(&rig, "other")? == "replicate:unix:replica.sock");
    rig.ok(&["--root", &elsewhere, "destroy", "other"])?;
    Ok(())
}

#[test]
fn a_receiver_passes_on_every_byte_or_says_why_not() -> Result<()> {
    let mut rig = Rig::new("relayed")?;
    rig.config("web.json", "count", "plain 1")?;
    rig.ok(&["new", "web.json"])?;
    let domain = fs::read(rig.file("r/state/web/domain.json"))?;
    let mut domain: Value = serde_json::from_slice(&domain)?;
    domain.as_object_mut().context("no object")?.remove("version");
    let greeting = |witness: Value, make: bool| json!({ "version": 1, "name": "copy", "domain": domain, "witness": witness, "make": make });
    StandIn::install(&mut rig)?;
    let (_monitor, replica) = StandIn::new(&rig.dir, "copy")?;
    for (line, says) in [
        (greeting(json!("dir:7"), true).to_string(), "different witnesses"),
        (greeting(json!(null), true).to_string().replace(":1,\"n", ":9,\"n"), "version 9"),
        (greeting(json!(null), false).to_string(), "no backup of 'copy' here any more"),
        ("{}".to_owned(), "first line"),
    ] {
        let mut receiver = rig.command(&["remus-receive"]);
        receiver.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut receiver = receiver.spawn()?;
        writeln!(receiver.stdin.take().context("no pipe")?, "{line}")?;
        let done = receiver.wait_with_output()?;
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        ensure!(!done.status.success() && said.contains(says), "{line}: {said}");
        ensure!(rig.listed("copy")?.is_none());
    }
    let receiver = || {
        let mut receiver = rig.command(&["remus-receive"]);
        receiver.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()
    };
    let mut made = receiver()?;
    writeln!(made.stdin.as_ref().context("a pipe")?, "{}", greeting(json!(null), true))?;
    ensure!(
        made.wait()?.success() && rig.listed("copy")?.is_some(),
        "it was made, and that is all"
    );
    let mut receiver = receiver()?;
    let (mut to, from) =
        (receiver.stdin.take().context("a pipe")?, receiver.stdout.take().context("a pipe")?);
    // With the first frames right behind the line.
    write!(to, "{}\nframes", greeting(json!(null), false))?;
    let mut from = BufReader::new(from);
    let mut welcome = String::new();
    from.read_line(&mut welcome)?;
    ensure!(welcome == "{}\n", "{welcome}");
    let (mut monitor, _) = replica.accept()?;
    let mut frames = [0; 6];
    monitor.read_exact(&mut frames)?;
    ensure!(&frames == b"frames");
    let much: Vec<u8> = (0..1 << 20).map(|byte: u32| (byte % 251) as u8).collect();
    let sent = much.clone();
    let writer = std::thread::spawn(move || to.write_all(&sent));
    let mut got = vec![0; much.len()];
    monitor.read_exact(&mut got)?;
    ensure!(got == much);
    monitor.write_all(b"Accept")?;
    drop(monitor);
    let mut rest = Vec::new();
    from.read_to_end(&mut rest)?;
    ensure!(rest == b"Accept" && receiver.wait()?.success(), "{rest:?}");
    let _ = writer.join();
    Ok(())
}
