//! A guest's kvm-clock continues from where it stopped, or as if it had not stopped, as requested.
use std::fs::File;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use qmp::client::Client;
use serde_json::json;
use stories::monitor::{Monitor, SOON, Vm};

use crate::snapshot::save;
use crate::stage::{Stage, cont, quits, stop};
use crate::stream::{getfd, inherited};

/// How long the guest stays saved.
const GAP: Duration = Duration::from_secs(2);

/// What the guest's clock shows.
fn guest_time(monitor: &mut Monitor) -> Result<Duration> {
    let line = monitor.wait_for("\n", SOON)?;
    let number = line.trim().strip_prefix("clock ").with_context(|| line.clone())?;
    Ok(Duration::from_nanos(u64::from_str_radix(number, 16)?))
}

fn restore(stage: &Stage, incoming: &str) -> Result<(Monitor, Client)> {
    let args = ["-S", "-incoming", incoming];
    let mut monitor = Vm::described(json!({})).args(&args).start(&stage.paths, &stage.dir)?;
    let qmp = monitor.qmp()?;
    Ok((monitor, qmp))
}

#[test]
fn a_guests_clock_continues_from_the_save_or_catches_up() -> Result<()> {
    let stage = Stage::new("clock")?;
    let (mut monitor, mut qmp) = stage.start(stage.vm("clock", "")?)?;
    guest_time(&mut monitor)?;
    let begin = Instant::now();
    monitor.type_in("x")?;
    let before = guest_time(&mut monitor)?;
    let saved = stage.file("saved");
    save(&mut qmp, &saved, false)?;
    let stream = stage.file("stream");
    getfd(&mut qmp, "out", File::create(&stream)?)?;
    qmp.execute_raw("migrate", json!({ "uri": "fd:out" }))?;
    quits(&stage, &mut monitor, &mut qmp)?;
    thread::sleep(GAP);

    // Restored, and saved again before it runs: the clock has not advanced since the first save.
    let (mut monitor, mut qmp) =
        restore(&stage, &format!("file:{},clock=realtime", saved.display()))?;
    let again = stage.file("again");
    save(&mut qmp, &again, false)?;
    quits(&stage, &mut monitor, &mut qmp)?;

    let file = File::open(&stream)?;
    let fd = inherited(&file)?;
    for (incoming, catches_up) in [
        (format!("file:{}", saved.display()), false),
        (format!("file:{},clock=continue,mapped=off", again.display()), false),
        (format!("file:{},mapped=uffd,clock=realtime", saved.display()), true),
        (format!("file:{},clock=realtime", again.display()), true),
        (format!("{fd},clock=realtime"), true),
    ] {
        let (mut monitor, mut qmp) = restore(&stage, &incoming)?;
        cont(&mut qmp)?;
        let asked = begin.elapsed();
        monitor.type_in("x")?;
        let ahead = guest_time(&mut monitor)?.checked_sub(before).context("it went back")?;
        let most = begin.elapsed();
        println!("{incoming}: {ahead:?} ahead after {most:?}");
        ensure!(ahead <= if catches_up { most } else { most - GAP }, "{incoming}: {ahead:?}");
        ensure!(!catches_up || ahead >= GAP, "{incoming}: {ahead:?} after {most:?}");
        // From then on it stops with the machine.
        stop(&mut qmp)?;
        thread::sleep(GAP);
        cont(&mut qmp)?;
        monitor.type_in("x")?;
        let now = guest_time(&mut monitor)? - before;
        ensure!(now >= ahead && now - ahead <= begin.elapsed() - asked - GAP, "{now:?}");
        quits(&stage, &mut monitor, &mut qmp)?;
    }
    Ok(())
}
