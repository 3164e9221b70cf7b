//! A chain of failovers of one guest. In each turn the guest is protected by a new process at the
//! other host, works, and loses its own host; then it runs at the other one. A client outside counts
//! all the time, and another has records written to the guest's disk.
use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fastrand::Rng;

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
/// Numbers that the guest gives before and after each failover.
const NUMBERS: usize = 20;
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
        let (period, work) = (rng.u64(1..50), rng.u64(0..500));
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
    /// How long all of the turn took.
    pub took: Duration,
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { turn, failover, away, gap, took } = self;
        let work = match turn.pages {
            0 => "an idle guest".to_owned(),
            pages => format!("{pages} pages of {} bytes each {:?}", turn.bytes, turn.period),
        };
        let step = turn.step.map_or("any moment".to_owned(), |step| format!("step {step:?}"));
        write!(f, "{work}, killed at {step}: away for {away:.1?}, to TCP for {gap:.1?}; ")?;
        write!(f, "{failover:.1?}; {took:.1?} in all")
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
        let host = self.pair.hosts.host(primary.side);
        let mut relay = None;
        let backup = self.pair.protect_through(&mut primary, PROTECTION, |to| {
            if turn.step.is_none() {
                return Ok(to);
            }
            let (made, address) = Relay::start(host, to)?;
            relay = Some(made);
            Ok(address)
        })?;
        self.counter.wait(NUMBERS, SOON).context("protected")?;
        std::thread::sleep(turn.work);
        let killed = match relay.as_ref().zip(turn.step) {
            Some((relay, step)) => relay.wait(step, SOON)?,
            None => Instant::now(),
        };
        let failover = Pair::kill(primary, &backup, LIMIT)?;
        self.counter.wait(NUMBERS, LIMIT).context("after the failover")?;
        self.client.check_memory(SOON)?;
        // Each of them was flushed before it was acknowledged.
        let acknowledged = self.recorder.acknowledged();
        self.recorder.wait(1, SOON)?;
        let found = self.client.check_records(SOON)?;
        ensure!(found > acknowledged, "{found} records of {acknowledged}");
        self.primary = Some(backup);
        let (away, gap) = (self.probe.longest_gap(killed)?, self.counter.longest_gap(killed));
        Ok(Done { turn, failover, away, gap, took: began.elapsed() })
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
