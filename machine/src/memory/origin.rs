//! Where guest memory has the contents that a machine begins with.
use std::{ops::Range, sync::Weak};

use devices::Memory;

use super::fault::Filler;

/// Where guest memory has its contents from.
#[derive(Default)]
pub enum Origin {
    /// It began as zero, and was written to.
    #[default]
    Written,
    /// It is mapped from the files of a save.
    Mapped,
    /// Ranges of its image are filled when they are touched, until the filler is gone.
    Missing(Vec<Range<u64>>, Weak<Filler>),
}

/// Guest memory with its contents.
pub struct Contents {
    /// The memory.
    pub memory: Memory,
    /// Ranges of its image that are not zero although nobody may have touched them yet.
    pub filled: Vec<Range<u64>>,
    /// Where they come from.
    pub origin: Origin,
}

impl From<Memory> for Contents {
    fn from(memory: Memory) -> Self {
        Self { memory, filled: Vec::new(), origin: Origin::Written }
    }
}
