//! Virtual time, network, witness, fences, and what has to be true after each event.
use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, HashSet},
};

use replication::{
    Agreement, Arbiter, Backup, Connection, Digest, Epoch, Frame, Identity, Incarnation, Input,
    Lineage, Mark, OnLoss, Output, Pair, Primary, Question, Rules, Settings, Term, Time, Witness,
    pace::{Cost, Pace},
};

#[path = "arbiters.rs"]
mod arbiters;
#[path = "checks.rs"]
mod checks;
#[path = "host.rs"]
mod host;
#[path = "view.rs"]
mod view;

pub use arbiters::Fence;
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

/// How often it is looked how far a run is: shorter than anything takes.
pub const STEP: Time = Time::from_micros(200);

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
    /// A process has ended, as the kernel of its peer's host says.
    Gone {
        to: usize,
        incarnation: Incarnation,
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
    /// Who has brought its peer of a term down.
    fenced: HashSet<(usize, Term)>,
    whole: HashMap<Term, Epoch>,
    /// Up to which epoch of each its output was let out as acknowledged.
    released: HashMap<Term, Epoch>,
    pub promotions: u64,
    pub solos: u64,
    /// Starts from a disk.
    pub cold: u64,
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
    /// Whether both sides are on one host, whose kernel knows which process has ended.
    pub local: bool,
    /// First copies of everything, and of changes alone.
    pub full: u64,
    pub warm: u64,
    /// Releases of a primary whose backup was running the guest already.
    pub late_releases: u64,
    pub dials: u64,
    /// What a fence does.
    pub fence: Fence,
    /// No connection can be made.
    pub unreachable: bool,
    /// Everything that clients were told, and all questions.
    pub told: Vec<Output>,
    /// When epochs begin: see `Primary::pace`.
    pub pace: Option<Pace>,
    pub strict: bool,
    /// Starts from a disk that were tried: by which process, with which word.
    pub denied: HashSet<(usize, Mark)>,
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

    /// As most tests have it: a time-out of 200 ms, an epoch each 50 ms.
    pub fn with(seed: u64, arbiter: Arbiter, on_loss: OnLoss, rules: Rules) -> Self {
        let settings = Settings {
            agreement: Agreement { arbiter, machine: Digest(1) },
            timeout: ms(200),
            period: ms(50),
            ack_limit: ms(10_000),
            on_loss,
            leave_slow: true,
        };
        Self::of(seed, settings, rules)
    }

    /// Two hosts and a spare process on the second.
    pub fn of(seed: u64, settings: Settings, rules: Rules) -> Self {
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
            fenced: HashSet::new(),
            whole: HashMap::new(),
            released: HashMap::new(),
            delay: 0,
            loss: 0,
            slow: 0,
            beside: false,
            local: false,
            full: 0,
            warm: 0,
            late_releases: 0,
            dials: 0,
            fence: Fence::Works,
            unreachable: false,
            told: Vec::new(),
            pace: None,
            strict: false,
            denied: HashSet::new(),
            asked: Vec::new(),
            promotions: 0,
            solos: 0,
            cold: 0,
            victims: [false; 3],
            late: 0,
            tell: std::env::var_os("TELL").is_some(),
        };
        for i in 0..3u128 {
            let incarnation = Incarnation(1000 * (i + 1));
            let me = Identity { lineage: GUEST, incarnation };
            let node = if i == 0 {
                let primary = Primary::new(me, Term(1), settings, rules);
                let free = Mark::Free { term: Term(1) };
                Node::new(Role::Primary(primary), incarnation, free, true, rules)
            } else {
                let sidecar = Mark::Outdated { term: Term(0) };
                let backup = Backup::new(me, sidecar, settings, rules).0;
                Node::new(Role::Backup(backup), incarnation, sidecar, false, rules)
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
        let resent = if again { 2 * self.delay + self.random.u64(10..200) } else { 0 };
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
            self.run(STEP)?;
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
            | Event::Gone { to, .. }
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
                let counts = self.nodes[i].is_held(input);
                self.completed(i, input, counts)?;
                if counts {
                    self.input(i, input)?;
                }
                if matches!(input, Input::Captured { .. }) { self.paid(i) } else { Ok(()) }
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
                self.nodes[to].arriving = pages;
                self.input(to, Input::Received(over, frame))?;
                self.nodes[to].arriving = None;
                Ok(())
            }
            Event::Closed { to, over, .. } => self.input(to, Input::Closed(over)),
            Event::Gone { to, incarnation } => {
                let known = self.nodes[to].status().is_some_and(|s| s.peer == Some(incarnation));
                if known { self.input(to, Input::PeerGone) } else { Ok(()) }
            }
            Event::Dialled(i, incarnation) => self.dialled(i, incarnation),
            Event::Asked { by, incarnation, nonce, question } => {
                self.answer(by, incarnation, nonce, question)
            }
            Event::Request => self.request(),
        }
    }

    /// An epoch has cost the guest something.
    fn paid(&mut self, i: usize) -> Result<(), String> {
        if self.pace.is_none() {
            return Ok(());
        }
        let pages = self.random.u64(0..500);
        let (pause, fault) = (self.jitter(100, 1500), Time::from_micros(10));
        self.input(i, Input::Cost(Cost { pause, pages, fault }))?;
        let node = &self.nodes[i];
        let waits = node.held.back().is_some_and(|(epoch, _)| *epoch == node.epoch);
        self.input(i, Input::OutputWaits(waits))
    }

    /// What was begun is done, on the host.
    fn completed(&mut self, i: usize, input: Input, counts: bool) -> Result<(), String> {
        let node = &mut self.nodes[i];
        match input {
            Input::Marked(mark) => {
                node.sidecar = mark;
                node.marking.pop_front();
            }
            Input::Held(epoch) if counts => {
                if let Some(pages) = node.received.remove(&epoch) {
                    node.guest.apply(pages);
                    node.keep_on_disk(epoch, &mut self.random);
                    let term = node.status().map_or(Term(0), |status| status.term);
                    if self.truth.get(&(term, epoch)) != Some(&node.guest.digest()) {
                        return Err(format!("process {i} holds no {epoch:?} of {term} (I6)"));
                    }
                    let whole = self.whole.entry(term).or_default();
                    *whole = epoch.max(*whole);
                }
            }
            Input::Held(_) | Input::Captured { .. } | Input::NotHeld(..) | Input::Prepared => {}
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
                node.disk.serve(reply);
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
            node.disk.serve(reply);
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
}
