//! A term that only begins, or whose backup is another process than it was: nothing runs at the
//! backup's host, and the guest at its primary notices nothing.
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use stories::agent::Story;
use stories::lab::hosts::{Hosts, Side};
use stories::lab::proxy::{Address, Proxy};
use stories::monitor::{BOOT, SOON};
use stories::replicated::client::Client;
use stories::replicated::counter::{Counter, Manner};
use stories::replicated::machine::{pace, start, vm};
use stories::replicated::pair::{Machine, Pair, Protection};
use stories::replicated::relay::{Relay, Step};

const PROTECTION: Protection =
    Protection { interval: Duration::from_millis(25), timeout: Duration::from_millis(300) };
/// Bytes of the disk.
const DISK: usize = 2 << 20;
/// Numbers that show that the guest is running.
const SOME: usize = 20;

/// Begins a protection of which nothing gets through from `step` on; its backup.
fn cut_at(pair: &mut Pair<'_>, primary: &mut Machine, step: Step) -> Result<Machine> {
    let (backup, address) = pair.backup(primary.side.other())?;
    let (relay, way) = Relay::start(pair.hosts.host(primary.side), address)?;
    relay.cut_at(step);
    pair.lead(primary, way)?;
    pair.begin(primary, PROTECTION, &json!({}))?;
    relay.wait(step, SOON).with_context(|| backup.monitor.said())?;
    Ok(backup)
}

/// The backup's process has ended without having run the guest.
fn has_left(mut backup: Machine) -> Result<()> {
    let end = backup.monitor.wait_exit()?;
    let said = backup.monitor.said_to_its_end()?;
    ensure!(end.code() == Some(1), "{end}: {said}");
    ensure!(said.contains("has left this backup"), "{said}");
    Ok(())
}

/// The backup is killed, or the link is cut, at each step until the backup may run the guest. Then
/// the primary is: the image that was being filled is no guest's any more.
pub fn before_it_is_armed(story: &Story) -> Result<()> {
    let hosts = Hosts::new(&story.debian, 1)?;
    let pair = Pair::new(&hosts, &story.paths, &story.dir)?;
    let mut pair = pair.with_disk(Side::Left, &[1; DISK])?;
    // The relay reads what it passes on.
    pair.tls = false;
    let mut primary = pair.boot(Side::Left)?;
    let counter = Counter::start(&hosts.outside, Manner::default())?;
    counter.wait(SOME, BOOT)?;
    for (step, is_killed, ends) in [
        (Step::Offered, true, "off"),
        (Step::Pages, true, "off"),
        (Step::Acknowledged, false, "off"),
        (Step::Armed, true, "degraded"),
        (Step::Armed, false, "degraded"),
        // The term that it has won is still its own.
        (Step::Acknowledged, false, "degraded"),
    ] {
        let backup = cut_at(&mut pair, &mut primary, step)?;
        match is_killed {
            true => drop(backup),
            false => has_left(backup).with_context(|| format!("{step:?}"))?,
        }
        primary.wait_state(ends).with_context(|| format!("{step:?}"))?;
        counter.wait(SOME, SOON)?;
    }
    ensure!(counter.finish()?.reconnections == 0, "the connection did not survive");

    let backup = cut_at(&mut pair, &mut primary, Step::Pages)?;
    drop(primary);
    has_left(backup)?;
    let dir = story.dir.join("half");
    std::fs::create_dir(&dir)?;
    let half = vm(&story.paths)?.disk("disk", pair.image(Side::Right).context("no image")?, false);
    let mut half = start(half, &hosts, Side::Right, &story.paths, &dir)?;
    let (end, said) = (half.wait_exit()?, half.said_to_its_end()?);
    ensure!(!end.success() && said.contains("was being filled"), "{end}: {said}");
    Ok(())
}

/// The backup hangs, and a supervisor starts another one in its place, which the primary then finds
/// at its address. The new one gets nothing in this term: the primary wins it first. When the old
/// one wakes up, it has lost.
pub fn is_replaced(story: &Story) -> Result<()> {
    let hosts = Hosts::new(&story.debian, 1)?;
    let mut pair = Pair::new(&hosts, &story.paths, &story.dir)?;
    let mut primary = pair.boot(Side::Left)?;
    let mut client = Client::connect(&hosts, BOOT)?;
    client.write(100, 512, 10 * pace(), SOON)?;
    let counter = Counter::start(&hosts.outside, Manner::default())?;
    // So long that the primary connects again before it would claim the term by itself.
    let patient = Protection { timeout: Duration::from_secs(2), ..PROTECTION };
    let mut proxy = None;
    let mut old = pair.protect_through(&mut primary, patient, |to| {
        let here = Address::Tcp("127.0.0.1:0".parse()?);
        let made = hosts.host(Side::Left).enter(|| Proxy::new(&here, Address::Tcp(to)))??;
        let Address::Tcp(address) = *made.address() else { unreachable!() };
        proxy = Some(made);
        Ok(address)
    })?;
    old.signal(Signal::STOP)?;
    let (mut new, address) = pair.backup(Side::Right)?;
    pair.lead(&mut primary, address)?;
    primary.agent.forget();
    proxy.context("no proxy")?.hang_up();
    primary.agent.wait("a refusal", SOON, |event| {
        let reason = event.data.get("reason").and_then(Value::as_str);
        reason.filter(|reason| reason.contains("another process is bound")).map(|_| ())
    })?;
    primary.wait_state("degraded")?;
    counter.wait(SOME, SOON)?;
    let info = new.replication()?;
    ensure!(info.get("state") == Some(&json!("listening")), "{info}");

    pair.protect_again(&mut primary, &new, PROTECTION)?;
    ensure!(primary.number("term")? == 2);
    counter.wait(SOME, SOON)?;
    old.signal(Signal::CONT)?;
    old.wait_state("abandoned")?;
    let rounds = client.check_memory(SOON)?;
    primary.checkpoints(2)?;
    Pair::kill(primary, &new, SOON)?;
    counter.wait(SOME, SOON)?;
    ensure!(client.check_memory(SOON)? >= rounds, "what was told outside is forgotten");
    ensure!(counter.finish()?.reconnections == 0, "the connection did not survive");
    old.wait_state("abandoned").map(drop)
}
