//! `stop` really stops the vCPUs, whatever they are doing, and `cont` loses nothing.
use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use qmp::client::Client;
use serde_json::{Value, json};
use stories::monitor::SOON;

use crate::counters::{all_is_well, counting, storm};
use crate::stage::{Stage, cont, quits, status, stop};

#[test]
fn stop_and_cont_under_a_flood_of_accesses() -> Result<()> {
    let stage = Stage::new("storm1")?;
    let (monitor, mut qmp, counters) = counting(&stage, stage.vm("count", "registers 1")?, 1)?;
    storm(&mut qmp, &counters, 300)?;
    all_is_well(&stage, monitor, qmp)
}

#[test]
fn stop_and_cont_of_four_processors_under_a_flood_of_accesses() -> Result<()> {
    let stage = Stage::new("storm4")?;
    let (monitor, mut qmp, counters) = counting(&stage, stage.vm("count", "registers 4")?, 4)?;
    storm(&mut qmp, &counters, 200)?;
    all_is_well(&stage, monitor, qmp)
}

#[test]
fn stop_and_cont_of_four_processors_that_never_leave_the_guest() -> Result<()> {
    let stage = Stage::new("plain4")?;
    let (monitor, mut qmp, counters) = counting(&stage, stage.vm("count", "plain 4")?, 4)?;
    storm(&mut qmp, &counters, 100)?;
    all_is_well(&stage, monitor, qmp)
}

#[test]
fn accesses_across_edges_come_out_right_however_often_they_are_interrupted() -> Result<()> {
    let stage = Stage::new("split")?;
    let (mut monitor, mut qmp, rounds) = counting(&stage, stage.vm("split", "")?, 1)?;
    monitor.wait_for("the first page begins with 74726976\n", SOON)?;
    for time in 0..300_u32 {
        stop(&mut qmp)?;
        cont(&mut qmp)?;
        // Moments unrelated to the guest's own rhythm.
        thread::sleep(Duration::from_micros(u64::from(time * 37 % 1009)));
    }
    rounds.wait_past(&rounds.read()?)?;
    all_is_well(&stage, monitor, qmp)
}

#[test]
fn two_clients_see_the_same_life() -> Result<()> {
    let stage = Stage::new("two")?;
    let (mut monitor, mut first, counters) =
        counting(&stage, stage.vm("count", "registers 1")?, 1)?;
    let mut second = Client::connect(&stage.socket(), SOON)?;
    for _ in 0..20 {
        stop(&mut first)?;
        ensure!(second.wait_event("STOP", SOON)?.data == json!({}));
        ensure!(status(&mut second)? == "paused");
        // Repeating the command causes no event.
        ensure!(second.execute_raw("stop", json!({}))? == json!({}));
        cont(&mut second)?;
        ensure!(first.wait_event("RESUME", SOON)?.data == json!({}));
        ensure!(first.execute_raw("cont", json!({}))? == json!({}));
    }
    counters.wait_past(&counters.read()?)?;
    // Each at its own pace, at the same time.
    let racer = thread::spawn(move || -> Result<Client> {
        for _ in 0..100 {
            ensure!(second.execute_raw("stop", json!({}))? == json!({}));
            ensure!(second.execute_raw("cont", json!({}))? == json!({}));
        }
        Ok(second)
    });
    for _ in 0..100 {
        ensure!(first.execute_raw("cont", json!({}))? == json!({}));
        ensure!(first.execute_raw("stop", json!({}))? == json!({}));
    }
    let mut second = racer.join().map_err(|_| anyhow::anyhow!("the second client panicked"))??;
    ensure!(first.execute_raw("cont", json!({}))? == json!({}));
    ensure!(status(&mut second)? == "running");
    counters.wait_past(&counters.read()?)?;
    quits(&stage, &mut monitor, &mut first)?;
    ensure!(
        second.wait_event("SHUTDOWN", SOON)?.data.get("reason") == Some(&json!("host-qmp-quit"))
    );
    Ok(())
}

#[test]
fn query_cpus_names_the_threads_that_run_the_guest() -> Result<()> {
    let stage = Stage::new("threads")?;
    let (monitor, mut qmp, counters) = counting(&stage, stage.vm("count", "plain 4")?, 4)?;
    let cpus = qmp.execute_raw("query-cpus", json!({}))?;
    let fast = qmp.execute_raw("query-cpus-fast", json!({}))?;
    let cpus = cpus.as_array().context("no list")?;
    ensure!(cpus.len() == 4);
    let mut threads = HashSet::new();
    for (number, cpu) in cpus.iter().enumerate() {
        ensure!(cpu.get("CPU") == Some(&json!(number)), "{cpu}");
        let thread = cpu.get("thread_id").and_then(Value::as_u64).context("no thread")?;
        let same = fast.pointer(&format!("/{number}/thread-id")).and_then(Value::as_u64);
        ensure!(same == Some(thread), "query-cpus-fast reports something else");
        ensure!(threads.insert(thread), "one thread for two processors");
    }
    let task = |thread: &u64| format!("/proc/{}/task/{thread}", monitor.pid());
    // While the guest runs, its threads take processor time; a stopped one's threads sleep.
    let before: Vec<_> =
        threads.iter().map(|thread| spent(&task(thread))).collect::<Result<_>>()?;
    let deadline = Instant::now() + SOON;
    for (thread, before) in threads.iter().zip(&before) {
        while spent(&task(thread))?.1 <= before.1 {
            ensure!(Instant::now() < deadline, "thread {thread} does not run");
            thread::sleep(Duration::from_millis(5));
        }
    }
    stop(&mut qmp)?;
    for thread in &threads {
        let asleep = |state: &str| state == "S";
        let deadline = Instant::now() + SOON;
        while !asleep(&spent(&task(thread))?.0) {
            ensure!(Instant::now() < deadline, "thread {thread} is busy although it is stopped");
            thread::yield_now();
        }
    }
    cont(&mut qmp)?;
    counters.wait_past(&counters.read()?)?;
    all_is_well(&stage, monitor, qmp)
}

/// A thread's state, and the clock ticks it has spent (proc(5), `stat`).
fn spent(task: &str) -> Result<(String, u64)> {
    let path = Path::new(task).join("stat");
    let stat = fs::read_to_string(&path).with_context(|| format!("{} is gone", path.display()))?;
    let (_, fields) = stat.rsplit_once(") ").context("no name in stat")?;
    let field = |number: usize| fields.split(' ').nth(number).context("stat is short");
    let user: u64 = field(11)?.parse()?;
    let system: u64 = field(12)?.parse()?;
    Ok((field(0)?.to_owned(), user + system))
}
