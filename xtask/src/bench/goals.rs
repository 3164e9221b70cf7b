//! The performance goals of this monitor relative to others: measures them in one run and says
//! which are met.
use std::fmt::Write;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::figures::{Figures, short};
use super::measure::{compare, introduce};
use super::monitors::{BARE, FEW_SLOTS, Found, Monitor, OURS, PEERS_KNOWN};
use super::rig::Rig;
use super::statistics::{Ratio, median, ratio_of_medians};
use super::{Metric, Scenario, density};

const FIRECRACKER: &Monitor = &PEERS_KNOWN[1];
const CLOUD_HYPERVISOR: &Monitor = &PEERS_KNOWN[2];

/// The scenarios, the other monitors in each, and the default number of turns.
const MEASURED: [(Scenario, &[&Monitor], usize); 4] = [
    (Scenario::Density, &[FIRECRACKER], density::RUNS),
    (Scenario::Start, &[CLOUD_HYPERVISOR, &BARE], 40),
    (Scenario::Boot, &[&FEW_SLOTS, FIRECRACKER], 20),
    (Scenario::Io, &[CLOUD_HYPERVISOR], 20),
];

/// What is measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Plan {
    /// Turns of each, if not the default.
    pub runs: Option<usize>,
    /// Whether there is a Linux that runs here.
    pub linux: bool,
}

/// The limit of a figure.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Limit {
    AtMost(f64),
    AtLeast(f64),
}

impl Limit {
    fn is_kept(self, value: f64) -> bool {
        match self {
            Self::AtMost(limit) => value <= limit,
            Self::AtLeast(limit) => value >= limit,
        }
    }
}

/// A figure to reach.
struct Goal {
    /// The label for people, which names what it is compared with.
    figure: &'static str,
    measured: (Scenario, Metric),
    ours: &'static Monitor,
    /// The other monitor; `None` for a goal in the figure's own unit.
    other: Option<&'static Monitor>,
    limit: Limit,
}

const fn goal(
    figure: &'static str,
    measured: (Scenario, Metric),
    other: Option<&'static Monitor>,
    limit: Limit,
) -> Goal {
    Goal { figure, measured, ours: &OURS, other, limit }
}

const GOALS: [Goal; 17] = {
    use Limit::{AtLeast, AtMost};
    use Metric as M;
    use Scenario::{Boot, Density, Io, Start};
    const FC: Option<&Monitor> = Some(FIRECRACKER);
    const CH: Option<&Monitor> = Some(CLOUD_HYPERVISOR);
    [
        goal("machines at once, wall, to Firecracker's", (Density, M::ManyWall), FC, AtMost(1.0)),
        goal(
            "machines at once, CPU of each, to Firecracker's",
            (Density, M::ManyCpu),
            FC,
            AtMost(1.0),
        ),
        goal(
            "machines at once, guest's memory it has not touched, KiB",
            (Density, M::ManyGuest),
            None,
            AtMost(128.0),
        ),
        goal("clones at once, wall, to Firecracker's", (Density, M::ClonesWall), FC, AtMost(1.0)),
        goal(
            "clones at once, CPU of each, to Firecracker's",
            (Density, M::ClonesCpu),
            FC,
            AtMost(1.0),
        ),
        goal("exec to first byte, to Cloud Hypervisor's", (Start, M::FirstByte), CH, AtMost(0.6)),
        goal(
            "exec to first byte, to a bare C program's",
            (Start, M::FirstByte),
            Some(&BARE),
            AtMost(2.6),
        ),
        goal("exec to Linux's init, to Firecracker's", (Boot, M::Init), FC, AtMost(0.83)),
        Goal {
            ours: &FEW_SLOTS,
            ..goal("the same with `disk-slots=1,nic-slots=1`", (Boot, M::Init), FC, AtMost(0.75))
        },
        goal("4 KiB reads, depth 1, to Cloud Hypervisor's", (Io, M::RandRead1), CH, AtLeast(1.0)),
        goal("4 KiB writes, depth 1, to Cloud Hypervisor's", (Io, M::RandWrite1), CH, AtLeast(1.0)),
        goal("TCP guest to host, to Cloud Hypervisor's", (Io, M::TcpOut), CH, AtLeast(1.0)),
        goal("its CPU for each byte", (Io, M::TcpOutCpu), CH, AtMost(1.1)),
        goal("TCP host to guest, to Cloud Hypervisor's", (Io, M::TcpIn), CH, AtLeast(1.0)),
        goal("its CPU for each byte", (Io, M::TcpInCpu), CH, AtMost(1.1)),
        goal("TCP round trips, to Cloud Hypervisor's", (Io, M::TcpRoundTrips), CH, AtLeast(1.0)),
        goal("the CPU of each", (Io, M::TcpRoundTripCpu), CH, AtMost(1.1)),
    ]
};

/// Measures all figures that have goals, with those of `found` that are needed.
///
/// # Errors
/// The requesting process has ended, there is no C compiler, or the user has interrupted it.
pub fn measure(rig: &Rig, mut found: Vec<Found>, plan: &Plan) -> Result<()> {
    found.push(Found::few_slots(&rig.paths));
    found.push(Found::bare(&rig.dir)?);
    found.retain(|found| {
        let needed = |others: &&[&Monitor]| others.iter().any(|m| m.name == found.name);
        found.name == OURS.name || MEASURED.iter().any(|(_, others, _)| needed(others))
    });
    introduce(&found)?;
    for (scenario, others, usual) in MEASURED {
        if !plan.linux && matches!(scenario, Scenario::Boot | Scenario::Io) {
            continue;
        }
        let takes_part = |found: &&Found| {
            found.name == OURS.name || others.iter().any(|other| other.name == found.name)
        };
        let part: Vec<&Found> = found.iter().filter(takes_part).collect();
        compare(rig, &part, &[scenario], plan.runs.unwrap_or(usual))?;
    }
    Ok(())
}

/// A goal, and what was measured.
#[derive(Debug, Serialize)]
pub struct Row {
    figure: &'static str,
    /// Turns.
    runs: usize,
    /// The ratio of the medians, or the median where there is nothing to compare with.
    measured: Option<f64>,
    /// The 95 % interval of the ratio, if all turns succeeded.
    interval: Option<Ratio>,
    goal: String,
    /// None if it was not measured.
    met: Option<bool>,
    /// Why it was not measured.
    missing: Option<String>,
}

impl Row {
    fn of(goal: &Goal, figures: &Figures) -> Self {
        let (scenario, metric) = goal.measured;
        let samples = |monitor: &Monitor| figures.samples(scenario, metric, monitor.name);
        let ours = samples(goal.ours);
        let (measured, interval) = match goal.other {
            None => (median(ours), None),
            Some(other) => {
                let other = samples(other);
                let ratio = median(ours).zip(median(other)).map(|(ours, other)| ours / other);
                (ratio, ratio_of_medians(ours, other))
            }
        };
        let lacks = [Some(goal.ours), goal.other].into_iter().flatten();
        let lacks = lacks.into_iter().find(|monitor| samples(monitor).is_empty());
        let missing = lacks.map(|monitor| {
            let known = figures.monitors.iter().any(|(name, _)| name == monitor.name);
            let why = match known {
                true => figures.why_missing(scenario, metric, monitor.name),
                false => "not found on PATH".to_owned(),
            };
            format!("{}: {why}", monitor.name)
        });
        Self {
            figure: goal.figure,
            runs: ours.len(),
            measured,
            interval,
            goal: said(goal),
            met: measured.map(|value| goal.limit.is_kept(value)),
            missing,
        }
    }

    fn verdict(&self) -> &'static str {
        match self.met {
            Some(true) => "met",
            Some(false) => "missed",
            None => "not measured",
        }
    }

    fn value(&self) -> String {
        match (self.measured, self.interval) {
            (None, _) => "-".to_owned(),
            (Some(value), None) => short(value),
            (Some(value), Some(Ratio { low, high, .. })) => {
                format!("{} ({}-{})", short(value), short(low), short(high))
            }
        }
    }
}

fn said(goal: &Goal) -> String {
    match goal.limit {
        Limit::AtMost(limit) => format!("<= {limit}"),
        Limit::AtLeast(limit) => format!(">= {limit}"),
    }
}

/// All goals.
#[must_use]
pub fn rows(figures: &Figures) -> Vec<Row> {
    GOALS.iter().map(|goal| Row::of(goal, figures)).collect()
}

/// How many were missed or not measured.
#[must_use]
pub fn not_met(rows: &[Row]) -> usize {
    rows.iter().filter(|row| row.met != Some(true)).count()
}

/// The table for people.
#[must_use]
pub fn table(rows: &[Row]) -> String {
    let mut text = format!("\n{:<58}{:>4}{:>20}{:>9}\n", "ratio of medians", "n", "95 %", "goal");
    for row in rows {
        // Writing to a string does not fail.
        let _ = write!(
            text,
            "{:<58}{:>4}{:>20}{:>9}  {}",
            row.figure,
            row.runs,
            row.value(),
            row.goal,
            row.verdict()
        );
        if let Some(why) = &row.missing {
            let _ = write!(text, " ({})", why.lines().next().unwrap_or_default());
        }
        text.push('\n');
    }
    text
}

/// The table in `docs/compare.md`.
#[must_use]
pub fn page(figures: &Figures, rows: &[Row]) -> String {
    let about = &figures.about;
    let host = about.host.split(',').next().unwrap_or_default();
    let mut text =
        "| figure | ratio measured | goal | | n | date, host |\n|---|---|---|---|---|---|\n"
            .to_owned();
    for row in rows {
        let (figure, value, verdict) = (row.figure, row.value(), row.verdict());
        let _ = writeln!(
            text,
            "| {figure} | {value} | {} | {verdict} | {} | {}, {host} |",
            row.goal, row.runs, about.date
        );
    }
    let versions = figures.monitors.iter().map(|(name, version)| format!("{name}: {version}"));
    let _ = writeln!(text, "\n- {}\n- {}", figures.title, about.host);
    versions.for_each(|version| {
        let _ = writeln!(text, "- {version}");
    });
    text
}

/// Everything, for programs.
#[must_use]
pub fn json(figures: &Figures, rows: &[Row]) -> Value {
    json!({ "goals": rows, "all": figures.json() })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::bench::about::About;
    use crate::bench::figures::Failure;

    fn figures() -> Figures {
        let mut figures = Figures::default();
        figures.about =
            About { date: "2026-01-02".to_owned(), host: "2 x CPU, Linux 6".to_owned() };
        for monitor in [&OURS, FIRECRACKER] {
            figures.monitor(monitor.name.to_owned(), "1".to_owned());
        }
        let mut sample = |monitor: &Monitor, metric, value| {
            figures.sample(Scenario::Density, metric, monitor.name.to_owned(), value);
        };
        for value in [90.0, 110.0, 100.0] {
            sample(&OURS, Metric::ManyWall, value);
            sample(FIRECRACKER, Metric::ManyWall, value * 0.8);
            sample(&OURS, Metric::ManyGuest, value);
        }
        sample(&OURS, Metric::ClonesWall, 3.0);
        figures
    }

    #[test]
    fn each_goal_is_met_or_missed_by_itself() {
        let rows = rows(&figures());
        assert_eq!((rows[0].verdict(), rows[0].value().as_str()), ("missed", "1.25 (1.25-1.25)"));
        assert_eq!((rows[2].verdict(), rows[2].value().as_str()), ("met", "100"));
        assert_eq!(not_met(&rows), GOALS.len() - 1);
        assert!(Limit::AtLeast(1.0).is_kept(1.0) && !Limit::AtLeast(1.0).is_kept(0.99));
        assert!(Limit::AtMost(1.0).is_kept(1.0) && !Limit::AtMost(1.0).is_kept(1.01));
    }

    #[test]
    fn what_was_not_measured_has_a_reason() {
        let mut figures = figures();
        let error = "no way".to_owned();
        let (scenario, monitor) = (Scenario::Density, FIRECRACKER.name.to_owned());
        figures.failed.push(Failure {
            scenario,
            part: "clones at once".to_owned(),
            monitor,
            error,
        });
        let rows = rows(&figures);
        assert_eq!(rows[3].missing.as_deref(), Some("Firecracker: failed: no way"));
        assert_eq!(rows[5].missing.as_deref(), Some("this monitor: not measured"));
        figures.sample(Scenario::Start, Metric::FirstByte, OURS.name.to_owned(), 1.0);
        let rows = super::rows(&figures);
        assert_eq!(rows[5].missing.as_deref(), Some("Cloud Hypervisor: not found on PATH"));
        let table = table(&rows);
        assert!(table.contains("not measured (Firecracker: failed: no way)"), "{table}");
    }

    #[test]
    fn the_page_has_a_line_for_each_goal() {
        let figures = figures();
        let page = page(&figures, &rows(&figures));
        let lines: Vec<_> = page.lines().collect();
        assert_eq!(
            lines[2],
            "| machines at once, wall, to Firecracker's | 1.25 (1.25-1.25) | <= 1 | missed | 3 | 2026-01-02, 2 x CPU |"
        );
        let after = &lines[2 + GOALS.len()..];
        assert_eq!(
            after,
            ["", "- ", "- 2 x CPU, Linux 6", "- this monitor: 1", "- Firecracker: 1"]
        );
    }

    #[test]
    fn every_goal_is_measured_and_is_in_the_documentation() {
        let workspace = stories::paths::workspace();
        let page = fs::read_to_string(workspace.join("docs/compare.md")).unwrap();
        let rows: Vec<_> = page
            .lines()
            .filter(|line| line.contains(" | <= ") || line.contains(" | >= "))
            .collect();
        assert_eq!(rows.len(), GOALS.len());
        for (goal, row) in GOALS.iter().zip(rows) {
            let cells: Vec<_> = row.split(" | ").collect();
            assert_eq!(cells[0], format!("| {}", goal.figure));
            assert_eq!(cells[2], said(goal));
            let (scenario, metric) = goal.measured;
            assert!(crate::bench::part::Part::measuring(scenario, metric).is_some());
            let (_, others, _) = MEASURED.iter().find(|(known, ..)| *known == scenario).unwrap();
            let takes_part = |name| name == OURS.name || others.iter().any(|m| m.name == name);
            assert!(takes_part(goal.ours.name) && goal.other.is_none_or(|m| takes_part(m.name)));
        }
    }
}
