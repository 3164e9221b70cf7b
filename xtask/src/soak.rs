//! `cargo remus-soak`: a chain of failovers of one guest, see [`stories::replicated::chain`].
//! Everything that a seed determines can be repeated. A turn that fails ends the chain; another one
//! begins with the next turn, so that a long run says how often something happens.
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use stories::debian::Debian;
use stories::lab::hosts::Hosts;
use stories::paths::Paths;
use stories::replicated::chain::{Chain, Done, Turn};
use stories::replicated::pair::Pair;
use stories::replicated::relay::Step;

use crate::bench::interrupt::Interrupt;
use crate::bench::statistics::quantile;

/// How it is called.
pub const USAGE: &str = "\
Kills a protected guest's host again and again, at any moment and at each step of an epoch, and
checks that nothing is lost. Says at the end what it has found.

Usage: cargo remus-soak -- TURNS [OPTION]...
  --seed NUMBER   the same turns as in the run that printed this number
  --from TURN     begin with this turn instead of turn 1
  -h              this text
";
/// Turns that may fail before it gives up.
const MOST_FAILURES: usize = 10;

/// Bytes of the guest's disk: it is full of records after an hour.
const DISK: usize = 128 << 20;

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
}

/// A turn that has failed.
struct Failed {
    number: u64,
    what: String,
}

/// Runs the turns, and prints what becomes of them.
///
/// # Errors
/// In some turn the guest did not go on, or not as it has to; says which, and how to repeat it.
pub fn run(plan: &Plan, paths: &Paths, debian: &Debian, interrupt: &Interrupt) -> Result<()> {
    println!("Seed {}.", plan.seed);
    let (mut done, mut failed) = (Vec::new(), Vec::new());
    let (mut next, mut stopped) = (plan.from, Ok(()));
    while next <= plan.turns && failed.len() < MOST_FAILURES {
        let (number, ended) = match chain(plan, next, (paths, debian), interrupt, &mut done) {
            Ok(ended) => ended,
            Err(error) => {
                stopped = Err(error);
                break;
            }
        };
        if let Some(what) = ended {
            println!("{number:>6}: failed: {what}");
            failed.push(Failed { number, what });
        }
        next = number + 1;
    }
    print!("{}", table(&done));
    print!("{}", found(&done, &failed, plan));
    stopped?;
    ensure!(failed.is_empty(), "{} of the turns failed", failed.len());
    Ok(())
}

/// Runs one chain from the turn `from` on. Returns its last turn, and how that has failed.
fn chain(
    plan: &Plan,
    from: u64,
    (paths, debian): (&Paths, &Debian),
    interrupt: &Interrupt,
    done: &mut Vec<Done>,
) -> Result<(u64, Option<String>)> {
    let dir = paths.fresh_scratch("remus-soak")?;
    let hosts = Hosts::new(debian, plan.seed)?;
    let mut chain = Chain::start(&hosts, Pair::new(&hosts, paths, &dir)?, DISK)?;
    for number in from..=plan.turns {
        interrupt.check()?;
        let turn = Turn::new(plan.seed, number);
        match chain.turn(turn) {
            Ok(one) => {
                println!("{number:>6}: {one}");
                done.push(one);
            }
            Err(error) => return Ok((number, Some(format!("{turn:?}: {error:#}")))),
        }
    }
    let (report, records) = match chain.finish() {
        Ok(seen) => seen,
        Err(error) => return Ok((plan.turns, Some(format!("the counter: {error:#}")))),
    };
    println!(
        "{} numbers were acknowledged, in order, and {records} records on the disk; connections \
         broken: {}.",
        report.steps.len(),
        report.reconnections
    );
    std::fs::remove_dir_all(&dir).context("cannot clean up")?;
    Ok((plan.turns, None))
}

/// How many turns were killed where, and what failed.
fn found(done: &[Done], failed: &[Failed], plan: &Plan) -> String {
    let at = |step| done.iter().filter(|done| done.turn.step == step).count();
    let steps = Step::ALL.map(|step| format!("{} {step:?}", at(Some(step))));
    let again: u32 = done.iter().map(|done| done.again).sum();
    let mut text = format!(
        "\n{} failovers: {} at any moment, {}. Protected only by another backup: {again}. Failed: {}.\n",
        done.len(),
        at(None),
        steps.join(", "),
        failed.len()
    );
    for Failed { number, what } in failed {
        text.push_str(&format!(
            "\nturn {number}: {what}\n  to begin with it: cargo remus-soak -- {} --seed {} --from {number}\n",
            plan.turns, plan.seed
        ));
    }
    text
}

/// A row for each figure, in milliseconds.
fn table(done: &[Done]) -> String {
    type Figure = fn(&Done) -> Duration;
    let figures: [(&str, Figure); 10] = [
        ("detect", |done| done.failover.detect),
        ("decide", |done| done.failover.decide),
        ("apply", |done| done.failover.apply),
        ("run", |done| done.failover.run),
        ("all, from outside", |done| done.failover.all),
        ("away, by datagrams", |done| done.away),
        ("the counter's gap", |done| done.gap),
        ("until protected", |done| done.protecting),
        ("checks", |done| done.checking),
        ("the whole turn", |done| done.took),
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
    use stories::replicated::pair::Failover;

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
    fn the_table_has_a_row_for_each_figure() {
        let ms = Duration::from_millis;
        let failover =
            Failover { detect: ms(1), decide: ms(2), apply: ms(3), run: ms(4), all: ms(5) };
        let turn = Turn::new(1, 1);
        let (protecting, checking, took) = (ms(300), ms(100), ms(900));
        let done = |gap| Done {
            turn,
            failover,
            away: ms(6),
            gap: ms(gap),
            protecting,
            checking,
            took,
            free: 1,
            again: 0,
        };
        let done = [done(6), done(8)];
        let table = table(&done);
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

    #[test]
    fn a_failure_is_found_with_the_command_that_repeats_it() {
        let plan = Plan { turns: 9, seed: 7, from: 1 };
        let failed = Failed { number: 4, what: "it is silent".to_owned() };
        let text = found(&[], &[failed], &plan);
        assert!(text.contains("turn 4: it is silent"), "{text}");
        assert!(text.contains("cargo remus-soak -- 9 --seed 7 --from 4"), "{text}");
    }
}
