//! Random runs of a backup in which the power is cut after any step; then the next process recovers,
//! and the images have to hold one epoch.
use super::*;

const BLOCKS: usize = 16;
const BLOCK: usize = 512;
const CAPACITY: u64 = 12_000;

/// A backup with two images, and what the client of its guest knows.
struct Run {
    rng: fastrand::Rng,
    rules: Rules,
    medium: Volatile,
    images: [Volatile; 2],
    journal: JournalFile<Volatile>,
    /// The contents of both disks at the end of each epoch, from the first in the journal on.
    history: Vec<Vec<u8>>,
    /// The last epoch that the primary was told to be safe.
    acknowledged: Epoch,
    /// The guest runs here: the contents at its last flush, and what it has written since.
    running: Option<(Vec<u8>, Vec<usize>)>,
    value: u8,
}

/// What a client sees that no single machine can do.
type Broken = String;

impl Run {
    fn new(seed: u64, rules: Rules) -> Self {
        let medium = Volatile::new(HEADER + CAPACITY);
        let journal = JournalFile::format(medium.clone(), GUEST, START, CAPACITY, rules).unwrap();
        let images = [0; 2].map(|_| Volatile::new((BLOCKS * BLOCK) as u64));
        let history = vec![vec![0; 2 * BLOCKS]];
        let rng = fastrand::Rng::with_seed(seed);
        let acknowledged = START.epoch;
        Self { rng, rules, medium, images, journal, history, acknowledged, running: None, value: 0 }
    }

    /// One of the steps that the rules allow.
    fn step(&mut self) {
        if self.running.is_some() {
            return self.guest();
        }
        match self.rng.u8(0..24) {
            0..8 => self.receive(),
            8..12 => {
                self.journal.sync().unwrap();
                self.acknowledged = self.journal.order().durable();
            }
            12..17 => {
                self.journal.apply(&self.images).unwrap();
            }
            17 | 18 => self.journal.sync_images(&self.images).unwrap(),
            19 | 20 => self.journal.trim().unwrap(),
            // The host's kernel writes back what it likes.
            21 | 22 => self.images[self.rng.usize(0..2)].sync().unwrap(),
            _ if self.journal.order().may_run() => {
                // After the grant; the word `running` is durable before the first write.
                self.running = Some((self.contents(), Vec::new()));
            }
            _ if self.rng.u8(0..4) == 0 => {
                self.journal.settle(&self.images).unwrap();
            }
            _ => {}
        }
    }

    /// An epoch with some changes.
    fn receive(&mut self) {
        let mut contents = self.history.last().unwrap().clone();
        let mut data = Vec::new();
        for _ in 0..self.rng.usize(0..4) {
            self.value = self.value % 250 + 1;
            let at = self.rng.usize(0..2 * BLOCKS);
            let value = if self.rng.u8(0..4) == 0 { 0 } else { self.value };
            contents[at] = value;
            data.push((at, [value; BLOCK]));
        }
        let changes = data.iter().map(|(at, data)| {
            let (disk, offset) = ((at / BLOCKS) as u16, (at % BLOCKS * BLOCK) as u64);
            match data[0] {
                0 => Change::Zero { disk, offset, length: BLOCK as u64 },
                _ => Change::Write { disk, offset, data },
            }
        });
        match self.journal.append(self.journal.order().last().next(), changes) {
            Ok(()) => self.history.push(contents),
            Err(JournalError::Full { .. }) => {}
            Err(e) => panic!("{e}"),
        }
    }

    /// The promoted guest writes a block, or flushes.
    fn guest(&mut self) {
        let Some((flushed, since)) = &mut self.running else { return };
        if self.rng.u8(0..3) == 0 {
            self.images.iter().for_each(|image| image.sync().unwrap());
            *flushed = blocks(&self.images);
            since.clear();
        } else {
            let at = self.rng.usize(0..2 * BLOCKS);
            self.value = self.value % 250 + 1;
            let data = [self.value; BLOCK];
            self.images[at / BLOCKS].write_at((at % BLOCKS * BLOCK) as u64, &data).unwrap();
            since.push(at);
        }
    }

    fn contents(&self) -> Vec<u8> {
        blocks(&self.images)
    }

    /// Cut the power, recover, and check what is in the images then.
    fn cut(mut self) -> Result<Recovered, Broken> {
        let medium = self.medium.cut(&mut self.rng);
        self.images = [0, 1].map(|n| self.images[n].cut(&mut self.rng));
        if let Some((flushed, since)) = self.running {
            // Without the rule, nothing but the journal says what is void.
            let void = START.term;
            let mut next = JournalFile::recover(medium, GUEST, void, self.rules).unwrap();
            next.settle(&self.images).unwrap();
            let found = blocks(&self.images);
            let lost = (0..2 * BLOCKS).find(|at| found[*at] != flushed[*at] && !since.contains(at));
            return match lost {
                Some(at) => Err(format!("block {at} is not as the promoted guest has flushed it")),
                None => Ok(Recovered::Running),
            };
        }
        let mut next = JournalFile::recover(medium, GUEST, START.term, self.rules).unwrap();
        let place = next.settle(&self.images).unwrap();
        if place.epoch < self.acknowledged {
            return Err(format!("{place:?}, though {:?} was acknowledged", self.acknowledged));
        }
        let expected = &self.history[(place.epoch.0 - START.epoch.0) as usize];
        let found = blocks(&self.images);
        match found == *expected {
            true => Ok(Recovered::Backup),
            false => Err(format!("{place:?} is {found:?} instead of {expected:?}")),
        }
    }
}

#[derive(PartialEq, Eq)]
enum Recovered {
    Backup,
    Running,
}

/// The first byte of each block of both images; a torn one is 255.
fn blocks(images: &[Volatile; 2]) -> Vec<u8> {
    let all = images.iter().flat_map(|image| {
        let seen = image.seen();
        let each = seen.chunks(BLOCK).map(|block| {
            let whole = block.iter().all(|byte| *byte == block[0]);
            if whole { block[0] } else { u8::MAX }
        });
        each.collect::<Vec<_>>()
    });
    all.collect()
}

/// Runs of up to `steps` steps, one for each seed, until one breaks.
fn runs(seeds: u64, rules: Rules) -> Result<[u64; 2], (u64, Broken)> {
    let mut ends = [0; 2];
    for seed in 0..seeds {
        let mut run = Run::new(seed, rules);
        for _ in 0..run.rng.usize(0..120) {
            run.step();
        }
        let end = run.cut().map_err(|why| (seed, why))?;
        ends[usize::from(end == Recovered::Running)] += 1;
    }
    Ok(ends)
}

#[test]
fn a_power_cut_after_any_step_leaves_one_epoch() {
    let [backups, promoted] = runs(6000, Rules::ALL).unwrap();
    assert!(backups > 500 && promoted > 500, "{backups} {promoted}");
}

#[test]
fn without_a_rule_it_does_not() {
    for rule in [Rule::Durable, Rule::Sync, Rule::Void] {
        let (seed, why) = runs(20_000, Rules::without(rule)).unwrap_err();
        println!("without {rule:?}: seed {seed}: {why}");
    }
}
