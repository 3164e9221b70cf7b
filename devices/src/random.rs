//! The one source of random numbers: the host's (getrandom(2)).
use std::io;

use rustix::rand::{GetRandomFlags, getrandom};

/// `N` unpredictable bytes.
///
/// # Errors
/// When the host provides none: its kernel is older than 3.17, or a filter forbids the call.
pub fn bytes<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        // More than 256 bytes may come in parts.
        filled += getrandom(rest, GetRandomFlags::empty())?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_are_alike_and_none_is_left_out() {
        let (one, other): ([u8; 4096], [u8; 4096]) = (bytes().unwrap(), bytes().unwrap());
        assert_ne!(one, other);
        assert!(one.chunks(64).all(|part| part.iter().any(|byte| *byte != 0)));
        assert_eq!(bytes().unwrap(), [0_u8; 0]);
    }
}
