//! A client that lets the guest count, and notices when a number is lost, given twice or given in
//! another history than the one that the guest told before.
use std::collections::VecDeque;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::client::Client;
use super::probe;
use crate::counted::{FIRST_HASH, hash};
use crate::lab::namespace::Namespace;

/// Requests whose fate may be unknown at once: each doubles the histories to be compared.
const UNKNOWN: usize = 8;

/// What an answer may be, after everything that was answered so far.
#[derive(Debug, Clone)]
struct Expected {
    number: u64,
    hash: u64,
    /// Requests without an answer, whose connections have broken: each was carried out or not.
    unknown: VecDeque<String>,
}

impl Expected {
    const fn new() -> Self {
        Self { number: 0, hash: FIRST_HASH, unknown: VecDeque::new() }
    }

    /// Takes the answer to `word`.
    fn check(&mut self, word: &str, answer: &str) -> Result<()> {
        let (number, got) = answer.split_once(' ').context("no number and hash")?;
        let number: u64 = number.parse().context("no number")?;
        let got = u64::from_str_radix(got, 16).context("no hash")?;
        let Self { number: last, .. } = *self;
        ensure!(number > last, "{number} was given twice: {last} was acknowledged before");
        let most = last + 1 + self.unknown.len() as u64;
        ensure!(number <= most, "{number} follows {last}, and at most {most} was asked for");
        let carried_out = (number - last - 1) as u32;
        // Each bit of `choice` says whether one of them was carried out.
        let agrees = |choice: u32| {
            let chosen = self.unknown.iter().zip(0..).filter(|(_, bit)| choice >> bit & 1 == 1);
            let words = chosen.map(|(word, _)| word.as_str()).chain([word]);
            let history = (last + 1..).zip(words);
            history.fold(self.hash, |before, (number, word)| hash(before, number, word)) == got
        };
        let mut choices = 0..1_u32 << self.unknown.len();
        let known = choices.any(|choice| choice.count_ones() == carried_out && agrees(choice));
        ensure!(known, "{number} comes with the hash of another history than {last} had");
        *self = Self { number, hash: got, unknown: VecDeque::new() };
        Ok(())
    }
}

/// An acknowledged number.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// The number.
    pub number: u64,
    /// When it was asked for.
    pub asked: Instant,
    /// When it came.
    pub came: Instant,
}

/// What has happened so far.
#[derive(Debug, Default)]
struct Log {
    steps: Vec<Step>,
    reconnections: u64,
    stop: bool,
    /// The connection, to end a wait for it.
    stream: Option<TcpStream>,
    failed: Option<String>,
}

#[derive(Default)]
struct Shared {
    log: Mutex<Log>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How the client asks.
#[derive(Debug, Clone, Copy)]
pub struct Manner {
    /// The pause after each answer.
    pub pause: Duration,
    /// How long it waits for an answer before it connects again.
    pub patience: Duration,
    /// How long it tries to connect.
    pub limit: Duration,
}

impl Default for Manner {
    /// As fast as the guest answers. The connection itself survives a failover, so it waits long.
    fn default() -> Self {
        let (patience, limit) = (Duration::from_secs(20), Duration::from_secs(20));
        Self { pause: Duration::ZERO, patience, limit }
    }
}

/// A client that counts, in a thread of its own; ended when dropped.
pub struct Counter {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<()>>>,
}

/// What a client has seen in all.
#[derive(Debug, Clone)]
pub struct Report {
    /// All acknowledged numbers.
    pub steps: Vec<Step>,
    /// How often it had to connect again.
    pub reconnections: u64,
}

impl Report {
    /// The longest time without an answer that contains or follows `since`. After a loss this is as
    /// long as TCP waits, up to twice the time of the guest's absence: that is what
    /// [`probe`] measures.
    #[must_use]
    pub fn longest_gap(&self, since: Instant) -> Duration {
        longest_gap(&self.steps, since)
    }

    /// How long each answer took.
    #[must_use]
    pub fn latencies(&self) -> Vec<Duration> {
        self.steps.iter().map(|step| step.came - step.asked).collect()
    }
}

impl Counter {
    /// Connects from `namespace` and begins to count, with a guest that nobody has asked before.
    ///
    /// # Errors
    /// No more threads.
    pub fn start(namespace: &Namespace, manner: Manner) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        let thread = namespace.spawn("counter", move || {
            if let Err(error) = count(&theirs, manner) {
                theirs.lock().failed = Some(format!("{error:#}"));
                theirs.changed.notify_all();
            }
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Waits for that many more acknowledged numbers.
    ///
    /// # Errors
    /// They do not come within `limit`, or something is wrong.
    pub fn wait(&self, more: usize, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        let mut log = self.shared.lock();
        let enough = log.steps.len() + more;
        loop {
            if let Some(error) = &log.failed {
                bail!("the counter: {error}");
            }
            if log.steps.len() >= enough {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let missing = enough - log.steps.len();
            ensure!(!left.is_zero(), "{missing} of {more} numbers do not come within {limit:?}");
            let waited = self.shared.changed.wait_timeout(log, left);
            log = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The last number that was acknowledged; 0 before the first one.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.shared.lock().steps.last().map_or(0, |step| step.number)
    }

    /// As [`Report::longest_gap`], so far.
    #[must_use]
    pub fn longest_gap(&self, since: Instant) -> Duration {
        longest_gap(&self.shared.lock().steps, since)
    }

    /// Ends it.
    ///
    /// # Errors
    /// Something was wrong.
    pub fn finish(mut self) -> Result<Report> {
        self.end()?;
        let mut log = self.shared.lock();
        if let Some(error) = log.failed.take() {
            bail!("the counter: {error}");
        }
        Ok(Report { steps: std::mem::take(&mut log.steps), reconnections: log.reconnections })
    }

    fn end(&mut self) -> Result<()> {
        let mut log = self.shared.lock();
        log.stop = true;
        if let Some(stream) = log.stream.take() {
            // An error means that the guest has hung up already.
            let _ = stream.shutdown(Shutdown::Both);
        }
        drop(log);
        match self.thread.take().map(JoinHandle::join) {
            Some(Err(_)) => bail!("the counter panicked"),
            Some(Ok(result)) => result,
            None => Ok(()),
        }
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        // `finish` reports that.
        let _ = self.end();
    }
}

fn longest_gap(steps: &[Step], since: Instant) -> Duration {
    let came: Vec<_> = steps.iter().map(|step| step.came).collect();
    probe::longest_gap(&came, since)
}

fn count(shared: &Shared, manner: Manner) -> Result<()> {
    let mut expected = Expected::new();
    let mut client = connect(shared, manner)?;
    for request in 1_u64.. {
        if shared.lock().stop {
            break;
        }
        let word = request.to_string();
        let asked = Instant::now();
        match client.ask(&format!("next {word}"), manner.patience) {
            Ok(answer) => {
                expected
                    .check(&word, &answer)
                    .with_context(|| format!("request {word}: {answer}"))?;
                let step = Step { number: expected.number, asked, came: Instant::now() };
                shared.lock().steps.push(step);
                shared.changed.notify_all();
                std::thread::sleep(manner.pause);
            }
            Err(_) if shared.lock().stop => break,
            Err(error) => {
                eprintln!("the counter connects again after {:?}: {error}", asked.elapsed());
                expected.unknown.push_back(word);
                ensure!(expected.unknown.len() <= UNKNOWN, "too many connections have broken");
                shared.lock().reconnections += 1;
                client = connect(shared, manner)?;
            }
        }
    }
    Ok(())
}

fn connect(shared: &Shared, manner: Manner) -> Result<Client> {
    let client = Client::here(manner.limit)?;
    shared.lock().stream = Some(client.stream()?);
    Ok(client)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest.
    struct Guest(u64, u64);

    impl Guest {
        fn next(&mut self, word: &str) -> String {
            self.0 += 1;
            self.1 = hash(self.1, self.0, word);
            format!("{} {:016x}", self.0, self.1)
        }
    }

    fn counted(words: &[&str]) -> (Expected, Guest) {
        let (mut expected, mut guest) = (Expected::new(), Guest(0, FIRST_HASH));
        for word in words {
            expected.check(word, &guest.next(word)).unwrap();
        }
        (expected, guest)
    }

    fn error(expected: &mut Expected, word: &str, answer: &str) -> String {
        expected.check(word, answer).unwrap_err().to_string()
    }

    #[test]
    fn a_guest_that_loses_what_it_acknowledged_is_noticed() {
        let (mut expected, _) = counted(&["a", "b", "c"]);
        let (_, mut behind) = counted(&["a", "b"]);
        assert!(error(&mut expected, "d", &behind.next("d")).contains("given twice"));
        let (_, mut fresh) = counted(&[]);
        assert!(error(&mut expected, "d", &fresh.next("d")).contains("given twice"));
    }

    #[test]
    fn a_guest_that_counts_for_somebody_else_is_noticed() {
        let (mut expected, mut guest) = counted(&["a", "b"]);
        guest.next("not ours");
        assert!(error(&mut expected, "c", &guest.next("c")).contains("at most"));
    }

    #[test]
    fn a_guest_with_another_history_is_noticed() {
        let (mut expected, _) = counted(&["a", "b"]);
        let (_, mut other) = counted(&["a", "x"]);
        assert!(error(&mut expected, "c", &other.next("c")).contains("another history"));
    }

    #[test]
    fn a_request_without_an_answer_was_carried_out_or_not() {
        for carried_out in [[false, false], [true, false], [false, true], [true, true]] {
            let (mut expected, mut guest) = counted(&["a"]);
            for (word, carried_out) in ["b", "c"].into_iter().zip(carried_out) {
                expected.unknown.push_back(word.to_owned());
                if carried_out {
                    guest.next(word);
                }
            }
            expected.check("d", &guest.next("d")).unwrap();
            expected.check("e", &guest.next("e")).unwrap();
        }
        // But not something else.
        let (mut expected, mut guest) = counted(&["a"]);
        expected.unknown.push_back("b".to_owned());
        guest.next("x");
        assert!(error(&mut expected, "c", &guest.next("c")).contains("another history"));
    }

    #[test]
    fn what_is_no_answer_is_refused() {
        let (mut expected, _) = counted(&["a"]);
        for answer in ["", "2", "2 x", "x 0", "error: no such request"] {
            assert!(expected.check("b", answer).is_err(), "{answer}");
        }
    }
}
