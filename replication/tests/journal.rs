//! Every order of journal, images and writeback at a backup, with a power cut after each step.
//!
//! One disk of two blocks. Epoch 1 writes `a` and flushes, epoch 2 writes `b`; after the promotion
//! the guest writes `a` again and flushes.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs, reason = "a test")]
use std::collections::{HashMap, VecDeque};

use replication::{Epoch, Journal, Rule, Rules};

/// What a block holds: nothing, or the number of the epoch that wrote it; 3 after the promotion.
type Image = [u8; 2];

/// Which block an epoch writes.
const fn block(epoch: Epoch) -> usize {
    epoch.0 as usize - 1
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Disk {
    journal: Journal,
    /// Entries of the journal on the medium, and those only in the page cache.
    entries: Vec<Epoch>,
    volatile: Vec<Epoch>,
    cache: Image,
    medium: Image,
    runs: bool,
    flushed: bool,
}

impl Disk {
    fn next(&self) -> Vec<(&'static str, Self)> {
        let mut all = Vec::new();
        let mut step = |name, change: &dyn Fn(&mut Self)| {
            let mut next = self.clone();
            change(&mut next);
            all.push((name, next));
        };
        if !self.runs && self.journal.last() < Epoch(2) {
            step("append", &|d| {
                d.journal.appended();
                d.volatile.push(d.journal.last());
            });
        }
        if !self.volatile.is_empty() {
            step("journal sync", &|d| {
                d.entries.append(&mut d.volatile);
                d.journal.journal_synced(d.journal.last());
            });
        }
        if let Some(epoch) = self.journal.to_apply().filter(|_| !self.runs) {
            if self.cache[block(epoch)] == epoch.0 as u8 {
                step("applied", &|d| d.journal.applied());
            } else {
                step("apply", &|d| d.cache[block(epoch)] = epoch.0 as u8);
            }
        }
        for block in 0..2 {
            if self.cache[block] != self.medium[block] {
                step("writeback", &|d| d.medium[block] = d.cache[block]);
            }
        }
        step("image sync", &|d| {
            d.medium = d.cache;
            d.journal.images_synced(d.journal.last_applied());
        });
        if let Some(epoch) = self.journal.to_trim() {
            step("trim", &|d| {
                d.entries.retain(|entry| *entry > epoch);
                d.journal.trimmed(epoch);
            });
        }
        if !self.runs && self.journal.last() == Epoch(2) && self.journal.may_run() {
            step("promote", &|d| d.runs = true);
        }
        if self.runs && self.cache[0] != 3 {
            step("guest writes", &|d| d.cache[0] = 3);
        }
        if self.runs && self.cache[0] == 3 && self.cache == self.medium {
            step("guest flushed", &|d| d.flushed = true);
        }
        all
    }

    /// What a power cut here leaves, and what is wrong with it.
    fn after_power_cut(&self) -> Option<&'static str> {
        let mut image = self.medium;
        for epoch in &self.entries {
            image[block(*epoch)] = epoch.0 as u8;
        }
        if image[1] == 2 && image[0] == 0 {
            return Some("b is there without a, which was flushed before it");
        }
        if self.flushed && image[0] != 3 {
            return Some("a flushed write of the promoted guest is overwritten");
        }
        (self.runs && image[0] == 0).then_some("what was flushed before the failover is gone")
    }
}

/// The states, or the shortest way to a violation.
fn search(rules: Rules) -> Result<usize, (usize, &'static str, Vec<&'static str>)> {
    let first = Disk {
        journal: Journal::new(Epoch(0), rules),
        entries: Vec::new(),
        volatile: Vec::new(),
        cache: [0; 2],
        medium: [0; 2],
        runs: false,
        flushed: false,
    };
    let mut seen = HashMap::from([(first.clone(), None)]);
    let mut open = VecDeque::from([first]);
    while let Some(disk) = open.pop_front() {
        if let Some(wrong) = disk.after_power_cut() {
            let (mut way, mut at) = (Vec::new(), disk);
            while let Some((name, from)) = seen[&at].clone() {
                way.insert(0, name);
                at = from;
            }
            return Err((way.len(), wrong, way));
        }
        for (name, next) in disk.next() {
            if !seen.contains_key(&next) {
                seen.insert(next.clone(), Some((name, disk.clone())));
                open.push_back(next);
            }
        }
    }
    Ok(seen.len())
}

#[test]
fn a_power_cut_at_any_step_leaves_images_of_one_epoch() {
    let states = search(Rules::ALL).unwrap();
    println!("{states} states");
    assert!(states > 40, "the search has come far enough to mean something: {states}");
}

#[test]
fn each_rule_switched_off_breaks_an_image() {
    for (rule, says) in [
        (Rule::Durable, "b is there without a"),
        (Rule::Sync, "b is there without a"),
        (Rule::Void, "overwritten"),
    ] {
        let (steps, wrong, way) = search(Rules::without(rule)).unwrap_err();
        println!("without {rule:?}: after {steps} steps: {wrong}: {way:?}");
        assert!(wrong.contains(says), "{rule:?}: {wrong}");
    }
}
