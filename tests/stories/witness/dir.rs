//! Processes that race for terms in a directory, and are killed wherever they are.
use std::collections::BTreeMap;
use std::fs;
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use fastrand::Rng;
use replication::{
    Answer, Incarnation, Lineage, Party, Question, Record, Settled, Side, Term, Word,
};
use stories::replicated::etcd::in_memory;
use stories::seed;

use crate::rig::{Asker, line};

const PROCESSES: u64 = 8;
const TERMS: u64 = 1000;
const GUEST: Lineage = Lineage(7);

/// One in so many claims is interrupted by a kill.
const KILLS: u32 = 50;

#[test]
fn each_term_has_one_winner_although_claimants_are_killed() -> Result<()> {
    let dir = in_memory("race")?;
    let uri = format!("dir:{}", dir.display());
    let identity = Asker::new(&uri, None)?.identify()?;
    let seed = seed::get()?;
    let start = Barrier::new(PROCESSES as usize);
    let results = thread::scope(|scope| {
        let race = |number| {
            let (uri, identity, start) = (&uri, &identity, &start);
            scope.spawn(move || race(number, uri, identity, start, seed))
        };
        let threads: Vec<_> = (1..=PROCESSES).map(race).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Result<Vec<_>>>()
    })?;
    let mut wins: BTreeMap<u128, u64> = BTreeMap::new();
    let (answers, kills): (Vec<_>, Vec<_>) = results.into_iter().unzip();
    let mut look = Asker::new(&uri, Some(&identity))?;
    for term in 0..TERMS {
        let all: Vec<_> = answers.iter().map(|answers| answers[term as usize]).collect();
        ensure!(
            all.iter().all(|one| *one == all[0]),
            "term {} of seed {seed} has several records: {all:?}",
            term + 1
        );
        let kept = look.ask(GUEST, Question::Look { term: Term(term + 1) })?;
        ensure!(kept == Answer::Record(Some(all[0])), "another record is kept: {kept:?}");
        *wins.entry(all[0].winner.incarnation.0).or_default() += 1;
    }
    let kills: u32 = kills.into_iter().sum();
    println!("{PROCESSES} processes, {TERMS} terms, {kills} kills; wins: {wins:?}");
    ensure!(wins.len() > 1 && kills > 0, "there was no race: {wins:?}, {kills} kills");
    Ok(fs::remove_dir_all(dir)?)
}

/// Claims all terms for `number`; the records, and how often its process was killed.
fn race(
    number: u64,
    uri: &str,
    identity: &str,
    start: &Barrier,
    seed: u64,
) -> Result<(Vec<Record>, u32)> {
    let mut rng = Rng::with_seed(seed ^ number);
    let mut asker = Asker::new(uri, Some(identity))?;
    let party = Party { side: Side::Primary, incarnation: Incarnation(number.into()) };
    let mut records = Vec::new();
    let mut kills = 0;
    start.wait();
    for term in 1..=TERMS {
        let claim = Question::Claim { term: Term(term), word: Word::Solo, party };
        while rng.u32(0..KILLS) == 0 {
            asker.send(&line(GUEST, claim).to_string())?;
            thread::sleep(Duration::from_micros(rng.u64(0..500)));
            asker.kill()?;
            kills += 1;
        }
        match asker.ask(GUEST, claim)? {
            Answer::Record(Some(record)) => records.push(record),
            other => anyhow::bail!("term {term}: {other:?}"),
        }
    }
    Ok((records, kills))
}

#[test]
fn each_promotion_has_one_outcome() -> Result<()> {
    let dir = in_memory("settle")?;
    let uri = format!("dir:{}", dir.display());
    let winner = Party { side: Side::Backup, incarnation: Incarnation(1) };
    let mut askers = [Asker::new(&uri, None)?, Asker::new(&uri, None)?];
    for term in 1..=100 {
        let term = Term(term);
        askers[0].ask(GUEST, Question::Claim { term, word: Word::Promote, party: winner })?;
        // The backup runs it, while a later process of its host believes that it never did.
        let outcomes = [Settled::Running, Settled::Yielded { to: Incarnation(2) }];
        for (asker, to) in askers.iter_mut().zip(outcomes) {
            let settle = Question::Settle { term, winner: winner.incarnation, to };
            asker.send(&line(GUEST, settle).to_string())?;
        }
        let both = [askers[0].receive()?, askers[1].receive()?];
        ensure!(both[0] == both[1] && both[0]["record"]["settled"].is_string(), "{both:?}");
    }
    Ok(fs::remove_dir_all(dir)?)
}
