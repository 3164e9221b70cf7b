//! Two hosts whose link, or one of which, fails. The client outside must never notice more than a
//! pause, and only one side may go on.
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use stories::agent::Story;
use stories::lab::hosts::{GUEST_MAC, Hosts, Side};
use stories::lab::line::Impairment;
use stories::lab::proxy::{self, Address, Proxy};
use stories::lab::switch::Direction;
use stories::monitor::{BOOT, SOON};
use stories::replicated::client::Client;
use stories::replicated::counter::{Counter, Manner};
use stories::replicated::machine::pace;
use stories::replicated::pair::{Machine, Pair, Protection};

const PROTECTION: Protection =
    Protection { interval: Duration::from_millis(25), timeout: Duration::from_millis(200) };
/// Numbers that show that the guest is running.
const SOME: usize = 50;
/// Exit status of a primary whose guest runs elsewhere.
const FENCED: i32 = 3;

/// A guest that counts and writes memory, at the left host.
struct Scene<'a> {
    pair: Pair<'a>,
    primary: Machine,
    client: Client,
    counter: Counter,
}

impl<'a> Scene<'a> {
    fn new(story: &'a Story, hosts: &'a Hosts) -> Result<Self> {
        let mut pair = Pair::new(hosts, &story.paths, &story.dir)?;
        let primary = pair.boot(Side::Left)?;
        let mut client = Client::connect(hosts, BOOT)?;
        client.write(100, 512, 10 * pace(), SOON)?;
        let counter = Counter::start(&hosts.outside, Manner::default())?;
        counter.wait(SOME, SOON)?;
        Ok(Self { pair, primary, client, counter })
    }

    /// The guest continues in the connections that there were, at this side.
    fn goes_on_at(&mut self, side: Side) -> Result<()> {
        self.counter.wait(SOME, SOON)?;
        self.client.check_memory(SOON)?;
        let seen = self.pair.hosts.front.port_of(GUEST_MAC);
        ensure!(seen == Some(side.port()), "the guest was last seen at port {seen:?}");
        Ok(())
    }

    fn end(self) -> Result<()> {
        let report = self.counter.finish()?;
        ensure!(report.reconnections == 0, "the connection did not survive");
        Ok(())
    }
}

/// The guest has run at its backup from some moment on.
fn fails_over(backup: &Machine) -> Result<()> {
    let moved = backup
        .agent
        .wait("the failover", SOON, |event| (event.event == "REPLICATION_FAILOVER").then_some(()));
    moved.map(|_| ()).with_context(|| format!("backup: {}", backup.monitor.said()))
}

/// The old primary learns that the guest runs elsewhere, and ends. It may learn both at once, and
/// then has no time to say that it is fenced.
fn is_fenced(mut primary: Machine) -> Result<()> {
    let status = primary.monitor.wait_exit()?;
    ensure!(status.code() == Some(FENCED), "{status}: {}", primary.monitor.said());
    Ok(())
}

/// The primary's host loses power: nothing that it sends arrives any more, and nobody is told. The
/// backup asks the witness after its time-out, and continues the guest. What is left of the primary
/// has no witness, so it holds its output; when its host is back, it is fenced.
pub fn host_vanishes(story: &Story) -> Result<()> {
    let hosts = Hosts::new(&story.debian, 1)?;
    let mut scene = Scene::new(story, &hosts)?;
    let backup = scene.pair.protect(&mut scene.primary, PROTECTION)?;
    scene.counter.wait(SOME, SOON)?;
    let isolate = |impairment| {
        hosts.link.set_both(Side::Left.port(), impairment)?;
        hosts.front.set_both(Side::Left.port(), impairment)
    };
    isolate(Impairment::cut())?;
    scene.pair.witness.cut(Side::Left, true);
    fails_over(&backup)?;
    scene.goes_on_at(Side::Right)?;
    let info = scene.primary.replication()?;
    ensure!(info.get("state") == Some(&json!("stalled")), "{info}");

    isolate(Impairment::default())?;
    scene.pair.witness.cut(Side::Left, false);
    let primary = scene.primary;
    is_fenced(primary)?;
    scene.primary = backup;
    scene.goes_on_at(Side::Right)?;
    scene.end()
}

/// The link is cut both ways, and each way alone, while both sides reach the witness: exactly one
/// side continues, and the other one knows.
pub fn is_cut(story: &Story) -> Result<()> {
    let hosts = Hosts::new(&story.debian, 1)?;
    let mut scene = Scene::new(story, &hosts)?;
    let mut owner = Side::Left;
    for cuts in [&[Direction::Up, Direction::Down][..], &[Direction::Up], &[Direction::Down]] {
        let mut backup = scene.pair.protect(&mut scene.primary, PROTECTION)?;
        scene.counter.wait(SOME, SOON)?;
        let info = scene.primary.replication()?;
        scene.primary.agent.forget();
        for direction in cuts {
            hosts.link.set(owner.port(), *direction, Impairment::cut())?;
        }
        let end = scene.primary.agent.wait_one_of(&["degraded", "fenced"], SOON)?;
        let lineage = info.get("lineage").and_then(Value::as_str).context("no lineage")?;
        let term = info.get("term").and_then(Value::as_u64).context("no term")?;
        let record = scene.pair.witness.record(lineage, term).context("nobody has asked")?;
        let winner = if end == "degraded" { &scene.primary } else { &backup };
        ensure!(record.get("side") == Some(&json!(side_of(&end))), "{end}, but {record:?}");
        println!("cut {cuts:?}: {} continues", side_of(&end));
        owner = winner.side;
        hosts.link.set_both(Side::Left.port(), Impairment::default())?;
        hosts.link.set_both(Side::Right.port(), Impairment::default())?;
        if end == "degraded" {
            backup
                .wait_until("abandoned", |info| info.get("state") == Some(&json!("abandoned")))?;
        } else {
            fails_over(&backup)?;
            is_fenced(std::mem::replace(&mut scene.primary, backup))?;
        }
        scene.goes_on_at(owner)?;
        scene.primary.wait_until("settled", |info| info.get("waiting-for").is_none())?;
    }
    scene.end()
}

fn side_of(end: &str) -> &'static str {
    if end == "degraded" { "primary" } else { "backup" }
}

/// The primary's process is stopped until the guest has run at its backup for a while, and then
/// continued: it is fenced, and until then no frame of its guest leaves its host.
pub fn primary_is_stopped(story: &Story) -> Result<()> {
    let hosts = Hosts::new(&story.debian, 1)?;
    let mut scene = Scene::new(story, &hosts)?;
    let backup = scene.pair.protect(&mut scene.primary, PROTECTION)?;
    scene.counter.wait(SOME, SOON)?;
    scene.primary.signal(Signal::STOP)?;
    fails_over(&backup)?;
    sleep(10 * PROTECTION.timeout);
    scene.goes_on_at(Side::Right)?;
    let left = |hosts: &Hosts| hosts.front.counts(Side::Left.port(), Direction::Up);
    let before = left(&hosts)?;
    scene.primary.signal(Signal::CONT)?;
    is_fenced(std::mem::replace(&mut scene.primary, backup))?;
    scene.goes_on_at(Side::Right)?;
    let sent = left(&hosts)?.sent - before.sent;
    ensure!(sent == 0, "{sent} frames left the host of a primary that was fenced");
    scene.end()
}

/// A line that loses 5 % and has a round trip of 200 ms: TCP sends again, so that the other side is
/// silent for a while now and then. The guest stays protected, and nobody asks the witness.
pub fn is_bad(story: &Story) -> Result<()> {
    let hosts = Hosts::new(&story.debian, 1)?;
    let mut scene = Scene::new(story, &hosts)?;
    let protection = Protection { timeout: Duration::from_secs(3), ..PROTECTION };
    let mut backup = scene.pair.protect(&mut scene.primary, protection)?;
    scene.counter.wait(SOME, SOON)?;
    let bad = Impairment { loss: 0.05, ..Impairment::delay(Duration::from_millis(100)) };
    hosts.link.set(Side::Left.port(), Direction::Up, bad)?;
    hosts.link.set(Side::Left.port(), Direction::Down, bad)?;
    let acked = |info: &Value| info.get("acked").and_then(Value::as_u64).unwrap_or_default();
    let before = acked(&scene.primary.replication()?);
    let info = scene.primary.wait_until("10 checkpoints", |info| acked(info) >= before + 10)?;
    let lost = hosts.link.counts(Side::Left.port(), Direction::Up)?.lost
        + hosts.link.counts(Side::Left.port(), Direction::Down)?.lost;
    ensure!(lost > 0, "the line has lost nothing");
    ensure!(info.get("state") == Some(&json!("protected")), "{info}");
    ensure!(info.get("claimed") == Some(&json!(false)), "{info}");
    let info = backup.replication()?;
    ensure!(info.get("state") == Some(&json!("standby")), "{info}");
    println!("{lost} frames were lost");
    scene.counter.wait(3, SOON)?;
    scene.client.check_memory(SOON)?;
    scene.end()
}

/// Bits that are flipped on the way, with and without encryption: the connection ends, and another
/// one takes its place; no side takes that for the other one's death, and the backup has nothing
/// wrong in memory.
pub fn flips_bits(story: &Story) -> Result<()> {
    let hosts = Hosts::new(&story.debian, 1)?;
    let mut scene = Scene::new(story, &hosts)?;
    // So that there is time for another connection before a side asks the witness.
    let protection = Protection { timeout: Duration::from_secs(4), ..PROTECTION };
    let mut owner = Side::Left;
    for tls in [true, false] {
        scene.pair.tls = tls;
        let mut proxy = None;
        let mut backup = scene.pair.protect_through(&mut scene.primary, protection, |to| {
            let here = Address::Tcp("127.0.0.1:0".parse()?);
            let made = hosts.host(owner).enter(|| Proxy::new(&here, Address::Tcp(to)))??;
            let Address::Tcp(address) = *made.address() else { unreachable!() };
            proxy = Some(made);
            Ok(address)
        })?;
        let proxy = proxy.context("no proxy")?;
        let mut connections = proxy.accepted();
        for (direction, after) in [
            (proxy::Direction::Forth, 20_000),
            (proxy::Direction::Back, 10),
            (proxy::Direction::Forth, 3),
        ] {
            proxy.flip(direction, after);
            scene.primary.wait_until("another connection", |_| proxy.accepted() > connections)?;
            connections = proxy.accepted();
            let acked = |info: &Value| info.get("acked").and_then(Value::as_u64);
            let info = scene.primary.replication()?;
            scene.primary.wait_until("protection", |now| {
                now.get("state") == Some(&json!("protected")) && acked(now) > acked(&info)
            })?;
            scene.counter.wait(SOME, SOON)?;
        }
        let info = backup.replication()?;
        ensure!(info.get("state") == Some(&json!("standby")), "{info}");
        let primary = std::mem::replace(&mut scene.primary, backup);
        Pair::kill(primary, &scene.primary, SOON)?;
        owner = owner.other();
        scene.goes_on_at(owner)?;
        scene.primary.wait_until("settled", |info| info.get("waiting-for").is_none())?;
    }
    scene.end()
}
