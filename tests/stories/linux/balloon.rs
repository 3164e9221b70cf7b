//! Linux's own driver fills the balloon, reports freed memory, and gives its statistics.
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use qmp::client::Client;
use serde_json::{Value, json};
use stories::agent::Story;
use stories::monitor::{Monitor, SOON, Vm};
use stories::resident::guest_memory;

use crate::snapshot::Shape;

/// Makes the guest write `mib` MiB to a file system in its memory.
fn write(guest: &mut Monitor, mib: u64) -> Result<()> {
    guest.sh("mount -t tmpfs -o size=90% none /mnt")?;
    guest.sh(&format!("head -c {mib}m /dev/urandom > /mnt/file"))?;
    Ok(())
}

/// Makes the guest touch nearly all of its memory, and free it again.
fn touch(guest: &mut Monitor, mib: u64) -> Result<()> {
    write(guest, mib / 4 * 3)?;
    guest.sh("umount /mnt")?;
    Ok(())
}

/// Waits until the guest keeps only `bytes`.
fn fill(qmp: &mut Client, bytes: u64) -> Result<()> {
    qmp.execute_raw("balloon", json!({ "value": bytes }))?;
    let deadline = Instant::now() + SOON;
    loop {
        let actual = qmp.execute_raw("query-balloon", json!({}))?;
        if actual.get("actual") == Some(&json!(bytes)) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{actual}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// The host has at least 95 % of the half that is in the balloon.
fn gives_half_back(guest: &mut Monitor, qmp: &mut Client, mib: u64) -> Result<()> {
    touch(guest, mib)?;
    let (all, half) = (mib << 20, mib << 20 >> 1);
    fill(qmp, half)?;
    let kept = guest_memory(guest.pid(), mib)?;
    ensure!(kept <= all - half / 100 * 95, "{kept} bytes are kept");
    fill(qmp, all)
}

/// Half of the memory goes into the balloon, also after the machine was restored from a file that
/// its memory is mapped from.
pub fn half(story: &Story, shape: Shape) -> Result<()> {
    let vm = shape.vm(story)?.args(&["-balloon", "deflate-on-oom=on"]);
    let mut guest = vm.start(&story.paths, &story.dir)?;
    guest.wait_ready()?;
    let mut qmp = guest.qmp()?;
    gives_half_back(&mut guest, &mut qmp, shape.mib)?;

    let interval = json!({
        "path": "balloon0", "property": "guest-stats-polling-interval", "value": 1,
    });
    qmp.execute_raw("qom-set", interval)?;
    let deadline = Instant::now() + SOON;
    let free = loop {
        let stats = json!({ "path": "balloon0", "property": "guest-stats" });
        let stats = qmp.execute_raw("qom-get", stats)?;
        match stats.pointer("/stats/stat-free-memory").and_then(Value::as_u64) {
            Some(free) => break free,
            None => ensure!(Instant::now() < deadline, "{stats}"),
        }
    };
    ensure!(free > 0 && free < shape.mib << 20, "{free} bytes are free");

    let saved = story.dir.join("saved");
    qmp.execute_raw("migrate", json!({ "uri": format!("file:{}", saved.display()) }))?;
    qmp.execute_raw("quit", json!({}))?;
    guest.wait_exit()?;
    let source = format!("file:{},mapped=on", saved.display());
    let console = "-chardev stdio,id=outside -incoming";
    let args = [&console.split(' ').collect::<Vec<_>>()[..], &[source.as_str()]].concat();
    let mut guest = Vm::described(json!({})).args(&args).start(&story.paths, &story.dir)?;
    let mut qmp = guest.qmp()?;
    gives_half_back(&mut guest, &mut qmp, shape.mib)?;
    qmp.execute_raw("quit", json!({}))?;
    guest.wait_exit()?;
    Ok(())
}

/// Memory that the guest has freed goes back to the host without a request.
pub fn freed(story: &Story, shape: Shape) -> Result<()> {
    let reporting = ["-balloon", "free-page-reporting=on"];
    let mut guest = shape.vm(story)?.args(&reporting).start(&story.paths, &story.dir)?;
    guest.wait_ready()?;
    let size = shape.mib / 2;
    write(&mut guest, size)?;
    let before = guest_memory(guest.pid(), shape.mib)?;
    ensure!(before > size << 20, "{before} bytes");
    guest.sh("umount /mnt")?;
    let begin = Instant::now();
    // Pieces below 2 MiB are not reported.
    let wanted = before - (size << 20) / 10 * 9;
    loop {
        let kept = guest_memory(guest.pid(), shape.mib)?;
        if kept <= wanted {
            break;
        }
        ensure!(begin.elapsed() < SOON, "{kept} of {before} bytes are kept");
        thread::sleep(Duration::from_millis(50));
    }
    // Linux waits for two seconds by itself.
    eprintln!("{size} MiB went back within {:.1} s", begin.elapsed().as_secs_f64());
    guest.qmp()?.execute_raw("quit", json!({}))?;
    guest.wait_exit()?;
    Ok(())
}
