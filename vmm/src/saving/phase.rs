//! The phases of a save, as the main thread sees it: an input leads to another phase, and to
//! effects that have to be carried out. There are no side effects here.
//!
//! ```text
//!            Opened, Round, Ready
//!   Copying ----------------------+----> Finishing    the guest was captured and runs on
//!      |                          |          |
//!      |                          +----> Stopped      it stays stopped until it is copied
//!      | Done                            |    |
//!      +---------------------------------+----+----> Over
//! ```
use crate::lifecycle::State;

/// Phase of a save.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The thread opens the destination, or copies while the guest runs; clients control the guest.
    Copying,
    /// The machine is stopped for the save. With its state before.
    Stopped(State),
    /// Disks and taps were released: the machine is the receiver's, unless the receiver gives it
    /// back.
    Going(State),
    /// The save needs nothing more of the machine; clients control it.
    Finishing,
    /// The thread is done.
    Over,
}

/// What kind of save it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// The guest runs on here, if it ran.
    pub resume: bool,
    /// Where the machine is sent.
    pub receiver: Receiver,
}

/// Where a saved machine is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Receiver {
    /// Into a directory.
    Directory,
    /// To another process, which may run it from then on and sends no answers.
    Mute,
    /// To another process, which sends answers.
    Answers,
}

impl Terms {
    /// Whether another process may run the machine from then on.
    pub fn is_stream(self) -> bool {
        self.receiver != Receiver::Directory
    }

    /// Whether memory is copied while the guest runs, if it runs.
    pub fn live(self) -> bool {
        self.resume || self.is_stream()
    }
}

/// An input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// The destination is open, and the guest runs (or does not).
    Opened { live: bool },
    /// A round is complete.
    Round,
    /// The rest has to be copied with the machine stopped.
    Ready,
    /// The machine was captured, and runs again already.
    Captured,
    /// The machine was captured, and has to stay stopped. With its state before.
    Held(State),
    /// Memory is no longer needed.
    Copied,
    /// The receiver has everything, and waits.
    HandOver,
    /// The save was cancelled before it counted; the thread may hang.
    Cancelled,
    /// The thread is done.
    Done(Outcome),
}

/// How a save ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It counts.
    Saved,
    /// It does not.
    Failed,
    /// The receiver may have the machine, or may not.
    Unknown,
}

/// An effect to be carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Turn the dirty log on, and have all memory copied.
    LogAndCopy,
    /// Give the thread the changes so far.
    Harvest,
    /// Stop the machine and give its state to the thread.
    Capture,
    /// Release disks and taps.
    Release,
    /// Tell the receiver that they are released.
    Go,
    /// Go back to what the machine was before it was stopped.
    GoBack(State),
    /// Leave it stopped. With its state before.
    Rest(State),
    /// Leave it to the receiving process.
    Leave,
}

impl Phase {
    /// The phase and the effects that `input` leads to. An input that does not fit the phase is too
    /// late, and has no effect.
    pub fn on(self, terms: Terms, input: Input) -> (Self, Vec<Effect>) {
        use {Effect as E, Input as I, Outcome as O};
        match (self, input) {
            (Self::Copying, I::Opened { live: true }) => (self, vec![E::LogAndCopy]),
            (Self::Copying, I::Opened { live: false } | I::Ready) => (self, vec![E::Capture]),
            (Self::Copying, I::Round) => (self, vec![E::Harvest]),
            (Self::Copying, I::Captured) => (Self::Finishing, vec![]),
            (Self::Copying, I::Held(before)) => (Self::Stopped(before), vec![]),
            (Self::Stopped(before), I::Copied) if terms.resume => {
                (Self::Finishing, vec![E::GoBack(before)])
            }
            // The peer of a stream may have everything: only the thread knows.
            (Self::Stopped(before), I::Cancelled) if !terms.is_stream() => {
                (Self::Finishing, vec![E::GoBack(before)])
            }
            (Self::Stopped(before), I::HandOver) => (Self::Going(before), vec![E::Release, E::Go]),
            // The receiver runs a copy.
            (Self::Finishing, I::HandOver) => (self, vec![E::Go]),
            (Self::Stopped(before) | Self::Going(before), I::Done(outcome)) => {
                let then = match outcome {
                    O::Failed => E::GoBack(before),
                    O::Saved | O::Unknown if terms.is_stream() => E::Leave,
                    O::Unknown => E::GoBack(before),
                    O::Saved => E::Rest(before),
                };
                (Self::Over, vec![then])
            }
            (Self::Copying | Self::Finishing, I::Done(_)) => (Self::Over, vec![]),
            _ => (self, vec![]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Effect as E, Input as I, *};

    const RESUME: Terms = Terms { resume: true, receiver: Receiver::Directory };
    const SUSPEND: Terms = Terms { resume: false, receiver: Receiver::Directory };
    const MOVE: Terms = Terms { resume: false, receiver: Receiver::Answers };
    const SAVED: I = I::Done(Outcome::Saved);
    const FAILED: I = I::Done(Outcome::Failed);
    const UNKNOWN: I = I::Done(Outcome::Unknown);

    /// All effects, and the last phase.
    fn follow(terms: Terms, inputs: &[Input]) -> (Phase, Vec<Effect>) {
        inputs.iter().fold((Phase::Copying, Vec::new()), |(phase, mut done), input| {
            let (phase, effects) = phase.on(terms, *input);
            done.extend(effects);
            (phase, done)
        })
    }

    #[test]
    fn a_guest_that_runs_on_is_captured_once_and_never_waits_for_the_thread() {
        let inputs = [I::Opened { live: true }, I::Round, I::Round, I::Ready, I::Captured];
        let (phase, done) = follow(RESUME, &inputs);
        assert_eq!(done, [E::LogAndCopy, E::Harvest, E::Harvest, E::Capture]);
        assert_eq!(phase, Phase::Finishing);
        for end in [SAVED, FAILED] {
            assert_eq!(phase.on(RESUME, end), (Phase::Over, vec![]));
        }
    }

    #[test]
    fn a_guest_that_was_stopped_goes_where_the_save_leads() {
        let ran = State::Running;
        for (terms, end, then) in [
            (SUSPEND, SAVED, E::Rest(ran)),
            (SUSPEND, FAILED, E::GoBack(ran)),
            (MOVE, SAVED, E::Leave),
            (MOVE, FAILED, E::GoBack(ran)),
        ] {
            let inputs = [I::Opened { live: false }, I::Held(ran), I::Copied, end];
            assert_eq!(follow(terms, &inputs), (Phase::Over, vec![E::Capture, then]));
        }
        let inputs = [I::Opened { live: false }, I::Held(ran), I::Copied, SAVED];
        assert_eq!(follow(RESUME, &inputs).1, [E::Capture, E::GoBack(ran)]);
    }

    #[test]
    fn a_cancelled_save_lets_go_of_the_guest_unless_another_process_may_have_it() {
        let held = [I::Opened { live: false }, I::Held(State::Running), I::Cancelled];
        let (phase, done) = follow(SUSPEND, &held);
        assert_eq!((phase, done[1]), (Phase::Finishing, E::GoBack(State::Running)));
        assert_eq!(phase.on(SUSPEND, FAILED), (Phase::Over, vec![]));
        assert_eq!(follow(MOVE, &held), (Phase::Stopped(State::Running), vec![E::Capture]));
    }

    #[test]
    fn a_machine_that_was_given_away_comes_back_by_a_word_only() {
        let ran = State::Running;
        let given = [I::Opened { live: false }, I::Held(ran), I::Copied, I::HandOver];
        let (phase, done) = follow(MOVE, &given);
        assert_eq!((phase, &done[1..]), (Phase::Going(ran), &[E::Release, E::Go][..]));
        assert_eq!(phase.on(MOVE, I::Cancelled), (phase, vec![]), "too late");
        assert_eq!(phase.on(MOVE, FAILED), (Phase::Over, vec![E::GoBack(ran)]));
        for end in [SAVED, UNKNOWN] {
            assert_eq!(phase.on(MOVE, end), (Phase::Over, vec![E::Leave]));
        }
    }

    #[test]
    fn a_machine_that_was_stopped_is_let_go_once() {
        let (ran, off) = (State::Running, State::Paused);
        let phases = [
            Phase::Over,
            Phase::Copying,
            Phase::Stopped(ran),
            Phase::Stopped(off),
            Phase::Finishing,
        ];
        let (live, still) = (I::Opened { live: true }, I::Opened { live: false });
        let inputs = [
            [live, still, I::Round, I::Ready, I::Captured, I::HandOver],
            [I::Held(ran), I::Held(off), I::Copied, I::Cancelled, SAVED, FAILED],
            [UNKNOWN; 6],
        ];
        for terms in [RESUME, SUSPEND, MOVE] {
            for (phase, input) in
                phases.iter().flat_map(|p| inputs.as_flattened().iter().map(move |i| (*p, *i)))
            {
                let (next, effects) = phase.on(terms, input);
                let lets_go = |e: &&E| matches!(e, E::GoBack(_) | E::Rest(_) | E::Leave);
                let stopped = |phase| matches!(phase, Phase::Stopped(_) | Phase::Going(_));
                let freed = usize::from(stopped(phase) && !stopped(next));
                assert_eq!(effects.iter().filter(lets_go).count(), freed, "{phase:?} on {input:?}");
                let over = phase != Phase::Over && next == Phase::Over;
                assert_eq!(over, phase != Phase::Over && matches!(input, I::Done(_)));
            }
        }
    }
}
