//! Which worlds are the same. A search over the real machines would not end if it distinguished
//! worlds that differ only in their clocks, in the numbers of connections and questions, or in what
//! is never read again.
use std::{
    collections::BTreeSet,
    hash::{DefaultHasher, Hash, Hasher},
};

use replication::{Connection, Incarnation, Question, Searched};

use crate::world::{Role, World};

/// Any order, as long as it is always the same.
fn order(thing: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    thing.hash(&mut hasher);
    hasher.finish()
}

impl World {
    /// Make worlds equal that differ only in clocks, numbers of connections and questions, or in
    /// what is never read again.
    pub fn normalise(&mut self) {
        // Frames to the dead, and over connections that their reader has left, are never read.
        let dead: Vec<bool> = self.nodes.iter().map(|n| n.role == Role::Dead).collect();
        let using: Vec<_> = (0..self.nodes.len()).map(|i| self.connection(i)).collect();
        let primary: Vec<_> = (0..self.nodes.len()).map(|i| self.primary(i).is_some()).collect();
        self.frames.retain(|(_, to), queue| {
            queue.retain(|(over, _)| {
                !dead[*to]
                    && (if primary[*to] {
                        using[*to] == Some(*over)
                    } else {
                        using[*to] <= Some(*over)
                    })
            });
            !queue.is_empty()
        });
        let mut live: BTreeSet<Connection> = using.iter().flatten().copied().collect();
        live.extend(self.frames.values().flatten().map(|(over, _)| *over));
        self.wires.retain(|wire| live.contains(&wire.connection));
        let number = |connection: Connection| {
            let rank = live.iter().position(|other| *other == connection);
            Connection(rank.map_or(0, |rank| rank as u64 + 1))
        };
        for wire in &mut self.wires {
            wire.connection = number(wire.connection);
        }
        for (over, _) in self.frames.values_mut().flatten() {
            *over = number(*over);
        }
        // A question whose answer is no longer awaited still reaches the witness.
        let nonces: Vec<_> = (0..self.nodes.len()).map(|i| self.nonce(i)).collect();
        let nodes = &self.nodes;
        let waited = |i: usize, incarnation: Incarnation, nonce: u64| {
            nodes[i].incarnation == incarnation && nonces[i] == Some(nonce)
        };
        for (i, incarnation, nonce, _) in &mut self.questions {
            *nonce = u64::from(waited(*i, *incarnation, *nonce));
        }
        self.questions.retain(|(_, _, nonce, question)| {
            *nonce == 1 || !matches!(question, Question::Look { .. })
        });
        self.questions.sort_by_key(order);
        self.questions.dedup();
        self.answers.retain(|(i, incarnation, nonce, ..)| waited(*i, *incarnation, *nonce));
        for (_, _, nonce, ..) in &mut self.answers {
            *nonce = 1;
        }
        self.answers.sort_by_key(order);
        self.answers.dedup();
        for node in &mut self.nodes {
            match &mut node.role {
                Role::Dead => {}
                Role::Primary(primary) => primary.normalise(number),
                Role::Backup(backup) => backup.normalise(number),
                Role::Start(start) => start.normalise(|connection| connection),
            }
        }
    }
}
