//! How much of a guest's memory is resident on the host.
use std::fs;

use anyhow::{Context, Result, ensure};

/// How many bytes of the `mib` MiB of guest memory of process `pid` are resident: those of the
/// largest run of writable mappings without a gap. The process's total would be enough if the host
/// never reclaimed memory.
///
/// # Errors
/// The process has no such mappings.
pub fn guest_memory(pid: u32, mib: u64) -> Result<u64> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut runs, mut end) = (vec![(0, 0)], 0);
    for line in smaps.lines() {
        let first = line.split(' ').next().unwrap_or_default();
        let range = first.split_once('-').and_then(|(from, to)| {
            Some((u64::from_str_radix(from, 16).ok()?, u64::from_str_radix(to, 16).ok()?))
        });
        let kib = line.strip_prefix("Rss:").and_then(|rest| rest.trim().strip_suffix(" kB"));
        if let Some((from, to)) = range.filter(|_| line.contains(" rw-")) {
            if from != end {
                runs.push((0, 0));
            }
            runs.last_mut().context("none")?.0 += to - from;
            end = to;
        } else if range.is_some() {
            // This mapping does not belong to a run and is not counted.
            runs.push((0, 0));
            end = 0;
        } else if let Some(kib) = kib {
            runs.last_mut().context("none")?.1 += kib.trim().parse::<u64>()? << 10;
        }
    }
    let (size, resident) = runs.into_iter().max().context("no mappings")?;
    ensure!((mib << 20..(mib + 8) << 20).contains(&size), "guest memory of {size} bytes");
    Ok(resident)
}
