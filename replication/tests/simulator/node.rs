//! One process with its host: guest, gates, sidecar, agent.
use std::collections::{HashMap, VecDeque};

use replication::{
    Backup, Epoch, Incarnation, Input, Mark, Output, Primary, Start, Time, backup, primary,
};

use crate::guest::Guest;

pub enum Role {
    Dead,
    Primary(Primary),
    Backup(Backup),
    Start(Start),
}

pub struct Node {
    pub role: Role,
    pub incarnation: Incarnation,
    pub sidecar: Mark,
    /// Until when it is stopped.
    pub frozen: Time,
    /// Whether its agent reaches the witness.
    pub agent: bool,
    /// After how many more outputs it dies.
    pub doom: Option<u32>,
    pub guest: Guest,
    /// What a start from its disk would begin with.
    pub disk: u64,
    /// Replies behind the gates, with the epoch that they belong to.
    pub held: VecDeque<(Epoch, u64)>,
    /// The epoch that is running.
    pub epoch: Epoch,
    /// The guest's output is not held.
    pub free: bool,
    pub parked: bool,
    pub runs: bool,
    /// Epochs in staging, or received.
    pub staged: HashMap<Epoch, Guest>,
    /// The time for which a tick is in the heap.
    pub tick: Option<Time>,
}

impl Node {
    pub fn new(role: Role, incarnation: Incarnation, sidecar: Mark, runs: bool) -> Self {
        Self {
            role,
            incarnation,
            sidecar,
            frozen: Time::ZERO,
            agent: true,
            doom: None,
            guest: Guest::new(),
            disk: 0,
            held: VecDeque::new(),
            epoch: Epoch(1),
            free: runs,
            parked: false,
            runs,
            staged: HashMap::new(),
            tick: None,
        }
    }

    pub fn step(&mut self, now: Time, input: Input) -> Vec<Output> {
        match &mut self.role {
            Role::Dead => Vec::new(),
            Role::Primary(primary) => primary.step(now, input),
            Role::Backup(backup) => backup.step(now, input),
            Role::Start(start) => start.step(now, input),
        }
    }

    pub fn deadline(&self) -> Option<Time> {
        match &self.role {
            Role::Dead => None,
            Role::Primary(primary) => primary.deadline(),
            Role::Backup(backup) => backup.deadline(),
            Role::Start(start) => start.deadline(),
        }
    }

    pub fn is_alive(&self) -> bool {
        !matches!(self.role, Role::Dead)
    }

    pub fn primary(&self) -> Option<&Primary> {
        match &self.role {
            Role::Primary(primary) => Some(primary),
            _ => None,
        }
    }

    pub fn primary_state(&self) -> Option<primary::State> {
        self.primary().map(Primary::state)
    }

    pub fn backup_state(&self) -> Option<backup::State> {
        match &self.role {
            Role::Backup(backup) => Some(backup.state()),
            _ => None,
        }
    }

    /// Whether the guest runs here and is seen by others at once.
    pub fn owns(&self) -> bool {
        self.is_alive() && self.runs && self.free && !self.parked
    }

    pub fn die(&mut self) {
        self.role = Role::Dead;
        self.incarnation.0 += 1;
        self.held.clear();
        self.staged.clear();
        (self.free, self.parked, self.runs) = (false, false, false);
        (self.doom, self.tick) = (None, None);
        self.frozen = Time::ZERO;
    }
}
