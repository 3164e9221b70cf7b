//! The kernel command line: what can be passed to a kernel.
use thiserror::Error;

use crate::limits::MAX_CMDLINE;

/// Why a command line cannot be used.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum CmdlineError {
    /// Longer than the kernel reads.
    #[error("it has {len} bytes{}; the kernel takes at most {max}", devices(*added))]
    TooLong {
        /// Its length.
        len: usize,
        /// Bytes added to the user's.
        added: usize,
        /// Longest allowed.
        max: usize,
    },
    /// A byte that would end it early, or that has no meaning to the kernel.
    #[error(
        "it has {what} at byte {at}; only printable ASCII is allowed, because kernels read plain bytes up to the first NUL"
    )]
    Byte {
        /// Which byte.
        what: String,
        /// Its offset, from 0.
        at: usize,
    },
}

fn devices(added: usize) -> String {
    match added {
        0 => String::new(),
        _ => format!(", {added} of them virtio_mmio.device= words for the devices"),
    }
}

/// Check that some kernel could accept `user`, the user's command line.
///
/// # Errors
/// When it has a byte that is not passed on, or is too long.
pub fn check_user(user: &str) -> Result<(), CmdlineError> {
    check(user, 0, MAX_CMDLINE)
}

/// Check that a kernel that accepts `max` bytes could take `user` and `added` more bytes.
///
/// # Errors
/// As [`check_user`].
pub fn check(user: &str, added: usize, max: usize) -> Result<(), CmdlineError> {
    let bad = user.bytes().position(|byte| !(matches!(byte, b' '..=b'~' | b'\t')));
    if let Some(at) = bad {
        let what = match user.as_bytes().get(at) {
            Some(0) => "a zero byte".to_owned(),
            Some(b'\n') => "a line break".to_owned(),
            Some(byte) if byte.is_ascii() => format!("a control character (0x{byte:02x})"),
            _ => format!("\"{}\"", user.get(at..).and_then(|s| s.chars().next()).unwrap_or('?')),
        };
        return Err(CmdlineError::Byte { what, at });
    }
    let len = user.len().saturating_add(added);
    match len <= max {
        true => Ok(()),
        false => Err(CmdlineError::TooLong { len, added, max }),
    }
}
