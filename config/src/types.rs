//! Values that are valid by construction: each is checked once, where it enters, whether from the
//! command line, the JSON file, QMP or a saved state.
mod memory;
mod names;
mod numbers;

pub use memory::{MemorySize, MemorySizeError};
pub use names::{Id, TapName, text};
pub use numbers::{
    Count, CpuCount, DiskIops, DiskQueueSize, DiskQueues, NicQueuePairs, NicQueueSize, PerSecond,
    QueueSize, Rate, RngBps,
};

/// Why a value is invalid, worded as the end of a sentence that names place and value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    /// Not a decimal number.
    #[error("must be a number in {0}..={1}")]
    NotANumber(u64, u64),
    /// Below the first or above the second.
    #[error("not in {0}..={1}")]
    OutOfRange(u64, u64),
    /// Within the limits, but not a power of two.
    #[error("not a power of two: {}", powers(*.0, *.1))]
    NotAPowerOfTwo(u16, u16),
    /// Nothing at all.
    #[error("must not be empty")]
    Empty,
    /// Longer than the second number of bytes.
    #[error("{0} bytes long, at most {1} are allowed")]
    TooLong(usize, usize),
    /// NUL: a reader that stops there would see only a part.
    #[error("must not contain a NUL character")]
    Nul,
    /// Not a valid name for a Linux network interface (`dev_valid_name`).
    #[error("not an interface name: no '/', ':', '%' or space")]
    NoInterfaceName,
}

fn powers(least: u16, most: u16) -> String {
    let all = (0..u16::BITS).map(|bit| 1u16 << bit).filter(|size| (least..=most).contains(size));
    all.map(|size| size.to_string()).collect::<Vec<_>>().join(", ")
}
