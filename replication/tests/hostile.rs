//! Any inputs in any order, as no peer and no driver should give them: the machines neither panic
//! nor grow, and a primary never lets out what was not acknowledged.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs, reason = "a test")]
use replication::{
    Accept, Agreement, Answer, Arbiter, Backup, Bond, Command, Connection, Digest, Epoch, Fault,
    Frame, Hello, Identity, Incarnation, Input, Lineage, Mark, Memory, Message, OnLoss, Output,
    Pair, Party, Primary, Question, Record, Refusal, Room, Rules, Settings, Settled, Side, Start,
    Term, Time, Word,
};

const ME: Identity = Identity { lineage: Lineage(1), incarnation: Incarnation(1) };

/// Small numbers, so that many of them fit; now and then the largest.
fn number(random: &mut fastrand::Rng) -> u64 {
    if random.u8(..20) == 0 { u64::MAX } else { random.u64(..4) }
}

fn agreement() -> Agreement {
    Agreement { arbiter: Arbiter::Witness(Digest(1)), machine: Digest(1) }
}

fn message(random: &mut fastrand::Rng) -> Message {
    let incarnation = Incarnation(number(random).into());
    let digest = Digest(number(random));
    match random.u8(..14) {
        0 => Message::Hello(Hello {
            lineage: Lineage(1),
            incarnation,
            bound: random.bool().then_some(ME.incarnation),
            claimed: random.u8(..5) == 0,
            agreement: agreement(),
        }),
        1 => {
            let held = Memory { term: Term(number(random)), epoch: Epoch(number(random)), digest };
            let memory = random.bool().then_some(held);
            Message::Accept(Accept { incarnation, digest, memory, agreement: agreement() })
        }
        2 => Message::Refuse(Refusal::Claimed),
        3 | 4 => Message::End { digest },
        5 => Message::Ack,
        6 => Message::Nack(Fault::Disk),
        7 => Message::Armed(Pair { primary: incarnation, backup: ME.incarnation }),
        8 => Message::Beat {
            claimed: random.u8(..5) == 0,
            unfit: random.u8(..5) == 0,
            probe: number(random),
        },
        9 => Message::Release,
        10 => Message::Running,
        11 => Message::Bye { end: random.bool() },
        12 => Message::Ended,
        _ => Message::Sync { base: random.bool().then(|| Epoch(number(random))) },
    }
}

const COMMANDS: [Command; 4] =
    [Command::Start, Command::Unprotect, Command::Quit, Command::Failover];
const ROOMS: [Room; 3] = [Room::Ample, Room::Scarce, Room::None];

/// An input; often one that the machine waits for.
fn input(random: &mut fastrand::Rng, asked: &mut Vec<Output>) -> Input {
    let (epoch, digest) = (Epoch(number(random)), Digest(number(random)));
    let connection = Connection(number(random));
    if !asked.is_empty() && random.u8(..3) > 0 {
        match asked.remove(0) {
            Output::Mark(mark) => return Input::Marked(mark),
            Output::Capture { epoch, .. } => return Input::Captured { epoch, digest },
            Output::Hold(epoch) => return Input::Held(epoch),
            Output::Prepare(_) => return Input::Prepared,
            Output::Dial => return Input::Connected(connection),
            Output::Ask { nonce, question } => {
                let side = if random.bool() { Side::Primary } else { Side::Backup };
                let winner = Party { side, incarnation: Incarnation(number(random).into()) };
                let words = [Word::Solo, Word::Promote, Word::Cold, Word::End];
                let to = Settled::Yielded { to: Incarnation(number(random).into()) };
                let settled = [None, Some(Settled::Running), Some(to)][random.usize(..3)];
                let record = Record { word: words[random.usize(..4)], winner, settled };
                let answers = [
                    Answer::Record(None),
                    Answer::Record(Some(record)),
                    Answer::Superseded,
                    Answer::Down,
                ];
                return Input::Answered { nonce, question, answer: answers[random.usize(..4)] };
            }
            _ => {}
        }
    }
    let term = Term(number(random));
    match random.u8(..18) {
        0..=5 => Input::Received(connection, Frame { term, epoch, message: message(random) }),
        6 | 7 => Input::Tick,
        8 => Input::Connected(connection),
        9 => Input::Closed(connection),
        10 => Input::Captured { epoch, digest },
        11 => Input::Marked(Mark::Free { term }),
        12 => Input::Answered { nonce: 1, question: Question::Look { term }, answer: Answer::Down },
        13 => [Input::NotApplied, Input::CannotRun, Input::NotHeld(epoch, Fault::Disk)]
            [random.usize(..3)],
        14 => Input::Held(epoch),
        15 => Input::Forced(COMMANDS[random.usize(..4)]),
        16 => {
            let room = Input::Room(ROOMS[random.usize(..3)]);
            [Input::HeardBeside, Input::PeerGone, Input::Untracked, room][random.usize(..4)]
        }
        _ => Input::Command(COMMANDS[random.usize(..4)]),
    }
}

#[test]
fn any_inputs_in_any_order() {
    let settings = Settings {
        agreement: agreement(),
        timeout: Time::from_millis(200),
        period: Time::from_millis(50),
        ack_limit: Time::from_secs(1),
        on_loss: OnLoss::Claim,
        leave_slow: true,
    };
    for seed in 0..3000 {
        let mut random = fastrand::Rng::with_seed(seed);
        let rules = Rules::default();
        let pair = Pair { primary: Incarnation(2), backup: ME.incarnation };
        let bond = Bond { term: Term(1), pair, side: Side::Backup };
        let mut primary = Primary::new(ME, Term(1), settings, rules);
        let mut backup = Backup::new(ME, Mark::Outdated { term: Term(0) }, settings, rules).0;
        let mut start = Start::new(ME, Mark::Protected(bond), settings, rules).0;
        let (mut asked, mut now, mut acked) = (Vec::new(), Time::ZERO, Epoch(0));
        for _ in 0..300 {
            now += Time::from_millis(random.u64(..300));
            let input = input(&mut random, &mut asked);
            if let Input::Received(_, Frame { epoch, message, .. }) = input
                && matches!(message, Message::Ack | Message::Accept(_))
            {
                acked = acked.max(epoch);
            }
            let outputs = match seed % 3 {
                0 => primary.step(now, input),
                1 => backup.step(now, input),
                _ => start.step(now, input),
            };
            assert!(outputs.len() < 100, "{input:?} led to {} outputs", outputs.len());
            for output in outputs {
                if let Output::ReleaseThrough(epoch) = output {
                    assert!(epoch <= acked, "{epoch:?} was let out, {acked:?} acknowledged");
                }
                asked.push(output);
            }
            asked.truncate(50);
        }
    }
}

const LINK: Connection = Connection(1);

/// A primary whose term is armed, over that connection, and the time.
fn protected(settings: Settings) -> (Primary, Time) {
    let mut primary = Primary::new(ME, Term(1), settings, Rules::default());
    let mut now = Time::ZERO;
    let mut step = |input| {
        now += Time::from_millis(1);
        primary.step(now, input)
    };
    let frame = |message| Frame { term: Term(1), epoch: Epoch(1), message };
    let agreement = settings.agreement;
    let accept = Accept { incarnation: Incarnation(2), digest: Digest(0), memory: None, agreement };
    step(Input::Command(Command::Start));
    step(Input::Connected(LINK));
    let greeted = Frame { epoch: Epoch(0), ..frame(Message::Accept(accept)) };
    step(Input::Received(LINK, greeted));
    step(Input::Captured { epoch: Epoch(1), digest: Digest(1) });
    let marks = step(Input::Received(LINK, frame(Message::Ack)));
    let mark = marks.iter().find_map(|output| match output {
        Output::Mark(mark) => Some(*mark),
        _ => None,
    });
    let armed = step(Input::Marked(mark.unwrap()));
    assert!(armed.contains(&Output::ReleaseThrough(Epoch(1))), "{armed:?}");
    (primary, now)
}

/// Without an arbiter, an operator can force the backup to run the guest. A primary that continues
/// without asking must not do so once it hears of that: there would be two.
#[test]
fn a_primary_that_continues_without_asking_stops_when_the_backup_may_run() {
    let agreement = Agreement { arbiter: Arbiter::None, machine: Digest(1) };
    let settings = Settings {
        agreement,
        timeout: Time::from_millis(200),
        period: Time::from_millis(50),
        ack_limit: Time::from_secs(1),
        on_loss: OnLoss::Continue,
        leave_slow: false,
    };
    let beat = |term, claimed| Frame {
        term: Term(term),
        epoch: Epoch(1),
        message: Message::Beat { claimed, unfit: false, probe: 0 },
    };
    for last in [beat(2, false), beat(1, true)] {
        let (mut primary, mut now) = protected(settings);
        let mut step = |input| {
            now += Time::from_millis(1);
            primary.step(now, input)
        };
        let mut after = step(Input::Received(LINK, last));
        for _ in 0..1000 {
            after.extend(step(Input::Tick));
        }
        assert!(after.contains(&Output::Park) && after.contains(&Output::CloseTaps), "{after:?}");
        let runs = |output: &Output| {
            matches!(
                output,
                Output::OpenGates | Output::Unpark | Output::Mark(_) | Output::ReleaseThrough(_)
            )
        };
        assert!(!after.iter().any(runs), "{after:?}");
    }
}

/// A primary whose backup's process has ended does not wait until that is silent for long enough.
#[test]
fn a_backup_whose_process_has_ended_is_not_waited_for() {
    let settings = Settings {
        agreement: agreement(),
        timeout: Time::from_secs(100),
        period: Time::from_millis(50),
        ack_limit: Time::from_secs(100),
        on_loss: OnLoss::Claim,
        leave_slow: false,
    };
    let (mut primary, now) = protected(settings);
    let closed = primary.step(now, Input::Closed(LINK));
    let claim = |output: &Output| {
        matches!(output, Output::Ask { question: Question::Claim { word: Word::Solo, .. }, .. })
    };
    assert!(!closed.iter().any(claim), "it may be back: {closed:?}");
    let gone = primary.step(now, Input::PeerGone);
    assert!(gone.iter().any(claim), "{gone:?}");
}
