//! A toy guest, and a client that remembers every reply.
use std::{
    collections::HashSet,
    hash::{DefaultHasher, Hash, Hasher},
};

/// A server that counts requests, in 64 pages of memory.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Guest {
    /// Requests served; also on its disk.
    pub counter: u64,
    pages: [u64; 64],
}

impl Guest {
    pub fn new() -> Self {
        Self { counter: 0, pages: [0; 64] }
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

    pub fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish()
    }
}

/// Everything that was ever let out.
#[derive(Default)]
pub struct Client {
    told: HashSet<u64>,
}

impl Client {
    /// A reply has arrived. A number that comes twice was given by a guest that had lost an earlier
    /// reply, or by two guests at once.
    pub fn told(&mut self, reply: u64) -> Result<(), String> {
        if self.told.insert(reply) {
            return Ok(());
        }
        Err(format!("reply {reply} was given twice (I2, I3)"))
    }

    pub fn count(&self) -> usize {
        self.told.len()
    }
}
