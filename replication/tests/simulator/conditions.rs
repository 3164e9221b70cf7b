//! Faults that are no deaths: slow and bad links, frames that lie, two settings, agents that are away,
//! what the guest does, clocks. The numbers are those of the specification's table.
use replication::{
    Agreement, Answer, Arbiter, Backup, Command, Digest, Epoch, Event, Frame, Hello, Identity,
    Incarnation, Input, Lineage, Mark, Message, Output, Party, Question, Record, Refusal, Rules,
    Side, Term, Word, backup, primary,
};

use crate::{
    node::Role,
    scenarios::{Outcome, owned_by, protected},
    sim::{GUEST, Sim, ms},
};

const BOTH: [(usize, usize); 2] = [(0, 1), (1, 0)];

#[test]
fn row_13_loss_and_delay_are_no_reason_to_promote() -> Outcome {
    for beside in [false, true] {
        let mut sim = protected(13)?;
        // A round trip is a third of the time-out.
        (sim.delay, sim.beside) = (30, beside);
        sim.run(ms(10_000))?;
        sim.loss = 5;
        for _ in 0..100 {
            sim.run(ms(600))?;
            sim.command(Command::Start)?;
        }
        assert_eq!(sim.promotions, 0, "{}", sim.describe());
        let gaps = |output: &&Output| matches!(output, Output::Tell(Event::Gap(_)));
        assert!(sim.told.iter().filter(gaps).count() > 0, "nobody was warned");
    }
    Ok(())
}

#[test]
fn row_13_a_link_that_flaps_costs_no_new_copy() -> Outcome {
    let mut sim = protected(13)?;
    let begin = sim.now;
    while sim.now < begin + ms(60_000) {
        sim.cut(&BOTH);
        sim.run(ms(100))?;
        sim.reset_connections();
        sim.heal();
        sim.run(ms(100))?;
    }
    assert_eq!((sim.promotions, sim.solos, sim.full + sim.warm), (0, 0, 1), "{}", sim.describe());
    assert!(sim.dials < 700, "{} attempts to connect", sim.dials);
    sim.run(ms(6000))?;
    assert!(sim.is_protected(), "{}", sim.describe());
    Ok(())
}

#[test]
fn row_13_a_second_path_keeps_a_broken_connection_from_being_a_death() -> Outcome {
    // The connection is away for longer than both would wait, and heart-beats arrive.
    for (beside, promotions_and_solos) in [(true, 0), (false, 1)] {
        let mut sim = protected(13)?;
        sim.beside = beside;
        sim.reset_connections();
        sim.port[1] = if beside { 1 } else { 2 };
        sim.unreachable = true;
        sim.run(ms(2000))?;
        sim.unreachable = false;
        sim.port[1] = 1;
        sim.run(ms(6000))?;
        assert_eq!(sim.promotions + sim.solos, promotions_and_solos, "{}", sim.describe());
        assert!(!beside || sim.is_protected(), "{}", sim.describe());
    }
    Ok(())
}

#[test]
fn row_18_frames_that_lie_are_refused_and_the_last_epoch_is_kept() -> Outcome {
    let any = Digest(666);
    for (term, back, message) in [
        (Term(1), 0, Message::End { digest: any }),
        (Term(1), -1, Message::End { digest: any }),
        (Term(1), 5, Message::End { digest: any }),
        (Term(1), 0, Message::Sync { base: None }),
        (Term(2), 1, Message::End { digest: any }),
        (Term(1), 0, Message::Ack),
    ] {
        let mut sim = protected(18)?;
        sim.run(ms(200))?;
        let over = sim.connection(1).unwrap();
        let whole = sim.nodes[1].status().unwrap().epoch;
        let epoch = Epoch(whole.0.saturating_add_signed(back));
        sim.input(1, Input::Received(over, Frame { term, epoch, message }))?;
        assert_eq!(sim.nodes[1].status().unwrap().epoch, whole);
        sim.run(ms(3000))?;
        assert!(sim.is_protected(), "{message:?}: {}", sim.describe());
        assert_eq!((sim.promotions, sim.solos, sim.full), (0, 0, 1), "{message:?}");
    }
    Ok(())
}

#[test]
fn row_18_a_frame_of_an_old_term_changes_nothing() -> Outcome {
    let mut sim = protected(18)?;
    let (here, there) = (sim.connection(0).unwrap(), sim.connection(1).unwrap());
    for message in [Message::Ack, Message::Running, Message::Ended, Message::Release] {
        let frame = Frame { term: Term(0), epoch: Epoch(9), message };
        sim.input(0, Input::Received(here, frame))?;
        sim.input(1, Input::Received(there, frame))?;
        assert!(sim.is_protected(), "{message:?}");
    }
    Ok(())
}

#[test]
fn row_18_a_later_term_parks_the_guest_and_the_witness_is_asked() -> Outcome {
    let mut sim = protected(18)?;
    let over = sim.connection(0).unwrap();
    let message = Message::Beat { claimed: false, unfit: false, probe: 0 };
    sim.input(0, Input::Received(over, Frame { term: Term(9), epoch: Epoch(9), message }))?;
    assert!(sim.nodes[0].parked, "{}", sim.describe());
    sim.run(ms(1000))?;
    assert_eq!(sim.promotions + sim.solos, 1, "{}", sim.describe());
    Ok(())
}

#[test]
fn row_18_another_domain_is_refused() -> Outcome {
    let mut sim = protected(18)?;
    let hello = Hello {
        lineage: Lineage(666),
        incarnation: Incarnation(666),
        bound: None,
        claimed: false,
        agreement: sim.settings.agreement,
    };
    let frame = Frame { term: Term(7), epoch: Epoch(0), message: Message::Hello(hello) };
    let over = replication::Connection(1_000_000);
    let outputs = sim.nodes[1].step(sim.now, Input::Received(over, frame));
    assert!(matches!(
        outputs[..],
        [Output::Send(_, Frame { message: Message::Refuse(Refusal::Lineage), .. })]
    ));
    sim.run(ms(1000))?;
    assert!(sim.is_protected());
    Ok(())
}

#[test]
fn row_20_two_witnesses_or_policies_are_refused_before_anything_is_sent() -> Outcome {
    for arbiter in [Arbiter::Witness(Digest(2)), Arbiter::Fence(Digest(1)), Arbiter::None] {
        let mut sim = Sim::new(20, false, Rules::ALL);
        let mut settings = sim.settings;
        settings.agreement = Agreement { arbiter, ..settings.agreement };
        let me = Identity { lineage: GUEST, incarnation: sim.nodes[1].incarnation };
        let word = Mark::Outdated { term: Term(0) };
        sim.nodes[1].role = Role::Backup(Backup::new(me, word, settings, Rules::ALL).0);
        sim.input(0, Input::Command(Command::Start))?;
        sim.run(ms(1000))?;
        assert_eq!(sim.nodes[0].primary_state(), Some(primary::State::Off));
        assert_eq!(sim.nodes[1].backup_state(), Some(backup::State::Listening));
        assert_eq!((sim.full, sim.owner()), (0, Some(0)));
        assert!(sim.told.contains(&Output::Tell(Event::Refused(Refusal::Agreement))));
    }
    Ok(())
}

#[test]
fn row_22_an_agent_that_is_away_is_no_answer() -> Outcome {
    for at in 0..20 {
        for away in [&[0][..], &[1], &[0, 1]] {
            let mut sim = protected(22)?;
            // While nothing is asked, nobody notices.
            away.iter().for_each(|i| sim.nodes[*i].agent = false);
            sim.run(ms(2000 + at * 13))?;
            assert!(sim.is_protected(), "{}", sim.describe());
            sim.cut(&BOTH);
            sim.run(ms(3000))?;
            let who = [None, Some(1), Some(0)][if away.len() > 1 { 0 } else { 1 + away[0] }];
            assert_eq!(sim.owner(), who, "{}", sim.describe());
            away.iter().for_each(|i| sim.nodes[*i].agent = true);
            sim.run(ms(6000))?;
            assert_eq!(sim.promotions + sim.solos, 1, "{}", sim.describe());
        }
    }
    Ok(())
}

#[test]
fn row_22_an_answer_to_another_question_is_dropped() -> Outcome {
    let mut sim = protected(22)?;
    sim.cut(&BOTH);
    sim.serving = false;
    sim.run(ms(1000))?;
    let party = Party { side: Side::Primary, incarnation: sim.nodes[0].incarnation };
    let record = Record { word: Word::Solo, winner: party, settled: None };
    let claim = Question::Claim { term: Term(1), word: Word::Solo, party };
    let other = Question::Claim { term: Term(1), word: Word::End, party };
    let nonce = sim.asked.last().unwrap().0;
    for (nonce, question) in [(nonce + 1, claim), (nonce, other), (0, claim)] {
        let answer = Answer::Record(Some(record));
        sim.input(0, Input::Answered { nonce, question, answer })?;
        sim.input(1, Input::Answered { nonce, question, answer })?;
        sim.run(ms(100))?;
        assert_eq!(sim.owner(), None, "{}", sim.describe());
    }
    Ok(())
}

#[test]
fn row_23_more_is_written_than_can_be_sent() -> Outcome {
    let mut sim = protected(23)?;
    // Each epoch takes three seconds, and output comes faster than that allows to hold.
    sim.slow = 3000;
    let mut throttled = 0;
    for _ in 0..600 {
        sim.run(ms(100))?;
        throttled = sim.nodes[0].throttle.max(throttled);
    }
    assert!(sim.is_protected(), "{}", sim.describe());
    assert_eq!((sim.promotions, sim.solos), (0, 0));
    assert!(throttled >= 10, "the guest was never slowed down");
    sim.slow = 0;
    sim.run(ms(20_000))?;
    assert_eq!(sim.nodes[0].throttle, 0);
    Ok(())
}

#[test]
fn row_23_a_stalled_guest_is_parked_at_its_cap_and_let_go() -> Outcome {
    let mut sim = protected(23)?;
    sim.cut(&BOTH);
    sim.serving = false;
    sim.run(ms(5000))?;
    assert!(sim.nodes[0].parked && sim.nodes[0].held.len() <= 200, "{}", sim.describe());
    sim.serving = true;
    sim.until(ms(6000), |sim| sim.owner().is_some())
}

#[test]
fn row_24_a_guest_that_powers_itself_off_does_so_once_or_not_at_all() -> Outcome {
    let (mut ended, mut continued) = (0, 0);
    for at in 0..60 {
        let mut sim = protected(at)?;
        sim.run(ms(40))?;
        sim.power_off()?;
        sim.run(ms(at))?;
        let died_first = sim.nodes[0].is_alive();
        sim.kill(0, false);
        sim.run(ms(5000))?;
        match sim.owner() {
            None => ended += 1,
            Some(owner) => {
                assert!(died_first && !sim.client.is_off() && !sim.nodes[owner].guest.off);
                continued += 1;
            }
        }
        assert!(sim.promotions <= 1);
    }
    assert!(ended > 5 && continued > 5, "{ended} have ended, {continued} gone on");
    Ok(())
}

#[test]
fn row_24_a_guest_that_reboots_stays_protected() -> Outcome {
    for at in 0..50 {
        let mut sim = protected(at)?;
        sim.nodes[0].reboot();
        sim.run(ms(at))?;
        sim.nodes[0].reboot();
        assert!(sim.is_protected());
        sim.kill(0, true);
        sim.until(ms(600), owned_by(1))?;
    }
    Ok(())
}

#[test]
fn row_24_nothing_that_a_guest_does_is_a_suspicion() -> Outcome {
    for seed in 0..100 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut sim = protected(seed)?;
        for _ in 0..40 {
            match random.u8(0..4) {
                0 => sim.nodes[0].reboot(),
                1 => sim.flood(0, random.usize(1..400))?,
                2 => sim.nodes[0].paused ^= true,
                _ => {}
            }
            sim.run(ms(random.u64(1..100)))?;
        }
        sim.run(ms(1000))?;
        assert!(sim.is_protected() && !sim.nodes[0].parked, "{}", sim.describe());
        let stalls = |i: usize| sim.nodes[i].status().map_or(0, |status| status.stalls);
        assert_eq!((stalls(0), stalls(1)), (0, 0));
    }
    Ok(())
}

#[test]
fn row_25_a_paused_guest_stays_protected() -> Outcome {
    let mut sim = protected(25)?;
    sim.nodes[0].paused = true;
    sim.run(ms(20_000))?;
    assert!(sim.is_protected(), "{}", sim.describe());
    let before = sim.nodes[0].guest.clone();
    sim.kill(0, false);
    sim.until(ms(600), owned_by(1))?;
    assert!(sim.nodes[1].guest.counter >= before.counter);
    Ok(())
}

#[test]
fn row_26_clocks_are_never_compared() -> Outcome {
    for ahead in [[0, 3_600_000], [3_600_000, 0]] {
        let mut sim = Sim::new(26, false, Rules::ALL);
        (sim.nodes[0].ahead, sim.nodes[1].ahead) = (ms(ahead[0]), ms(ahead[1]));
        sim.input(0, Input::Command(Command::Start))?;
        sim.until(ms(2000), Sim::is_protected)?;
        sim.run(ms(5000))?;
        assert!(sim.is_protected(), "{}", sim.describe());
        sim.kill(0, false);
        sim.until(ms(600), owned_by(1))?;
    }
    Ok(())
}

#[test]
fn row_27_of_two_hosts_without_power_one_starts_the_guest() -> Outcome {
    for first in 0..2 {
        for delay in [0, 1, 50, 3000] {
            let mut sim = protected(27)?;
            sim.run(ms(333))?;
            sim.kill(0, false);
            sim.kill(1, false);
            sim.run(ms(5000))?;
            sim.restart(first, true)?;
            sim.run(ms(delay))?;
            sim.restart(1 - first, true)?;
            sim.run(ms(5000))?;
            assert!(sim.owner().is_some(), "{}", sim.describe());
        }
    }
    Ok(())
}

#[test]
fn row_27_a_term_that_was_won_by_who_is_dead_is_its_successors() -> Outcome {
    // Given back to a primary that has died.
    let mut sim = protected(27)?;
    sim.kill(0, false);
    sim.until(ms(600), |sim| sim.nodes[1].backup_state() == Some(backup::State::Promoting))?;
    sim.nodes[1].marking.clear();
    sim.kill(1, true);
    sim.restart(1, false)?;
    sim.run(ms(3000))?;
    sim.restart(0, true)?;
    sim.until(ms(1000), owned_by(0))?;
    // Won by a primary that has died before its disk says so.
    for command in [Command::Unprotect, Command::Quit] {
        let mut sim = protected(27)?;
        sim.input(0, Input::Command(command))?;
        sim.until(ms(100), |sim| sim.witness.record(GUEST, Term(1)).is_some())?;
        sim.kill(0, false);
        sim.run(ms(3000))?;
        sim.restart(0, true)?;
        sim.until(ms(1000), owned_by(0))?;
    }
    Ok(())
}

#[test]
fn row_27_a_backup_whose_disk_fails_after_the_ack_promotes_nothing() -> Outcome {
    let mut sim = protected(27)?;
    sim.input(1, Input::NotApplied)?;
    sim.until(ms(1000), owned_by(0))?;
    sim.run(ms(5000))?;
    assert_eq!((sim.promotions, sim.solos), (0, 1));
    // The same if its primary dies before it could be told.
    let mut sim = protected(27)?;
    sim.kill(0, false);
    sim.input(1, Input::NotApplied)?;
    sim.run(ms(5000))?;
    assert_eq!((sim.owner(), sim.promotions), (None, 0));
    Ok(())
}
