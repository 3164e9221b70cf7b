//! What has to be true after each event. Two owners, and replies that are given twice, are noticed
//! where they happen.
use replication::{
    Bond, Command, Epoch, Event, Frame, Input, Mark, Message, Output, Question, Searched, Settled,
    Side, Status, Term, Waiting, Word, backup, primary,
};

use super::{GUEST, Sim};
use crate::node::{Node, Role};

/// What a process was before an input.
pub struct Before {
    incarnation: replication::Incarnation,
    status: Option<Status>,
}

impl Before {
    pub fn of(node: &Node) -> Self {
        Self { incarnation: node.incarnation, status: node.status() }
    }
}

impl Sim {
    /// An input has been taken: numbers only grow, what is of an old term changes nothing (I4), and
    /// no state is left silently (I9).
    pub(super) fn check_step(
        &self,
        i: usize,
        before: &Before,
        input: &Input,
        outputs: &[Output],
    ) -> Result<(), String> {
        let node = &self.nodes[i];
        let (Some(old), Some(new)) = (before.status, node.status()) else { return Ok(()) };
        if before.incarnation != node.incarnation || old.role != new.role {
            return Ok(());
        }
        // What is received and not held, and what is held back for an acknowledgement (I5).
        let unacknowledged = new.epoch.0.saturating_sub(new.acked.0);
        let many = new.acked > Epoch(0) && unacknowledged > primary::UNACKNOWLEDGED as u64;
        if node.received.len() > primary::UNACKNOWLEDGED || many {
            return Err(format!("process {i} keeps {} epochs (I5)", node.received.len()));
        }
        let same = old.term == new.term && old.armed && new.armed;
        if new.term < old.term || same && (new.epoch < old.epoch || new.acked < old.acked) {
            return Err(format!("process {i} goes back: {old:?}, {new:?} (I4)"));
        }
        if let Input::Received(_, Frame { term, message, .. }) = input
            && *term < old.term
            && !matches!(message, Message::Hello(_) | Message::Refuse(_))
        {
            let acts = |output: &Output| !matches!(output, Output::Close(_) | Output::Send(..));
            if outputs.iter().any(acts) || old.state != new.state {
                return Err(format!("process {i} obeys {message:?} of an old term (I4)"));
            }
        }
        let tells = |output: &Output| {
            matches!(output, Output::Tell(Event::State(_)) | Output::Run { .. } | Output::Exit(_))
        };
        let arming = |state| if state == "arming" { "protected" } else { state };
        if arming(old.state) != arming(new.state) && !outputs.iter().any(tells) {
            return Err(format!(
                "process {i} was {}, and is silently {} (I9)",
                old.state, new.state
            ));
        }
        Ok(())
    }

    /// Every wait has a name, and an end or a next attempt (I8).
    pub(super) fn check_wait(&self, i: usize) -> Result<(), String> {
        let node = &self.nodes[i];
        let waiting = match &node.role {
            Role::Primary(primary) => primary.waiting(),
            Role::Backup(backup) => backup.waiting(),
            Role::Start(start) if !start.is_over() => {
                let waits = node.deadline().is_some() || node.pending > 0;
                return waits.then_some(()).ok_or(format!("start {i} waits for nothing (I8)"));
            }
            Role::Start(_) | Role::Dead => return Ok(()),
        };
        let idle = match &node.role {
            Role::Primary(primary) => matches!(
                primary.state(),
                primary::State::Off | primary::State::Degraded | primary::State::Protected
            ),
            Role::Backup(backup) => backup.state() == backup::State::Standby,
            _ => true,
        };
        let serves = node.backup_state() == Some(backup::State::Listening);
        match waiting {
            None if idle => Ok(()),
            None => Err(format!("process {i} waits for nothing: {} (I8)", self.describe())),
            Some(Waiting::Operator) => Ok(()),
            Some(_) if serves || node.deadline().is_some() || node.pending > 0 => Ok(()),
            Some(waiting) => Err(format!(
                "process {i} waits for {} without end: {} (I8)",
                waiting.name(),
                self.describe()
            )),
        }
    }

    /// What is let out as acknowledged is in a backup's memory (I1).
    pub(super) fn check_release(
        &mut self,
        i: usize,
        before: Option<Term>,
        epoch: Epoch,
    ) -> Result<(), String> {
        let Some(term) = before else { return Ok(()) };
        if self.closed.get(&term) == Some(&"promote") {
            self.late_releases += 1;
        }
        let held = self.whole.get(&term).copied().unwrap_or_default();
        if epoch > held {
            return Err(format!("process {i} lets out {epoch:?} of {term}, held {held:?} (I1)"));
        }
        let out = self.released.entry(term).or_default();
        *out = epoch.max(*out);
        Ok(())
    }

    /// A start from a disk that says `protected` has won its term (I12).
    pub(super) fn check_cold(&self, i: usize) -> Result<(), String> {
        let node = &self.nodes[i];
        let asked =
            |(bond, _): &(Bond, _)| Mark::Running { term: bond.term.next(), promoted: None };
        let won = node.claims.filter(|claim| asked(claim) == node.sidecar);
        let Some((bond, claimant)) = won else { return Ok(()) };
        let won = self.witness.record(GUEST, bond.term).is_some_and(|record| {
            let winner = record.winner.incarnation;
            match (record.word, record.settled) {
                (Word::Cold, _) => winner == claimant,
                // By the process that the disk names, which is dead.
                (_, Some(Settled::Yielded { to })) => to == bond.own().incarnation,
                (word, _) => word != Word::Promote && winner == bond.own().incarnation,
            }
        });
        if won || self.fenced.contains(&(i, bond.term)) {
            return Ok(());
        }
        Err(format!("process {i} starts from its disk, and {} is not its own (I12)", bond.term))
    }

    /// A term is armed for two incarnations, and once.
    pub(super) fn check_armed(&mut self, frame: Frame) -> Result<(), String> {
        let Message::Armed(pair) = frame.message else { return Ok(()) };
        match self.pairs.insert(frame.term, pair) {
            Some(other) if other != pair => {
                Err(format!("{} is armed for {other:?} and {pair:?} (I10)", frame.term))
            }
            _ => Ok(()),
        }
    }

    /// Only those two try to win it by Solo or Promote.
    pub(super) fn check_claim(&self, question: Question) -> Result<(), String> {
        let Question::Claim { term, word: Word::Solo | Word::Promote, party } = question else {
            return Ok(());
        };
        let Some(pair) = self.pairs.get(&term) else { return Ok(()) };
        let may = match party.side {
            Side::Primary => pair.primary,
            Side::Backup => pair.backup,
        };
        if party.incarnation == may {
            return Ok(());
        }
        Err(format!("{party:?} claims {term}, which is armed for {pair:?} (I10)"))
    }

    /// No term that is closed is called protected by both its sides (I11).
    pub fn check_given_away(&self) -> Result<(), String> {
        for primary in self.nodes.iter().filter_map(Node::primary) {
            let (term, bound) = (primary.term(), primary.bound());
            let stands_by = self.nodes.iter().any(|node| {
                let state = node.backup_state();
                Some(node.incarnation) == bound && state == Some(backup::State::Standby)
            });
            if primary.state() == primary::State::Protected
                && stands_by
                && primary.nonce().is_none()
                && let Some(record) = self.witness.record(GUEST, term)
            {
                return Err(format!(
                    "{term} is given away ({:?}), called protected (I11)",
                    record.word
                ));
            }
        }
        Ok(())
    }

    /// Give a command to whichever process is the primary.
    pub fn command(&mut self, command: Command) -> Result<(), String> {
        match (0..3).find(|i| self.nodes[*i].primary().is_some()) {
            Some(i) => self.input(i, Input::Command(command)),
            None => Ok(()),
        }
    }
}
