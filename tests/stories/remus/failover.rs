//! The primary is lost, and the guest continues at its backup.
use std::env;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use stories::agent::Story;
use stories::lab::hosts::{GUEST_MAC, Hosts, Side};
use stories::monitor::{BOOT, SOON};
use stories::paths::GUEST_KERNEL;
use stories::replicated::chain::{Chain, Turn};
use stories::replicated::client::Client;
use stories::replicated::counter::{Counter, Manner};
use stories::replicated::machine::pace;
use stories::replicated::pair::{Pair, Protection};
use stories::replicated::probe::Probe;
use stories::seed;

/// From one checkpoint to the next, and without a byte from the primary until it is suspected.
const PROTECTION: Protection =
    Protection { interval: Duration::from_millis(25), timeout: Duration::from_millis(200) };

/// Bytes of the guest's disk, which is full of records after some minutes.
const DISK: usize = 16 << 20;

/// kill -9 of the primary: the counter continues, in the connection that it had.
pub fn counter_goes_on(story: &Story) -> Result<()> {
    let hosts = Hosts::new(&story.debian, 1)?;
    let mut pair = Pair::new(&hosts, &story.paths, &story.dir)?;
    let mut primary = pair.boot(Side::Left)?;
    let mut client = Client::connect(&hosts, BOOT)?;
    client.write(100, 512, 10 * pace(), SOON)?;
    let counter = Counter::start(&hosts.outside, Manner::default())?;
    counter.wait(50, SOON)?;

    let backup = pair.protect(&mut primary, PROTECTION)?;
    counter.wait(50, SOON)?;
    let rounds = client.check_memory(SOON)?;
    let probe = Probe::start(&hosts.outside, 2 * pace())?;
    let killed = Instant::now();
    let failover = Pair::kill(primary, &backup, SOON)?;
    counter.wait(50, SOON)?;
    ensure!(client.check_memory(SOON)? >= rounds, "what was told outside is forgotten");
    ensure!(hosts.front.port_of(GUEST_MAC) == Some(Side::Right.port()));
    let report = counter.finish()?;
    ensure!(report.reconnections == 0, "the connection did not survive");
    let (away, gap) = (probe.longest_gap(killed)?, report.longest_gap(killed));
    println!("{} numbers; away for {away:?}, to TCP for {gap:?}; {failover:?}", report.steps.len());
    Ok(())
}

/// The guest is lost again and again, each time protected by the host that it came from. In the
/// emulated host, where a turn takes a minute, only a few times.
pub fn again_and_again(story: &Story) -> Result<()> {
    let turns = if env::var_os(GUEST_KERNEL).is_some() { 50 } else { 2 };
    let seed = seed::get()?;
    let hosts = Hosts::new(&story.debian, 1)?;
    let mut chain = Chain::start(&hosts, Pair::new(&hosts, &story.paths, &story.dir)?, DISK)?;
    for number in 1..=turns {
        let turn = Turn::new(seed, number);
        let done = chain.turn(turn).with_context(|| {
            format!("turn {number}: {turn:?}; STORIES_SEED={seed} takes the same turns")
        })?;
        println!("{number}: {done}");
    }
    let (report, records) = chain.finish()?;
    println!("{records} records on the disk");
    ensure!(report.reconnections == 0, "{} connections broke", report.reconnections);
    Ok(())
}
