//! The state machines against virtual time: links that delay and are cut, processes that are killed
//! at any output, stop for a while and resume, a second process of the backup's host, a witness
//! that does not answer, fences; a guest that counts, and a client that remembers every reply.
//!
//! `SEED=n` runs one seed, `SEEDS=n` that many; `TELL=1` prints what happens. A life that fails is
//! printed with those of its faults that it needs to fail.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs, reason = "a test")]
#[path = "simulator/conditions.rs"]
mod conditions;
#[path = "simulator/guest.rs"]
mod guest;
#[path = "simulator/node.rs"]
mod node;
#[path = "simulator/scenarios.rs"]
mod scenarios;
#[path = "simulator/sim.rs"]
mod sim;
#[path = "simulator/terms.rs"]
mod terms;

use std::{collections::BTreeMap, env, sync::Mutex, thread};

use replication::{Command, Input, Rule, Rules, Time, backup};
use sim::{Sim, ms};

/// Something that goes wrong.
#[derive(Debug, Clone, Copy)]
enum Fault {
    Kill(usize, bool),
    Doom(usize, u32),
    Freeze(usize, u64),
    Cut(bool, bool),
    NoWitness,
    LateWitness,
    NoAgent(usize),
    SecondProcess,
    CannotRun,
    Unprotect,
    Failover,
    /// The backup is ordered to take over.
    TakeOver,
    /// The guest reboots itself.
    Reboot,
    /// All connections break.
    Break,
    /// Started again; from its disk, or to listen.
    Restart(usize, bool),
    /// The network is whole again.
    Heal,
}

fn fault(random: &mut fastrand::Rng) -> Fault {
    let i = random.usize(0..2);
    match random.u8(0..20) {
        0 | 1 => Fault::Kill(i, random.bool()),
        2 | 3 => Fault::Doom(i, random.u32(0..12)),
        4 => Fault::Freeze(i, random.u64(50..3000)),
        5 | 6 => Fault::Cut(random.bool(), random.bool()),
        7 => Fault::NoWitness,
        8 => Fault::NoAgent(i),
        9 => Fault::SecondProcess,
        10 => Fault::CannotRun,
        11 => Fault::Unprotect,
        12 => Fault::Failover,
        13 => Fault::Heal,
        14 => Fault::LateWitness,
        15 => Fault::TakeOver,
        16 => Fault::Reboot,
        17 => Fault::Break,
        _ => Fault::Restart(i, random.bool()),
    }
}

fn apply(sim: &mut Sim, fault: Fault) -> Result<(), String> {
    match fault {
        Fault::Kill(i, host_lives) => sim.kill(i, host_lives),
        Fault::Doom(i, outputs) => sim.nodes[i].doom = Some(outputs),
        Fault::Freeze(i, time) => sim.nodes[i].frozen = sim.now + ms(time),
        Fault::Cut(there, back) => {
            let all = [(0, 1), (0, 2), (1, 0), (2, 0)];
            let from = if there { 0 } else { 2 };
            let to = if back || !there { 4 } else { 2 };
            sim.cut(&all[from..to]);
        }
        Fault::NoWitness => sim.serving = false,
        Fault::LateWitness => sim.late = 3000,
        Fault::NoAgent(i) => sim.nodes[i].agent = false,
        Fault::SecondProcess => sim.port[1] = 2,
        Fault::CannotRun => sim.input(1, Input::CannotRun)?,
        Fault::Unprotect => sim.input(0, Input::Command(Command::Unprotect))?,
        Fault::Failover => sim.input(0, Input::Command(Command::Failover))?,
        Fault::TakeOver => sim.input(1, Input::Command(Command::Failover))?,
        Fault::Reboot => sim.nodes.iter_mut().for_each(|node| node.reboot()),
        Fault::Break => sim.reset_connections(),
        Fault::Restart(i, from_disk) => sim.restart(i, from_disk)?,
        Fault::Heal => sim.heal(),
    }
    Ok(())
}

/// What seeds have shown.
#[derive(Debug, Default)]
struct Shown {
    promotions: u64,
    solos: u64,
    warm: u64,
    full: u64,
    late_releases: u64,
    replies: u64,
    /// Lives that end without an owner, by the state of their processes.
    ownerless: BTreeMap<String, (u64, u64)>,
}

impl Shown {
    fn add(&mut self, other: Self) {
        self.promotions += other.promotions;
        self.solos += other.solos;
        self.warm += other.warm;
        self.full += other.full;
        self.late_releases += other.late_releases;
        self.replies += other.replies;
        for (class, (count, seed)) in other.ownerless {
            self.ownerless.entry(class).or_insert((0, seed)).0 += count;
        }
    }
}

/// A life: with a witness or a fence, with a second path for beats or not, and what goes wrong when.
#[derive(Debug, Clone)]
struct Life {
    seed: u64,
    fence: bool,
    beside: bool,
    faults: Vec<(Time, Fault)>,
}

impl Life {
    /// Any faults after `first`.
    fn any(seed: u64, first: &[Fault], most: usize) -> Self {
        let mut random = fastrand::Rng::with_seed(seed ^ 0x5eed);
        let (mut at, mut faults) = (Time::ZERO, Vec::new());
        let count = first.len() + random.usize(usize::from(first.is_empty())..=most);
        for n in 0..count {
            let most = if random.bool() { 50 } else { 600 };
            at += ms(random.u64(5..most));
            let any = fault(&mut random);
            faults.push((at, first.get(n).copied().unwrap_or(any)));
        }
        let (fence, beside) = (random.u8(0..4) == 0, random.bool());
        Self { seed, fence: fence && first.is_empty(), beside, faults }
    }

    /// With only those faults that it needs to fail.
    fn shrunk(mut self, fails: impl Fn(&Self) -> bool) -> Self {
        let mut n = 0;
        while n < self.faults.len() {
            let mut fewer = self.clone();
            fewer.faults.remove(n);
            if fails(&fewer) { self = fewer } else { n += 1 }
        }
        self
    }
}

/// One life: protect, faults, all healed, and protected again.
fn live(life: &Life, rules: Rules) -> Result<Shown, String> {
    let (seed, fence) = (life.seed, life.fence);
    let mut sim = Sim::new(seed, fence, rules);
    sim.beside = life.beside;
    sim.input(0, Input::Command(Command::Start))?;
    for (at, fault) in &life.faults {
        sim.run(at.saturating_sub(sim.now))?;
        if sim.tell {
            println!("{:?} {fault:?}", sim.now);
        }
        apply(&mut sim, *fault)?;
        sim.check_given_away()?;
    }
    sim.run(ms(1000))?;
    sim.heal();
    (sim.serving, sim.late) = (true, 0);
    for node in &mut sim.nodes {
        (node.agent, node.doom) = (true, None);
    }
    let (mut again, begun) = (sim.now, sim.now);
    let kept = !life.faults.iter().any(|(_, fault)| matches!(fault, Fault::Restart(_, true)));
    while !sim.is_protected() && sim.now < begun + ms(30_000) {
        let lost = sim.owner().is_none() && sim.now > begun + ms(14_000);
        if lost && kept && !fence && sim.promotions == 0 && !sim.victims[0] {
            return Err(format!("lost, though nobody else ever ran it (A9): {}", sim.describe()));
        }
        if sim.now >= again {
            again = sim.now + ms(1500);
            heal_processes(&mut sim, begun)?;
        }
        sim.run(ms(50))?;
    }
    sim.check_given_away()?;
    let mut ownerless = BTreeMap::new();
    if sim.owner().is_none() && !sim.is_protected() {
        ownerless.insert(sim.class(fence), (1, seed));
    }
    // Without a witness a side may have to wait for a person: see `Question::Fence`.
    if !sim.is_protected() && sim.owner().is_some() && !fence {
        return Err(format!("owned and healed, but not protected: {}", sim.describe()));
    }
    Ok(Shown {
        promotions: sim.promotions,
        solos: sim.solos,
        warm: sim.warm,
        full: sim.full,
        late_releases: sim.late_releases,
        replies: sim.client.count() as u64,
        ownerless,
    })
}

/// Start what is dead again, and protect what is owned. Sides wait before they start from disk, so
/// that a living one asks first; then processes that only listen end, so that such a start is possible.
fn heal_processes(sim: &mut Sim, begun: Time) -> Result<(), String> {
    let from_disk = sim.owner().is_none() && sim.now > begun + ms(15_000);
    for i in 0..3 {
        if from_disk && sim.nodes[i].backup_state() == Some(backup::State::Listening) {
            sim.kill(i, true);
        }
        sim.restart(i, from_disk)?;
    }
    if let Some(owner) = sim.owner() {
        // The port is that of a process that listens.
        sim.port[1] = if sim.nodes[1].backup_state().is_some() { 1 } else { 2 };
        sim.input(owner, Input::Command(Command::Start))?;
    }
    Ok(())
}

/// Run seeds on two threads: what they have shown, and the lives that have failed.
fn seeds(count: u64, rules: Rules) -> (Shown, Vec<(Life, String)>) {
    let all = Mutex::new((Shown::default(), Vec::new()));
    thread::scope(|scope| {
        for part in 0..2 {
            let all = &all;
            scope.spawn(move || {
                for seed in (part..count).step_by(2) {
                    let life = Life::any(seed, &[], 7);
                    let one = live(&life, rules);
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

fn number(name: &str) -> Option<u64> {
    env::var(name).ok()?.parse().ok()
}

#[test]
fn any_seed() {
    if let Some(seed) = number("SEED") {
        let life = Life::any(seed, &[], 7);
        println!("{life:?}\n{:?}", live(&life, Rules::ALL).unwrap());
        return;
    }
    let count = number("SEEDS").unwrap_or(10_000);
    let (shown, failed) = seeds(count, Rules::ALL);
    println!("{count} seeds: {shown:#?}");
    for (life, wrong) in failed.iter().take(10) {
        let least = life.clone().shrunk(|life| live(life, Rules::ALL).is_err());
        println!("SEED={}: {wrong}\n    {least:?}", life.seed);
    }
    assert!(failed.is_empty(), "{} of {count} seeds have failed; replay with SEED=n", failed.len());
    // A process has won a term and died before its sidecar said so, and the other side is dead or
    // has left. The next process of its side is refused (`Denial::Earlier`): a person decides. At
    // least two processes have died then.
    let left: Vec<_> = shown.ownerless.keys().filter(|c| !c.contains("dead Protected")).collect();
    assert!(left.is_empty(), "nobody may start the guest: {left:?}");
    assert!(shown.promotions * 10 > count && shown.solos * 10 > count, "too little happened");
}

/// Each rule that is missing is found by seeds, with faults that exercise it.
#[test]
fn seeds_find_what_a_missing_rule_breaks() {
    let any = &[][..];
    let controls = [
        (Rule::Arm, "(I3)", any),
        (Rule::Ack, "(I1)", any),
        (Rule::Wit, "(I3)", any),
        (Rule::Gran, "(I3)", any),
        (Rule::Close, "(I3)", &[Fault::Unprotect]),
        (Rule::Cold, "(I3)", &[Fault::Kill(0, false), Fault::Restart(0, true)]),
        (Rule::Burn, "(I11)", &[Fault::LateWitness, Fault::Cut(true, true), Fault::Heal]),
        (Rule::Pair, "(I10)", &[Fault::SecondProcess, Fault::Cut(true, true), Fault::Heal]),
        (Rule::Hand, "(I3)", &[Fault::Failover, Fault::Kill(0, true), Fault::Restart(0, true)]),
        (Rule::Yield, "(A9)", &[Fault::Freeze(0, 700), Fault::Doom(1, 4)]),
    ];
    let mut missed = Vec::new();
    for (rule, says, first) in controls {
        let broken = |life: &Life, rules| {
            live(life, rules).err().filter(|wrong: &String| wrong.contains(says))
        };
        let without = Rules::without(rule);
        let mut lives = (0..3000).map(|seed| Life { fence: false, ..Life::any(seed, first, 2) });
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
