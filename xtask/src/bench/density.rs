//! Many machines at once: started, and restored from one save.
mod crowd;

use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::cpu;
use super::guests::{FIRST_BYTE, TOUCHED_KIB};
use super::measure::{LIMIT, SETTLE, Turn};
use super::monitors::Guest;
use super::run::Run;
use super::smaps::Shares;
use super::{Metric, snapshots};
use crowd::{Crowd, Launch};

/// RAM of each guest, MiB: the highest minimum of all monitors.
const MIB: u64 = 128;
/// Free memory required for each machine, MiB. Guests touch hardly any; the largest monitor needs
/// 40.
const NEEDED_MIB: u64 = 64;
/// Most machines at once: as many as the usual limit of open files allows.
const MOST: usize = 300;
/// Lets all monitors settle before their memory is measured.
const REST: Duration = Duration::from_millis(200);
/// The default number of turns.
pub const RUNS: usize = 15;

/// How many machines at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Started at once.
    pub machines: usize,
    /// Restored at once.
    pub clones: usize,
}

impl Default for Counts {
    fn default() -> Self {
        Self { machines: 100, clones: 50 }
    }
}

impl Counts {
    /// The number after `option`.
    ///
    /// # Errors
    /// It is not a number in the allowed range.
    pub fn parse(option: &str, word: Option<&str>) -> Result<usize> {
        let count = word.and_then(|word| word.parse().ok());
        let count = count.filter(|count| (1..=MOST).contains(count));
        count.with_context(|| format!("{option} takes a number, 1 to {MOST}"))
    }

    /// Checks that this host has the memory.
    ///
    /// # Errors
    /// It does not have enough.
    pub fn check(self) -> Result<()> {
        let meminfo = fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
        let free = available_mib(&meminfo).context("/proc/meminfo tells no MemAvailable")?;
        let count = self.machines.max(self.clones) as u64;
        let needed = count * NEEDED_MIB;
        ensure!(
            needed <= free,
            "{count} machines at once may need {needed} MiB, and this host has {free} MiB free: --machines and --clones make fewer"
        );
        Ok(())
    }

    /// For the title of a figure.
    #[must_use]
    pub fn title(self) -> String {
        format!("{} machines started and {} clones restored at once", self.machines, self.clones)
    }
}

fn available_mib(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? >> 10)
}

/// The metrics for started machines or for clones: wall-clock time, CPU time, private memory,
/// proportional share, memory of the guest.
type Metrics = [Metric; 5];
const MACHINES: Metrics =
    [Metric::ManyWall, Metric::ManyCpu, Metric::ManyPrivate, Metric::ManyPss, Metric::ManyGuest];
const CLONES: Metrics = [
    Metric::ClonesWall,
    Metric::ClonesCpu,
    Metric::ClonesPrivate,
    Metric::ClonesPss,
    Metric::ClonesGuest,
];

/// Starts many machines at once, whose guests report that they run and halt.
///
/// # Errors
/// One of them does not start.
pub fn machines(turn: &Turn<'_>) -> Result<()> {
    let guest = Guest { mib: MIB, ..turn.rig.halting(turn.found)? };
    let launch = Launch {
        found: turn.found,
        dir: turn.rig.dir.join("machines"),
        interrupt: &turn.rig.interrupt,
        command: &|socket, dir| turn.found.command(&guest, socket, dir),
        resume: None,
        freeze: false,
    };
    measure(turn, &launch, turn.rig.counts.machines, MACHINES)
}

/// Saves a guest that reports repeatedly that it runs, and restores it many times at once. Each
/// clone is frozen when it has reported: the others are measured, not its loop.
///
/// # Errors
/// It cannot be saved, or a clone does not run.
pub fn clones(turn: &Turn<'_>) -> Result<()> {
    let (found, saved) = (turn.found, turn.rig.dir.join("saved"));
    let guest = Guest { mib: MIB, ..turn.rig.small_talker(found)? };
    // Saved again each time: the layout of a file in the page cache changes the time to map it.
    let mut run = Run::start(found, &guest, &turn.rig.dir)?;
    let (mut connection, _) = run.connect()?;
    run.wait_byte(FIRST_BYTE, LIMIT)?;
    thread::sleep(SETTLE);
    snapshots::save(found, &mut connection, &saved)?;
    drop((connection, run));
    let launch = Launch {
        found,
        dir: turn.rig.dir.join("clones"),
        interrupt: &turn.rig.interrupt,
        command: &|socket, dir| snapshots::command(found, &guest, &saved, socket, dir),
        resume: found.monitor.way.is_told_to_resume().then_some(&saved),
        freeze: true,
    };
    measure(turn, &launch, turn.rig.counts.clones, CLONES)
}

fn measure(turn: &Turn<'_>, launch: &Launch<'_>, count: usize, metrics: Metrics) -> Result<()> {
    let before = cpu::of_ended_children()?;
    let (wall, shares) = Crowd::gather(launch, count, |crowd| {
        thread::sleep(REST);
        Ok((crowd.wall(), crowd.shares(MIB << 10)?))
    })?;
    let cpu = cpu::of_ended_children()? - before;
    for (metric, value) in metrics.into_iter().zip(values(wall, cpu, &shares)) {
        turn.sample(metric, value)?;
    }
    Ok(())
}

/// Milliseconds until the last guest had reported, milliseconds of CPU time for each machine, and
/// the mean of each kind of memory in KiB.
fn values(wall: Duration, cpu: Duration, shares: &[Shares]) -> [f64; 5] {
    let count = shares.len().max(1) as f64;
    let mean = |part: fn(&Shares) -> u64| shares.iter().map(part).sum::<u64>() as f64 / count;
    [
        wall.as_secs_f64() * 1e3,
        cpu.as_secs_f64() * 1e3 / count,
        mean(|shares| shares.private),
        mean(|shares| shares.pss),
        mean(|shares| shares.guest.saturating_sub(TOUCHED_KIB)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_for_all_and_means_for_each() {
        let one = Shares { private: 2000, pss: 2500, guest: 44 };
        // A clone whose guest pages are all shared with the others.
        let other = Shares { private: 3000, pss: 3500, guest: 2 };
        let values = values(Duration::from_millis(250), Duration::from_millis(12), &[one, other]);
        assert_eq!(values, [250.0, 6.0, 2500.0, 3000.0, 20.0]);
    }

    #[test]
    fn counts_are_bounded() {
        assert_eq!(Counts::parse("--clones", Some("3")).unwrap(), 3);
        for word in [None, Some("0"), Some("301"), Some("many")] {
            let error = Counts::parse("--clones", word).unwrap_err().to_string();
            assert_eq!(error, "--clones takes a number, 1 to 300");
        }
        Counts { machines: 1, clones: 1 }.check().unwrap();
        let error = Counts { machines: 1, clones: usize::MAX >> 16 }.check().unwrap_err();
        assert!(error.to_string().contains("--machines and --clones make fewer"), "{error}");
    }

    #[test]
    fn free_memory_is_what_is_available() {
        let meminfo = "MemTotal:  4096 kB\nMemFree:  1024 kB\nMemAvailable:    2048 kB\n";
        assert_eq!(available_mib(meminfo), Some(2));
        assert_eq!(available_mib("MemTotal: 1 kB\n"), None);
    }
}
