//! `stop` means stopped, whatever the processors are in the middle of, and `cont` loses nothing.
use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use stories::client::Client;
use stories::monitor::{Monitor, SOON};

use crate::stage::{Stage, cont, quits, status, stop};

/// Guest memory as a file, in which counters can be read from outside.
struct Counters {
    memory: File,
    count: u64,
}

impl Counters {
    /// The guests' `COUNTERS`.
    const AT: u64 = 4 << 20;

    fn read(&self) -> Result<Vec<u64>> {
        (0..self.count)
            .map(|number| {
                let mut bytes = [0; 8];
                self.memory.read_exact_at(&mut bytes, Self::AT + number * 4096)?;
                Ok(u64::from_le_bytes(bytes))
            })
            .collect()
    }

    /// Waits until every one has gone on.
    fn wait_past(&self, before: &[u64]) -> Result<()> {
        let deadline = Instant::now() + SOON;
        while Instant::now() < deadline {
            if self.read()?.iter().zip(before).all(|(now, before)| now > before) {
                return Ok(());
            }
            thread::sleep(Duration::from_micros(100));
        }
        anyhow::bail!("counters stay at {:?} after {before:?}", self.read()?)
    }
}

/// Starts a guest whose counters can be seen.
fn counting(
    stage: &Stage,
    guest: &str,
    cmdline: &str,
    cpus: u64,
) -> Result<(Monitor, Client, Counters)> {
    let memory = stage.file("memory");
    let vm = stage
        .vm(guest, cmdline)?
        .machine("vcpu_count", cpus)
        .machine("mem_path", memory.to_string_lossy())
        .machine("mem_share", true);
    let (monitor, qmp) = stage.start(vm)?;
    let counters = Counters { memory: File::open(memory)?, count: cpus };
    counters.wait_past(&vec![0; usize::try_from(cpus)?])?;
    Ok((monitor, qmp, counters))
}

/// Between `stop` and `cont` no counter moves; afterwards all do.
fn storm(qmp: &mut Client, counters: &Counters, times: usize) -> Result<()> {
    for time in 0..times {
        stop(qmp)?;
        let stopped = counters.read()?;
        // Asking gives a processor that goes on the time to show it.
        ensure!(status(qmp)? == "paused");
        ensure!(counters.read()? == stopped, "stop {time} did not stop all");
        cont(qmp)?;
        // Sometimes at once, so that `stop` meets processors that have hardly begun.
        if time % 4 != 0 {
            counters.wait_past(&stopped)?;
        }
    }
    Ok(())
}

fn all_is_well(stage: &Stage, mut monitor: Monitor, mut qmp: Client) -> Result<()> {
    let shown = monitor.unseen();
    ensure!(!shown.contains("WRONG"), "{shown}");
    quits(stage, &mut monitor, &mut qmp)
}

#[test]
fn stop_and_cont_under_a_flood_of_accesses() -> Result<()> {
    let stage = Stage::new("storm1")?;
    let (monitor, mut qmp, counters) = counting(&stage, "count", "registers 1", 1)?;
    storm(&mut qmp, &counters, 300)?;
    all_is_well(&stage, monitor, qmp)
}

#[test]
fn stop_and_cont_of_four_processors_under_a_flood_of_accesses() -> Result<()> {
    let stage = Stage::new("storm4")?;
    let (monitor, mut qmp, counters) = counting(&stage, "count", "registers 4", 4)?;
    storm(&mut qmp, &counters, 200)?;
    all_is_well(&stage, monitor, qmp)
}

#[test]
fn stop_and_cont_of_four_processors_that_never_leave_the_guest() -> Result<()> {
    let stage = Stage::new("plain4")?;
    let (monitor, mut qmp, counters) = counting(&stage, "count", "plain 4", 4)?;
    storm(&mut qmp, &counters, 100)?;
    all_is_well(&stage, monitor, qmp)
}

#[test]
fn accesses_across_edges_come_out_right_however_often_they_are_interrupted() -> Result<()> {
    let stage = Stage::new("split")?;
    let (mut monitor, mut qmp, rounds) = counting(&stage, "split", "", 1)?;
    monitor.wait_for("the first page begins with 74726976\n", SOON)?;
    for time in 0..300_u32 {
        stop(&mut qmp)?;
        cont(&mut qmp)?;
        // Moments that follow no pattern of the guest's.
        thread::sleep(Duration::from_micros(u64::from(time * 37 % 1009)));
    }
    rounds.wait_past(&rounds.read()?)?;
    all_is_well(&stage, monitor, qmp)
}

#[test]
fn two_clients_see_the_same_life() -> Result<()> {
    let stage = Stage::new("two")?;
    let (mut monitor, mut first, counters) = counting(&stage, "count", "registers 1", 1)?;
    let mut second = Client::connect(&stage.socket())?;
    for _ in 0..20 {
        stop(&mut first)?;
        ensure!(second.wait_event("STOP", SOON)? == json!({}));
        ensure!(status(&mut second)? == "paused");
        // Doing it again is no event.
        ensure!(second.execute("stop", Value::Null)? == json!({}));
        cont(&mut second)?;
        ensure!(first.wait_event("RESUME", SOON)? == json!({}));
        ensure!(first.execute("cont", Value::Null)? == json!({}));
    }
    counters.wait_past(&counters.read()?)?;
    // Each at its own pace, at the same time.
    let racer = thread::spawn(move || -> Result<Client> {
        for _ in 0..100 {
            ensure!(second.execute("stop", Value::Null)? == json!({}));
            ensure!(second.execute("cont", Value::Null)? == json!({}));
        }
        Ok(second)
    });
    for _ in 0..100 {
        ensure!(first.execute("cont", Value::Null)? == json!({}));
        ensure!(first.execute("stop", Value::Null)? == json!({}));
    }
    let mut second = racer.join().map_err(|_| anyhow::anyhow!("the second client panicked"))??;
    ensure!(first.execute("cont", Value::Null)? == json!({}));
    ensure!(status(&mut second)? == "running");
    counters.wait_past(&counters.read()?)?;
    quits(&stage, &mut monitor, &mut first)?;
    ensure!(second.wait_event("SHUTDOWN", SOON)?.get("reason") == Some(&json!("host-qmp-quit")));
    Ok(())
}

#[test]
fn query_cpus_names_the_threads_that_run_the_guest() -> Result<()> {
    let stage = Stage::new("threads")?;
    let (monitor, mut qmp, counters) = counting(&stage, "count", "plain 4", 4)?;
    let cpus = qmp.execute("query-cpus", Value::Null)?;
    let fast = qmp.execute("query-cpus-fast", Value::Null)?;
    let cpus = cpus.as_array().context("no list")?;
    ensure!(cpus.len() == 4);
    let mut threads = HashSet::new();
    for (number, cpu) in cpus.iter().enumerate() {
        ensure!(cpu.get("CPU") == Some(&json!(number)), "{cpu}");
        let thread = cpu.get("thread_id").and_then(Value::as_u64).context("no thread")?;
        let same = fast.pointer(&format!("/{number}/thread-id")).and_then(Value::as_u64);
        ensure!(same == Some(thread), "query-cpus-fast tells something else");
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
