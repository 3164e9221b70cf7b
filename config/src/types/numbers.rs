//! Numbers with limits.
use std::{fmt, num::ParseIntError, str::FromStr};

use super::ValueError;

/// Parse `word` as a number of decimal digits only.
fn number<N: FromStr<Err = ParseIntError>>(
    word: &str,
    least: u64,
    most: u64,
) -> Result<N, ValueError> {
    let digits = !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_digit());
    match digits {
        true => word.parse().map_err(|_| ValueError::OutOfRange(least, most)),
        false => Err(ValueError::NotANumber(least, most)),
    }
}

/// A count from `MIN` to `MAX`; one by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Count<const MIN: u16, const MAX: u16>(u16);

/// Queues of a disk.
pub type DiskQueues = Count<1, 32>;
/// Queue pairs of a NIC, one for each direction.
pub type NicQueuePairs = Count<1, 16>;

impl<const MIN: u16, const MAX: u16> Count<MIN, MAX> {
    /// The maximum.
    pub const MAX: u16 = MAX;

    /// The number.
    pub fn get(self) -> u16 {
        self.0
    }
}

impl<const MIN: u16, const MAX: u16> Default for Count<MIN, MAX> {
    fn default() -> Self {
        Self(MIN)
    }
}

impl<const MIN: u16, const MAX: u16> TryFrom<u16> for Count<MIN, MAX> {
    type Error = ValueError;

    fn try_from(number: u16) -> Result<Self, ValueError> {
        match (MIN..=MAX).contains(&number) {
            true => Ok(Self(number)),
            false => Err(ValueError::OutOfRange(MIN.into(), MAX.into())),
        }
    }
}

impl<const MIN: u16, const MAX: u16> TryFrom<usize> for Count<MIN, MAX> {
    type Error = ValueError;

    fn try_from(number: usize) -> Result<Self, ValueError> {
        let number = u16::try_from(number);
        number.map_err(|_| ValueError::OutOfRange(MIN.into(), MAX.into()))?.try_into()
    }
}

impl<const MIN: u16, const MAX: u16> FromStr for Count<MIN, MAX> {
    type Err = ValueError;

    fn from_str(word: &str) -> Result<Self, ValueError> {
        number::<u16>(word, MIN.into(), MAX.into())?.try_into()
    }
}

impl<const MIN: u16, const MAX: u16> fmt::Display for Count<MIN, MAX> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Descriptors of a virtqueue: a power of two from `MIN` to `MAX`; 256 by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct QueueSize<const MIN: u16, const MAX: u16>(u16);

/// Descriptors of a disk's queue.
pub type DiskQueueSize = QueueSize<2, 1024>;
/// Descriptors of a NIC's queue.
pub type NicQueueSize = QueueSize<256, 4096>;

impl<const MIN: u16, const MAX: u16> QueueSize<MIN, MAX> {
    /// The number.
    pub fn get(self) -> u16 {
        self.0
    }
}

impl<const MIN: u16, const MAX: u16> Default for QueueSize<MIN, MAX> {
    fn default() -> Self {
        const { assert!(MIN <= 256 && 256 <= MAX) };
        Self(256)
    }
}

impl<const MIN: u16, const MAX: u16> TryFrom<u16> for QueueSize<MIN, MAX> {
    type Error = ValueError;

    fn try_from(size: u16) -> Result<Self, ValueError> {
        match ((MIN..=MAX).contains(&size), size.is_power_of_two()) {
            (true, true) => Ok(Self(size)),
            (true, false) => Err(ValueError::NotAPowerOfTwo(MIN, MAX)),
            (false, _) => Err(ValueError::OutOfRange(MIN.into(), MAX.into())),
        }
    }
}

impl<const MIN: u16, const MAX: u16> FromStr for QueueSize<MIN, MAX> {
    type Err = ValueError;

    fn from_str(word: &str) -> Result<Self, ValueError> {
        number::<u16>(word, MIN.into(), MAX.into())?.try_into()
    }
}

impl<const MIN: u16, const MAX: u16> fmt::Display for QueueSize<MIN, MAX> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A limit per second, from `MIN` to `MAX`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rate<const MIN: u64, const MAX: u64>(u64);

/// A disk's requests per second.
pub type DiskIops = Rate<1, 1_000_000>;
/// Bytes, or packets, per second.
pub type PerSecond = Rate<1, { u64::MAX }>;
/// virtio-rng's bytes per second.
pub type RngBps = Rate<64, 1_000_000_000>;

impl<const MIN: u64, const MAX: u64> Rate<MIN, MAX> {
    /// The number.
    pub fn get(self) -> u64 {
        self.0
    }

    /// Convert `number` to a limit; 0 stands for none.
    ///
    /// # Errors
    /// When it is not a valid limit.
    pub fn or_unlimited(number: u64) -> Result<Option<Self>, ValueError> {
        match number {
            0 => Ok(None),
            _ if (MIN..=MAX).contains(&number) => Ok(Some(Self(number))),
            _ => Err(ValueError::OutOfRange(0, MAX)),
        }
    }
}

impl<const MIN: u64, const MAX: u64> TryFrom<u64> for Rate<MIN, MAX> {
    type Error = ValueError;

    fn try_from(number: u64) -> Result<Self, ValueError> {
        match (MIN..=MAX).contains(&number) {
            true => Ok(Self(number)),
            false => Err(ValueError::OutOfRange(MIN, MAX)),
        }
    }
}

impl<const MIN: u64, const MAX: u64> FromStr for Rate<MIN, MAX> {
    type Err = ValueError;

    fn from_str(word: &str) -> Result<Self, ValueError> {
        number::<u64>(word, MIN, MAX)?.try_into()
    }
}

impl<const MIN: u64, const MAX: u64> fmt::Display for Rate<MIN, MAX> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Number of vCPUs: x2APIC ids would allow more, but the MP table and CPU masks of old guests do
/// not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct CpuCount(u8);

impl CpuCount {
    /// One.
    pub const MIN: Self = Self(1);
    /// The maximum.
    pub const MAX: Self = Self(254);

    /// The number.
    pub fn get(self) -> u8 {
        self.0
    }
}

impl TryFrom<u8> for CpuCount {
    type Error = ValueError;

    fn try_from(number: u8) -> Result<Self, ValueError> {
        let Self(least) = Self::MIN;
        let Self(most) = Self::MAX;
        match (least..=most).contains(&number) {
            true => Ok(Self(number)),
            false => Err(ValueError::OutOfRange(least.into(), most.into())),
        }
    }
}

impl FromStr for CpuCount {
    type Err = ValueError;

    fn from_str(word: &str) -> Result<Self, ValueError> {
        number::<u8>(word, Self::MIN.0.into(), Self::MAX.0.into())?.try_into()
    }
}

impl fmt::Display for CpuCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_outside_of_its_limits_is_no_value_wherever_it_comes_from() {
        let says = |e: ValueError| e.to_string();
        assert_eq!("0".parse::<DiskQueues>().map_err(says), Err("not in 1..=32".into()));
        assert_eq!(DiskQueues::try_from(33u16).map_err(says), Err("not in 1..=32".into()));
        assert_eq!(
            NicQueuePairs::try_from(1usize << 20).map_err(says),
            Err("not in 1..=16".into())
        );
        assert_eq!("16".parse::<NicQueuePairs>().map(NicQueuePairs::get), Ok(16));
        for word in ["", "-1", "+1", "1.0", "0x1", " 1", "one"] {
            let error = word.parse::<DiskQueueSize>().map_err(says);
            assert_eq!(error, Err("must be a number in 2..=1024".into()), "{word:?}");
        }
        assert_eq!(
            "99999999".parse::<DiskQueueSize>().map_err(says),
            Err("not in 2..=1024".into())
        );
        assert_eq!(
            NicQueueSize::try_from(768).map_err(says),
            Err("not a power of two: 256, 512, 1024, 2048, 4096".into())
        );
        assert_eq!(CpuCount::try_from(255).map_err(says), Err("not in 1..=254".into()));
    }

    #[test]
    fn no_limit_is_zero_where_that_is_how_it_is_said() {
        assert_eq!(DiskIops::or_unlimited(0), Ok(None));
        assert_eq!(DiskIops::or_unlimited(7).map(|rate| rate.map(DiskIops::get)), Ok(Some(7)));
        let error = DiskIops::or_unlimited(1_000_001);
        assert_eq!(error.map_err(|e| e.to_string()), Err("not in 0..=1000000".into()));
        assert!(DiskIops::try_from(0).is_err() && RngBps::try_from(63).is_err());
        assert_eq!(PerSecond::try_from(u64::MAX).map(PerSecond::get), Ok(u64::MAX));
    }
}
