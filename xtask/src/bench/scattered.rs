//! How long a save stops Linux while it writes to pages scattered over its memory: a guest of 1 GiB
//! has touched 700 MiB, and writes 2,000 pages, 512 KiB apart, every 100 ms
//! (`xtask/guest/init.rs`).
use super::figures::Figures;
use super::measure::{LIMIT, Turn};
use super::monitors::{Guest, OURS};
use super::snapshots::{Target, save_live};
use super::statistics::{median, quantile};
use super::{Metric, Scenario};
use anyhow::Result;

/// RAM of the guest, MiB.
const MIB: u64 = 1024;
/// Saves of each kind in each run.
pub const SAVES: usize = 10;
/// Runs that give 50 pauses of each kind, the number that the bounds are meant for.
pub const RUNS: usize = 5;

/// Upper bound of the median pause, ms.
const MEDIAN: f64 = 5.0;
/// Upper bound of the 95th percentile of the pauses, ms.
const P95: f64 = 10.0;
/// The largest factor allowed between the medians of the two kinds.
const FACTOR: f64 = 1.3;

/// Boots it, and saves it repeatedly, in turns into a directory and into a stream.
///
/// # Errors
/// It does not boot, or cannot be saved.
pub fn pauses(turn: &Turn<'_>) -> Result<()> {
    if !turn.found.monitor.way.is_live() {
        return Ok(());
    }
    let mut run = turn.start(&Guest { mib: MIB, ..turn.linux("scatter")? })?;
    let (mut connection, _) = run.connect()?;
    while run.wait_figure(LIMIT)?.0 != "scattered" {}
    let saved = turn.rig.dir.join("saved");
    let targets = [
        (Target::Directory(&saved), Metric::ScatteredDirectory),
        (Target::Stream, Metric::ScatteredStream),
    ];
    for (target, metric) in targets.into_iter().cycle().take(2 * SAVES) {
        turn.time(metric, save_live(turn.found, &mut connection, target)?)?;
    }
    Ok(())
}

/// This monitor's pauses and their bounds, one line for each kind; nothing if they were not
/// measured.
#[must_use]
pub fn verdict(figures: &Figures) -> Vec<String> {
    let of = |metric| figures.samples(Scenario::Scattered, metric, OURS.name);
    let line = |metric: Metric| {
        let samples = of(metric);
        let (middle, high) = (median(samples)?, quantile(samples, 0.95)?);
        let said = format!(
            "{}: median {middle:.2} ms (at most {MEDIAN:.0}), p95 {high:.2} ms (at most {P95:.0}), n = {}",
            metric.label().0,
            samples.len(),
        );
        Some(judged(said, middle <= MEDIAN && high <= P95))
    };
    let ratio = || {
        let (directory, stream) =
            (median(of(Metric::ScatteredDirectory))?, median(of(Metric::ScatteredStream))?);
        let ratio = directory / stream;
        let said = format!("directory / stream: {ratio:.2} (within {FACTOR})");
        Some(judged(said, (1.0 / FACTOR..=FACTOR).contains(&ratio)))
    };
    let lines = [line(Metric::ScatteredDirectory), line(Metric::ScatteredStream), ratio()];
    lines.into_iter().flatten().collect()
}

fn judged(mut said: String, good: bool) -> String {
    said.push_str(if good { ": kept" } else { ": MISSED" });
    said
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(directory: &[f64], stream: &[f64]) -> Figures {
        let mut figures = Figures::default();
        for (metric, samples) in
            [(Metric::ScatteredDirectory, directory), (Metric::ScatteredStream, stream)]
        {
            for &sample in samples {
                figures.sample(Scenario::Scattered, metric, OURS.name.to_owned(), sample);
            }
        }
        figures
    }

    fn missed(figures: &Figures) -> Vec<usize> {
        let lines = verdict(figures);
        (0..lines.len()).filter(|&line| lines[line].ends_with("MISSED")).collect()
    }

    #[test]
    fn each_bound_is_judged_by_itself() {
        assert_eq!(verdict(&figures(&[], &[])), [""; 0]);
        assert_eq!(missed(&figures(&[4.0; 50], &[5.0; 50])), [0; 0]);
        assert_eq!(missed(&figures(&[5.1; 50], &[5.0; 50])), [0]);
        // One in ten is slow: the median does not show it.
        let slow: Vec<f64> = (0..50).map(|save| if save % 10 == 0 { 11.0 } else { 4.0 }).collect();
        assert_eq!(missed(&figures(&[4.0; 50], &slow)), [1]);
        assert_eq!(missed(&figures(&[4.0; 50], &[3.0; 50])), [2]);
        assert_eq!(missed(&figures(&[3.0; 50], &[4.0; 50])), [2]);
    }
}
