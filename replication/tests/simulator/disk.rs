//! The disk of a guest as one host has it: an image behind a page cache, and the journal of a
//! backup. The power may be cut at any moment: of what was not synced, any part is gone.
use replication::{Epoch, Journal, Mark, Rule, Rules, Term};

const BLOCKS: usize = 8;

/// What is on a disk: in block 0 the last request that was served, in the others, in turn, what each
/// request was. The guest writes and flushes the latter first.
pub type Blocks = [u64; BLOCKS];

const fn place(request: u64) -> usize {
    1 + request as usize % (BLOCKS - 1)
}

/// The writes of requests after `from`, up to `to`: blocks with their contents.
fn writes(from: u64, to: u64) -> impl Iterator<Item = (usize, u64)> {
    (from + 1..=to).flat_map(|request| [(place(request), request), (0, request)])
}

/// Whether a guest could have left this behind: all that it has flushed is there.
fn is_consistent(blocks: &Blocks) -> bool {
    let last = blocks[0];
    let earliest = last.saturating_sub(BLOCKS as u64 - 2).max(1);
    (earliest..=last).all(|request| {
        let found = blocks[place(request)];
        found == request || found == last + 1 && place(last + 1) == place(request)
    })
}

/// An epoch in the journal: what the guest had served before and after it.
#[derive(Debug, Clone, Copy)]
struct Entry {
    epoch: Epoch,
    from: u64,
    to: u64,
    is_durable: bool,
}

#[derive(Debug, Clone)]
pub struct Disk {
    cache: Blocks,
    medium: Blocks,
    entries: Vec<Entry>,
    order: Journal,
    /// The term of its entries.
    term: Term,
    rules: Rules,
    /// What a client may rely on: a request that it was told to be done, or a backup's host has
    /// acknowledged.
    pub promised: u64,
}

impl Disk {
    pub fn new(rules: Rules) -> Self {
        Self {
            cache: [0; BLOCKS],
            medium: [0; BLOCKS],
            entries: Vec::new(),
            order: Journal::new(Epoch(0), rules),
            term: Term(0),
            rules,
            promised: 0,
        }
    }

    /// The last request that is on it.
    pub fn last(&self) -> u64 {
        self.cache[0]
    }

    /// The guest that runs here serves a request: each write is flushed.
    pub fn serve(&mut self, request: u64) {
        for (block, contents) in writes(request - 1, request) {
            self.cache[block] = contents;
            self.medium = self.cache;
        }
        self.promised = request;
    }

    /// The first epoch of a term: the image is filled with all that the primary's has, and synced.
    pub fn begin(&mut self, term: Term, epoch: Epoch, last: u64) {
        self.cache = [0; BLOCKS];
        writes(last.saturating_sub(BLOCKS as u64), last)
            .for_each(|(block, contents)| self.cache[block] = contents);
        self.medium = self.cache;
        self.entries.clear();
        self.order = Journal::new(epoch, self.rules);
        self.term = term;
    }

    /// An epoch is appended to the journal, after which the guest has served `to` requests.
    pub fn append(&mut self, epoch: Epoch, to: u64) {
        let from = self.entries.last().map_or(self.cache[0], |entry| entry.to);
        self.entries.push(Entry { epoch, from, to, is_durable: false });
        self.order.appended();
    }

    pub fn sync_journal(&mut self) {
        self.entries.iter_mut().for_each(|entry| entry.is_durable = true);
        self.order.journal_synced(self.order.last());
    }

    pub fn drop_after(&mut self, epoch: Epoch) {
        let kept = epoch.max(self.order.last_applied());
        self.order.dropped_after(kept);
        self.entries.retain(|entry| entry.epoch <= kept);
    }

    /// What a host does between: write epochs through `epoch` to the image, sync it, and trim.
    pub fn work(&mut self, epoch: Epoch, random: &mut fastrand::Rng) {
        while random.u8(0..3) > 0 && self.apply(epoch) {}
        if random.u8(0..4) == 0 {
            self.sync_image();
        }
        if random.u8(0..4) == 0 {
            self.trim();
        }
    }

    fn apply(&mut self, through: Epoch) -> bool {
        // Without the rule, also what is not durable yet.
        let early = self.rules == Rules::without(Rule::Durable);
        let Some(epoch) = self.order.to_apply().filter(|epoch| early || *epoch <= through) else {
            return false;
        };
        if let Some(entry) = self.entries.iter().find(|entry| entry.epoch == epoch) {
            let changes = writes(entry.from, entry.to);
            changes.for_each(|(block, contents)| self.cache[block] = contents);
        }
        self.order.applied();
        true
    }

    fn sync_image(&mut self) {
        self.medium = self.cache;
        self.order.images_synced(self.order.last_applied());
    }

    fn trim(&mut self) {
        if let Some(through) = self.order.to_trim() {
            self.entries.retain(|entry| entry.epoch > through);
            self.order.trimmed(through);
        }
    }

    /// Before the guest runs here: everything is in the image, and nothing in the journal.
    pub fn settle(&mut self) {
        self.sync_journal();
        while self.apply(self.order.last()) {}
        if !self.order.may_run() {
            self.sync_image();
            self.trim();
        }
    }

    /// The power is cut: any blocks that were not synced, and the last entries that were not, may be
    /// gone.
    pub fn cut(&mut self, random: &mut fastrand::Rng) {
        for block in 0..BLOCKS {
            if random.bool() {
                self.medium[block] = self.cache[block];
            }
        }
        self.cache = self.medium;
        while random.bool() && self.entries.pop_if(|entry| !entry.is_durable).is_some() {}
    }

    /// The next process opens the image, whose sidecar says `word`: what is in the journal is
    /// applied, unless the guest has run here since. What is wrong with the image then.
    pub fn recover(&mut self, word: Mark) -> Result<u64, String> {
        let void = match word {
            Mark::Running { term, .. } | Mark::Free { term } => self.term < term,
            _ => false,
        };
        if !void || self.rules == Rules::without(Rule::Void) {
            for entry in &self.entries {
                let changes = writes(entry.from, entry.to);
                changes.for_each(|(block, contents)| self.cache[block] = contents);
            }
        }
        self.medium = self.cache;
        self.entries.clear();
        let filled = !matches!(word, Mark::Inconsistent { .. });
        if filled && !is_consistent(&self.cache) {
            return Err(format!("{word:?}: an image says {:?} after a replay (I7)", self.cache));
        }
        if filled && self.cache[0] < self.promised {
            let (found, promised) = (self.cache[0], self.promised);
            return Err(format!("{word:?}: an image is at {found}, promised {promised} (I7)"));
        }
        Ok(self.cache[0])
    }
}
