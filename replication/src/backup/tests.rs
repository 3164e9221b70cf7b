//! A backup that suspects its primary, or is ordered to take over, step by step.
use std::time::Duration;

use super::*;
use crate::{
    identity::{Connection, Lineage},
    message::{Frame, Hello, Message},
    record::{Answer, Question, Record, Word},
    settings::{Agreement, Arbiter, OnLoss},
};

const PRIMARY: Incarnation = Incarnation(1);
const BACKUP: Incarnation = Incarnation(2);

const WITNESS: Arbiter = Arbiter::Witness(Digest(3));

fn settings(arbiter: Arbiter) -> Settings {
    Settings {
        agreement: Agreement { arbiter, machine: Digest(4) },
        timeout: Duration::from_millis(500),
        period: Duration::from_millis(50),
        ack_limit: Duration::from_secs(5),
        on_loss: OnLoss::Claim,
        leave_slow: false,
    }
}

struct Driven {
    backup: Backup,
    now: Time,
}

impl Driven {
    /// One that holds an epoch, and may promote.
    fn standby(arbiter: Arbiter) -> Self {
        let me = Identity { lineage: Lineage(9), incarnation: BACKUP };
        let (backup, _) =
            Backup::new(me, Mark::Free { term: Term(1) }, settings(arbiter), Rules::ALL);
        let mut this = Self { backup, now: Time::ZERO };
        this.hears(
            0,
            Message::Hello(Hello {
                lineage: Lineage(9),
                incarnation: PRIMARY,
                bound: None,
                claimed: false,
                agreement: settings(arbiter).agreement,
            }),
        );
        this.hears(0, Message::Sync { base: None });
        this.hears(1, Message::End { digest: Digest(1) });
        this.step(Input::Held(Epoch(1)));
        this.hears(1, Message::Armed(Pair { primary: PRIMARY, backup: BACKUP }));
        assert_eq!(this.backup.state(), State::Standby);
        this
    }

    /// Words are durable at once.
    fn step(&mut self, input: Input) -> Vec<Output> {
        self.now += Duration::from_millis(1);
        let mut outputs = self.backup.step(self.now, input);
        let marks: Vec<_> = outputs
            .iter()
            .filter_map(|output| match output {
                Output::Mark(mark) => Some(*mark),
                _ => None,
            })
            .collect();
        for mark in marks {
            outputs.extend(self.step(Input::Marked(mark)));
        }
        outputs
    }

    fn hears(&mut self, epoch: u64, message: Message) -> Vec<Output> {
        let frame = Frame { term: Term(1), epoch: Epoch(epoch), message };
        self.step(Input::Received(Connection(1), frame))
    }

    /// What the beats say of a claim, until a time-out is over.
    fn beats(&mut self) -> Vec<bool> {
        let mut claims = Vec::new();
        for _ in 0..20 {
            self.now += settings(WITNESS).heartbeat() / 2;
            claims.extend(self.step(Input::Tick).iter().filter_map(|output| match output {
                Output::Send(_, Frame { message: Message::Beat { claimed, .. }, .. }) => {
                    Some(*claimed)
                }
                _ => None,
            }));
        }
        claims
    }
}

#[test]
fn an_ordered_claim_is_not_announced_so_that_a_living_primary_does_not_race_it() {
    let mut driven = Driven::standby(WITNESS);
    driven.step(Input::Command(crate::Command::Failover));
    let outputs = driven.step(Input::Prepared);
    let asked = outputs.iter().find_map(|output| match output {
        Output::Ask { nonce, question: question @ Question::Claim { .. } } => {
            Some((*nonce, *question))
        }
        _ => None,
    });
    let (nonce, question) = asked.expect("it asks without a suspicion");
    let beats = driven.beats();
    assert!(!beats.is_empty() && beats.iter().all(|claimed| !claimed), "{beats:?}");
    let record = Record { word: Word::Promote, winner: driven.backup.base.party(), settled: None };
    let answer = Answer::Record(Some(record));
    let outputs = driven.step(Input::Answered { nonce, question, answer });
    assert!(outputs.iter().any(|output| matches!(output, Output::Run { .. })), "{outputs:?}");
}

#[test]
fn a_claim_out_of_suspicion_is_announced() {
    let mut driven = Driven::standby(WITNESS);
    driven.now += settings(WITNESS).timeout;
    driven.step(Input::Tick);
    driven.step(Input::Prepared);
    let beats = driven.beats();
    assert!(beats.contains(&true), "{beats:?}");
}

#[test]
fn a_primary_that_is_back_late_is_made_to_connect_again_where_nobody_claims() {
    let mut driven = Driven::standby(Arbiter::None);
    driven.now += settings(Arbiter::None).timeout;
    driven.step(Input::Tick);
    driven.step(Input::Prepared);
    driven.beats();
    assert_eq!(driven.backup.state(), State::Suspecting);
    let outputs = driven.step(Input::Heard(Connection(1)));
    assert!(outputs.contains(&Output::Close(Connection(1))), "{outputs:?}");
}

#[test]
fn a_primary_whose_process_has_ended_is_not_waited_for() {
    let asks = |outputs: &[Output], wanted: fn(&Question) -> bool| {
        outputs.iter().any(|o| matches!(o, Output::Ask { question, .. } if wanted(question)))
    };
    let claims = |question: &Question| matches!(question, Question::Claim { .. });
    // Whether or not it was suspected before, and also if that comes later.
    for closes in [Some(true), Some(false), None] {
        let mut driven = Driven::standby(WITNESS);
        if closes == Some(true) {
            driven.step(Input::Closed(Connection(1)));
        }
        driven.step(Input::PeerGone);
        if closes == Some(false) {
            driven.step(Input::Closed(Connection(1)));
        }
        assert!(asks(&driven.step(Input::Prepared), claims), "{closes:?}");
        assert!(driven.now < settings(WITNESS).grace(), "it has not waited");
    }
    // The fence is still asked: it also keeps the primary from being started again.
    let mut driven = Driven::standby(Arbiter::Fence(Digest(5)));
    driven.step(Input::PeerGone);
    let outputs = driven.step(Input::Prepared);
    assert!(asks(&outputs, |question| matches!(question, Question::Fence { .. })), "{outputs:?}");
    // Where nobody decides, nobody does.
    let mut driven = Driven::standby(Arbiter::None);
    driven.step(Input::PeerGone);
    driven.step(Input::Prepared);
    driven.beats();
    assert_eq!(driven.backup.state(), State::Suspecting);
}
