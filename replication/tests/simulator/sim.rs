//! Virtual time, network, witness, fences, and what has to be true after each event.
use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap},
};

use replication::{
    Agreement, Answer, Arbiter, Backup, Connection, Digest, Epoch, Frame, Identity, Incarnation,
    Input, Lineage, Mark, OnLoss, Output, Pair, Primary, Question, Rules, Searched, Settings, Side,
    Term, Time, Witness, backup,
};

#[path = "checks.rs"]
mod checks;
#[path = "host.rs"]
mod host;

use checks::Before;

use crate::{
    guest::{Client, Pages, Seen},
    node::{Node, Role},
};

pub const GUEST: Lineage = Lineage(1);

/// A moment, in milliseconds.
pub const fn ms(ms: u64) -> Time {
    Time::from_millis(ms)
}

enum Event {
    Tick(usize),
    Input(usize, Incarnation, Input),
    Frame {
        from: usize,
        to: usize,
        over: Connection,
        frame: Frame,
        pages: Option<Pages>,
    },
    /// A piece of a frame.
    Piece {
        from: usize,
        to: usize,
        over: Connection,
    },
    /// A beat on the second path.
    Beside {
        from: usize,
        to: usize,
        incarnation: Incarnation,
    },
    Closed {
        from: usize,
        to: usize,
        over: Connection,
    },
    Dialled(usize, Incarnation),
    Asked {
        by: usize,
        incarnation: Incarnation,
        nonce: u64,
        question: Question,
    },
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
    /// For whom each term was armed, and what its backups have held whole.
    pairs: HashMap<Term, Pair>,
    whole: HashMap<Term, Epoch>,
    pub promotions: u64,
    pub solos: u64,
    /// Which processes were killed, by a fault or a fence.
    pub victims: [bool; 3],
    /// How much later than usual the witness answers, in milliseconds at most.
    pub late: u64,
    /// How long every frame takes in addition, one way, and how many percent have to be sent again;
    /// how long the pages of an epoch take. In milliseconds.
    pub delay: u64,
    pub loss: u8,
    pub slow: u64,
    /// Whether there is a second path for beats.
    pub beside: bool,
    /// First copies of everything, and of changes alone.
    pub full: u64,
    pub warm: u64,
    /// Releases of a primary whose backup was running the guest already.
    pub late_releases: u64,
    pub dials: u64,
    /// No connection can be made.
    pub unreachable: bool,
    /// Everything that clients were told, and all questions.
    pub told: Vec<Output>,
    pub asked: Vec<(u64, Question)>,
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
            pairs: HashMap::new(),
            whole: HashMap::new(),
            delay: 0,
            loss: 0,
            slow: 0,
            beside: false,
            full: 0,
            warm: 0,
            late_releases: 0,
            dials: 0,
            unreachable: false,
            told: Vec::new(),
            asked: Vec::new(),
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
    fn along(&mut self, from: usize, to: usize, slow: u64, event: Event) {
        let again = self.loss > 0 && self.random.u8(0..100) < self.loss;
        let resent = if again { 2 * self.delay + 200 } else { 0 };
        let at = self.now + self.jitter(100, 2000) + ms(self.delay + slow + resent);
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
            Event::Frame { to, .. }
            | Event::Closed { to, .. }
            | Event::Piece { to, .. }
            | Event::Beside { to, .. } => Some(*to),
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
                self.completed(i, input)?;
                self.input(i, input)
            }
            Event::Input(..) => Ok(()),
            Event::Frame { from, to, .. } | Event::Closed { from, to, .. }
                if self.cut.contains(&(from, to)) =>
            {
                self.stuck.push(event);
                Ok(())
            }
            Event::Piece { from, to, .. } if self.cut.contains(&(from, to)) => Ok(()),
            Event::Piece { to, over, .. } => self.input(to, Input::Heard(over)),
            Event::Beside { from, to, incarnation } => {
                let known = self.nodes[to].status().is_some_and(|s| s.peer == Some(incarnation));
                if known && !self.cut.contains(&(from, to)) {
                    self.input(to, Input::HeardBeside)?;
                }
                Ok(())
            }
            Event::Frame { to, over, frame, pages, .. } => {
                if let Some(pages) = pages {
                    self.nodes[to].received.insert(frame.epoch, pages);
                }
                self.input(to, Input::Received(over, frame))
            }
            Event::Closed { to, over, .. } => self.input(to, Input::Closed(over)),
            Event::Dialled(i, incarnation) => self.dialled(i, incarnation),
            Event::Asked { by, incarnation, nonce, question } => {
                self.answer(by, incarnation, nonce, question)
            }
            Event::Request => self.request(),
        }
    }

    /// What was begun is done, on the host.
    fn completed(&mut self, i: usize, input: Input) -> Result<(), String> {
        let node = &mut self.nodes[i];
        match input {
            Input::Marked(mark) => node.sidecar = mark,
            Input::Held(epoch) => {
                if let Some(pages) = node.received.remove(&epoch) {
                    node.guest.apply(pages);
                    node.disk = node.guest.counter;
                    let term = node.status().map_or(Term(0), |status| status.term);
                    if self.truth.get(&(term, epoch)) != Some(&node.guest.digest()) {
                        return Err(format!("process {i} holds no {epoch:?} of {term} (I6)"));
                    }
                    let whole = self.whole.entry(term).or_default();
                    *whole = epoch.max(*whole);
                }
            }
            Input::Captured { .. } | Input::Prepared | Input::NotHeld(..) => {}
            _ => return Ok(()),
        }
        let node = &mut self.nodes[i];
        node.pending = node.pending.saturating_sub(1);
        Ok(())
    }

    fn request(&mut self) -> Result<(), String> {
        let next = self.jitter(5_000, 15_000);
        self.after(next, Event::Request);
        for i in 0..self.nodes.len() {
            let node = &mut self.nodes[i];
            let stopped = node.parked || node.paused || node.frozen > self.now || node.guest.off;
            if node.is_alive() && node.runs && !stopped && self.random.u8(0..100) >= node.throttle {
                let reply = node.guest.serve();
                node.disk = reply;
                self.let_out(i, Seen::Reply(reply))?;
            }
        }
        Ok(())
    }

    /// The guest replies as fast as it can, until it is parked.
    pub fn flood(&mut self, i: usize, most: usize) -> Result<(), String> {
        for _ in 0..most {
            let node = &mut self.nodes[i];
            if !node.runs || node.parked || node.paused || node.guest.off {
                break;
            }
            let reply = node.guest.serve();
            node.disk = reply;
            self.let_out(i, Seen::Reply(reply))?;
        }
        Ok(())
    }

    /// The guest powers itself off.
    pub fn power_off(&mut self) -> Result<(), String> {
        for i in 0..self.nodes.len() {
            let node = &mut self.nodes[i];
            if node.is_alive() && node.runs && !node.parked && !node.guest.off {
                node.guest.off = true;
                self.let_out(i, Seen::Off)?;
            }
        }
        Ok(())
    }

    fn beat_beside(&mut self, from: usize) {
        let to = self.port[1 - Self::host(from)];
        if self.beside && to != from && self.random.u8(0..100) >= self.loss {
            let delay = self.jitter(100, 20_000) + ms(self.delay);
            let incarnation = self.nodes[from].incarnation;
            self.after(delay, Event::Beside { from, to, incarnation });
        }
    }

    fn dialled(&mut self, i: usize, incarnation: Incarnation) -> Result<(), String> {
        self.dials += 1;
        let to = self.port[1 - Self::host(i)];
        let open =
            !self.unreachable && !self.cut.contains(&(i, to)) && !self.cut.contains(&(to, i));
        let listens = matches!(self.nodes[to].role, Role::Backup(_));
        if self.nodes[i].incarnation != incarnation || !open || !listens {
            return Ok(());
        }
        self.connections += 1;
        let over = Connection(self.connections);
        self.ends.insert(over, [i, to]);
        self.input(i, Input::Connected(over))
    }

    fn answer(
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
        let was = Before::of(&self.nodes[i]);
        let outputs = self.nodes[i].step(self.now, input);
        self.check_step(i, &was, &input, &outputs)?;
        if self.tell && (!outputs.is_empty() || input != Input::Tick) {
            println!("{:?} process {i}: {input:?}\n    {outputs:?}", self.now);
        }
        self.carry_out(i, before, outputs)?;
        self.check_wait(i)
    }

    /// Every connection breaks, and both ends learn of it.
    pub fn reset_connections(&mut self) {
        for (over, [a, b]) in std::mem::take(&mut self.ends) {
            self.along(a, b, 0, Event::Closed { from: a, to: b, over });
            self.along(b, a, 0, Event::Closed { from: b, to: a, over });
        }
    }

    pub fn cut(&mut self, directions: &[(usize, usize)]) {
        self.cut.extend_from_slice(directions);
    }

    pub fn heal(&mut self) {
        self.cut.clear();
        for event in std::mem::take(&mut self.stuck) {
            if let Event::Frame { from, to, .. } | Event::Closed { from, to, .. } = event {
                self.along(from, to, 0, event);
            }
        }
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
    pub fn class(&self, fence: bool) -> String {
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
        format!("{} {states:?}", if fence { "fence" } else { "witness" })
    }
}
