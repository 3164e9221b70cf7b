//! Virtual time, network, witness, fences, and what has to be true after each event.
use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap},
};

use replication::{
    Agreement, Answer, Arbiter, Backup, Connection, Digest, Epoch, Frame, Identity, Incarnation,
    Input, Lineage, Mark, OnLoss, Primary, Question, Rules, Searched, Settings, Side, Term, Time,
    Witness, backup, primary,
};

#[path = "host.rs"]
mod host;

use crate::{
    guest::{Client, Guest},
    node::{Node, Role},
};

const GUEST: Lineage = Lineage(1);

/// A moment, in milliseconds.
pub const fn ms(ms: u64) -> Time {
    Time::from_millis(ms)
}

enum Event {
    Tick(usize),
    Input(usize, Incarnation, Input),
    Frame { from: usize, to: usize, over: Connection, frame: Frame, guest: Option<Box<Guest>> },
    Closed { from: usize, to: usize, over: Connection },
    Dialled(usize, Incarnation),
    Asked { by: usize, incarnation: Incarnation, nonce: u64, question: Question },
    Request,
}

pub struct Sim {
    pub now: Time,
    pub nodes: Vec<Node>,
    pub witness: Witness,
    /// Whether the witness serves.
    pub serving: bool,
    /// Which directions of the network are cut: from, to.
    pub cut: Vec<(usize, usize)>,
    /// Which process listens on the port of the backup's host.
    pub port: [usize; 2],
    pub client: Client,
    pub settings: Settings,
    rules: Rules,
    random: fastrand::Rng,
    heap: BinaryHeap<Reverse<(Time, u64)>>,
    events: HashMap<u64, Event>,
    count: u64,
    /// When the last frame from one to another arrives: connections keep their order.
    last: HashMap<(usize, usize), Time>,
    stuck: Vec<Event>,
    ends: HashMap<Connection, [usize; 2]>,
    connections: u64,
    /// What the primary was at the end of each epoch.
    truth: HashMap<(Term, Epoch), u64>,
    closed: HashMap<Term, &'static str>,
    pub promotions: u64,
    pub solos: u64,
    /// Which processes were killed, by a fault or a fence.
    pub victims: [bool; 3],
    /// How much later than usual the witness answers, in milliseconds at most.
    pub late: u64,
    /// Print everything that happens.
    pub tell: bool,
}

impl Sim {
    /// Two hosts with a witness or a fence.
    pub fn new(seed: u64, fence: bool, rules: Rules) -> Self {
        let arbiter = if fence { Arbiter::Fence(Digest(1)) } else { Arbiter::Witness(Digest(1)) };
        Self::with(seed, arbiter, OnLoss::Claim, rules)
    }

    /// Two hosts and a spare process on the second.
    pub fn with(seed: u64, arbiter: Arbiter, on_loss: OnLoss, rules: Rules) -> Self {
        let settings = Settings {
            agreement: Agreement { arbiter, machine: Digest(1) },
            timeout: ms(200),
            period: ms(50),
            ack_limit: ms(10_000),
            on_loss,
            leave_slow: true,
        };
        settings.check().unwrap();
        let mut this = Self {
            now: Time::ZERO,
            nodes: Vec::new(),
            witness: Witness::new(rules),
            serving: true,
            cut: Vec::new(),
            port: [0, 1],
            client: Client::default(),
            settings,
            rules,
            random: fastrand::Rng::with_seed(seed),
            heap: BinaryHeap::new(),
            events: HashMap::new(),
            count: 0,
            last: HashMap::new(),
            stuck: Vec::new(),
            ends: HashMap::new(),
            connections: 0,
            truth: HashMap::new(),
            closed: HashMap::new(),
            promotions: 0,
            solos: 0,
            victims: [false; 3],
            late: 0,
            tell: std::env::var_os("TELL").is_some(),
        };
        for i in 0..3u128 {
            let incarnation = Incarnation(1000 * (i + 1));
            let me = Identity { lineage: GUEST, incarnation };
            let node = if i == 0 {
                let primary = Primary::new(me, Term(1), settings, rules);
                Node::new(Role::Primary(primary), incarnation, Mark::Free { term: Term(1) }, true)
            } else {
                let sidecar = Mark::Outdated { term: Term(0) };
                let backup = Backup::new(me, sidecar, settings, rules).0;
                Node::new(Role::Backup(backup), incarnation, sidecar, false)
            };
            this.nodes.push(node);
        }
        this.after(ms(5), Event::Request);
        this
    }

    fn host(i: usize) -> usize {
        i.min(1)
    }

    fn after(&mut self, delay: Time, event: Event) {
        self.count += 1;
        self.heap.push(Reverse((self.now + delay, self.count)));
        self.events.insert(self.count, event);
    }

    fn jitter(&mut self, least: u64, most: u64) -> Time {
        Time::from_micros(self.random.u64(least..=most))
    }

    /// Send along one direction, in order.
    fn along(&mut self, from: usize, to: usize, event: Event) {
        let at = self.now + self.jitter(100, 2000);
        let last = self.last.entry((from, to)).or_default();
        *last = at.max(*last);
        let delay = *last - self.now;
        self.after(delay, event);
    }

    /// Run for a while; the error is the invariant that was broken.
    pub fn run(&mut self, duration: Time) -> Result<(), String> {
        let until = self.now + duration;
        while let Some(Reverse((at, number))) = self.heap.peek().copied().filter(|r| r.0.0 <= until)
        {
            self.heap.pop();
            self.now = at;
            let Some(event) = self.events.remove(&number) else { continue };
            self.happen(event)?;
            let owners = (0..3).filter(|i| self.nodes[*i].owns()).count();
            if owners > 1 {
                return Err(format!("{owners} processes own the guest at {at:?} (I3)"));
            }
        }
        self.now = until;
        Ok(())
    }

    /// Run until `done`, at most for a while.
    pub fn until(&mut self, most: Time, done: impl Fn(&Self) -> bool) -> Result<(), String> {
        let end = self.now + most;
        while !done(self) {
            if self.now > end {
                return Err(format!("not within {most:?}: {}", self.describe()));
            }
            self.run(ms(1))?;
        }
        Ok(())
    }

    fn happen(&mut self, event: Event) -> Result<(), String> {
        // A stopped process takes no input before it continues; then it reads its sockets first.
        let process = match &event {
            Event::Tick(i) | Event::Input(i, ..) | Event::Dialled(i, _) => Some(*i),
            Event::Frame { to, .. } | Event::Closed { to, .. } => Some(*to),
            _ => None,
        };
        if let Some(frozen) = process.map(|i| self.nodes[i].frozen).filter(|at| *at > self.now) {
            let late = if matches!(event, Event::Tick(_)) { ms(1) } else { Time::ZERO };
            self.after(frozen - self.now + late, event);
            return Ok(());
        }
        match event {
            Event::Tick(i) => {
                self.nodes[i].tick = None;
                self.input(i, Input::Tick)
            }
            Event::Input(i, incarnation, input) if self.nodes[i].incarnation == incarnation => {
                self.completed(i, input);
                self.input(i, input)
            }
            Event::Input(..) => Ok(()),
            Event::Frame { from, to, .. } | Event::Closed { from, to, .. }
                if self.cut.contains(&(from, to)) =>
            {
                self.stuck.push(event);
                Ok(())
            }
            Event::Frame { to, over, frame, guest, .. } => {
                if let Some(guest) = guest {
                    self.nodes[to].staged.insert(frame.epoch, *guest);
                }
                self.input(to, Input::Received(over, frame))
            }
            Event::Closed { to, over, .. } => self.input(to, Input::Closed(over)),
            Event::Dialled(i, incarnation) => self.dialled(i, incarnation),
            Event::Asked { by, incarnation, nonce, question } => {
                self.asked(by, incarnation, nonce, question)
            }
            Event::Request => self.request(),
        }
    }

    /// What was begun is done, on the host.
    fn completed(&mut self, i: usize, input: Input) {
        let node = &mut self.nodes[i];
        match input {
            Input::Marked(mark) => node.sidecar = mark,
            Input::Held(epoch) => {
                if let Some(guest) = node.staged.remove(&epoch) {
                    node.disk = guest.counter;
                    node.guest = guest;
                }
            }
            _ => {}
        }
    }

    fn request(&mut self) -> Result<(), String> {
        let next = self.jitter(5_000, 15_000);
        self.after(next, Event::Request);
        for node in &mut self.nodes {
            if node.is_alive() && node.runs && !node.parked && node.frozen <= self.now {
                let reply = node.guest.serve();
                node.disk = reply;
                if node.free {
                    self.client.told(reply)?;
                } else {
                    node.held.push_back((node.epoch, reply));
                }
            }
        }
        Ok(())
    }

    fn dialled(&mut self, i: usize, incarnation: Incarnation) -> Result<(), String> {
        let to = self.port[1 - Self::host(i)];
        let open = !self.cut.contains(&(i, to)) && !self.cut.contains(&(to, i));
        let listens = matches!(self.nodes[to].role, Role::Backup(_));
        if self.nodes[i].incarnation != incarnation || !open || !listens {
            return Ok(());
        }
        self.connections += 1;
        let over = Connection(self.connections);
        self.ends.insert(over, [i, to]);
        self.input(i, Input::Connected(over))
    }

    fn asked(
        &mut self,
        by: usize,
        incarnation: Incarnation,
        nonce: u64,
        question: Question,
    ) -> Result<(), String> {
        let answer = match question {
            Question::Fence { term } => self.fence(by, term),
            _ if !self.serving => None,
            _ => Some(self.witness.step(GUEST, question).answer),
        };
        if let Some(answer) = answer.filter(|_| self.nodes[by].agent) {
            let delay = self.jitter(500, 5000 + 1000 * self.late);
            self.after(
                delay,
                Event::Input(by, incarnation, Input::Answered { nonce, question, answer }),
            );
        }
        Ok(())
    }

    /// `stratoctl fence`, on the other host: refused if that side is the primary and is fencing,
    /// too, or if it has continued already.
    fn fence(&mut self, by: usize, of: Term) -> Option<Answer> {
        for i in (0..3).filter(|i| Self::host(*i) != Self::host(by)) {
            match self.nodes[i].sidecar {
                Mark::Fencing(bond) if bond.side == Side::Primary => return None,
                Mark::Running { term, .. } | Mark::Free { term } if term > of => return None,
                _ => {}
            }
        }
        for i in (0..3).filter(|i| Self::host(*i) != Self::host(by)) {
            self.nodes[i].sidecar = Mark::Fenced { term: of };
            self.kill(i, false);
        }
        Some(Answer::Down)
    }

    /// Give one input to a process and carry out what it says.
    pub fn input(&mut self, i: usize, input: Input) -> Result<(), String> {
        let before = self.nodes[i].primary().map(Primary::term);
        let outputs = self.nodes[i].step(self.now, input);
        if self.tell && (!outputs.is_empty() || input != Input::Tick) {
            println!("{:?} process {i}: {input:?}\n    {outputs:?}", self.now);
        }
        self.carry_out(i, before, outputs)
    }

    pub fn cut(&mut self, directions: &[(usize, usize)]) {
        self.cut.extend_from_slice(directions);
    }

    pub fn heal(&mut self) {
        self.cut.clear();
        for event in std::mem::take(&mut self.stuck) {
            if let Event::Frame { from, to, .. } | Event::Closed { from, to, .. } = event {
                self.along(from, to, event);
            }
        }
    }

    /// Whether a primary is protected by a backup that stands by.
    pub fn is_protected(&self) -> bool {
        let primary = self.nodes.iter().any(|n| n.primary().is_some_and(Primary::is_protected));
        primary && self.nodes.iter().any(|n| n.backup_state() == Some(backup::State::Standby))
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

    pub fn owner(&self) -> Option<usize> {
        (0..3).find(|i| self.nodes[*i].owns())
    }

    pub fn describe(&self) -> String {
        let state = |node: &Node| match &node.role {
            Role::Dead => format!("dead, {:?}", node.sidecar),
            Role::Primary(primary) => format!("{:?} in {}", primary.state(), primary.term()),
            Role::Backup(backup) => format!("{:?} in {}", backup.state(), backup.term()),
            Role::Start(_) => "starting".into(),
        };
        let states: Vec<String> = self.nodes.iter().map(state).collect();
        format!("{states:?}, {:?}", self.now)
    }
}
