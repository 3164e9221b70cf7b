//! A chain of failovers of one guest. In each turn the guest is protected by a new process at the
//! other host, works, and loses its own host; then it runs at the other one. A client outside counts
//! all the time, and another has records written to the guest's disk.
use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fastrand::Rng;
use serde_json::Value;

use super::client::Client;
use super::counter::{Counter, Manner, Report};
use super::machine::pace;
use super::pair::{Failover, Machine, Pair, Protection};
use super::probe::Probe;
use super::recorder::Recorder;
use super::relay::{Relay, Step};
use crate::lab::hosts::{Hosts, Side};
use crate::monitor::SOON;

/// Milliseconds between two checkpoints, and without a byte from the peer until it is suspected.
const PROTECTION: Protection =
    Protection { interval: Duration::from_millis(25), timeout: Duration::from_millis(200) };
/// How long a failover may take at most. Whether it is fast enough, the figures say.
const LIMIT: Duration = Duration::from_secs(20);
/// How soon an epoch is at a step, if there are any.
const STEP: Duration = Duration::from_secs(10);
/// Numbers that the guest gives before each failover, each of them held until a checkpoint is
/// acknowledged; and after it.
const BEFORE: usize = 5;
const AFTER: usize = 20;
/// How often another backup is tried.
const AGAIN: u32 = 3;
/// Pause after each record on the disk.
const RECORDS: Duration = Duration::from_millis(100);

/// What happens in a turn: all of it follows from a seed and the turn's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turn {
    /// Pages that the guest writes, bytes of each, and how often.
    pages: u64,
    bytes: usize,
    period: Duration,
    /// From its protection to its death, or until it is killed at the next [`Step`].
    work: Duration,
    /// The step at which it is killed; otherwise any moment.
    pub step: Option<Step>,
}

impl Turn {
    /// The turn of this number.
    #[must_use]
    pub fn new(seed: u64, number: u64) -> Self {
        let mut rng = Rng::with_seed(seed.wrapping_add(number.wrapping_mul(0x9e37_79b9)));
        let (pages, bytes) =
            if rng.bool() { (rng.u64(1..2000), 8 << rng.u32(0..10)) } else { (0, 0) };
        let (period, work) = (rng.u64(1..50), rng.u64(0..300));
        let step = if rng.bool() { rng.choice(Step::ALL) } else { None };
        Self {
            pages,
            bytes,
            period: Duration::from_millis(period).max(pace()),
            work: Duration::from_millis(work),
            step,
        }
    }
}

/// The figures of a turn.
#[derive(Debug, Clone, Copy)]
pub struct Done {
    /// What it was.
    pub turn: Turn,
    /// The parts of its failover.
    pub failover: Failover,
    /// How long no datagram came back.
    pub away: Duration,
    /// How long no number did.
    pub gap: Duration,
    /// From its beginning until the guest was protected.
    pub protecting: Duration,
    /// From the failover until everything was checked.
    pub checking: Duration,
    /// How long all of the turn took.
    pub took: Duration,
    /// KiB of memory that the guest has left.
    pub free: u64,
    /// How often another backup had to be tried.
    pub again: u32,
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { turn, failover, away, gap, took, .. } = self;
        let work = match turn.pages {
            0 => "an idle guest".to_owned(),
            pages => format!("{pages} pages of {} bytes each {:?}", turn.bytes, turn.period),
        };
        let step = turn.step.map_or("any moment".to_owned(), |step| format!("step {step:?}"));
        write!(f, "{work}, killed at {step}: away for {away:.1?}, to TCP for {gap:.1?}; ")?;
        write!(f, "{failover:.1?}; {took:.1?} in all; {} KiB left", self.free)
    }
}

/// The guest, and who watches it.
pub struct Chain<'a> {
    pair: Pair<'a>,
    /// Runs the guest; none after a turn that has failed.
    primary: Option<Machine>,
    counter: Counter,
    client: Client,
    recorder: Recorder,
    probe: Probe,
}

impl<'a> Chain<'a> {
    /// Boots the guest, whose disk has so many bytes, and begins to count.
    ///
    /// # Errors
    /// It does not come up.
    pub fn start(hosts: &'a Hosts, pair: Pair<'a>, disk: usize) -> Result<Self> {
        let mut pair = pair.with_disk(Side::Left, &vec![0; disk])?;
        let primary = pair.boot(Side::Left)?;
        let counter = Counter::start(&hosts.outside, Manner::default())?;
        let client = Client::connect(hosts, SOON)?;
        let recorder = Recorder::start(&hosts.outside, RECORDS)?;
        let probe = Probe::start(&hosts.outside, 2 * pace())?;
        Ok(Self { pair, primary: Some(primary), counter, client, recorder, probe })
    }

    /// One turn. After an error the chain has ended.
    ///
    /// # Errors
    /// The guest did not go on, or not as it has to.
    pub fn turn(&mut self, turn: Turn) -> Result<Done> {
        let began = Instant::now();
        let mut primary = self.primary.take().context("the chain has ended")?;
        self.client.write(turn.pages, turn.bytes, turn.period, SOON)?;
        // What is encrypted cannot be cut at a step.
        self.pair.tls = turn.step.is_none();
        let mut again = 0;
        let (backup, protecting, killed) = loop {
            let (backup, relay) = self.protect(&mut primary, turn, &mut again)?;
            let protecting = began.elapsed();
            self.counter.wait(BEFORE, SOON).context("protected")?;
            std::thread::sleep(turn.work);
            let reached = match relay.as_ref().zip(turn.step) {
                Some((relay, step)) => relay.wait(step, STEP),
                None => Ok(Instant::now()),
            };
            let error = match (reached, primary.agent.state().as_deref()) {
                (Ok(now), Some("protected")) => break (backup, protecting, now),
                (reached, _) => reached.err(),
            };
            // It must not claim the guest that its primary has lost nothing of.
            drop(backup);
            disturbed(&mut primary, &mut again, error)?;
        };
        let failover = Pair::kill(primary, &backup, LIMIT)?;
        let runs = Instant::now();
        self.counter.wait(AFTER, LIMIT).context("after the failover")?;
        self.client.check_memory(SOON)?;
        // Each of them was flushed before it was acknowledged.
        let acknowledged = self.recorder.acknowledged();
        self.recorder.wait(1, SOON)?;
        let found = self.client.check_records(SOON)?;
        ensure!(found > acknowledged, "{found} records of {acknowledged}");
        self.primary = Some(backup);
        let (away, gap) = (self.probe.longest_gap(killed)?, self.counter.longest_gap(killed));
        let free = self.client.free(SOON)?;
        let (checking, took) = (runs.elapsed(), began.elapsed());
        Ok(Done { turn, failover, away, gap, protecting, checking, took, free, again })
    }

    /// Protects the guest, through a relay if it is to be killed at a step.
    fn protect(
        &mut self,
        primary: &mut Machine,
        turn: Turn,
        again: &mut u32,
    ) -> Result<(Machine, Option<Relay>)> {
        let host = self.pair.hosts.host(primary.side);
        loop {
            let mut relay = None;
            let protected = self.pair.protect_through(primary, PROTECTION, |to| {
                if turn.step.is_none() {
                    return Ok(to);
                }
                let (made, address) = Relay::start(host, to)?;
                relay = Some(made);
                Ok(address)
            });
            match protected {
                Ok(backup) => return Ok((backup, relay)),
                Err(error) => disturbed(primary, again, Some(error))?,
            }
        }
    }

    /// Ends it; what the counter has seen, and how many records were acknowledged.
    ///
    /// # Errors
    /// A number that was acknowledged did not come back, or came twice.
    pub fn finish(self) -> Result<(Report, u64)> {
        let records = self.recorder.finish();
        Ok((self.counter.finish()?, records))
    }
}

/// On a host that is too busy, one side may hear nothing for the time-out. Then the primary has the
/// guest, alone, which has lost nothing, and is protected by another backup.
fn disturbed(primary: &mut Machine, again: &mut u32, error: Option<anyhow::Error>) -> Result<()> {
    let error = error.map_or_else(|| "it has no backup any more".to_owned(), |e| format!("{e:#}"));
    *again += 1;
    ensure!(*again <= AGAIN, "{error}");
    let alone = |info: &Value| {
        let state = info.get("state").and_then(Value::as_str);
        matches!(state, Some("off" | "degraded"))
    };
    primary.wait_until("it neither protects the guest nor has it alone", alone).context(error)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_depends_on_the_seed_and_its_number_only() {
        let turns = |seed| (1..=100).map(|number| Turn::new(seed, number)).collect::<Vec<_>>();
        assert_eq!(turns(1), turns(1));
        assert_ne!(turns(1), turns(2));
        let idle = turns(1).iter().filter(|turn| turn.pages == 0).count();
        assert!((20..80).contains(&idle), "{idle} of 100 are idle");
        for step in Step::ALL {
            let killed = turns(1).iter().filter(|turn| turn.step == Some(step)).count();
            assert!((1..30).contains(&killed), "{killed} of 100 at {step:?}");
        }
    }
}
