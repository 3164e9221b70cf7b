//! Values that are valid by construction: each is checked once, where it enters, whether from the
//! command line, the JSON file, QMP or a saved state.
use std::{fmt, num::ParseIntError, str::FromStr};

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

/// Name of a tap, valid for a Linux network interface (`dev_valid_name`): 1 to 15 bytes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TapName(String);

impl TapName {
    /// Most bytes: `IFNAMSIZ` less the terminator.
    pub const MAX: usize = 15;

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TapName {
    type Err = ValueError;

    fn from_str(word: &str) -> Result<Self, ValueError> {
        let name = text(word, Self::MAX)?;
        let bad = |c: char| matches!(c, '/' | ':' | '%') || c.is_whitespace();
        match name == "." || name == ".." || name.contains(bad) {
            true => Err(ValueError::NoInterfaceName),
            false => Ok(Self(name.to_owned())),
        }
    }
}

impl TryFrom<String> for TapName {
    type Error = ValueError;

    fn try_from(name: String) -> Result<Self, ValueError> {
        name.parse()
    }
}

impl From<TapName> for String {
    fn from(TapName(name): TapName) -> Self {
        name
    }
}

impl fmt::Display for TapName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A text of 1 to `most` bytes.
///
/// # Errors
/// When it is empty or too long, or has a NUL character.
pub fn text(word: &str, most: usize) -> Result<&str, ValueError> {
    match word.len() {
        0 => Err(ValueError::Empty),
        length if length > most => Err(ValueError::TooLong(length, most)),
        _ if word.contains('\0') => Err(ValueError::Nul),
        _ => Ok(word),
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

    #[test]
    fn memory_is_whole_and_can_be_addressed() {
        for bytes in [MemorySize::MIN.bytes(), 1 << 30, MemorySize::MAX.bytes()] {
            assert_eq!(MemorySize::try_from(bytes).map(MemorySize::bytes), Ok(bytes));
        }
        for bytes in [0, (16 << 20) - 1, (16 << 20) + 1, MemorySize::MAX.bytes() + 1, u64::MAX] {
            assert!(MemorySize::try_from(bytes).is_err(), "{bytes}");
        }
    }

    #[test]
    fn a_tap_has_a_name_that_linux_takes() {
        for name in ["tap0", "a", "fifteen-bytes-x"] {
            assert_eq!(name.parse::<TapName>().unwrap().as_str(), name);
        }
        for name in ["", ".", "..", "a/b", "a:b", "a%d", "a b", "a\0", "sixteen-bytes-xy"] {
            assert!(name.parse::<TapName>().is_err(), "{name:?}");
        }
    }
}
