//! The last checkpoints of a primary, and what they cost.
use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use qmp::schema::{Distribution, ReplicationEpoch, ReplicationEpochs, ReplicationSent};
use replication::{Epoch, Term, contents::Counters};

use crate::durations::microseconds;

/// Most checkpoints that are kept: the last 27 minutes at 200 ms, 3 minutes at 25 ms.
const KEPT: usize = 8192;
/// Most that are listed at once: a reply has room for a megabyte.
const LISTED: usize = 1000;

/// How long the parts of a pause took.
#[derive(Debug, Clone, Copy)]
pub struct Pause {
    /// When it began.
    pub began: Instant,
    /// Until vCPUs and devices had stopped.
    pub park: Duration,
    /// Finding out which pages had been written.
    pub harvest: Duration,
    /// Copying them.
    pub copy: Duration,
    /// Reading the state.
    pub state: Duration,
    /// All of it.
    pub all: Duration,
}

/// An epoch that was encoded.
#[derive(Debug, Clone, Copy)]
pub struct Encoded {
    /// Which one.
    pub epoch: Epoch,
    /// How long that took.
    pub time: Duration,
    /// Its bytes.
    pub bytes: u64,
    /// What was sent since the protection began.
    pub sent: Counters,
}

/// The checkpoints.
pub struct History {
    began: Instant,
    count: u64,
    /// Ascending by number, without gaps.
    kept: VecDeque<Kept>,
    sent: Counters,
}

struct Kept {
    began: Instant,
    encoded: Option<Instant>,
    shown: ReplicationEpoch,
}

impl Default for History {
    fn default() -> Self {
        let (kept, sent) = (VecDeque::new(), Counters::default());
        Self { began: Instant::now(), count: 0, kept, sent }
    }
}

impl History {
    /// An epoch was captured, with this many pages, while output of `held` bytes was held.
    pub fn captured(
        &mut self,
        (term, epoch): (Term, Epoch),
        pause: &Pause,
        pages: u64,
        held: usize,
    ) {
        self.count += 1;
        let since = |before: Instant| microseconds(pause.began.saturating_duration_since(before));
        // Between two protections there is no period.
        let last = self.kept.back().filter(|last| last.shown.term == term.0);
        let shown = ReplicationEpoch {
            number: self.count,
            term: term.0,
            epoch: epoch.0,
            at_us: since(self.began),
            period_us: last.map(|last| since(last.began)),
            pause_us: microseconds(pause.all),
            park_us: microseconds(pause.park),
            harvest_us: microseconds(pause.harvest),
            copy_us: microseconds(pause.copy),
            state_us: microseconds(pause.state),
            dirty_pages: pages,
            held_bytes: held as u64,
            ..Default::default()
        };
        if self.kept.len() == KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back(Kept { began: pause.began, encoded: None, shown });
    }

    /// An epoch of `term` was encoded. It is again when the connection is a new one.
    pub fn encoded(&mut self, term: Term, encoded: &Encoded) {
        self.sent = encoded.sent;
        if let Some(kept) = self.find(term, encoded.epoch) {
            kept.encoded = Some(Instant::now());
            kept.shown.encode_us = Some(microseconds(encoded.time));
            kept.shown.wire_bytes += encoded.bytes;
        }
    }

    /// The backup has acknowledged an epoch of `term`.
    pub fn acknowledged(&mut self, term: Term, epoch: Epoch) {
        if let Some(kept) = self.find(term, epoch) {
            kept.shown.ack_us = kept.encoded.map(|at| microseconds(at.elapsed()));
        }
    }

    /// The output of an epoch of `term` was released.
    pub fn released(&mut self, term: Term, epoch: Epoch) {
        if let Some(kept) = self.find(term, epoch) {
            kept.shown.commit_lag_us = Some(microseconds(kept.began.elapsed()));
        }
    }

    fn find(&mut self, term: Term, epoch: Epoch) -> Option<&mut Kept> {
        let is_it = |kept: &&mut Kept| (kept.shown.term, kept.shown.epoch) == (term.0, epoch.0);
        self.kept.iter_mut().rev().find(is_it)
    }

    /// The distributions, and the checkpoints after number `after`.
    pub fn show(&self, after: u64) -> ReplicationEpochs {
        type Figure = fn(&ReplicationEpoch) -> Option<u64>;
        let of = |figure: Figure| {
            distribution(self.kept.iter().filter_map(|kept| figure(&kept.shown)).collect())
        };
        let Counters { raw, zero, same, delta, lz4, wire } = self.sent;
        let listed = self.kept.iter().map(|kept| kept.shown).filter(|one| one.number > after);
        ReplicationEpochs {
            period_us: of(|one| one.period_us),
            pause_us: of(|one| Some(one.pause_us)),
            dirty_pages: of(|one| Some(one.dirty_pages)),
            held_bytes: of(|one| Some(one.held_bytes)),
            encode_us: of(|one| one.encode_us),
            ack_us: of(|one| one.ack_us),
            commit_lag_us: of(|one| one.commit_lag_us),
            sent: ReplicationSent { raw, zero, same, delta, lz4, wire },
            epochs: listed.take(LISTED).collect(),
        }
    }
}

fn distribution(mut values: Vec<u64>) -> Distribution {
    values.sort_unstable();
    let count = values.len() as u64;
    // The smallest value that so many of a hundred are not above.
    let at = |percent: usize| {
        let rank = (values.len() * percent).div_ceil(100).saturating_sub(1);
        values.get(rank).copied().unwrap_or(0)
    };
    let mean = values.iter().sum::<u64>().checked_div(count).unwrap_or(0);
    Distribution { count, mean, p50: at(50), p95: at(95), p99: at(99), max: at(100) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERM: Term = Term(3);

    fn pause(ms: u64) -> Pause {
        let part = Duration::from_millis(ms);
        let began = Instant::now();
        Pause { began, park: part, harvest: part, copy: part, state: part, all: 4 * part }
    }

    #[test]
    fn a_checkpoint_is_followed_from_its_pause_to_the_release_of_its_output() {
        let mut history = History::default();
        history.captured((TERM, Epoch(7)), &pause(1), 200, 64);
        let first = history.show(0).epochs[0];
        assert_eq!((first.number, first.term, first.epoch), (1, 3, 7));
        assert_eq!((first.pause_us, first.park_us, first.dirty_pages), (4000, 1000, 200));
        assert_eq!((first.held_bytes, first.period_us), (64, None));
        assert_eq!((first.encode_us, first.ack_us, first.commit_lag_us), (None, None, None));

        history.captured((TERM, Epoch(8)), &pause(1), 100, 0);
        let sent = Counters { delta: 300, wire: 5000, ..Default::default() };
        let time = Duration::from_micros(250);
        history.encoded(TERM, &Encoded { epoch: Epoch(7), time, bytes: 4000, sent });
        history.acknowledged(TERM, Epoch(7));
        history.released(TERM, Epoch(7));
        // Not of this term.
        history.released(Term(2), Epoch(8));
        let shown = history.show(0);
        let [first, second] = shown.epochs[..] else { panic!("{shown:?}") };
        assert_eq!((first.encode_us, first.wire_bytes), (Some(250), 4000));
        assert!(first.ack_us.is_some() && first.commit_lag_us >= first.ack_us, "{first:?}");
        assert!(second.period_us.is_some() && second.commit_lag_us.is_none(), "{second:?}");
        assert_eq!((shown.dirty_pages.count, shown.dirty_pages.mean), (2, 150));
        assert_eq!((shown.ack_us.count, shown.sent.delta), (1, 300));
        assert_eq!(history.show(1).epochs, [second], "only what is new");
    }

    #[test]
    fn it_stays_small_however_long_the_protection_lasts() {
        let mut history = History::default();
        let pause = pause(1);
        for epoch in 1..=3 * KEPT as u64 {
            history.captured((TERM, Epoch(epoch)), &pause, epoch, 0);
        }
        assert_eq!(history.kept.len(), KEPT);
        let first = history.show(0).epochs;
        assert_eq!((first.len(), first[0].number), (LISTED, 2 * KEPT as u64 + 1));
        let next = history.show(first[LISTED - 1].number).epochs;
        assert_eq!(next[0].number, first[LISTED - 1].number + 1);
        assert_eq!(history.show(u64::MAX).epochs, []);
        let listed = serde_json::to_string(&history.show(0)).unwrap().len();
        assert!(listed < 400 << 10, "{listed} bytes");
    }

    #[test]
    fn a_distribution_names_values_that_occurred() {
        let all = distribution((1..=200).rev().collect());
        assert_eq!((all.count, all.mean), (200, 100));
        assert_eq!((all.p50, all.p95, all.p99, all.max), (100, 190, 198, 200));
        let one = distribution(vec![9]);
        assert_eq!((one.p50, one.p99, one.max), (9, 9, 9));
        assert_eq!(distribution(Vec::new()), Distribution::default());
    }
}
