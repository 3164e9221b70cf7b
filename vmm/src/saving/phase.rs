//! Where a save is, as the main thread sees it: what happens leads to another phase, and to what
//! has to be done. No side effects here.
//!
//! ```text
//!            Opened, Round, Ready
//!   Copying ----------------------+----> Finishing    the guest was captured and runs on
//!      |                          |          |
//!      |                          +----> Stopped      it has to wait until it is copied
//!      | Done                            |    |
//!      +---------------------------------+----+----> Over
//! ```
use crate::lifecycle::State;

/// Where a save is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The thread opens, or copies while the guest runs; the guest is what clients make of it.
    Copying,
    /// The machine is stopped for it. Where it was before.
    Stopped(State),
    /// Disks and taps were let go: the machine is the receiver's, unless that gives it back.
    Going(State),
    /// All that the machine has to give was given: it is what clients make of it.
    Finishing,
    /// The thread is done.
    Over,
}

/// What kind of save it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// The guest runs on here, if it ran.
    pub resume: bool,
    /// Where the machine goes.
    pub receiver: Receiver,
}

/// Where a saved machine goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Receiver {
    /// Into a directory.
    Directory,
    /// To another process, which may run it from then on and says nothing.
    Mute,
    /// To another process, which answers.
    Answers,
}

impl Terms {
    /// Another process may run the machine from then on.
    pub fn is_stream(self) -> bool {
        self.receiver != Receiver::Directory
    }

    /// Memory is copied while the guest runs, if it does.
    pub fn live(self) -> bool {
        self.resume || self.is_stream()
    }
}

/// What happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// There is something to save into, and the guest runs (or does not).
    Opened { live: bool },
    /// A round has been made.
    Round,
    /// The rest needs a machine that is stopped.
    Ready,
    /// It was captured, and runs again already.
    Captured,
    /// It was captured, and has to stay stopped. Where it was before.
    Held(State),
    /// Memory is not needed any more.
    Copied,
    /// All is at the receiver, which waits.
    HandOver,
    /// It was cancelled before it counted; the thread may hang.
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

/// What has to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Log dirty pages, and have all memory copied.
    LogAndCopy,
    /// Tell the thread what has changed.
    Harvest,
    /// Stop the machine and give the thread what it needs of it.
    Capture,
    /// Let go of disks and taps.
    Release,
    /// Say so to the receiver.
    Go,
    /// Let the machine be what it was before it was stopped.
    GoBack(State),
    /// Leave it stopped. What it was before.
    Rest(State),
    /// Leave it to the process that it was sent to.
    Leave,
}

impl Phase {
    /// What `input` leads to. What makes no sense in a phase comes too late, and leads to nothing.
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
            // The other side of a stream may have all of it: only the thread can tell.
            (Self::Stopped(before), I::Cancelled) if !terms.is_stream() => {
                (Self::Finishing, vec![E::GoBack(before)])
            }
            (Self::Stopped(before), I::HandOver) => (Self::Going(before), vec![E::Release, E::Go]),
            // It is a copy that runs there.
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

    /// All that is done, and where it ends.
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
