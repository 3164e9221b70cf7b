//! `cargo remus-soak`: a chain of failovers of one guest. In each turn the guest is protected by a
//! new process at the other host, works, and loses its own host; then it runs at the other one. A
//! client outside counts all the time, another has records written to the guest's disk, and everything that a seed determines can be repeated.
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fastrand::Rng;
use serde::{Deserialize, Serialize};
use stories::debian::Debian;
use stories::lab::hosts::{Hosts, Side};
use stories::monitor::SOON;
use stories::paths::Paths;
use stories::replicated::client::Client;
use stories::replicated::counter::{Counter, Manner};
use stories::replicated::pair::{Failover, Machine, Pair, Protection};
use stories::replicated::probe::Probe;
use stories::replicated::recorder::Recorder;

use crate::bench::interrupt::Interrupt;
use crate::bench::statistics::quantile;

/// How it is called.
pub const USAGE: &str = "\
Kills a protected guest's host again and again, and checks that nothing is lost.

Usage: cargo remus-soak -- TURNS [OPTION]...
  --seed NUMBER   the same turns as in the run that printed this number
  --from TURN     begin with this turn instead of turn 1
  -h              this text
";
/// Milliseconds between two checkpoints, and without a byte from the peer until it is suspected.
const PROTECTION: Protection =
    Protection { interval: Duration::from_millis(25), timeout: Duration::from_millis(200) };
/// How long a failover may take at most. Whether it is fast enough, the figures say.
const LIMIT: Duration = Duration::from_secs(20);
/// From one datagram to the next.
const PERIOD: Duration = Duration::from_millis(2);
/// Numbers that the guest gives before and after each failover.
const NUMBERS: usize = 20;

/// Bytes of the guest's disk, and the pause after each record on it: it is full after an hour.
const DISK: usize = 128 << 20;
const RECORDS: Duration = Duration::from_millis(100);

/// What is done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    turns: u64,
    seed: u64,
    /// The first turn, from 1.
    from: u64,
}

impl Plan {
    /// Reads a command line.
    ///
    /// # Errors
    /// It is not as [`USAGE`] says.
    pub fn parse(words: &[&str]) -> Result<Self> {
        let number = |name: &str, word: Option<&&str>| -> Result<u64> {
            let word = word.with_context(|| format!("{name} needs a number\n\n{USAGE}"))?;
            word.parse().with_context(|| format!("{name}: '{word}' is not a number\n\n{USAGE}"))
        };
        let mut words = words.iter();
        let turns = number("TURNS", words.next())?;
        let mut plan = Self { turns, seed: fastrand::u64(..), from: 1 };
        while let Some(word) = words.next() {
            match *word {
                "--seed" => plan.seed = number("--seed", words.next())?,
                "--from" => plan.from = number("--from", words.next())?,
                other => bail!("cargo remus-soak does not know '{other}'\n\n{USAGE}"),
            }
        }
        ensure!(
            (1..=plan.turns).contains(&plan.from),
            "there is no turn {} of {}\n\n{USAGE}",
            plan.from,
            plan.turns
        );
        Ok(plan)
    }

    /// What happens in a turn.
    fn turn(&self, number: u64) -> Turn {
        let mut rng = Rng::with_seed(self.seed.wrapping_add(number.wrapping_mul(0x9e37_79b9)));
        let (pages, bytes) =
            if rng.bool() { (rng.u64(1..2000), 8 << rng.u32(0..10)) } else { (0, 0) };
        let (period, work) = (rng.u64(1..50), rng.u64(0..500));
        Turn {
            pages,
            bytes,
            period: Duration::from_millis(period),
            work: Duration::from_millis(work),
        }
    }
}

/// What happens in a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Turn {
    /// Pages that the guest writes, bytes of each, and how often.
    pages: u64,
    bytes: usize,
    period: Duration,
    /// From its protection to its death.
    work: Duration,
}

/// The figures of a turn.
struct Done {
    failover: Failover,
    /// How long no datagram came back, and no number.
    away: Duration,
    gap: Duration,
}

/// Runs the turns, and prints what becomes of them.
///
/// # Errors
/// In some turn the guest did not go on, or not as it has to; says which, and how to repeat it.
pub fn run(plan: &Plan, paths: &Paths, debian: &Debian, interrupt: &Interrupt) -> Result<()> {
    println!("Seed {}.", plan.seed);
    let dir = paths.fresh_scratch("remus-soak")?;
    let hosts = Hosts::new(debian, plan.seed)?;
    let pair = Pair::new(&hosts, paths, &dir)?;
    let mut pair = pair.with_disk(Side::Left, &vec![0; DISK])?;
    let mut primary = pair.boot(Side::Left)?;
    let counter = Counter::start(&hosts.outside, Manner::default())?;
    let mut client = Client::connect(&hosts, SOON)?;
    let recorder = Recorder::start(&hosts.outside, RECORDS)?;
    let probe = Probe::start(&hosts.outside, PERIOD)?;
    let mut done = Vec::new();
    for number in plan.from..=plan.turns {
        interrupt.check()?;
        let turn = plan.turn(number);
        let result = take_turn(turn, &mut pair, primary, &counter, &mut client);
        let (next, failover, killed) = result.with_context(|| {
            format!(
                "turn {number}, {turn:?}; to begin with it: cargo remus-soak -- {} --seed {} --from {number}",
                plan.turns, plan.seed
            )
        })?;
        primary = next;
        // Each of them was flushed before it was acknowledged.
        let acknowledged = recorder.acknowledged();
        recorder.wait(1, SOON)?;
        let found = client.check_records(SOON)?;
        ensure!(found > acknowledged, "turn {number}: {found} records of {acknowledged}");
        let (away, gap) = (probe.longest_gap(killed)?, counter.longest_gap(killed));
        println!(
            "{number:>6}: {turn:?}: away for {away:.1?}, to TCP for {gap:.1?}; {failover:.1?}"
        );
        done.push(Done { failover, away, gap });
    }
    let records = recorder.finish();
    let report = counter.finish()?;
    print!("{}", table(&done));
    println!(
        "{} numbers were acknowledged, in order, and {records} records on the disk; connections \
         broken: {}.",
        report.steps.len(),
        report.reconnections
    );
    std::fs::remove_dir_all(&dir).context("cannot clean up")
}

/// One turn; returns who runs the guest then, and when the old one died.
fn take_turn(
    turn: Turn,
    pair: &mut Pair<'_>,
    mut primary: Machine,
    counter: &Counter,
    client: &mut Client,
) -> Result<(Machine, Failover, Instant)> {
    client.write(turn.pages, turn.bytes, turn.period, SOON)?;
    let backup = pair.protect(&mut primary, PROTECTION)?;
    counter.wait(NUMBERS, SOON).context("protected")?;
    std::thread::sleep(turn.work);
    let killed = Instant::now();
    let failover = Pair::kill(primary, &backup, LIMIT)?;
    counter.wait(NUMBERS, LIMIT).context("after the failover")?;
    client.check_memory(SOON)?;
    Ok((backup, failover, killed))
}

/// A row for each figure, in milliseconds.
fn table(done: &[Done]) -> String {
    type Figure = fn(&Done) -> Duration;
    let figures: [(&str, Figure); 7] = [
        ("detect", |done| done.failover.detect),
        ("decide", |done| done.failover.decide),
        ("apply", |done| done.failover.apply),
        ("run", |done| done.failover.run),
        ("all, from outside", |done| done.failover.all),
        ("away, by datagrams", |done| done.away),
        ("the counter's gap", |done| done.gap),
    ];
    let mut table =
        format!("\n{:<18} {:>5} {:>9} {:>9} {:>9}  ms\n", "", "n", "median", "p99", "max");
    for (name, figure) in figures {
        let samples: Vec<_> = done.iter().map(|done| figure(done).as_secs_f64() * 1e3).collect();
        let at = |part| quantile(&samples, part).unwrap_or(f64::NAN);
        let (n, median, p99, max) = (samples.len(), at(0.5), at(0.99), at(1.0));
        table.push_str(&format!("{name:<18} {n:>5} {median:>9.2} {p99:>9.2} {max:>9.2}\n"));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_line_says_how_many_turns_and_which() {
        let plan = Plan::parse(&["100", "--seed", "7", "--from", "33"]).unwrap();
        assert_eq!(plan, Plan { turns: 100, seed: 7, from: 33 });
        for wrong in [
            &[][..],
            &["x"],
            &["5", "--seed"],
            &["5", "--from", "6"],
            &["5", "--from", "0"],
            &["0"],
            &["5", "x"],
        ] {
            assert!(Plan::parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_turn_depends_on_the_seed_and_its_number_only() {
        let plan = |seed, from| Plan { turns: 50, seed, from };
        let turns = |plan: Plan| (1..=50).map(|number| plan.turn(number)).collect::<Vec<_>>();
        assert_eq!(turns(plan(1, 1)), turns(plan(1, 20)));
        assert_ne!(turns(plan(1, 1)), turns(plan(2, 1)));
        let idle = turns(plan(1, 1)).iter().filter(|turn| turn.pages == 0).count();
        assert!((10..40).contains(&idle), "{idle} of 50 are idle");
    }

    #[test]
    fn the_table_has_a_row_for_each_figure() {
        let ms = Duration::from_millis;
        let failover =
            Failover { detect: ms(1), decide: ms(2), apply: ms(3), run: ms(4), all: ms(5) };
        let table = table(&[
            Done { failover, away: ms(6), gap: ms(6) },
            Done { failover, away: ms(6), gap: ms(8) },
        ]);
        assert!(
            table.lines().any(|line| line.split_whitespace().eq([
                "the",
                "counter's",
                "gap",
                "2",
                "7.00",
                "7.98",
                "8.00"
            ])),
            "{table}"
        );
    }
}
