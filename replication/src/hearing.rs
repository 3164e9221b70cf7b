//! What is known of the peer's being alive: when it was last heard, how long it was silent at most,
//! and whether what is heard now can be old.
use std::time::Duration;

use crate::{identity::Epoch, settings::Settings, timers::Time};

/// How long a gap is remembered, and a warning not repeated.
const REMEMBERED: Duration = Duration::from_secs(60);

/// When the peer was heard.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Hearing {
    /// The last byte.
    at: Time,
    /// The largest gaps in this minute and in the one before.
    gaps: [Duration; 2],
    /// When this minute began.
    minute: Time,
    warned: Option<Time>,
    /// Beats that did not arrive in time.
    missed: u64,
    /// The number of the last probe. Each is sent because this process has stood still: what it
    /// reads then may have waited for as long.
    probe: u64,
    /// The last one that came back.
    echoed: u64,
    /// The last epoch that the peer has captured, since when, and whether that was told.
    captured: (Epoch, Time, bool),
}

impl Hearing {
    /// A connection begins: the time before it was no gap. Even its first frame may have waited, so
    /// a doubt stays.
    pub fn restart(&mut self, now: Time) {
        self.at = now;
        self.captured = (Epoch::default(), now, false);
    }

    /// The peer says that `epoch` is its last. If that has been so for longer than `limit`, and was
    /// not told yet, for how long.
    pub fn captured(&mut self, epoch: Epoch, now: Time, limit: Duration) -> Option<Duration> {
        let (last, since, told) = &mut self.captured;
        if epoch != *last {
            (*last, *since, *told) = (epoch, now, false);
        }
        let stands = now.saturating_sub(*since);
        let tells = stands > limit && !std::mem::replace(told, stands > limit);
        tells.then_some(stands)
    }

    /// A byte of the peer, who sends a beat every `heartbeat`, has arrived. If its silence before is
    /// worth a warning, how long it was.
    pub fn heard(
        &mut self,
        now: Time,
        settings: &Settings,
        heartbeat: Duration,
    ) -> Option<Duration> {
        let gap = now.saturating_sub(std::mem::replace(&mut self.at, now));
        let beats = gap.as_nanos() / heartbeat.as_nanos().max(1);
        self.missed += u64::try_from(beats.saturating_sub(1)).unwrap_or(0);
        let age = now.saturating_sub(self.minute);
        if age >= REMEMBERED {
            let before = if age < 2 * REMEMBERED { self.gaps[0] } else { Duration::ZERO };
            (self.gaps, self.minute) = ([Duration::ZERO, before], now);
        }
        self.gaps[0] = self.gaps[0].max(gap);
        let quiet = self.warned.is_none_or(|at| now.saturating_sub(at) >= REMEMBERED);
        let warns = gap > settings.timeout / 3 && quiet;
        warns.then(|| {
            self.warned = Some(now);
            gap
        })
    }

    /// Trust nothing that is read from here on, until the peer has answered a new probe.
    pub fn doubt(&mut self) {
        self.probe += 1;
    }

    /// The number of the last probe.
    pub fn probe(&self) -> u64 {
        self.probe
    }

    /// The peer has answered this probe.
    pub fn echo(&mut self, probe: u64) {
        if probe <= self.probe {
            self.echoed = self.echoed.max(probe);
        }
    }

    /// Whether a probe has not come back yet.
    pub fn is_doubtful(&self) -> bool {
        self.probe != self.echoed
    }

    /// Whether a byte of the peer's is younger than half the time-out.
    pub fn is_fresh(&self, now: Time, settings: &Settings) -> bool {
        !self.is_doubtful() && now.saturating_sub(self.at) <= settings.timeout / 2
    }

    /// Beats that did not arrive in time, since the process began.
    pub fn missed(&self) -> u64 {
        self.missed
    }

    /// The longest silence of the last one to two minutes.
    pub fn largest_gap(&self) -> Duration {
        self.gaps[0].max(self.gaps[1])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        identity::Digest,
        settings::{Agreement, Arbiter, OnLoss},
    };

    const fn ms(ms: u64) -> Time {
        Time::from_millis(ms)
    }

    /// A tenth of the time-out below.
    const BEAT: Duration = ms(30);

    fn settings() -> Settings {
        Settings {
            agreement: Agreement { arbiter: Arbiter::None, machine: Digest(0) },
            timeout: ms(300),
            period: ms(50),
            ack_limit: ms(1000),
            on_loss: OnLoss::Stall,
            leave_slow: false,
        }
    }

    #[test]
    fn a_gap_of_more_than_a_third_of_the_timeout_warns_once_a_minute() {
        let (settings, mut hearing) = (settings(), Hearing::default());
        hearing.restart(ms(1000));
        assert_eq!(hearing.heard(ms(1100), &settings, BEAT), None, "just a third");
        assert_eq!(hearing.heard(ms(1201), &settings, BEAT), Some(ms(101)));
        assert_eq!(hearing.heard(ms(1400), &settings, BEAT), None, "within the same minute");
        assert_eq!((hearing.missed(), hearing.largest_gap()), (2 + 2 + 5, ms(199)));
        assert!(hearing.heard(ms(70_000), &settings, BEAT).is_some());
        assert_eq!(hearing.largest_gap(), ms(68_600));
        for second in 71..200 {
            hearing.heard(ms(1000 * second), &settings, BEAT);
        }
        assert_eq!(hearing.largest_gap(), ms(1000), "what is two minutes ago is forgotten");
    }

    #[test]
    fn after_a_doubt_only_an_answer_to_it_is_fresh() {
        let (settings, mut hearing) = (settings(), Hearing::default());
        hearing.restart(ms(1000));
        assert!(hearing.is_fresh(ms(1150), &settings) && !hearing.is_fresh(ms(1151), &settings));
        hearing.doubt();
        hearing.heard(ms(1200), &settings, BEAT);
        hearing.echo(0);
        hearing.echo(7);
        assert!(!hearing.is_fresh(ms(1200), &settings), "old, or never asked");
        hearing.echo(1);
        assert!(hearing.is_fresh(ms(1200), &settings));
    }
}
