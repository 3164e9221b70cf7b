//! Parsing of single values. Each function returns the value, or says what is allowed.
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;

use crate::{
    cmdline, limits,
    types::{self, Id, MemorySize, NicQueuePairs, ValueError},
};

/// What is allowed, worded as the end of a sentence that names place and value.
pub type Rule = String;

/// Any text without NUL.
pub fn text(word: &str) -> Result<String, Rule> {
    if word.contains('\0') {
        return Err("must not contain a NUL character".into());
    }
    Ok(word.to_owned())
}

/// A kernel command line.
pub fn cmdline(word: &str) -> Result<String, Rule> {
    cmdline::check_user(word).map_err(|e| e.to_string())?;
    Ok(word.to_owned())
}

/// A name or id: 1 to 255 bytes.
pub fn id(word: &str) -> Result<Id, Rule> {
    word.parse().map_err(|e: ValueError| e.to_string())
}

/// A path: 1 to 4096 bytes.
pub fn path(word: &str) -> Result<PathBuf, Rule> {
    bounded(word, limits::MAX_PATH).map(PathBuf::from)
}

/// A path that a Unix socket can be bound to.
pub fn socket_path(word: &str) -> Result<PathBuf, Rule> {
    bounded(word, limits::MAX_SOCKET_PATH).map(PathBuf::from)
}

/// A disk's serial number: 1 to 20 bytes.
pub fn disk_serial(word: &str) -> Result<String, Rule> {
    bounded(word, limits::MAX_DISK_SERIAL)
}

fn bounded(word: &str, most: usize) -> Result<String, Rule> {
    types::text(word, most).map(str::to_owned).map_err(|e| e.to_string())
}

/// `true|on|yes` or `false|off|no`.
pub fn boolean(word: &str) -> Result<bool, Rule> {
    match word {
        "true" | "on" | "yes" => Ok(true),
        "false" | "off" | "no" => Ok(false),
        _ => Err("must be on|true|yes or off|false|no".into()),
    }
}

/// `unmap` or `ignore`, or a boolean.
pub fn discard(word: &str) -> Result<bool, Rule> {
    match word {
        "unmap" => Ok(true),
        "ignore" => Ok(false),
        _ => boolean(word).map_err(|_| "must be unmap|true|on|yes or ignore|false|off|no".into()),
    }
}

/// A decimal number in `range`.
pub fn number<N>(word: &str, range: RangeInclusive<N>) -> Result<N, Rule>
where
    N: FromStr + PartialOrd + Display,
{
    let digits = !word.is_empty() && word.bytes().all(|b| b.is_ascii_digit());
    match word.parse::<N>() {
        Ok(value) if digits && range.contains(&value) => Ok(value),
        _ if digits => Err(format!("not in {}..={}", range.start(), range.end())),
        _ => Err(format!("must be a number in {}..={}", range.start(), range.end())),
    }
}

/// Bytes in `range`: `N[K|M]`.
pub fn size(word: &str, range: RangeInclusive<u32>) -> Result<u32, Rule> {
    let (digits, unit) = match word.strip_suffix(['K', 'k']) {
        Some(digits) => (digits, 1u32 << 10),
        None => word.strip_suffix(['M', 'm']).map_or((word, 1), |digits| (digits, 1 << 20)),
    };
    let size = number(digits, 0..=u32::MAX).ok().and_then(|count| count.checked_mul(unit));
    size.filter(|size| range.contains(size)).ok_or_else(|| {
        format!(
            "must be a number of bytes, optionally with the suffix K or M, at most {}K",
            range.end() >> 10
        )
    })
}

/// Guest RAM in bytes: `N[K|M|G|T]`. A bare number is in bytes if it is at least 1048576, as in the
/// first StratoVirt, and otherwise in MiB, as in the second: a machine has at least 1 MiB.
pub fn memory_size(word: &str) -> Result<MemorySize, Rule> {
    let malformed = || {
        "must be a number with the suffix K, M, G or T; a bare number is in MiB below 1048576, \
         otherwise in bytes"
            .to_owned()
    };
    let (digits, unit) = match word.char_indices().last() {
        Some((at, 'K' | 'k')) => (word.get(..at), Some(1u64 << 10)),
        Some((at, 'M' | 'm')) => (word.get(..at), Some(1 << 20)),
        Some((at, 'G' | 'g')) => (word.get(..at), Some(1 << 30)),
        Some((at, 'T' | 't')) => (word.get(..at), Some(1 << 40)),
        _ => (Some(word), None),
    };
    let digits = digits
        .filter(|d| !d.is_empty() && d.bytes().all(|b| b.is_ascii_digit()))
        .ok_or_else(malformed)?;
    let too_large = || "does not fit into 64 bits".to_owned();
    let count: u64 = digits.parse().map_err(|_| too_large())?;
    let unit = unit.unwrap_or(if count < 1 << 20 { 1 << 20 } else { 1 });
    let bytes = count.checked_mul(unit).ok_or_else(too_large)?;
    MemorySize::try_from(bytes).map_err(|e| e.to_string())
}

/// An Ethernet address of one station, `xx:xx:xx:xx:xx:xx`.
pub fn mac(word: &str) -> Result<[u8; 6], Rule> {
    let rule = || "Mac address is illegal: must be like 52:54:00:12:34:56".to_owned();
    let mut mac = [0; 6];
    let mut parts = word.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|p| p.len() == 2).ok_or_else(rule)?;
        if !part.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(rule());
        }
        *byte = u8::from_str_radix(part, 16).map_err(|_| rule())?;
    }
    if parts.next().is_some() {
        return Err(rule());
    }
    let [first, ..] = mac;
    if first & 1 != 0 || mac == [0; 6] {
        return Err("Mac address is illegal: all zero, or a group's (first byte odd)".into());
    }
    Ok(mac)
}

/// Inherited descriptors, `4` or `4:5:6`. Those below 3 are the standard streams.
pub fn descriptors(word: &str) -> Result<Vec<i32>, Rule> {
    let fds: Vec<i32> = word
        .split(':')
        .map(|fd| number(fd, 3..=i32::MAX))
        .collect::<Result<_, _>>()
        .map_err(|_| "must be descriptor numbers of 3 or more, separated by ':'".to_owned())?;
    let most = NicQueuePairs::MAX;
    if fds.len() > usize::from(most) {
        return Err(format!("{} descriptors, at most {most}", fds.len()));
    }
    Ok(fds)
}

/// A UUID in the usual 36 characters.
pub fn uuid(word: &str) -> Result<String, Rule> {
    let dash = |at: usize| matches!(at, 8 | 13 | 18 | 23);
    let well_formed = word.len() == 36
        && word.bytes().enumerate().all(
            |(at, b)| {
                if dash(at) { b == b'-' } else { b.is_ascii_hexdigit() }
            },
        );
    if !well_formed {
        return Err("must be like 01234567-89ab-cdef-0123-456789abcdef".into());
    }
    Ok(word.to_ascii_lowercase())
}
