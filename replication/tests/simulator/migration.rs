//! A live migration is protection, a planned failover and the end of protection: `stratoctl migrate`.
//! At each of its steps each fault, with a witness and without: exactly one copy runs in the end.
use replication::{
    Arbiter, Command, Input, OnLoss, Rules, backup,
    primary::{self, Handing},
};

use crate::{
    life::{Fault, recover},
    scenarios::{Outcome, protected},
    sim::{STEP, Sim, ms},
};

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Connecting,
    Syncing,
    /// It is not known yet that the backup may promote.
    Arming,
    Protected,
    Parked,
    Last,
    /// The term is being claimed for the other side.
    Claiming,
    /// It was: the other side prepares, asks, and marks its disks.
    Released,
    Suspecting,
    Promoting,
    /// The guest runs there, which is not noted at the witness yet.
    Settling,
    Runs,
}

const STEPS: [Step; 12] = [
    Step::Connecting,
    Step::Syncing,
    Step::Arming,
    Step::Protected,
    Step::Parked,
    Step::Last,
    Step::Claiming,
    Step::Released,
    Step::Suspecting,
    Step::Promoting,
    Step::Settling,
    Step::Runs,
];

fn reached(sim: &Sim, step: Step) -> bool {
    let (here, there) = (sim.nodes[0].primary_state(), sim.nodes[1].backup_state());
    let hands = |handing| here == Some(primary::State::HandingOver(handing));
    let last = matches!(here, Some(primary::State::HandingOver(Handing::Last(_))));
    match step {
        Step::Connecting => here == Some(primary::State::Connecting),
        Step::Syncing => here == Some(primary::State::Syncing),
        Step::Arming => here == Some(primary::State::Protected) && !sim.is_protected(),
        Step::Protected => sim.is_protected(),
        // With the epochs before it not acknowledged, the last one has to wait.
        Step::Parked => hands(Handing::Parked) || last,
        Step::Last => last,
        Step::Claiming => hands(Handing::Claiming) || hands(Handing::Released),
        Step::Released => hands(Handing::Released),
        Step::Suspecting => there == Some(backup::State::Suspecting),
        Step::Promoting => there == Some(backup::State::Promoting),
        Step::Settling => sim.nodes[1].primary().is_some(),
        Step::Runs => sim.nodes[1].primary().is_some() && !sim.nodes[0].is_alive(),
    }
}

/// What happens at a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Happens {
    Nothing,
    Dies(usize),
    /// Its host loses power, and starts again at once.
    Restarts(usize),
    Cut,
    /// Ctrl-C: protection is to end.
    Cancel,
    /// Nobody answers for a while.
    TimeOut,
    DiskFull,
    Reboot,
}

const ALL: [Happens; 10] = [
    Happens::Nothing,
    Happens::Dies(0),
    Happens::Dies(1),
    Happens::Restarts(0),
    Happens::Restarts(1),
    Happens::Cut,
    Happens::Cancel,
    Happens::TimeOut,
    Happens::DiskFull,
    Happens::Reboot,
];

impl Happens {
    fn to(self, sim: &mut Sim) -> Outcome {
        match self {
            Self::Nothing => Ok(()),
            Self::Dies(i) => sim.suffer(Fault::Kill(i, true)),
            Self::Restarts(i) => {
                sim.suffer(Fault::Kill(i, false))?;
                sim.run(ms(50))?;
                sim.suffer(Fault::Restart(i, false))
            }
            Self::Cut => sim.suffer(Fault::Cut(true, true)),
            Self::Cancel => sim.command(Command::Unprotect),
            Self::TimeOut => {
                sim.suffer(Fault::NoWitness)?;
                sim.run(ms(6000))
            }
            Self::DiskFull => sim.suffer(Fault::Storage(1, crate::node::Storage::Full)),
            Self::Reboot => sim.suffer(Fault::Reboot),
        }
    }
}

/// As far as `step`; then what happens, and as far as it gets.
fn migrate(arbiter: Arbiter, seed: u64, step: Step, happens: Happens) -> Result<Sim, String> {
    let on_loss = if arbiter == Arbiter::None { OnLoss::Stall } else { OnLoss::Claim };
    let mut sim = Sim::with(seed, arbiter, on_loss, Rules::ALL);
    let (mut there, mut moves) = (false, false);
    // A full disk is waited for as long as `ack_limit`.
    let most = ms(if happens == Happens::DiskFull { 13_000 } else { 4000 });
    sim.input(0, Input::Command(Command::Start))?;
    while sim.now < most {
        if !there && reached(&sim, step) {
            there = true;
            happens.to(&mut sim)?;
        }
        if !moves && sim.is_protected() && (there || step != Step::Protected) {
            moves = true;
            sim.command(Command::Failover)?;
        }
        sim.run(STEP)?;
    }
    assert!(there, "{step:?} with {happens:?} was not reached: {}", sim.describe());
    Ok(sim)
}

fn arbiters() -> [Arbiter; 2] {
    [Sim::new(0, false, Rules::ALL).settings.agreement.arbiter, Arbiter::None]
}

#[test]
fn each_fault_at_each_step_leaves_one_copy_and_loses_nothing() -> Outcome {
    let (mut stayed, mut moved) = (0, 0);
    for arbiter in arbiters() {
        for step in STEPS {
            for happens in ALL {
                for seed in 0..3 {
                    let name = format!("{arbiter:?}, {step:?}, {happens:?}, seed {seed}");
                    let said = |wrong: String| format!("{name}: {wrong}");
                    let mut sim = migrate(arbiter, seed, step, happens).map_err(said)?;
                    let mid = sim.describe();
                    recover(&mut sim).map_err(said)?;
                    if !sim.is_protected() {
                        return Err(format!("{name}: {mid}, then {}", sim.describe()));
                    }
                    let owner = sim.nodes.iter().position(|node| node.primary().is_some());
                    // A process that has the only copy, or whose disk says that it runs the guest,
                    // takes memory along.
                    let only = match happens {
                        Happens::Dies(0) | Happens::Restarts(0) => {
                            matches!(step, Step::Connecting | Step::Syncing | Step::Arming)
                        }
                        Happens::Dies(_) | Happens::Restarts(_) => {
                            matches!(step, Step::Promoting | Step::Settling | Step::Runs)
                        }
                        _ => false,
                    };
                    if sim.cold > 0 && !only {
                        return Err(format!("{name}: memory is lost: {mid}"));
                    }
                    *if owner == Some(0) { &mut stayed } else { &mut moved } += 1;
                }
            }
        }
    }
    assert!(stayed > 100 && moved > 100, "{stayed} have stayed, {moved} have moved");
    Ok(())
}

#[test]
fn until_it_is_given_away_a_failure_costs_the_guest_nothing() -> Outcome {
    for arbiter in arbiters() {
        for step in &STEPS[..6] {
            for happens in [Happens::Dies(1), Happens::Cancel, Happens::DiskFull] {
                let sim = migrate(arbiter, 1, *step, happens)?;
                // Where nobody is asked, a person is waited for.
                let by_hand = arbiter == Arbiter::None && sim.nodes[0].primary().is_some();
                let moved = sim.promotions == 1 && happens != Happens::Dies(1);
                assert!(
                    sim.owner() == Some(0) || by_hand || moved,
                    "{step:?} {happens:?}: {}",
                    sim.describe()
                );
            }
        }
    }
    Ok(())
}

#[test]
fn a_guest_that_has_moved_leaves_the_term_on_both_sides() -> Outcome {
    let mut sim = protected(4)?;
    sim.input(0, Input::Command(Command::Failover))?;
    sim.until(ms(500), |sim| sim.owner() == Some(1))?;
    for _ in 0..100 {
        sim.run(ms(20))?;
        sim.input(1, Input::Command(Command::Unprotect))?;
    }
    assert_eq!(sim.nodes[1].primary_state(), Some(primary::State::Off));
    let words = (sim.nodes[0].sidecar, sim.nodes[1].sidecar);
    assert!(
        matches!(words, (replication::Mark::Outdated { .. }, replication::Mark::Free { .. })),
        "{words:?}"
    );
    Ok(())
}
