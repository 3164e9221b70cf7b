//! Guests that count in memory, which the test reads from outside.
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use qmp::client::Client;
use stories::monitor::{Monitor, SOON, Vm};

use crate::stage::{Stage, cont, quits, status, stop};

/// Guest memory as a file, in which counters can be read from outside.
pub struct Counters {
    memory: File,
    count: u64,
}

impl Counters {
    /// The guests' `COUNTERS`.
    const AT: u64 = 4 << 20;

    pub fn read(&self) -> Result<Vec<u64>> {
        (0..self.count)
            .map(|number| {
                let mut bytes = [0; 8];
                self.memory.read_exact_at(&mut bytes, Self::AT + number * 4096)?;
                Ok(u64::from_le_bytes(bytes))
            })
            .collect()
    }

    /// Waits until every counter has moved.
    pub fn wait_past(&self, before: &[u64]) -> Result<()> {
        // A busy host's disk can stall for long.
        let deadline = Instant::now() + SOON * 3;
        while Instant::now() < deadline {
            if self.read()?.iter().zip(before).all(|(now, before)| now > before) {
                return Ok(());
            }
            thread::sleep(Duration::from_micros(100));
        }
        bail!("counters stay at {:?} after {before:?}", self.read()?)
    }
}

/// Starts a machine whose guest has `cpus` processors and counts on each.
pub fn counting(stage: &Stage, vm: Vm, cpus: u64) -> Result<(Monitor, Client, Counters)> {
    let memory = stage.file("memory");
    let vm = vm
        .machine("vcpu_count", cpus)
        .machine("mem_path", memory.to_string_lossy())
        .machine("mem_share", true);
    let (monitor, qmp) = stage.start(vm)?;
    let counters = Counters { memory: File::open(memory)?, count: cpus };
    counters.wait_past(&vec![0; usize::try_from(cpus)?])?;
    Ok((monitor, qmp, counters))
}

/// Between `stop` and `cont` no counter moves; afterwards all do.
pub fn storm(qmp: &mut Client, counters: &Counters, times: usize) -> Result<()> {
    for time in 0..times {
        stop(qmp)?;
        let stopped = counters.read()?;
        // Meanwhile a processor that still runs would count.
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

/// The guest has found no error, and the monitor ends as it should.
pub fn all_is_well(stage: &Stage, mut monitor: Monitor, mut qmp: Client) -> Result<()> {
    let shown = monitor.unseen();
    ensure!(!shown.contains("WRONG"), "{shown}");
    quits(stage, &mut monitor, &mut qmp)
}
