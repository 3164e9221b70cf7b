//! Every order of events of the real state machines, within bounds: processes that are slow,
//! frozen, killed at every output and started again, claims that arrive late, answers that are
//! lost, a second process of the backup's host, failback, cold starts, planned failover and closing
//! commands.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs, reason = "a test")]
#[path = "search/explore.rs"]
mod explore;
#[path = "search/moves.rs"]
mod moves;
#[path = "search/normal.rs"]
mod normal;
#[path = "search/world.rs"]
mod world;

use explore::{Found, explore};
use replication::{Arbiter, Digest, Rule, Rules};
use world::Bounds;

const ONE_TERM: Bounds = Bounds {
    rules: ALL,
    arbiter: Arbiter::Witness(Digest(1)),
    hosts: &[0, 1],
    epochs: 2,
    terms: 1,
    cuts: 1,
    kills: 1,
    lost: 1,
    commands: 1,
    slow: false,
};
/// Worlds that are visited at most; a search that needs more says so.
const MOST: usize = 20_000_000;
const ALL: Rules = Rules::ALL;

fn report(name: &str, found: &Found) {
    println!(
        "{name}: {} states, ran {}, solo {}, cold {}, lost {}",
        found.states,
        found.ran,
        found.solo,
        found.cold,
        found.lost.len()
    );
    if let Some((wrong, path)) = &found.broken {
        println!("  BROKEN after {} steps: {wrong}\n  {path:?}", path.len());
    }
    if let Some(path) = found.lost.first() {
        println!("  lost after {} steps\n  {path:?}", path.len());
    }
}

#[test]
fn one_term() {
    holds("one term, an answer lost", &Bounds { commands: 0, ..ONE_TERM }, true);
}

#[test]
fn one_term_that_is_left_by_command() {
    holds("a command, a cut", &Bounds { kills: 0, lost: 0, ..ONE_TERM }, true);
    holds("a command, a death", &Bounds { cuts: 0, lost: 0, ..ONE_TERM }, true);
}

#[test]
fn one_term_where_writes_and_captures_take_time() {
    holds("slow", &Bounds { slow: true, lost: 0, commands: 0, ..ONE_TERM }, true);
}

#[test]
fn a_second_process_of_the_backups_host() {
    let bounds = Bounds { hosts: &[0, 1, 1], epochs: 1, lost: 0, commands: 0, ..ONE_TERM };
    holds("second process, a cut", &Bounds { kills: 0, ..bounds }, false);
    holds("second process, a death", &Bounds { cuts: 0, ..bounds }, false);
}

#[test]
fn two_terms_with_failback() {
    let bounds = Bounds { terms: 2, lost: 0, commands: 0, ..ONE_TERM };
    holds("two terms, a cut", &Bounds { kills: 0, ..bounds }, false);
    holds("two terms, a death", &Bounds { cuts: 0, ..bounds }, false);
}

#[test]
fn one_term_with_a_fence_and_one_with_nobody_who_decides() {
    let bounds = Bounds { arbiter: Arbiter::Fence(Digest(1)), lost: 0, commands: 0, ..ONE_TERM };
    holds("fence", &bounds, false);
    holds("fence, slow", &Bounds { slow: true, kills: 0, ..bounds }, false);
    holds("fence, a command", &Bounds { commands: 1, kills: 0, ..bounds }, false);
    holds("nobody", &Bounds { arbiter: Arbiter::None, commands: 1, ..bounds }, false);
}

/// All faults at once; minutes. Run with `--ignored`.
#[test]
#[ignore = "takes minutes"]
fn everything_at_once() {
    holds("one term", &ONE_TERM, true);
    holds("slow", &Bounds { slow: true, lost: 0, ..ONE_TERM }, true);
    let bounds = Bounds { lost: 0, commands: 0, ..ONE_TERM };
    holds("two terms", &Bounds { terms: 2, ..bounds }, false);
    holds("second process", &Bounds { hosts: &[0, 1, 1], ..bounds }, false);
}

/// No world within `bounds` is wrong; and with `liveness`, there is none where the guest is lost
/// although only one process has died.
fn holds(name: &str, bounds: &Bounds, liveness: bool) {
    let start = std::time::Instant::now();
    let found = explore(bounds, MOST, liveness);
    report(name, &found);
    println!("  {:?}", start.elapsed());
    assert!(found.broken.is_none() && found.lost.is_empty());
}

/// Every rule is needed: without it there is a violation, and the search finds it. Each has the
/// smallest bounds that show it.
#[test]
fn each_rule_switched_off_breaks_an_invariant() {
    let none = Bounds { cuts: 0, kills: 0, lost: 0, commands: 0, ..ONE_TERM };
    let controls = [
        (Rule::Arm, "I3", none),
        (Rule::Burn, "I11", Bounds { cuts: 1, lost: 1, ..none }),
        (Rule::Pair, "I3", Bounds { cuts: 1, hosts: &[0, 1, 1], ..none }),
        (Rule::Close, "I3", Bounds { commands: 1, ..none }),
        (Rule::Hand, "I3", Bounds { commands: 1, kills: 1, ..none }),
        (Rule::Cold, "I3", Bounds { kills: 1, ..none }),
        (Rule::Ack, "I2", none),
        (Rule::Wit, "I3", none),
        (Rule::Gran, "I3", none),
    ];
    let mut missed = Vec::new();
    for (rule, invariant, bounds) in controls {
        let bounds = Bounds { rules: Rules::without(rule), ..bounds };
        assert!(explore(&Bounds { rules: ALL, ..bounds }, MOST, false).broken.is_none());
        let found = explore(&bounds, MOST, false);
        report(&format!("without {rule:?}"), &found);
        if !found.broken.is_some_and(|(wrong, _)| wrong.contains(invariant)) {
            missed.push(rule);
        }
    }
    let bounds = Bounds { rules: Rules::without(Rule::Yield), kills: 1, ..none };
    let found = explore(&bounds, MOST, true);
    report("without Yield", &found);
    assert!(found.broken.is_none(), "without `yield` it is safe, only the guest is lost");
    if found.lost.is_empty() {
        missed.push(Rule::Yield);
    }
    assert!(missed.is_empty(), "the search has missed {missed:?}");
}
