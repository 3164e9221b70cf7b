//! The size of guest RAM.
use std::fmt;

/// Guest RAM in bytes: a multiple of 1 MiB, at least 16 MiB; 256 MiB by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct MemorySize(u64);

/// Why a size of guest RAM is invalid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MemorySizeError {
    /// Less than a guest can boot in.
    #[error("{0} bytes, at least {min}M are required", min = MemorySize::MIN.0 >> 20)]
    TooSmall(u64),
    /// More than can be addressed.
    #[error("{0} bytes, at most {max}G can be addressed", max = MemorySize::MAX.0 >> 30)]
    TooLarge(u64),
    /// Not a multiple of KVM's and the guest's large pages.
    #[error("unaligned with {unit} for memory", unit = MemorySize::UNIT)]
    Unaligned(u64),
}

impl MemorySize {
    /// The minimum.
    pub const MIN: Self = Self(16 << 20);
    /// The maximum: physical addresses have 52 bits (Intel SDM 3A, 4.1.4), and 1 GiB of them is the
    /// hole. The host has far less, which shows when memory is allocated.
    pub const MAX: Self = Self((1 << 52) - (1 << 30));
    /// It is a multiple of this many bytes.
    pub const UNIT: u64 = 1 << 20;

    /// Bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

impl Default for MemorySize {
    fn default() -> Self {
        Self(256 << 20)
    }
}

impl TryFrom<u64> for MemorySize {
    type Error = MemorySizeError;

    fn try_from(bytes: u64) -> Result<Self, MemorySizeError> {
        match bytes {
            _ if bytes < Self::MIN.0 => Err(MemorySizeError::TooSmall(bytes)),
            _ if bytes > Self::MAX.0 => Err(MemorySizeError::TooLarge(bytes)),
            _ if !bytes.is_multiple_of(Self::UNIT) => Err(MemorySizeError::Unaligned(bytes)),
            _ => Ok(Self(bytes)),
        }
    }
}

impl fmt::Display for MemorySize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_whole_and_can_be_addressed() {
        for bytes in [MemorySize::MIN.bytes(), 1 << 30, MemorySize::MAX.bytes()] {
            assert_eq!(MemorySize::try_from(bytes).map(MemorySize::bytes), Ok(bytes));
        }
        for bytes in [0, (16 << 20) - 1, (16 << 20) + 1, MemorySize::MAX.bytes() + 1, u64::MAX] {
            assert!(MemorySize::try_from(bytes).is_err(), "{bytes}");
        }
    }
}
