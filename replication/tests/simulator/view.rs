//! What is seen of all processes.
use replication::{Arbiter, Connection, Primary, Searched, Time, backup};

use super::Sim;
use crate::node::{Node, Role};

impl Sim {
    /// When what has been sent so far arrives.
    pub fn arrivals(&self) -> impl Iterator<Item = Time> {
        self.last.values().copied()
    }

    /// Whether a primary is protected by a backup that stands by.
    pub fn is_protected(&self) -> bool {
        let primary = self.nodes.iter().any(|n| n.primary().is_some_and(Primary::is_protected));
        primary && self.nodes.iter().any(|n| n.backup_state() == Some(backup::State::Standby))
    }

    /// The connection that a process uses.
    pub fn connection(&self, i: usize) -> Option<Connection> {
        match &self.nodes[i].role {
            Role::Primary(primary) => primary.connection(),
            Role::Backup(backup) => backup.connection(),
            _ => None,
        }
    }

    pub fn owner(&self) -> Option<usize> {
        (0..3).find(|i| self.nodes[*i].owns())
    }

    pub fn describe(&self) -> String {
        let state = |node: &Node| match (&node.role, node.status()) {
            (Role::Dead, _) => format!("dead, {:?}", node.sidecar),
            (_, Some(status)) => format!("{} in {}", status.state, status.term),
            _ => "starting".into(),
        };
        let states: Vec<String> = self.nodes.iter().map(state).collect();
        format!("{states:?}, {:?}", self.now)
    }

    /// The states of all processes, without numbers.
    pub fn class(&self) -> String {
        let state = |node: &Node| match (&node.role, node.status()) {
            (Role::Dead, _) => {
                let word = format!("{:?}", node.sidecar);
                format!("dead {}", word.split(['(', ' ']).next().unwrap())
            }
            (_, Some(status)) => {
                let parked = if node.parked { " parked" } else { "" };
                let waiting = status.waiting.map_or("", replication::Waiting::name);
                format!("{}{parked} {waiting}", status.state)
            }
            _ => "starting".into(),
        };
        let states: Vec<String> = self.nodes.iter().map(state).collect();
        let arbiter = match self.settings.agreement.arbiter {
            Arbiter::Witness(_) => "witness",
            Arbiter::Fence(_) => "fence",
            Arbiter::None => "neither",
        };
        format!("{arbiter} {states:?}")
    }
}
