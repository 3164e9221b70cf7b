//! The measurements: samples by scenario, metric and monitor, and their summary, as a table and as
//! JSON.
use std::collections::BTreeMap;
use std::fmt::Write;

use serde::Serialize;

use super::about::About;
use super::part::Part;
use super::statistics::{median, quantile};
use super::{Metric, Scenario};

/// Everything that was measured.
#[derive(Debug, Default)]
pub struct Figures {
    /// What was compared, in a few words.
    pub title: String,
    /// When and where.
    pub about: About,
    /// The requested runs of each monitor; 0 if the number differs between scenarios.
    pub runs: usize,
    /// Name and version, in the order they take turns; the first is the one to compare with.
    pub monitors: Vec<(String, String)>,
    /// The monitors that were not found.
    pub missing: Vec<String>,
    /// Every failure, repeated ones included.
    pub failed: Vec<Failure>,
    samples: BTreeMap<(Scenario, Metric), BTreeMap<String, Vec<f64>>>,
}

/// One part of a scenario failed under a monitor in one run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Failure {
    /// Where.
    pub scenario: Scenario,
    /// The part that failed.
    pub part: String,
    /// Which one.
    pub monitor: String,
    /// Why.
    pub error: String,
}

/// The summary of some samples.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Summary {
    /// How many samples there are.
    pub samples: usize,
    /// The lowest.
    pub min: f64,
    /// The middle one, or between the two middle ones.
    pub median: f64,
    /// The 95th percentile.
    pub p95: f64,
    /// The highest.
    pub max: f64,
    /// The median divided by this monitor's; none without one.
    pub ratio: Option<f64>,
}

/// A line of the table: one metric under all monitors.
#[derive(Debug)]
pub struct Row {
    /// Where.
    pub scenario: Scenario,
    /// What.
    pub metric: Metric,
    /// By monitor, in their order; `None` for one without a figure.
    pub cells: Vec<Option<Summary>>,
}

impl Figures {
    /// Records a monitor, once.
    pub fn monitor(&mut self, name: String, version: String) {
        if !self.monitors.iter().any(|(known, _)| *known == name) {
            self.monitors.push((name, version));
        }
    }

    /// Adds a figure.
    pub fn sample(&mut self, scenario: Scenario, metric: Metric, monitor: String, value: f64) {
        self.samples.entry((scenario, metric)).or_default().entry(monitor).or_default().push(value);
    }

    /// The samples, in the order of measurement; none if it was not measured.
    #[must_use]
    pub fn samples(&self, scenario: Scenario, metric: Metric, monitor: &str) -> &[f64] {
        let by_monitor = self.samples.get(&(scenario, metric));
        by_monitor.and_then(|by_monitor| by_monitor.get(monitor)).map_or(&[], Vec::as_slice)
    }

    /// Why `monitor` has no figure for `metric`.
    #[must_use]
    pub fn why_missing(&self, scenario: Scenario, metric: Metric, monitor: &str) -> String {
        let part = Part::measuring(scenario, metric).map_or("", Part::label);
        let failed = self.failed.iter().find(|failure| {
            failure.scenario == scenario && failure.part == part && failure.monitor == monitor
        });
        match (failed, metric) {
            (Some(failure), _) => format!("failed: {}", failure.error),
            (None, Metric::List) => "has no stratoctl".to_owned(),
            (None, Metric::LivePause | Metric::ScatteredDirectory | Metric::ScatteredStream) => {
                "must be stopped for a save".to_owned()
            }
            (None, _) => "not measured".to_owned(),
        }
    }

    /// All of it, in order.
    #[must_use]
    pub fn rows(&self) -> Vec<Row> {
        let row = |(&(scenario, metric), by_monitor): (_, &BTreeMap<String, Vec<f64>>)| {
            let summary = |name: &String| by_monitor.get(name).and_then(|all| summarise(all));
            let mut cells: Vec<_> = self.monitors.iter().map(|(name, _)| summary(name)).collect();
            let ours = cells.first().copied().flatten();
            for cell in cells.iter_mut().flatten() {
                // There is no ratio to a median of zero.
                let ratio = ours.map(|ours| cell.median / ours.median);
                cell.ratio = ratio.filter(|ratio| ratio.is_finite());
            }
            Row { scenario, metric, cells }
        };
        self.samples.iter().map(row).collect()
    }

    /// The table for people.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = String::new();
        let mut last = None;
        for row in self.rows() {
            if last.replace(row.scenario) != Some(row.scenario) {
                // Writing to a string does not fail.
                let _ = write!(text, "\n{:<38}", row.scenario.title());
                for (name, _) in &self.monitors {
                    let _ = write!(text, "{name:>34}");
                }
                text.push('\n');
            }
            let (label, unit) = row.metric.label();
            let better = if row.metric.more_is_better() { '+' } else { '-' };
            let _ = write!(text, "{:<38}", format!("{label}, {unit} ({better})"));
            for (column, cell) in row.cells.iter().enumerate() {
                let cell = cell.map_or_else(
                    || "none".to_owned(),
                    |cell| {
                        let range = format!("({}-{})", short(cell.min), short(cell.max));
                        let ratio = match cell.ratio {
                            Some(ratio) if column > 0 => format!(" x{ratio:.2}"),
                            _ => String::new(),
                        };
                        format!("{} {range}{ratio}", short(cell.median))
                    },
                );
                let _ = write!(text, "{cell:>34}");
            }
            text.push('\n');
        }
        text
    }

    /// Everything, for programs.
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        let named = |row: &Row| {
            let cells = self.monitors.iter().zip(&row.cells);
            let cells: serde_json::Map<_, _> =
                cells.map(|((name, _), cell)| (name.clone(), serde_json::json!(cell))).collect();
            let samples = self.samples.get(&(row.scenario, row.metric));
            let (label, unit) = row.metric.label();
            serde_json::json!({
                "scenario": row.scenario,
                "metric": row.metric,
                "label": label,
                "unit": unit,
                "more_is_better": row.metric.more_is_better(),
                "monitors": cells,
                "samples": samples,
            })
        };
        let monitors: Vec<_> = self
            .monitors
            .iter()
            .map(|(name, version)| serde_json::json!({ "name": name, "version": version }))
            .collect();
        serde_json::json!({
            "title": self.title,
            "about": self.about,
            "runs": self.runs,
            "monitors": monitors,
            "not_found": self.missing,
            "failed": self.failed,
            "figures": self.rows().iter().map(named).collect::<Vec<_>>(),
        })
    }
}

fn summarise(samples: &[f64]) -> Option<Summary> {
    Some(Summary {
        samples: samples.len(),
        min: quantile(samples, 0.0)?,
        median: median(samples)?,
        p95: quantile(samples, 0.95)?,
        max: quantile(samples, 1.0)?,
        ratio: None,
    })
}

/// Three significant digits, or all digits before the point.
#[must_use]
pub fn short(value: f64) -> String {
    match value.abs() {
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures() -> Figures {
        let mut figures = Figures::default();
        figures.monitor("ours".to_owned(), "1".to_owned());
        figures.monitor("other".to_owned(), "2".to_owned());
        for value in [3.0, 1.0, 2.0] {
            figures.sample(Scenario::Payload, Metric::Api, "ours".to_owned(), value);
        }
        for value in [6.0, 2.0] {
            figures.sample(Scenario::Payload, Metric::Api, "other".to_owned(), value);
        }
        figures.sample(Scenario::Linux, Metric::TcpIn, "other".to_owned(), 120.0);
        figures
    }

    #[test]
    fn a_summary_has_the_median_the_range_and_the_ratio_to_this_monitor() {
        let rows = figures().rows();
        let [ours, other] = rows[0].cells[..] else { panic!("two monitors") };
        assert_eq!(
            ours,
            Some(Summary {
                samples: 3,
                min: 1.0,
                median: 2.0,
                p95: 2.9,
                max: 3.0,
                ratio: Some(1.0)
            })
        );
        assert_eq!(
            other,
            Some(Summary {
                samples: 2,
                min: 2.0,
                median: 4.0,
                p95: 5.8,
                max: 6.0,
                ratio: Some(2.0)
            })
        );
    }

    #[test]
    fn the_table_shows_what_is_missing_as_such() {
        let table = figures().table();
        let line = table.lines().find(|line| line.starts_with("exec to API ready")).unwrap();
        assert!(
            line.contains("2.00 (1.00-3.00)") && line.ends_with("4.00 (2.00-6.00) x2.00"),
            "{line}"
        );
        let line = table.lines().find(|line| line.starts_with("TCP host to guest")).unwrap();
        assert!(line.contains("none") && line.ends_with("120 (120-120)"), "{line}");
    }

    #[test]
    fn what_is_missing_has_a_reason() {
        let mut figures = figures();
        let (scenario, monitor) = (Scenario::Snapshots, "other".to_owned());
        let (part, error) = ("save".to_owned(), "no space".to_owned());
        figures.failed.push(Failure { scenario, part, monitor, error });
        let why = |metric| figures.why_missing(Scenario::Snapshots, metric, "other");
        assert_eq!(why(Metric::SaveRatio), "failed: no space");
        assert_eq!(why(Metric::LivePause), "must be stopped for a save");
        assert_eq!(why(Metric::Restore), "not measured");
    }

    #[test]
    fn the_json_has_every_sample() {
        let json = figures().json();
        assert_eq!(json["figures"][0]["samples"]["ours"], serde_json::json!([3.0, 1.0, 2.0]));
        assert_eq!(json["figures"][0]["monitors"]["other"]["ratio"], 2.0);
        assert_eq!(json["figures"][1]["monitors"]["ours"], serde_json::Value::Null);
    }
}
