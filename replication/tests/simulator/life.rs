//! A life of a guest: what its two sides have been told, what goes wrong and when, and what has to be
//! true once everything that can be is whole again.
use std::collections::BTreeMap;

use replication::{
    Agreement, Arbiter, Command, Digest, Input, OnLoss, Rules, Settings, Time, pace::Pace,
};

use crate::{
    node::{Role, Storage},
    sim::{Sim, ms},
};

/// Something that goes wrong, or that somebody does.
#[derive(Debug, Clone, Copy)]
pub enum Fault {
    /// A process dies; its host does, too, unless the flag is set.
    Kill(usize, bool),
    /// A process dies after so many more outputs.
    Doom(usize, u32),
    Freeze(usize, u64),
    Cut(bool, bool),
    /// All connections break.
    Break,
    /// No new connection can be made.
    Unreachable,
    NoWitness,
    LateWitness,
    NoAgent(usize),
    SecondProcess,
    CannotRun,
    /// An epoch that was acknowledged does not reach the images.
    NotApplied,
    Storage(usize, Storage),
    /// Pages take so many milliseconds.
    Slow(u64),
    Reboot,
    PowerOff,
    Pause,
    /// The guest replies so often as it can.
    Flood(usize),
    Command(usize, Command),
    /// Started again; from its disk, or to listen.
    Restart(usize, bool),
    /// The network is whole again.
    Heal,
}

pub fn fault(random: &mut fastrand::Rng) -> Fault {
    let i = random.usize(0..2);
    match random.u8(0..28) {
        0 | 1 => Fault::Kill(i, random.bool()),
        2 | 3 => Fault::Doom(i, random.u32(0..12)),
        4 => Fault::Freeze(i, random.u64(50..3000)),
        5 | 6 => Fault::Cut(random.bool(), random.bool()),
        7 => Fault::NoWitness,
        8 => Fault::NoAgent(i),
        9 => Fault::SecondProcess,
        10 => Fault::CannotRun,
        11 => Fault::Command(0, Command::Unprotect),
        12 => Fault::Command(0, Command::Failover),
        13 => Fault::Heal,
        14 => Fault::LateWitness,
        15 => Fault::Command(1, Command::Failover),
        16 => Fault::Reboot,
        17 => Fault::Break,
        18 => Fault::NotApplied,
        19 => Fault::Storage(i, if random.bool() { Storage::Hangs } else { Storage::Full }),
        20 => Fault::Slow(random.u64(50..3000)),
        21 => Fault::Pause,
        22 => Fault::Flood(random.usize(1..400)),
        23 => Fault::Unreachable,
        24 if random.u8(0..4) == 0 => Fault::PowerOff,
        24 if random.u8(0..4) == 0 => Fault::Command(i, Command::Quit),
        _ => Fault::Restart(i, random.bool()),
    }
}

impl Sim {
    pub fn suffer(&mut self, fault: Fault) -> Result<(), String> {
        if self.tell {
            println!("{:?} {fault:?}", self.now);
        }
        match fault {
            Fault::Kill(i, host_lives) => self.kill(i, host_lives),
            Fault::Doom(i, outputs) => self.nodes[i].doom = Some(outputs),
            Fault::Freeze(i, time) => {
                let frozen = &mut self.nodes[i].frozen;
                *frozen = self.now.saturating_add(ms(time)).max(*frozen);
            }
            Fault::Cut(there, back) => {
                let all = [(0, 1), (0, 2), (1, 0), (2, 0)];
                let from = if there { 0 } else { 2 };
                let to = if back || !there { 4 } else { 2 };
                self.cut(&all[from..to]);
            }
            Fault::Break => self.reset_connections(),
            Fault::Unreachable => self.unreachable = true,
            Fault::NoWitness => self.serving = false,
            Fault::LateWitness => self.late = 3000,
            Fault::NoAgent(i) => self.nodes[i].agent = false,
            Fault::SecondProcess => self.port[1] = 2,
            Fault::CannotRun => self.unfit(Input::CannotRun)?,
            Fault::NotApplied => self.unfit(Input::NotApplied)?,
            Fault::Storage(i, storage) => self.nodes[i].storage = storage,
            Fault::Slow(time) => self.slow = time,
            Fault::Reboot => self.nodes.iter_mut().for_each(|node| node.reboot()),
            Fault::PowerOff => self.power_off()?,
            Fault::Pause => self.nodes[0].paused = true,
            Fault::Flood(most) => self.flood(0, most)?,
            Fault::Command(i, command) => self.input(i, Input::Command(command))?,
            // Nobody starts a guest again that was seen to end.
            Fault::Restart(i, from_disk) if !self.client.is_off() => self.restart(i, from_disk)?,
            Fault::Restart(..) => {}
            Fault::Heal => self.heal(),
        }
        self.check_given_away()
    }

    /// The backup cannot run the guest: its copy is lost.
    fn unfit(&mut self, input: Input) -> Result<(), String> {
        self.victims[1] |= self.nodes[1].backup_state().is_some();
        self.input(1, input)
    }

    /// Everything is whole again, but for processes that are dead.
    pub fn heal_all(&mut self) {
        self.heal();
        (self.serving, self.late, self.unreachable) = (true, 0, false);
        (self.slow, self.delay, self.loss) = (0, 0, 0);
        for node in &mut self.nodes {
            (node.agent, node.doom, node.paused) = (true, None, false);
        }
        (0..3).for_each(|i| self.mend(i));
    }
}

/// What seeds have shown.
#[derive(Debug, Default)]
pub struct Shown {
    pub promotions: u64,
    pub solos: u64,
    pub cold: u64,
    pub warm: u64,
    pub full: u64,
    pub late_releases: u64,
    pub replies: u64,
    /// Lives at whose end nobody may start the guest, by the state of their processes: how many, and
    /// the first.
    pub ownerless: BTreeMap<String, (u64, u64)>,
}

impl Shown {
    pub fn of(sim: &Sim) -> Self {
        Self {
            promotions: sim.promotions,
            solos: sim.solos,
            cold: sim.cold,
            warm: sim.warm,
            full: sim.full,
            late_releases: sim.late_releases,
            replies: sim.client.count() as u64,
            ownerless: BTreeMap::new(),
        }
    }

    pub fn add(&mut self, other: Self) {
        self.promotions += other.promotions;
        self.solos += other.solos;
        self.cold += other.cold;
        self.warm += other.warm;
        self.full += other.full;
        self.late_releases += other.late_releases;
        self.replies += other.replies;
        for (class, (count, seed)) in other.ownerless {
            let known = self.ownerless.entry(class).or_insert((0, seed));
            *known = (known.0 + count, known.1.min(seed));
        }
    }
}

/// What both sides are told, and how good their link is.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    arbiter: Arbiter,
    on_loss: OnLoss,
    leave_slow: bool,
    /// A second path for beats.
    beside: bool,
    /// Both sides are on one host.
    local: bool,
    /// Epochs come when output waits, in this period at most; or in a fixed one, to which the guest
    /// is held.
    auto: Option<u64>,
    strict: bool,
    delay: u64,
    loss: u8,
    /// How far the clocks are ahead, in milliseconds.
    ahead: [u64; 2],
}

impl Setup {
    fn any(random: &mut fastrand::Rng) -> Self {
        let (arbiter, on_loss) = match random.u8(0..16) {
            0..3 => (Arbiter::Fence(Digest(1)), OnLoss::Claim),
            3 => (Arbiter::None, OnLoss::Stall),
            4 => (Arbiter::None, OnLoss::Continue),
            5 => (Arbiter::Witness(Digest(1)), OnLoss::Stall),
            6 => (Arbiter::Witness(Digest(1)), OnLoss::Stop),
            _ => (Arbiter::Witness(Digest(1)), OnLoss::Claim),
        };
        let plain = random.bool();
        Self {
            arbiter,
            on_loss,
            leave_slow: on_loss == OnLoss::Claim && random.u8(0..4) > 0,
            beside: random.bool(),
            local: random.u8(0..4) == 0,
            auto: (random.u8(0..4) == 0).then(|| random.u64(2..200)),
            strict: random.u8(0..4) == 0,
            delay: if plain { 0 } else { random.u64(0..30) },
            loss: if plain { 0 } else { random.u8(0..3) },
            ahead: if plain { [0; 2] } else { [random.u64(0..10_000_000), 0] },
        }
    }

    /// As most are: a witness and a good link.
    pub fn plain() -> Self {
        Self {
            arbiter: Arbiter::Witness(Digest(1)),
            on_loss: OnLoss::Claim,
            leave_slow: true,
            beside: false,
            local: false,
            auto: None,
            strict: false,
            delay: 0,
            loss: 0,
            ahead: [0; 2],
        }
    }

    fn sim(&self, seed: u64, rules: Rules) -> Sim {
        let settings = Settings {
            agreement: Agreement { arbiter: self.arbiter, machine: Digest(1) },
            timeout: ms(200),
            period: ms(50),
            ack_limit: ms(10_000),
            on_loss: self.on_loss,
            leave_slow: self.leave_slow,
        };
        let mut sim = Sim::of(seed, settings, rules);
        (sim.beside, sim.local) = (self.beside, self.local);
        (sim.delay, sim.loss) = (self.delay, self.loss);
        (sim.pace, sim.strict) = (self.auto.map(|longest| Pace::new(ms(longest))), self.strict);
        if let Role::Primary(primary) = &mut sim.nodes[0].role {
            primary.pace(sim.pace.clone(), sim.strict);
        }
        for (node, ahead) in sim.nodes.iter_mut().zip(self.ahead) {
            node.ahead = ms(ahead);
        }
        sim
    }
}

/// A life.
#[derive(Debug, Clone)]
pub struct Life {
    pub seed: u64,
    pub setup: Setup,
    pub faults: Vec<(Time, Fault)>,
}

impl Life {
    /// Any faults after `first`.
    pub fn any(seed: u64, first: &[Fault], most: usize) -> Self {
        let mut random = fastrand::Rng::with_seed(seed ^ 0x5eed);
        let (mut at, mut faults) = (Time::ZERO, Vec::new());
        let count = first.len() + random.usize(usize::from(first.is_empty())..=most);
        for n in 0..count {
            let most = if random.bool() { 50 } else { 600 };
            at += ms(random.u64(5..most));
            let any = fault(&mut random);
            faults.push((at, first.get(n).copied().unwrap_or(any)));
        }
        let setup = if first.is_empty() { Setup::any(&mut random) } else { Setup::plain() };
        Self { seed, setup, faults }
    }

    /// With only those faults that it needs to fail.
    pub fn shrunk(mut self, fails: impl Fn(&Self) -> bool) -> Self {
        let mut n = 0;
        while n < self.faults.len() {
            let mut fewer = self.clone();
            fewer.faults.remove(n);
            if fails(&fewer) { self = fewer } else { n += 1 }
        }
        self
    }

    /// Protect, faults, all healed, and protected again.
    pub fn live(&self, rules: Rules) -> Result<Shown, String> {
        let mut sim = self.setup.sim(self.seed, rules);
        sim.input(0, Input::Command(Command::Start))?;
        for (at, fault) in &self.faults {
            sim.run(at.saturating_sub(sim.now))?;
            sim.suffer(*fault)?;
        }
        sim.run(ms(1000))?;
        recover(&mut sim)?;
        let mut shown = Shown::of(&sim);
        if sim.is_protected() || sim.client.is_off() {
            return Ok(shown);
        }
        if sim.owner().is_none() {
            shown.ownerless.insert(sim.class(), (1, self.seed));
            let died = sim.victims.iter().filter(|died| **died).count();
            if died < 2 {
                return Err(format!("lost, though {died} have died (A1): {}", sim.describe()));
            }
        } else {
            return Err(format!("owned and healed, but not protected: {}", sim.describe()));
        }
        Ok(shown)
    }
}

impl Life {
    /// The same faults, but each only once the guest is protected again. None loses anything, not even
    /// what is in memory.
    pub fn one_by_one(&self, rules: Rules) -> Result<Shown, String> {
        let mut sim = self.setup.sim(self.seed, rules);
        recover(&mut sim)?;
        for (at, fault) in &self.faults {
            (sim.delay, sim.loss) = (self.setup.delay, self.setup.loss);
            sim.run(*at)?;
            recover(&mut sim)?;
            if !sim.is_protected() {
                return Err(format!("healed, and not protected: {}", sim.describe()));
            }
            sim.suffer(*fault)?;
            sim.run(ms(1500))?;
            recover(&mut sim)?;
            if !sim.is_protected() || sim.cold > 0 {
                return Err(format!("{fault:?} has lost memory (A1): {}", sim.describe()));
            }
        }
        Ok(Shown::of(&sim))
    }

    /// One at a time: what ends the guest, as it is asked to, is left out.
    pub fn kept(seed: u64) -> Self {
        let mut life = Self::any(seed, &[], 7);
        life.faults.retain(|(_, fault)| {
            !matches!(fault, Fault::PowerOff | Fault::Command(_, Command::Quit))
        });
        if life.setup.on_loss == OnLoss::Stop {
            life.setup.on_loss = OnLoss::Claim;
        }
        // A link that loses now and then is a second fault, at any time.
        life.setup.loss = 0;
        life
    }
}

/// Heal everything, and wait until the guest is protected again, or has powered itself off.
pub fn recover(sim: &mut Sim) -> Result<(), String> {
    sim.heal_all();
    // What is stopped is not healed, nor is a link that still carries what was sent before.
    let frozen = sim.nodes.iter().map(|node| node.frozen);
    let healed = frozen.chain(sim.arrivals()).fold(sim.now, Time::max);
    let witness = matches!(sim.settings.agreement.arbiter, Arbiter::Witness(_));
    let by_hand = !witness || sim.settings.on_loss == OnLoss::Stall;
    let limit = healed + ms(if by_hand { 20_000 } else { 10_000 });
    let mut again = sim.now;
    while !sim.is_protected() && !sim.client.is_off() && sim.now < limit {
        if sim.now >= again && sim.now >= healed {
            again = sim.now + ms(500);
            sim.operate(healed)?;
        }
        sim.run(ms(20))?;
    }
    sim.check_given_away()
}
