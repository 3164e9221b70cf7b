//! Where the initial contents of guest memory come from.
use std::{ops::Range, sync::Weak};

use devices::Memory;

use super::fault::Filler;

/// Where guest memory gets its contents from.
#[derive(Default)]
pub enum Origin {
    /// It started as zero, and was written to.
    #[default]
    Written,
    /// It is mapped from the files of a save.
    Mapped,
    /// These ranges are filled when they are touched, until the filler is dropped.
    Missing(Vec<Range<u64>>, Weak<Filler>),
}

/// Guest memory with its contents.
pub struct Contents {
    /// The memory.
    pub memory: Memory,
    /// Ranges that are not zero although they may not have been touched yet.
    pub filled: Vec<Range<u64>>,
    /// Where they come from.
    pub origin: Origin,
}

impl From<Memory> for Contents {
    fn from(memory: Memory) -> Self {
        Self { memory, filled: Vec::new(), origin: Origin::Written }
    }
}
