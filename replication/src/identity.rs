//! Names and numbers: which guest, which process, which ownership, which checkpoint.
use std::fmt;

/// A protected domain, over all its processes and hosts: a UUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Lineage(pub u128);

/// One process: a UUID. A process that is started again is another incarnation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Incarnation(pub u128);

/// As a UUID: 36 characters, in lower case.
impl fmt::Display for Lineage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let part = |shift: u32, bits: u32| (self.0 >> shift) & ((1 << bits) - 1);
        let (a, b, c) = (part(96, 32), part(80, 16), part(64, 16));
        write!(f, "{a:08x}-{b:04x}-{c:04x}-{:04x}-{:012x}", part(48, 16), part(0, 48))
    }
}

/// As a UUID.
impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Lineage(self.0).fmt(f)
    }
}

/// One ownership of the guest. It is closed exactly once, and the winner is the primary of the
/// next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Term(pub u64);

impl Term {
    /// The term after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "term {}", self.0)
    }
}

/// One checkpoint of a term. Numbers grow by one and are never used again within a term; 0 is
/// before the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

/// What identifies the contents of an epoch: its checksums, chained to those of the epoch before.
/// Opaque here; made by the caller, which moves the pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Digest(pub u64);

/// A connection to a peer, numbered upwards by the side that opens or accepts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Connection(pub u64);

/// The part that a process, or an image on disk, has in a term.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Side {
    /// Ran the guest when the term began.
    Primary,
    /// Holds the guest's last whole epoch.
    Backup,
}

/// Who may win a term: an incarnation, on one side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Party {
    /// Its side in that term.
    pub side: Side,
    /// The process.
    pub incarnation: Incarnation,
}

/// The two incarnations that an armed term binds. No other one can win it by Solo or Promote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Pair {
    /// The primary's.
    pub primary: Incarnation,
    /// The backup's.
    pub backup: Incarnation,
}
