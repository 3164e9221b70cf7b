//! The first copy of memory, in rounds while the guest runs.
use std::ops::Range;

use machine::memory::{image::PAGE_SIZE, staging};

/// Most bytes left for the epoch that ends the copy, unless the rounds do not get smaller.
const SMALL: u64 = 1024 * PAGE_SIZE;
/// Most rounds.
const MOST: u32 = 30;

/// How far the copy is.
#[derive(Debug, Default)]
pub struct Rounds {
    made: u32,
    /// Bytes of the last round.
    last: u64,
}

impl Rounds {
    /// Whether one more round follows, as `changed` has changed during the last one. Otherwise the
    /// guest is stopped for the rest.
    pub fn again(&mut self, changed: &[Range<u64>]) -> bool {
        let bytes = staging::bytes(changed);
        let shrinks = self.made < 3 || bytes < self.last;
        (self.made, self.last) = (self.made + 1, bytes);
        bytes > SMALL && shrinks && self.made < MOST
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(changed: impl Fn(u32) -> u64) -> u32 {
        let mut rounds = Rounds::default();
        (1..).find(|n| !rounds.again(std::slice::from_ref(&(0..changed(*n))))).unwrap()
    }

    #[test]
    fn rounds_end_when_little_is_left_or_they_do_not_help() {
        assert_eq!(made(|_| 0), 1);
        assert_eq!(made(|n| (SMALL * 4) >> n), 2);
        assert_eq!(made(|_| 1 << 30), 4, "a guest that writes as fast as it is copied");
        assert_eq!(made(|n| u64::from(1000 - n) << 30), MOST, "one that is a little slower");
    }
}
