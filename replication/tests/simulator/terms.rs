//! The ends of terms that a person brings about, and what the next term costs.
use replication::{Arbiter, Command, Event, Input, OnLoss, Output, Rules, Why, backup, primary};

use crate::{
    scenarios::{Outcome, owned_by, protected},
    sim::{Sim, ms},
};

/// Neither witness nor fence.
fn by_hand(on_loss: OnLoss) -> Result<Sim, String> {
    let mut sim = Sim::with(12, Arbiter::None, on_loss, Rules::ALL);
    sim.input(0, Input::Command(Command::Start))?;
    sim.until(ms(2000), Sim::is_protected)?;
    Ok(sim)
}

/// Ask for protection until it is there.
fn protect_again(sim: &mut Sim) -> Outcome {
    for _ in 0..20 {
        sim.command(Command::Start)?;
        if sim.until(ms(500), Sim::is_protected).is_ok() {
            return Ok(());
        }
    }
    Err(format!("not protected again: {}", sim.describe()))
}

fn failed(sim: &Sim, command: Command, why: Why) -> bool {
    sim.told.contains(&Output::Tell(Event::Failed(command, why)))
}

#[test]
fn row_12_by_hand_a_backup_takes_over_only_with_force() -> Outcome {
    let mut sim = by_hand(OnLoss::Stall)?;
    sim.kill(0, false);
    sim.run(ms(2000))?;
    sim.input(1, Input::Command(Command::Failover))?;
    sim.run(ms(20_000))?;
    assert_eq!(sim.owner(), None, "{}", sim.describe());
    assert!(failed(&sim, Command::Failover, Why::NoArbiter));
    sim.input(1, Input::Forced(Command::Failover))?;
    sim.until(ms(100), owned_by(1))
}

#[test]
fn row_12_a_primary_that_hears_of_a_forced_failover_ends() -> Outcome {
    for on_loss in [OnLoss::Stall, OnLoss::Continue] {
        let mut sim = by_hand(on_loss)?;
        sim.input(1, Input::Forced(Command::Failover))?;
        sim.until(ms(100), owned_by(1))?;
        sim.run(ms(3000))?;
        assert!(sim.owner() == Some(1) && !sim.nodes[0].is_alive(), "{}", sim.describe());
    }
    Ok(())
}

#[test]
fn row_12_force_is_used_only_after_the_witness_had_its_time() -> Outcome {
    let mut sim = protected(12)?;
    sim.kill(0, false);
    sim.serving = false;
    sim.run(ms(1000))?;
    sim.input(1, Input::Forced(Command::Failover))?;
    sim.run(ms(4900))?;
    assert_eq!(sim.owner(), None, "{}", sim.describe());
    sim.until(ms(300), owned_by(1))?;
    // The claim is written as soon as the witness is back, and protection begins only then.
    sim.restart(0, false)?;
    sim.input(1, Input::Command(Command::Start))?;
    sim.run(ms(2000))?;
    assert_eq!(sim.nodes[1].primary_state(), Some(primary::State::Degraded));
    sim.serving = true;
    sim.run(ms(6000))?;
    sim.input(1, Input::Command(Command::Start))?;
    sim.until(ms(2000), Sim::is_protected)
}

#[test]
fn row_12_force_is_refused_when_the_witness_names_the_other_side() -> Outcome {
    let mut sim = protected(12)?;
    sim.cut(&[(0, 1), (1, 0)]);
    sim.nodes[1].agent = false;
    sim.until(ms(1000), owned_by(0))?;
    sim.input(1, Input::Forced(Command::Failover))?;
    sim.run(ms(2000))?;
    sim.nodes[1].agent = true;
    sim.run(ms(6000))?;
    assert_eq!((sim.owner(), sim.promotions), (Some(0), 0), "{}", sim.describe());
    assert!(failed(&sim, Command::Failover, Why::Lost));
    Ok(())
}

#[test]
fn a_backup_that_is_ordered_to_take_over_asks_and_does() -> Outcome {
    for fence in [false, true] {
        let mut sim = Sim::new(5, fence, Rules::ALL);
        sim.input(0, Input::Command(Command::Start))?;
        sim.until(ms(2000), Sim::is_protected)?;
        sim.input(1, Input::Command(Command::Failover))?;
        sim.until(ms(200), owned_by(1))?;
        sim.run(ms(5000))?;
        assert_eq!((sim.owner(), sim.promotions), (Some(1), 1), "{}", sim.describe());
    }
    Ok(())
}

#[test]
fn a_primary_leaves_by_force_what_nobody_answers() -> Outcome {
    // Held output until a person decides; then the guest continues alone.
    let mut sim = protected(30)?;
    sim.serving = false;
    sim.kill(1, false);
    sim.run(ms(3000))?;
    assert_eq!(sim.owner(), None);
    sim.input(0, Input::Forced(Command::Unprotect))?;
    sim.run(ms(4900))?;
    assert_eq!(sim.owner(), None, "the witness had its time");
    sim.until(ms(300), owned_by(0))?;
    assert_eq!(sim.nodes[0].primary_state(), Some(primary::State::Off));
    // An end by force leaves the question to the next start.
    let mut sim = protected(31)?;
    sim.serving = false;
    sim.input(0, Input::Forced(Command::Quit))?;
    sim.run(ms(5200))?;
    assert!(!sim.nodes[0].is_alive(), "{}", sim.describe());
    sim.serving = true;
    sim.until(ms(6000), owned_by(1))
}

#[test]
fn who_repeats_a_forced_command_is_not_kept_waiting() -> Outcome {
    let repeat = |sim: &mut Sim, i: usize, command| {
        for _ in 0..6 {
            sim.input(i, Input::Forced(command))?;
            sim.run(ms(1000))?;
        }
        Ok::<_, String>(())
    };
    let mut sim = by_hand(OnLoss::Stall)?;
    sim.kill(1, false);
    sim.run(ms(1000))?;
    repeat(&mut sim, 0, Command::Unprotect)?;
    assert_eq!(sim.owner(), Some(0), "{}", sim.describe());
    let mut sim = protected(33)?;
    sim.serving = false;
    sim.kill(0, false);
    sim.run(ms(1000))?;
    repeat(&mut sim, 1, Command::Failover)?;
    assert_eq!(sim.owner(), Some(1), "{}", sim.describe());
    Ok(())
}

#[test]
fn an_owner_that_ends_before_the_witness_knows_of_it_leaves_that_to_the_next_one() -> Outcome {
    let mut sim = protected(34)?;
    sim.cut(&[(0, 1), (1, 0)]);
    sim.nodes[0].agent = false;
    sim.until(ms(1000), |sim| sim.nodes[1].backup_state() == Some(backup::State::Promoting))?;
    sim.serving = false;
    sim.until(ms(100), owned_by(1))?;
    sim.run(ms(100))?;
    sim.input(1, Input::Command(Command::Quit))?;
    sim.run(ms(100))?;
    assert!(!sim.nodes[1].is_alive() && sim.nodes[0].is_alive(), "{}", sim.describe());
    sim.heal_all();
    sim.restart(1, false)?;
    sim.until(ms(100), owned_by(1))?;
    // What has waited for that ends.
    sim.until(ms(8000), |sim| !sim.nodes[0].is_alive())
}

#[test]
fn by_hand_an_unfit_backup_serves_its_primary_again_in_the_next_term() -> Outcome {
    let mut sim = by_hand(OnLoss::Continue)?;
    sim.input(1, Input::CannotRun)?;
    sim.until(ms(500), owned_by(0))?;
    protect_again(&mut sim)
}

#[test]
fn a_guest_that_is_given_away_by_hand_comes_back_by_force() -> Outcome {
    let mut sim = by_hand(OnLoss::Stall)?;
    sim.input(0, Input::Command(Command::Failover))?;
    let released = primary::State::HandingOver(primary::Handing::Released);
    sim.until(ms(500), |sim| sim.nodes[0].primary_state() == Some(released))?;
    sim.kill(1, false);
    sim.run(ms(20_000))?;
    assert_eq!(sim.owner(), None, "{}", sim.describe());
    sim.input(0, Input::Forced(Command::Unprotect))?;
    sim.until(ms(100), owned_by(0))
}

#[test]
fn a_guest_that_is_given_away_by_hand_comes_back_from_a_backup_that_cannot_run_it() -> Outcome {
    for promoting in [false, true] {
        let mut sim = by_hand(OnLoss::Stall)?;
        sim.input(0, Input::Command(Command::Failover))?;
        let wanted = if promoting { backup::State::Promoting } else { backup::State::Suspecting };
        sim.until(ms(500), |sim| sim.nodes[1].backup_state() == Some(wanted))?;
        sim.input(1, Input::CannotRun)?;
        sim.until(ms(100), owned_by(0))?;
        sim.run(ms(2000))?;
        assert_eq!((sim.owner(), sim.promotions), (Some(0), 0), "{}", sim.describe());
    }
    Ok(())
}

#[test]
fn a_command_that_the_witness_does_not_answer_asks_the_backup() -> Outcome {
    let mut sim = protected(32)?;
    sim.serving = false;
    sim.input(0, Input::Command(Command::Unprotect))?;
    sim.until(ms(5200), owned_by(0))?;
    assert_eq!(sim.nodes[0].primary_state(), Some(primary::State::Off));
    assert!(!sim.nodes[1].is_alive());
    // Neither answers: the command fails by name, and protection is back.
    let mut sim = by_hand(OnLoss::Stall)?;
    sim.cut(&[(0, 1), (1, 0)]);
    sim.input(0, Input::Command(Command::Unprotect))?;
    sim.run(ms(6000))?;
    assert!(failed(&sim, Command::Unprotect, Why::NoAnswer));
    sim.cut.clear();
    sim.until(ms(6000), Sim::is_protected)
}

#[test]
fn row_14_a_false_suspicion_costs_the_changes_alone() -> Outcome {
    for at in 0..30 {
        let mut sim = protected(at)?;
        sim.run(ms(at * 7))?;
        sim.cut(&[(0, 1), (1, 0)]);
        sim.until(ms(500), owned_by(0))?;
        sim.heal();
        protect_again(&mut sim)?;
        assert_eq!((sim.full, sim.warm), (1, 1), "{}", sim.describe());
        sim.run(ms(200))?;
        sim.kill(0, false);
        sim.until(ms(600), owned_by(1))?;
    }
    Ok(())
}

#[test]
fn row_14_another_backup_or_an_old_one_is_filled_from_nothing() -> Outcome {
    for restarts in [false, true] {
        let mut sim = protected(14)?;
        sim.cut(&[(0, 1), (1, 0)]);
        sim.until(ms(500), owned_by(0))?;
        sim.heal();
        if restarts {
            sim.kill(1, true);
            sim.restart(1, false)?;
        } else {
            // Longer than the changes are kept.
            sim.run(ms(601_000))?;
            sim.restart(1, false)?;
        }
        protect_again(&mut sim)?;
        assert_eq!((sim.full, sim.warm), (2, 0));
    }
    Ok(())
}

#[test]
fn row_14_a_resync_that_never_began_may_be_tried_again() -> Outcome {
    for at in 0..12 {
        let mut sim = protected(at)?;
        sim.cut(&[(0, 1), (1, 0)]);
        sim.until(ms(500), owned_by(0))?;
        sim.heal();
        let left = |sim: &Sim| sim.nodes[1].backup_state() == Some(backup::State::Abandoned);
        sim.until(ms(2000), left)?;
        sim.command(Command::Start)?;
        sim.run(ms(at))?;
        sim.reset_connections();
        sim.run(ms(500))?;
        sim.restart(1, false)?;
        protect_again(&mut sim)?;
        assert_eq!(sim.owner(), None, "its output is held");
        sim.run(ms(100))?;
        sim.kill(0, false);
        sim.until(ms(600), owned_by(1))?;
    }
    Ok(())
}

#[test]
fn row_14_by_hand_the_primarys_word_is_enough_for_the_next_term() -> Outcome {
    let mut sim = by_hand(OnLoss::Continue)?;
    sim.cut(&[(0, 1), (1, 0)]);
    sim.until(ms(500), owned_by(0))?;
    sim.run(ms(2000))?;
    sim.heal();
    protect_again(&mut sim)?;
    assert_eq!((sim.full, sim.warm), (1, 1));
    Ok(())
}
