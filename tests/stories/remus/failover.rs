//! The primary is lost, and the guest continues at its backup.
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use stories::agent::Story;
use stories::lab::hosts::{GUEST_MAC, Hosts, Side};
use stories::monitor::{BOOT, SOON};
use stories::replicated::client::Client;
use stories::replicated::counter::{Counter, Manner};
use stories::replicated::machine::pace;
use stories::replicated::pair::{Pair, Protection};
use stories::replicated::probe::Probe;

/// From one checkpoint to the next, and without a byte from the primary until it is suspected.
const PROTECTION: Protection =
    Protection { interval: Duration::from_millis(25), timeout: Duration::from_millis(200) };

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
