//! One process with its host: guest, gates, sidecar, agent.
use std::collections::{HashMap, VecDeque};

use replication::{
    Backup, Bond, Epoch, Incarnation, Input, Mark, Output, Primary, Room, Rules, Start, Status,
    Term, Time, backup, primary,
};

use crate::{
    disk::Disk,
    guest::{Guest, Pages, Seen},
};

pub enum Role {
    Dead,
    Primary(Primary),
    Backup(Backup),
    Start(Start),
}

/// What the storage under a backup's journal does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    Works,
    Hangs,
    Full,
}

pub struct Node {
    pub role: Role,
    pub incarnation: Incarnation,
    pub sidecar: Mark,
    /// Words that are being written, and until when its storage is busy.
    pub marking: VecDeque<Mark>,
    pub busy: Time,
    /// What a start from its disk has to win, and as whom: a later start asks as the same.
    pub claims: Option<(Bond, Incarnation)>,
    /// Until when it is stopped.
    pub frozen: Time,
    /// Whether its agent reaches the witness.
    pub agent: bool,
    /// After how many more outputs it dies.
    pub doom: Option<u32>,
    pub guest: Guest,
    pub disk: Disk,
    /// Its image is being filled: the next epoch is the first of a term.
    pub filling: bool,
    /// What is behind the gates, with the epoch that it belongs to.
    pub held: VecDeque<(Epoch, Seen)>,
    /// How full that was when the process was last told.
    pub room: Room,
    /// For how many percent of the time the guest is parked.
    pub throttle: u8,
    /// How far its clock is ahead.
    pub ahead: Time,
    /// How much is begun and not done.
    pub pending: u32,
    /// The epoch that is running.
    pub epoch: Epoch,
    /// The guest's output is not held.
    pub free: bool,
    pub parked: bool,
    pub storage: Storage,
    /// Epochs that it was asked to hold meanwhile.
    pub hung: Vec<Epoch>,
    /// Epochs that it is asked to hold, in order; and whether they still count.
    pub holding: VecDeque<(Epoch, bool)>,
    /// Paused by a command.
    pub paused: bool,
    pub runs: bool,
    /// Epochs in staging.
    pub staged: HashMap<Epoch, Guest>,
    /// Those of the term before, while what was written since is kept.
    pub kept: HashMap<Epoch, Guest>,
    /// What the first epoch of this term is sent as a change of.
    pub base: Option<(Epoch, Guest)>,
    /// What an `End` that is being read has brought.
    pub arriving: Option<Pages>,
    /// Epochs that are to be held.
    pub received: HashMap<Epoch, Pages>,
    /// The time for which a tick is in the heap.
    pub tick: Option<Time>,
}

impl Node {
    pub fn new(
        role: Role,
        incarnation: Incarnation,
        sidecar: Mark,
        runs: bool,
        rules: Rules,
    ) -> Self {
        Self {
            role,
            incarnation,
            sidecar,
            marking: VecDeque::new(),
            busy: Time::ZERO,
            claims: None,
            frozen: Time::ZERO,
            agent: true,
            doom: None,
            guest: Guest::new(),
            disk: Disk::new(rules),
            filling: false,
            held: VecDeque::new(),
            room: Room::Ample,
            throttle: 0,
            ahead: Time::ZERO,
            pending: 0,
            epoch: Epoch(1),
            free: runs,
            parked: false,
            storage: Storage::Works,
            hung: Vec::new(),
            holding: VecDeque::new(),
            paused: false,
            runs,
            staged: HashMap::new(),
            kept: HashMap::new(),
            base: None,
            arriving: None,
            received: HashMap::new(),
            tick: None,
        }
    }

    pub fn step(&mut self, now: Time, input: Input) -> Vec<Output> {
        let now = now + self.ahead;
        match &mut self.role {
            Role::Dead => Vec::new(),
            Role::Primary(primary) => primary.step(now, input),
            Role::Backup(backup) => backup.step(now, input),
            Role::Start(start) => start.step(now, input),
        }
    }

    pub fn deadline(&self) -> Option<Time> {
        let at = match &self.role {
            Role::Dead => None,
            Role::Primary(primary) => primary.deadline(),
            Role::Backup(backup) => backup.deadline(),
            Role::Start(start) => start.deadline(),
        };
        at.map(|at| at.saturating_sub(self.ahead))
    }

    pub fn status(&self) -> Option<Status> {
        match &self.role {
            Role::Primary(primary) => Some(primary.status()),
            Role::Backup(backup) => Some(backup.status()),
            _ => None,
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

    /// Its guest reboots itself.
    pub fn reboot(&mut self) {
        if self.is_alive() && self.runs && !self.parked {
            self.guest.reset();
        }
    }

    /// Who claims the term of its disk.
    /// The process that the disk names can be named once more.
    pub fn claimant(&mut self, bond: Bond, as_before: bool) -> Incarnation {
        match self.claims {
            Some((known, claimant)) if known.term == bond.term => claimant,
            _ => {
                let new = if as_before { bond.own().incarnation } else { self.incarnation };
                self.claims = Some((bond, new));
                new
            }
        }
    }

    /// Memory has an epoch, and so has the disk: as the first one, or in the journal.
    pub fn keep_on_disk(&mut self, epoch: Epoch, random: &mut fastrand::Rng) {
        if std::mem::take(&mut self.filling) {
            let term = self.status().map_or(Term(0), |status| status.term);
            self.disk.begin(term, epoch, self.guest.counter);
        } else {
            self.disk.sync_journal();
        }
        let whole = self.status().map_or(Epoch(0), |status| status.epoch);
        self.disk.work(whole, random);
    }

    /// Whether the storage's answer is for an epoch that still counts.
    pub fn is_held(&mut self, input: Input) -> bool {
        match input {
            Input::Held(_) | Input::NotHeld(..) => {
                self.holding.pop_front().is_some_and(|(_, counts)| counts)
            }
            _ => true,
        }
    }

    pub fn die(&mut self) {
        self.role = Role::Dead;
        self.incarnation.0 += 1;
        self.held.clear();
        self.staged.clear();
        self.kept.clear();
        self.received.clear();
        self.hung.clear();
        self.holding.clear();
        self.base = None;
        (self.room, self.throttle, self.pending) = (Room::Ample, 0, 0);
        (self.free, self.parked, self.runs) = (false, false, false);
        (self.doom, self.tick) = (None, None);
        (self.frozen, self.busy) = (Time::ZERO, Time::ZERO);
        self.filling = false;
    }
}
