//! What protection has to reach, and whether it does.
use super::{Manner, floor};
use crate::bench::figures::Figures;
use crate::bench::statistics::{median, quantile};
use crate::bench::{Metric, Scenario};

/// Bytes of a page.
const PAGE: f64 = 4096.0;
const MIB: f64 = (1 << 20) as f64;

/// What has to be reached, one line for each; nothing of what was not measured.
#[must_use]
pub fn verdict(figures: &Figures) -> Vec<String> {
    use Manner::{Backup, Nowhere};
    let few = (Scenario::RemusFew, 0.5, 2.0);
    let many = (Scenario::RemusMany, 1.5, 4.0);
    [
        pause(figures, many, Backup),
        pause(figures, many, Nowhere),
        floor(figures, many.0),
        pause(figures, few, Backup),
        pause(figures, few, Nowhere),
        floor(figures, few.0),
        held(figures),
        cost(figures, Nowhere),
        cost(figures, Backup),
        adapted(figures, Nowhere),
        adapted(figures, Backup),
        lone(figures),
        local(figures),
        failover(figures),
        memory(figures),
        wire(figures, Scenario::RemusUnpack),
        wire(figures, Scenario::RemusDatabase),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn samples(figures: &Figures, scenario: Scenario, metric: Metric, manner: Manner) -> &[f64] {
    figures.samples(scenario, metric, manner.name())
}

fn pause(
    figures: &Figures,
    (scenario, most, p99): (Scenario, f64, f64),
    manner: Manner,
) -> Option<String> {
    let samples = samples(figures, scenario, Metric::Pause, manner);
    let (middle, high) = (median(samples)?, quantile(samples, 0.99)?);
    let (title, name, n) = (scenario.title(), manner.name(), samples.len());
    let said = format!(
        "pause, {title}, {name}: median {middle:.2} ms (at most {most}), p99 {high:.2} ms (at most {p99}), n = {n}"
    );
    Some(judged(said, middle <= most && high <= p99))
}

fn floor(figures: &Figures, scenario: Scenario) -> Option<String> {
    let of = |metric| figures.samples(scenario, metric, floor::NAME);
    let pauses = of(Metric::Pause);
    let (middle, high) = (median(pauses)?, quantile(pauses, 0.99)?);
    let (finding, copying) = (median(of(Metric::PauseHarvest))?, median(of(Metric::PauseCopy))?);
    Some(format!(
        "  the bare loop, {}: median {middle:.2} ms (finding {finding:.2}, copying {copying:.2}), p99 {high:.2} ms, n = {}",
        scenario.title(),
        pauses.len()
    ))
}

fn held(figures: &Figures) -> Option<String> {
    let of = |metric| samples(figures, Scenario::RemusHeld, metric, Manner::Backup);
    let (rate, periods) = (median(of(Metric::Rate))?, of(Metric::Period));
    let (longest, pages) = (quantile(periods, 1.0)?, median(of(Metric::DirtyPages))?);
    let lags = of(Metric::CommitLag);
    let (lag, most) = (median(lags)?, quantile(lags, 1.0)?);
    let said = format!(
        "network and disk held, {pages:.0} pages: {rate:.1} checkpoints a second (at least 39.5), longest period {longest:.1} ms (at most 50), output held for {lag:.1} ms, at most {most:.1}, n = {}",
        periods.len()
    );
    Some(judged(said, rate >= 39.5 && longest <= 50.0))
}

fn cost(figures: &Figures, manner: Manner) -> Option<String> {
    let work = |manner| samples(figures, Scenario::RemusFew, Metric::Work, manner);
    let (protected, floor) = (work(manner), work(Manner::Harvest));
    let cost = 100.0 - median(protected)? / median(floor)? * 100.0;
    let all = 100.0 - median(protected)? / median(work(Manner::Nothing))? * 100.0;
    let (name, n) = (manner.name(), protected.len());
    let said = format!(
        "cost at 40/s and 200 pages beyond harvesting, {name}: {cost:.1} % (at most 5), {all:.1} % of all work, n = {n}"
    );
    Some(judged(said, cost <= 5.0))
}

fn adapted(figures: &Figures, manner: Manner) -> Option<String> {
    let of = |metric, manner| samples(figures, Scenario::RemusAuto, metric, manner);
    let protected = of(Metric::Work, manner);
    let lost = 100.0 - median(protected)? / median(of(Metric::Work, Manner::Nothing))? * 100.0;
    let (period, n) = (median(of(Metric::Period, manner))?, protected.len());
    let said = format!(
        "2,000 pages per 25 ms of work, period adapted, {}: {lost:.1} % of all work (at most 15), period {period:.0} ms, n = {n}",
        manner.name()
    );
    Some(judged(said, lost <= 15.0))
}

fn lone(figures: &Figures) -> Option<String> {
    let of = |manner| samples(figures, Scenario::RemusHosts, Metric::LoneRequest, manner);
    let (before, after) = (median(of(Manner::Nothing))?, median(of(Manner::Backup))?);
    let (added, n) = (after - before, of(Manner::Backup).len());
    let said = format!(
        "lone request, period adapted: {after:.2} ms instead of {before:.2}, {added:.2} later (at most 5), n = {n}"
    );
    Some(judged(said, added <= 5.0))
}

fn failover(figures: &Figures) -> Option<String> {
    let what = "kill -9 to the guest running at the backup, time-out 200 ms";
    away(figures, Scenario::RemusHosts, what, 500.0)
}

fn local(figures: &Figures) -> Option<String> {
    let what = "the same on one host with the fence 'local'";
    away(figures, Scenario::RemusLocal, what, 50.0)
}

fn away(figures: &Figures, scenario: Scenario, what: &str, limit: f64) -> Option<String> {
    let samples = samples(figures, scenario, Metric::Failover, Manner::Backup);
    let (middle, most, n) = (median(samples)?, quantile(samples, 1.0)?, samples.len());
    let said =
        format!("{what}: median {middle:.0} ms, all at most {most:.0} (at most {limit}), n = {n}");
    Some(judged(said, most <= limit))
}

fn memory(figures: &Figures) -> Option<String> {
    let of = |metric| samples(figures, Scenario::RemusMany, metric, Manner::Backup);
    let (memory, epoch) = (of(Metric::BackupMemory), median(of(Metric::DirtyPages))? * PAGE / MIB);
    let (middle, most, n) = (median(memory)?, quantile(memory, 1.0)?, memory.len());
    let limit = 2.0f64.mul_add(epoch, 16.0);
    let said = format!(
        "memory of the backup beyond its guest's, epochs of {epoch:.1} MiB: median {middle:.1} MiB, at most {most:.1} (at most {limit:.1}: 2 epochs + 16), n = {n}"
    );
    Some(judged(said, most <= limit))
}

fn wire(figures: &Figures, scenario: Scenario) -> Option<String> {
    let of = |metric| samples(figures, scenario, metric, Manner::Backup);
    let (shares, pages) = (of(Metric::WireShare), of(Metric::DirtyPages));
    let (middle, n) = (median(pages)?, shares.len());
    let sent: f64 = shares.iter().zip(pages).map(|(share, pages)| share * pages).sum();
    let share = sent / pages.iter().sum::<f64>();
    let said = format!(
        "bytes on the wire, {}: {share:.1} % of those of its pages (at most 40), {middle:.0} pages in a checkpoint, n = {n}",
        scenario.title()
    );
    Some(judged(said, share <= 40.0))
}

fn judged(mut said: String, good: bool) -> String {
    said.push_str(if good { ": kept" } else { ": MISSED" });
    said
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_judged_by_its_median_and_its_99th_percentile() {
        let mut figures = Figures::default();
        let mut add = |manner: Manner, metric, values: &[f64]| {
            for value in values {
                figures.sample(Scenario::RemusFew, metric, manner.name().to_owned(), *value);
            }
        };
        assert_eq!(verdict(&Figures::default()), [""; 0]);
        add(Manner::Backup, Metric::Pause, &[&[0.4; 95][..], &[2.5; 5]].concat());
        add(Manner::Nowhere, Metric::Pause, &[0.4; 100]);
        add(Manner::Harvest, Metric::Work, &[100.0]);
        add(Manner::Nothing, Metric::Work, &[110.0]);
        add(Manner::Nowhere, Metric::Work, &[94.0]);
        let lines = verdict(&figures);
        let kept: Vec<_> = lines.iter().map(|line| line.ends_with("kept")).collect();
        assert_eq!(kept, [false, true, false], "{lines:?}");
        assert!(lines[2].contains("6.0 %") && lines[2].contains("14.5 %"), "{lines:?}");
    }
}
