//! Who decides: the witness, or a fence.
use replication::{Answer, Incarnation, Input, Mark, Question, Side, Term, Time};

use super::{Event, GUEST, Sim, ms};

/// What a fence does when it is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fence {
    Works,
    /// Its command takes half a minute.
    Slow,
    Fails,
    /// Says that the peer is down, and does nothing.
    Lies,
}

impl Sim {
    pub(super) fn answer(
        &mut self,
        by: usize,
        incarnation: Incarnation,
        nonce: u64,
        question: Question,
    ) -> Result<(), String> {
        self.check_claim(question)?;
        let answer = match question {
            Question::Fence { term } => self.fence(by, term),
            _ if !self.serving => None,
            _ => Some(self.witness.step(GUEST, question).answer),
        };
        if let Some(answer) = answer.filter(|_| self.nodes[by].agent) {
            let slow = matches!(question, Question::Fence { .. }) && self.fence == Fence::Slow;
            let slow = if slow { ms(30_000) } else { Time::ZERO };
            let delay = self.jitter(500, 5000 + 1000 * self.late) + slow;
            self.after(
                delay,
                Event::Input(by, incarnation, Input::Answered { nonce, question, answer }),
            );
        }
        Ok(())
    }

    /// `stratoctl fence`, on the other host: refused if that side is the primary and is fencing,
    /// too, or is in a later term.
    fn fence(&mut self, by: usize, of: Term) -> Option<Answer> {
        match self.fence {
            Fence::Works | Fence::Slow => {}
            Fence::Fails => return None,
            Fence::Lies => return Some(Answer::Down),
        }
        for i in (0..3).filter(|i| Self::host(*i) != Self::host(by)) {
            let mark = self.nodes[i].sidecar;
            let fences = matches!(mark, Mark::Fencing(bond) if bond.side == Side::Primary);
            if fences || mark.term() > of {
                return None;
            }
        }
        for i in (0..3).filter(|i| Self::host(*i) != Self::host(by)) {
            self.nodes[i].sidecar = Mark::Fenced { term: of };
            self.lose_power(i);
        }
        self.fenced.insert((by, of));
        Some(Answer::Down)
    }
}
