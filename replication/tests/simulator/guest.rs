//! A toy guest, and a client that remembers every reply.
use std::{
    collections::HashSet,
    hash::{DefaultHasher, Hash, Hasher},
};

const PAGES: usize = 64;

/// A server that counts requests, in 64 pages of memory.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Guest {
    /// Requests served; also on its disk.
    pub counter: u64,
    /// It has powered itself off.
    pub off: bool,
    pages: [u64; PAGES],
}

/// What an epoch carries.
#[derive(Debug, Clone)]
pub enum Pages {
    /// Everything.
    All(Box<Guest>),
    /// What was written since the backup's epoch.
    Since { counter: u64, off: bool, pages: Vec<(usize, u64)> },
}

impl Pages {
    /// Requests that the guest had served at the end of the epoch.
    pub fn counter(&self) -> u64 {
        match self {
            Self::All(guest) => guest.counter,
            Self::Since { counter, .. } => *counter,
        }
    }
}

impl Guest {
    pub fn new() -> Self {
        Self { counter: 0, off: false, pages: [0; PAGES] }
    }

    /// Started from a disk with this number on it: memory is new.
    pub fn from_disk(counter: u64) -> Self {
        Self { counter, ..Self::new() }
    }

    /// Serve one request. The reply is a number that is never given twice.
    pub fn serve(&mut self) -> u64 {
        self.counter += 1;
        let page = self.counter as usize % self.pages.len();
        self.pages[page] = self.pages[page].wrapping_mul(31).wrapping_add(self.counter);
        self.counter
    }

    /// It reboots itself.
    pub fn reset(&mut self) {
        self.pages = [self.counter; PAGES];
    }

    pub fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish()
    }

    /// What has changed since `base`.
    pub fn since(&self, base: &Self) -> Pages {
        let both = self.pages.iter().zip(&base.pages).enumerate();
        let pages = both.filter(|(_, (new, old))| new != old).map(|(n, (new, _))| (n, *new));
        Pages::Since { counter: self.counter, off: self.off, pages: pages.collect() }
    }

    /// Take an epoch in.
    pub fn apply(&mut self, epoch: Pages) {
        match epoch {
            Pages::All(guest) => *self = *guest,
            Pages::Since { counter, off, pages } => {
                (self.counter, self.off) = (counter, off);
                for (n, page) in pages {
                    self.pages[n] = page;
                }
            }
        }
    }
}

/// What a guest lets others see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    Reply(u64),
    /// It has powered itself off.
    Off,
}

/// Everything that was ever let out.
#[derive(Default)]
pub struct Client {
    told: HashSet<u64>,
    /// It was seen to power itself off, after so many requests.
    off: Option<u64>,
}

impl Client {
    /// The guest was seen to power itself off.
    pub fn off(&mut self, counter: u64) {
        self.off = Some(counter);
    }

    pub fn is_off(&self) -> bool {
        self.off.is_some()
    }

    /// A reply has arrived. A number that comes twice was given by a guest that had lost an earlier
    /// reply, or by two guests at once.
    pub fn told(&mut self, reply: u64) -> Result<(), String> {
        // One that was on its way is no more than late.
        if self.off.is_some_and(|last| reply > last) {
            return Err(format!("reply {reply} of a guest that was seen to power off (I2)"));
        }
        if self.told.insert(reply) {
            return Ok(());
        }
        Err(format!("reply {reply} was given twice (I2, I3)"))
    }

    pub fn count(&self) -> usize {
        self.told.len()
    }
}
