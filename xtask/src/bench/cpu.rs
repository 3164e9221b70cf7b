//! CPU time of monitors, from `/proc/PID/stat`: all threads, in user and kernel mode, the guest's
//! instructions included.
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

/// The kernel's unit, whatever its own clock: 1 / `USER_HZ`.
const TICK: Duration = Duration::from_millis(10);

/// What process `pid` has used.
///
/// # Errors
/// It has ended.
pub fn of(pid: u32) -> Result<Duration> {
    read(&pid.to_string()).map(|[own, _]| own)
}

/// CPU time of the children that this process has waited for, and of those that these have waited
/// for. The kernel adds the times up exactly and rounds each sum down to 10 ms.
///
/// # Errors
/// The kernel does not report it.
pub fn of_ended_children() -> Result<Duration> {
    read("self").map(|[_, children]| children)
}

fn read(process: &str) -> Result<[Duration; 2]> {
    let path = format!("/proc/{process}/stat");
    let stat = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    times(&stat).with_context(|| format!("{path} cannot be read: {stat}"))
}

/// Fields 14 and 15 (utime, stime) and fields 16 and 17 (cutime, cstime), each pair summed.
fn times(stat: &str) -> Option<[Duration; 2]> {
    // The second field is a name in parentheses, which may contain anything.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace().skip(11).map(|field| field.parse::<u32>().ok());
    let mut sum = || TICK.checked_mul(fields.next()??.checked_add(fields.next()??)?);
    Some([sum()?, sum()?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_spaces_and_parentheses_moves_no_field() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194304 90 0 0 0 150 50 30 20 20 0 1 0 1";
        assert_eq!(times(stat), Some([2000, 500].map(Duration::from_millis)));
        assert_eq!(times("7 (a) S 1 7"), None);
    }

    #[test]
    fn this_process_can_be_asked() {
        of(std::process::id()).unwrap();
        of_ended_children().unwrap();
        of(u32::MAX).unwrap_err();
    }
}
