//! Rate-limited logging, for lines that a guest or a lasting host fault could cause without end.
use std::{
    fmt::{self, Display},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

/// At most one line in this interval.
const QUIET: Duration = Duration::from_secs(1);

/// Log as `log::$level!` does, but at most one line a second from each call site.
macro_rules! log_seldom {
    ($level:ident, $($message:tt)+) => {{
        static LIMIT: $crate::log_limit::Limit = $crate::log_limit::Limit::new();
        if let Some(left_out) = LIMIT.pass(::std::time::Instant::now()) {
            ::log::$level!("{}{left_out}", format_args!($($message)+));
        }
    }};
}
pub(crate) use log_seldom;

/// The limit of one call site.
pub(crate) struct Limit(Mutex<State>);

struct State {
    last: Option<Instant>,
    left_out: u64,
}

impl Limit {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(State { last: None, left_out: 0 }))
    }

    /// Whether a line may be written at `now`; if so, the note of omitted lines to append to it.
    pub(crate) fn pass(&self, now: Instant) -> Option<LeftOut> {
        let mut state = self.0.lock();
        if state.last.is_some_and(|last| now.duration_since(last) < QUIET) {
            state.left_out = state.left_out.saturating_add(1);
            return None;
        }
        state.last = Some(now);
        Some(LeftOut(std::mem::take(&mut state.left_out)))
    }
}

/// How many lines were left out before this one.
pub(crate) struct LeftOut(u64);

impl Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => Ok(()),
            n => write!(f, " ({n} similar lines suppressed)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_a_second_that_says_how_many_it_stands_for() {
        let limit = Limit::new();
        let begin = Instant::now();
        let said = |ms| limit.pass(begin + Duration::from_millis(ms)).map(|l| l.to_string());
        assert_eq!(said(0).unwrap(), "");
        assert!([1, 500, 999].into_iter().all(|ms| said(ms).is_none()));
        assert_eq!(said(1000).unwrap(), " (3 similar lines suppressed)");
        assert!(said(1999).is_none());
        assert_eq!(said(5000).unwrap(), " (1 similar lines suppressed)");
        assert_eq!(said(6000).unwrap(), "");
    }
}
