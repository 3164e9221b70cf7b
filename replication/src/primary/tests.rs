//! When the epochs of a primary begin.
use std::time::Duration;

use super::*;
use crate::{
    identity::{Connection, Digest, Lineage},
    message::{Accept, Frame, Message},
    settings::{Agreement, Arbiter, OnLoss},
};

const BACKUP: Incarnation = Incarnation(2);
const PERIOD: Duration = Duration::from_millis(25);

fn settings() -> Settings {
    Settings {
        agreement: Agreement { arbiter: Arbiter::Witness(Digest(3)), machine: Digest(4) },
        timeout: Duration::from_millis(500),
        period: PERIOD,
        ack_limit: Duration::from_secs(5),
        on_loss: OnLoss::Claim,
        leave_slow: false,
    }
}

/// A protected primary. Each epoch is captured and acknowledged as soon as it begins.
struct Driven {
    primary: Primary,
    now: Time,
    began: Vec<Time>,
}

impl Driven {
    fn protected() -> Self {
        let me = Identity { lineage: Lineage(9), incarnation: Incarnation(1) };
        let primary = Primary::new(me, Term(1), settings(), Rules::ALL);
        let mut this = Self { primary, now: Time::ZERO, began: Vec::new() };
        this.step(Input::Command(Command::Start));
        this.step(Input::Connected(Connection(1)));
        let agreement = settings().agreement;
        let accept = Accept { incarnation: BACKUP, digest: Digest(0), memory: None, agreement };
        this.hears(0, Message::Accept(accept));
        assert_eq!(this.primary.state(), State::Protected);
        this
    }

    fn hears(&mut self, epoch: u64, message: Message) {
        let frame = Frame { term: Term(1), epoch: Epoch(epoch), message };
        self.step(Input::Received(Connection(1), frame));
    }

    fn step(&mut self, input: Input) {
        for output in self.primary.step(self.now, input) {
            match output {
                Output::Capture { epoch, .. } => {
                    self.began.push(self.now);
                    self.step(Input::Captured { epoch, digest: Digest(epoch.0) });
                    self.hears(epoch.0, Message::Ack);
                }
                Output::Mark(mark @ Mark::Protected(_)) => self.step(Input::Marked(mark)),
                _ => {}
            }
        }
    }

    /// Lets this time pass, with ticks that are each `late` after they were wanted.
    fn passes(&mut self, time: Duration, late: Duration) {
        let end = self.now + time;
        while let Some(at) = self.primary.deadline().filter(|at| *at < end) {
            self.now = self.now.max(at + late);
            self.step(Input::Tick);
            // Its backup beats.
            self.step(Input::Heard(Connection(1)));
        }
    }
}

#[test]
fn a_backup_that_nothing_depends_on_yet_may_be_silent_for_longer() {
    let me = Identity { lineage: Lineage(9), incarnation: Incarnation(1) };
    let mut primary = Primary::new(me, Term(1), settings(), Rules::ALL);
    let agreement = settings().agreement;
    let accept = Accept { incarnation: BACKUP, digest: Digest(0), memory: None, agreement };
    let frame = Frame { term: Term(1), epoch: Epoch(0), message: Message::Accept(accept) };
    primary.step(Time::ZERO, Input::Command(Command::Start));
    primary.step(Time::ZERO, Input::Connected(Connection(1)));
    primary.step(Time::ZERO, Input::Received(Connection(1), frame));
    let mut now = Time::ZERO;
    let mut until = |primary: &mut Primary, end: Duration| {
        while let Some(at) = primary.deadline().filter(|at| *at < end) {
            now = at;
            primary.step(now, Input::Tick);
        }
    };
    until(&mut primary, Duration::from_millis(1999));
    assert_eq!(primary.state(), State::Syncing, "memory is being copied: 500 ms are nothing");
    // Its output is held now.
    let first = Input::Captured { epoch: Epoch(1), digest: Digest(1) };
    primary.step(Duration::from_millis(1999), first);
    until(&mut primary, Duration::from_secs(3));
    assert_eq!(primary.state(), State::Off);
}

#[test]
fn a_timer_that_is_always_late_does_not_make_epochs_rarer() {
    let mut driven = Driven::protected();
    driven.began.clear();
    driven.passes(PERIOD * 40, PERIOD / 10);
    assert!((39..=40).contains(&driven.began.len()), "{:?}", driven.began);
}

#[test]
fn after_a_standstill_the_epochs_that_were_missed_are_not_made_up_for() {
    let mut driven = Driven::protected();
    driven.began.clear();
    driven.passes(PERIOD * 3, Duration::ZERO);
    driven.now += PERIOD * 4;
    driven.passes(PERIOD * 3, Duration::ZERO);
    let periods = driven.began.windows(2).map(|pair| pair[1] - pair[0]);
    assert!(periods.clone().all(|period| period >= PERIOD), "{:?}", driven.began);
    assert!(periods.max() > Some(PERIOD * 3), "{:?}", driven.began);
}
