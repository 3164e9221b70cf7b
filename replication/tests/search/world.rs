//! Processes, network, witness and disks' sidecars, as the search moves them.
use std::collections::{BTreeMap, VecDeque};

use replication::{
    Agreement, Answer, Arbiter, Backup, Connection, Digest, Epoch, Frame, From, Identity,
    Incarnation, Input, Lineage, Mark, OnLoss, Output, Primary, Question, Rules, Searched,
    Settings, Side, Start, Term, Time, Timer, Witness, primary,
};

pub const GUEST: Lineage = Lineage(1);

/// What a search may do at most.
#[derive(Clone, Copy)]
pub struct Bounds {
    pub rules: Rules,
    pub arbiter: Arbiter,
    /// Hosts of the processes: 0 is where the guest begins.
    pub hosts: &'static [usize],
    pub epochs: u64,
    pub terms: u64,
    pub cuts: u8,
    pub kills: u8,
    /// Answers of the witness that are lost.
    pub lost: u8,
    /// Commands that leave a term.
    pub commands: u8,
    /// Whether durable writes, captures and the like take any time: else they are done within the
    /// step that requests them.
    pub slow: bool,
}

impl Bounds {
    pub fn settings(&self) -> Settings {
        let nobody = self.arbiter == Arbiter::None;
        Settings {
            agreement: Agreement { arbiter: self.arbiter, machine: Digest(1) },
            timeout: Time::from_secs(1),
            period: Time::from_millis(200),
            ack_limit: Time::from_secs(10),
            on_loss: if nobody { OnLoss::Stall } else { OnLoss::Claim },
            leave_slow: false,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Role {
    Dead,
    Primary(Box<Primary>),
    Backup(Box<Backup>),
    Start(Box<Start>),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Node {
    pub role: Role,
    pub incarnation: Incarnation,
    pub sidecar: Mark,
    /// What was begun and is not done, in order.
    pub pending: VecDeque<Input>,
    /// It wants a connection.
    pub dialling: bool,
    /// The guest runs here and its output is free.
    pub free: bool,
    pub parked: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Wire {
    pub connection: Connection,
    pub primary: usize,
    pub backup: usize,
    pub broken: bool,
}

/// How a term was closed in fact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Facts {
    /// Highest epoch whose output was let out because of an acknowledgement.
    pub released: Epoch,
    /// The primary continued alone.
    pub solo: bool,
    /// The backup ran, from this epoch.
    pub ran: Option<Epoch>,
    /// It was started from a disk.
    pub cold: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct World {
    pub nodes: Vec<Node>,
    pub witness: Witness,
    /// On their way to the witness, and back.
    pub questions: Vec<(usize, Incarnation, u64, Question)>,
    pub answers: Vec<(usize, Incarnation, u64, Question, Answer)>,
    pub wires: Vec<Wire>,
    /// Frames from one process to another, in order.
    pub frames: BTreeMap<(usize, usize), VecDeque<(Connection, Frame)>>,
    pub up: bool,
    pub facts: BTreeMap<Term, Facts>,
    pub cuts: u8,
    pub kills: u8,
    pub lost: u8,
    pub commands: u8,
}

impl World {
    pub fn new(bounds: &Bounds) -> Self {
        let node = |(i, host): (usize, &usize)| {
            let incarnation = Incarnation(10 * (i as u128 + 1));
            let me = Identity { lineage: GUEST, incarnation };
            let (settings, rules) = (bounds.settings(), bounds.rules);
            let free = *host == 0;
            let (role, sidecar) = if free {
                let primary = Primary::new(me, Term(1), settings, rules);
                (Role::Primary(Box::new(primary)), Mark::Free { term: Term(1) })
            } else {
                let sidecar = Mark::Outdated { term: Term(0) };
                (Role::Backup(Box::new(Backup::new(me, sidecar, settings, rules).0)), sidecar)
            };
            let pending = VecDeque::new();
            Node { role, incarnation, sidecar, pending, dialling: false, free, parked: false }
        };
        Self {
            nodes: bounds.hosts.iter().enumerate().map(node).collect(),
            witness: Witness::new(bounds.rules),
            questions: Vec::new(),
            answers: Vec::new(),
            wires: Vec::new(),
            frames: BTreeMap::new(),
            up: true,
            facts: BTreeMap::new(),
            cuts: bounds.cuts,
            kills: bounds.kills,
            lost: bounds.lost,
            commands: bounds.commands,
        }
    }

    pub fn primary(&self, i: usize) -> Option<&Primary> {
        match &self.nodes[i].role {
            Role::Primary(primary) => Some(primary),
            _ => None,
        }
    }

    pub fn armed(&self, i: usize) -> Vec<Timer> {
        match &self.nodes[i].role {
            Role::Dead => Vec::new(),
            Role::Primary(primary) => primary.armed(),
            Role::Backup(backup) => backup.armed(),
            Role::Start(start) => start.armed(),
        }
    }

    pub fn nonce(&self, i: usize) -> Option<u64> {
        match &self.nodes[i].role {
            Role::Dead => None,
            Role::Primary(primary) => primary.nonce(),
            Role::Backup(backup) => backup.nonce(),
            Role::Start(start) => start.nonce(),
        }
    }

    /// Whether the question of a process, or its answer, is on its way.
    pub fn is_asked(&self, i: usize) -> bool {
        self.questions.iter().any(|(asker, _, nonce, _)| *asker == i && *nonce == 1)
            || self.answers.iter().any(|(asker, ..)| *asker == i)
    }

    /// The connection that a process uses.
    pub fn connection(&self, i: usize) -> Option<Connection> {
        match &self.nodes[i].role {
            Role::Primary(primary) => primary.connection(),
            Role::Backup(backup) => backup.connection(),
            _ => None,
        }
    }

    pub fn make_due(&mut self, i: usize, timer: Timer) {
        match &mut self.nodes[i].role {
            Role::Dead => {}
            Role::Primary(primary) => primary.make_due(timer),
            Role::Backup(backup) => backup.make_due(timer),
            Role::Start(start) => start.make_due(timer),
        }
    }

    /// Step process `i`, and carry out at most `most` of its outputs. Whether that was all.
    pub fn input(&mut self, bounds: &Bounds, i: usize, input: Input, most: &mut usize) -> bool {
        let before = self.primary(i).map(Primary::term);
        let outputs = match &mut self.nodes[i].role {
            Role::Dead => Vec::new(),
            Role::Primary(primary) => primary.step(Time::ZERO, input),
            Role::Backup(backup) => backup.step(Time::ZERO, input),
            Role::Start(start) => start.step(Time::ZERO, input),
        };
        self.carry_out(bounds, i, outputs, before, most)
    }

    /// Carry out at most `most` outputs of process `i`, and where nothing takes time also what
    /// they begin. Whether that was all.
    pub fn carry_out(
        &mut self,
        bounds: &Bounds,
        i: usize,
        outputs: Vec<Output>,
        before: Option<Term>,
        most: &mut usize,
    ) -> bool {
        for output in outputs {
            if *most == 0 {
                return false;
            }
            *most -= 1;
            self.perform(bounds, i, output, before);
        }
        if !bounds.slow {
            while let Some(done) = self.nodes[i].pending.pop_front() {
                let Some(done) = self.complete(bounds, i, done) else { continue };
                if !self.input(bounds, i, done, most) {
                    return false;
                }
            }
        }
        true
    }

    /// What was begun is done. `None` where the bounds do not allow it.
    pub fn complete(&mut self, bounds: &Bounds, i: usize, done: Input) -> Option<Input> {
        match done {
            Input::Marked(mark) => {
                self.nodes[i].sidecar = mark;
                if let (Mark::Running { promoted: None, term }, Role::Start(_)) =
                    (mark, &self.nodes[i].role)
                {
                    self.facts.entry(Term(term.0 - 1)).or_default().cold = true;
                }
            }
            _ if !self.is_possible(bounds, i, &done) => return None,
            _ => {}
        }
        Some(done)
    }

    /// Whether the bounds allow it. The last epoch of a planned failover is one more.
    pub fn is_possible(&self, bounds: &Bounds, i: usize, done: &Input) -> bool {
        let Input::Captured { epoch: Epoch(epoch), .. } = *done else { return true };
        let last = primary::State::HandingOver(primary::Handing::Last(Epoch(epoch)));
        let state = self.primary(i).map(Primary::state);
        epoch <= bounds.epochs || epoch == bounds.epochs + 1 && state == Some(last)
    }

    fn perform(&mut self, bounds: &Bounds, i: usize, output: Output, before: Option<Term>) {
        let incarnation = self.nodes[i].incarnation;
        let node = &mut self.nodes[i];
        match output {
            Output::Send(connection, frame) => {
                if let Some(wire) = self.wires.iter().find(|wire| wire.connection == connection) {
                    let to = if wire.primary == i { wire.backup } else { wire.primary };
                    if !wire.broken {
                        self.frames.entry((i, to)).or_default().push_back((connection, frame));
                    }
                }
            }
            Output::Dial => node.dialling = true,
            Output::Close(connection) => self.sever(connection, Some(i)),
            Output::Ask { nonce, question } => {
                let asked = (i, incarnation, nonce, question);
                if !self.questions.contains(&asked) {
                    self.questions.push(asked);
                }
            }
            Output::Mark(mark) => node.pending.push_back(Input::Marked(mark)),
            Output::Capture { epoch, shut } => {
                // The gates shut at the end of this epoch; output of it counts as its own.
                node.free &= !shut;
                let digest = Digest(epoch.0);
                node.pending.push_back(Input::Captured { epoch, digest });
            }
            Output::ReleaseThrough(epoch) => {
                let term = self.primary(i).map_or(Term(0), Primary::term);
                let facts = self.facts.entry(term).or_default();
                facts.released = facts.released.max(epoch);
            }
            Output::OpenGates => {
                node.free = true;
                if let (Some(before), Some(now)) = (before, self.primary(i))
                    && now.term() > before
                {
                    self.facts.entry(before).or_default().solo = true;
                }
            }
            Output::CloseTaps => node.free = false,
            Output::Park => node.parked = true,
            Output::Unpark => node.parked = false,
            Output::Hold(epoch) => node.pending.push_back(Input::Held(epoch)),
            Output::Prepare(_) => node.pending.push_back(Input::Prepared),
            Output::DropAfter(_) => node.pending.retain(|done| !matches!(done, Input::Held(_))),
            Output::Unprepare => node.pending.retain(|done| *done != Input::Prepared),
            Output::Run { term, from, promoted } => {
                if let From::Epoch(epoch) = from {
                    self.facts.entry(Term(term.0 - 1)).or_default().ran = Some(epoch);
                }
                let me = Identity { lineage: GUEST, incarnation };
                let (owner, outputs) =
                    Primary::owner(me, term, promoted, bounds.settings(), bounds.rules);
                node.role = Role::Primary(Box::new(owner));
                (node.free, node.parked) = (true, false);
                for output in outputs {
                    self.perform(bounds, i, output, None);
                }
            }
            Output::Exit(_) => self.die(i),
            // What memory holds, time, and how full it is, are not part of the search.
            Output::Tell(_)
            | Output::BeatBeside
            | Output::Sync { .. }
            | Output::Track { .. }
            | Output::Untrack
            | Output::Throttle(_)
            | Output::Harvest
            | Output::Fill { .. } => {}
        }
    }

    /// `stratoctl fence` on the other host: refused if that side is the primary and is fencing, too, or
    /// is in a later term.
    pub fn fence(&mut self, bounds: &Bounds, by: usize, of: Term) -> Option<Answer> {
        let there: Vec<usize> =
            (0..self.nodes.len()).filter(|i| bounds.hosts[*i] != bounds.hosts[by]).collect();
        let refuses = |mark: Mark| {
            let fences = matches!(mark, Mark::Fencing(bond) if bond.side == Side::Primary);
            fences || mark.term() > of
        };
        if there.iter().any(|i| refuses(self.nodes[*i].sidecar)) {
            return None;
        }
        for i in there {
            if self.nodes[i].role != Role::Dead {
                self.nodes[i].incarnation.0 += 1;
                self.die(i);
            }
            self.nodes[i].sidecar = Mark::Fenced { term: of };
        }
        Some(Answer::Down)
    }

    /// The process is gone; what it had begun is not done.
    pub fn die(&mut self, i: usize) {
        let node = &mut self.nodes[i];
        node.role = Role::Dead;
        node.pending.clear();
        (node.dialling, node.free, node.parked) = (false, false, false);
        for wire in &mut self.wires {
            wire.broken |= wire.primary == i || wire.backup == i;
        }
    }

    /// End a connection. What is on its way to `reader` is never read.
    pub fn sever(&mut self, connection: Connection, reader: Option<usize>) {
        for wire in &mut self.wires {
            wire.broken |= wire.connection == connection;
        }
        for ((_, to), queue) in &mut self.frames {
            if Some(*to) == reader {
                queue.retain(|(over, _)| *over != connection);
            }
        }
    }

    /// What is wrong here, if anything is.
    pub fn wrong(&self) -> Option<String> {
        let owners: Vec<usize> = (0..self.nodes.len())
            .filter(|i| self.nodes[*i].free && !self.nodes[*i].parked)
            .collect();
        if owners.len() > 1 {
            return Some(format!("processes {owners:?} both own the guest (I3)"));
        }
        for (term, facts) in &self.facts {
            if let Some(from) = facts.ran.filter(|from| facts.released > *from) {
                let out = facts.released.0;
                return Some(format!(
                    "{term}: output of epoch {out} is out, the backup ran from {} (I2)",
                    from.0
                ));
            }
            let closed = [facts.solo, facts.ran.is_some(), facts.cold];
            if closed.iter().filter(|closed| **closed).count() > 1 {
                return Some(format!("{term} is closed twice: {facts:?} (I3)"));
            }
        }
        (0..self.nodes.len()).find_map(|i| self.given_away(i))
    }

    /// A term that is closed at the witness, while both sides call it protected and nothing is on
    /// its way that would inform them (I11).
    fn given_away(&self, i: usize) -> Option<String> {
        let primary = self.primary(i)?;
        let term = primary.term();
        let record = self.witness.record(GUEST, term)?;
        let quiet = self.up && self.frames.is_empty() && self.answers.is_empty();
        let called = primary.state() == primary::State::Protected && primary.nonce().is_none();
        let other = self.nodes.iter().any(|node| {
            let Role::Backup(backup) = &node.role else { return false };
            backup.state() == replication::backup::State::Standby
                && Some(node.incarnation) == primary.bound()
                && backup.term() == term
                && backup.nonce().is_none()
        });
        (quiet && called && other).then(|| {
            format!("{term} is given away ({:?}) and yet both call it protected (I11)", record.word)
        })
    }
}
