//! The state machines against virtual time: links that delay and are cut, processes that are killed
//! at any output, stop for a while and resume, a second process of the backup's host, a witness
//! that does not answer, fences; a guest that counts, and a client that remembers every reply.
//!
//! `SEED=n` runs one seed, `SEEDS=n` that many, `FROM=n` others; `TELL=1` prints what happens. A life that fails is
//! printed with those of its faults that it needs to fail.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs, reason = "a test")]
#[path = "simulator/conditions.rs"]
mod conditions;
#[path = "simulator/disk.rs"]
mod disk;
#[path = "simulator/guest.rs"]
mod guest;
#[path = "simulator/life.rs"]
mod life;
#[path = "simulator/migration.rs"]
mod migration;
#[path = "simulator/node.rs"]
mod node;
#[path = "simulator/operator.rs"]
mod operator;
#[path = "simulator/scenarios.rs"]
mod scenarios;
#[path = "simulator/sim.rs"]
mod sim;
#[path = "simulator/terms.rs"]
mod terms;

use std::{env, sync::Mutex, thread};

use life::{Fault, Life, Shown};
use replication::{Command, Rule, Rules};

/// Run lives on two threads: what they have shown, and those that have failed.
fn run(
    seeds: std::ops::Range<u64>,
    life: impl Fn(u64) -> Life + Sync,
    live: impl Fn(&Life) -> Result<Shown, String> + Sync,
) -> (Shown, Vec<(Life, String)>) {
    let all = Mutex::new((Shown::default(), Vec::new()));
    thread::scope(|scope| {
        for part in 0..2 {
            let (all, life, live, seeds) = (&all, &life, &live, seeds.clone());
            scope.spawn(move || {
                for seed in seeds.skip(part).step_by(2) {
                    let life = life(seed);
                    let one = live(&life);
                    let mut all = all.lock().unwrap();
                    match one {
                        Ok(one) => all.0.add(one),
                        Err(wrong) => all.1.push((life, wrong)),
                    }
                }
            });
        }
    });
    all.into_inner().unwrap()
}

/// Run one seed or many, and print the faults that those need that fail.
fn search(
    count: u64,
    life: impl Fn(u64) -> Life + Sync,
    live: impl Fn(&Life) -> Result<Shown, String> + Sync,
) -> Shown {
    if let Some(seed) = number("SEED") {
        let life = life(seed);
        println!("{life:?}\n{:?}", live(&life).unwrap());
        return Shown::default();
    }
    let (from, count) = (number("FROM").unwrap_or(0), number("SEEDS").unwrap_or(count));
    let (shown, failed) = run(from..from + count, life, &live);
    println!("{count} seeds from {from}: {shown:#?}");
    for (life, wrong) in failed.iter().take(10) {
        let least = life.clone().shrunk(|life| live(life).is_err());
        println!("SEED={}: {wrong}\n    {least:?}", life.seed);
    }
    assert!(failed.is_empty(), "{} of {count} seeds have failed; replay with SEED=n", failed.len());
    shown
}

fn number(name: &str) -> Option<u64> {
    env::var(name).ok()?.parse().ok()
}

#[test]
fn any_seed() {
    let shown = search(20_000, |seed| Life::any(seed, &[], 7), |life| life.live(Rules::ALL));
    let replies = shown.replies;
    assert!(replies == 0 || shown.promotions > 2000 && shown.solos > 2000, "too little happened");
}

#[test]
fn one_fault_at_a_time_loses_nothing() {
    search(3000, Life::kept, |life| life.one_by_one(Rules::ALL));
}

/// Each rule that is missing is found by seeds, with faults that exercise it.
#[test]
fn seeds_find_what_a_missing_rule_breaks() {
    let any = &[][..];
    let (leaves, moves) = (Command::Unprotect, Command::Failover);
    let controls = [
        (Rule::Arm, "(I3)", any),
        (Rule::Ack, "(I1)", any),
        (Rule::Wit, "(I3)", any),
        (Rule::Gran, "(I3)", any),
        (Rule::Close, "(I3)", &[Fault::Command(0, leaves)]),
        (Rule::Cold, "(I12)", &[Fault::Kill(0, false), Fault::Restart(0, true)]),
        (Rule::Burn, "(I11)", &[Fault::LateWitness, Fault::Cut(true, true), Fault::Heal]),
        (Rule::Pair, "(I10)", &[Fault::SecondProcess, Fault::Cut(true, true), Fault::Heal]),
        (
            Rule::Hand,
            "(I3)",
            &[Fault::Command(0, moves), Fault::Kill(0, true), Fault::Restart(0, true)],
        ),
        (Rule::Yield, "(A1)", &[Fault::Freeze(0, 700), Fault::Doom(1, 4)]),
        (Rule::Durable, "(I7)", &[Fault::Kill(1, false)]),
        (Rule::Sync, "(I7)", &[Fault::Kill(1, false)]),
        (Rule::Void, "(I7)", &[Fault::Kill(0, false), Fault::Kill(1, false)]),
    ];
    let mut missed = Vec::new();
    for (rule, says, first) in controls {
        let broken = |life: &Life, rules| {
            life.live(rules).err().filter(|wrong: &String| wrong.contains(says))
        };
        let without = Rules::without(rule);
        let mut lives = (0..3000).map(|seed| Life::any(seed, first, 2));
        let found = lives.find(|life| broken(life, without).is_some());
        let Some(life) = found else {
            missed.push(rule);
            continue;
        };
        assert_eq!(broken(&life, Rules::ALL), None, "with {rule:?} it holds");
        let (seed, count) = (life.seed, life.faults.len());
        let least = life.shrunk(|life| broken(life, without).is_some());
        let wrong = broken(&least, without).unwrap();
        println!(
            "without {rule:?}: SEED={seed}, {} of {count} faults: {wrong}",
            least.faults.len()
        );
    }
    assert!(missed.is_empty(), "no seed has found that these are missing: {missed:?}");
}
