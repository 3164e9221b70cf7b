//! Compares two builds of this monitor, in turns: what has become slower, and how certain that is.
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::{fs, thread};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::figures::{Figures, short};
use super::guests::FIRST_BYTE;
use super::measure::{LIMIT, STARTED, Turn, introduce, send};
use super::monitors::Found;
use super::rig::{self, MIB, Rig};
use super::run::Run;
use super::statistics::{Ratio, median, ratio_of_medians};
use super::{Message, Metric, Scenario, snapshots};

/// The names of the two builds.
pub const NAMES: [&str; 2] = ["A", "B"];
/// Runs of each for figures that take milliseconds, unless the command line says otherwise.
pub const TIMES: usize = 200;
/// Memory is measured in every tenth run: it takes a second, and hardly varies.
const OF_MEMORY: usize = 10;
/// Runs of each for figures that a guest measures by moving data, unless the command line says
/// otherwise.
pub const IO_TIMES: usize = 20;
/// A build is worse if an interval lies wholly above this.
pub const TOLERANCE: f64 = 1.03;
/// Fewer runs give no verdict: even the interval from the lowest to the highest value does not
/// contain the true median with a probability of 95 %.
const FEWEST: usize = 6;
/// How often one save is restored. The layout of its file in the page cache changes the time to map
/// it by some 15 %, so two builds that each restored one save would differ by chance.
const TURNS_OF_A_SAVE: usize = 10;
/// What is compared.
const FIGURES: [(Scenario, Metric); 10] = [
    (Scenario::Payload, Metric::FirstByte),
    (Scenario::Payload, Metric::Private),
    (Scenario::Snapshots, Metric::Restore),
    (Scenario::Linux, Metric::SeqRead),
    (Scenario::Linux, Metric::SeqWrite),
    (Scenario::Linux, Metric::RandRead1),
    (Scenario::Linux, Metric::RandRead32),
    (Scenario::Linux, Metric::TcpOut),
    (Scenario::Linux, Metric::TcpIn),
    (Scenario::Linux, Metric::TcpRoundTrips),
];

/// The two builds and the numbers of runs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Plan {
    /// The two programs.
    pub programs: [PathBuf; 2],
    /// Runs of each for figures that take milliseconds.
    pub times: usize,
    /// Runs of each for block and network; `None` where no Linux runs.
    pub io_times: usize,
}

/// The monitor that `named` refers to: a program, or a directory that contains one.
///
/// # Errors
/// There is none.
pub fn program(named: &Path) -> Result<PathBuf> {
    let path = if named.is_dir() { named.join("stratovirt") } else { named.to_owned() };
    let found = fs::canonicalize(&path).with_context(|| {
        format!(
            "--builds takes two builds of stratovirt, each a program or the directory that it is in: {} does not exist",
            path.display()
        )
    })?;
    anyhow::ensure!(found.is_file(), "{} is not a program", found.display());
    Ok(found)
}

/// Measures both.
///
/// # Errors
/// One of them fails, so that the other cannot be compared.
pub fn measure(rig: &Rig, plan: &Plan) -> Result<()> {
    let [first, second] = &plan.programs;
    let [a, b] = NAMES;
    let builds = [build(rig, a, first)?, build(rig, b, second)?];
    introduce(&builds)?;
    let memory_times = plan.times.div_ceil(OF_MEMORY).max(FEWEST.min(plan.times));
    send(&Message::Plan(2 * (plan.times * 2 + memory_times + plan.io_times)))?;

    let started = |turn: &Turn<'_>| {
        let mut run = turn.start(&rig.payload(turn.found)?)?;
        let first = run.wait_byte(FIRST_BYTE, LIMIT)?;
        anyhow::Ok((run, first))
    };
    in_turns(rig, &builds, plan.times, Scenario::Payload, |turn| {
        let (_run, first) = started(turn)?;
        turn.time(Metric::FirstByte, first)
    })?;
    in_turns(rig, &builds, memory_times, Scenario::Payload, |turn| {
        let (run, _) = started(turn)?;
        thread::sleep(STARTED);
        turn.sample(Metric::Private, run.private_kib(MIB)? as f64)
    })?;

    // Each restores its own save: formats may differ.
    let saved = |found: &Found| rig.dir.join(format!("saved-{}", found.name));
    for first in (0..plan.times).step_by(TURNS_OF_A_SAVE) {
        for found in &builds {
            let turn = Turn::new(rig, found, Scenario::Snapshots);
            let (_run, mut connection, _) = turn.talking(MIB)?;
            snapshots::save(found, &mut connection, &saved(found))?;
        }
        let times = TURNS_OF_A_SAVE.min(plan.times - first);
        in_turns(rig, &builds, times, Scenario::Snapshots, |turn| {
            let (guest, saved) = (rig.talker(turn.found)?, saved(turn.found));
            let mut run = Run::restore(turn.found, &guest, &saved, &rig.dir)?;
            turn.time(Metric::Restore, run.wait_byte(FIRST_BYTE, LIMIT)?)
        })?;
    }
    in_turns(rig, &builds, plan.io_times, Scenario::Linux, |turn| turn.devices("all"))
}

/// A copy of `program`. How a program was read into the page cache decides how many of its pages
/// are mapped at once, and pages that another process maps, too, are not private. So two copies of
/// one program that were read in different ways differ by 2 % in private memory.
fn build(rig: &Rig, name: &str, program: &Path) -> Result<Found> {
    let copy = rig.dir.join(format!("build-{name}"));
    fs::copy(program, &copy).with_context(|| format!("cannot copy {}", program.display()))?;
    rig::read_again(&copy)?;
    Ok(Found::build(name, copy))
}

/// Runs a step `times` times for both; which one goes first alternates.
fn in_turns(
    rig: &Rig,
    builds: &[Found; 2],
    times: usize,
    scenario: Scenario,
    act: impl Fn(&Turn<'_>) -> Result<()>,
) -> Result<()> {
    let [a, b] = builds;
    for number in 0..times {
        for found in if number % 2 == 0 { [a, b] } else { [b, a] } {
            send(&Message::Step(format!("{}: {}", scenario.title(), found.name)))?;
            act(&Turn::new(rig, found, scenario))
                .with_context(|| format!("{}, build {}", scenario.title(), found.name))?;
        }
    }
    Ok(())
}

/// One figure of both.
#[derive(Debug)]
pub struct Row {
    /// What was measured.
    pub metric: Metric,
    /// Runs of each.
    pub times: usize,
    /// The medians.
    pub medians: [f64; 2],
    /// B's cost relative to A's: above 1, B is worse, whether higher or lower is better for this
    /// figure.
    pub cost: Ratio,
}

impl Row {
    /// Whether B is certainly worse by more than [`TOLERANCE`].
    #[must_use]
    pub fn is_worse(&self) -> bool {
        self.times >= FEWEST && self.cost.low > TOLERANCE
    }
}

/// The results of both; figures that were not measured are left out.
#[must_use]
pub fn rows(figures: &Figures) -> Vec<Row> {
    let row = |(scenario, metric): (Scenario, Metric)| {
        let [a, b] = NAMES.map(|name| figures.samples(scenario, metric, name));
        let cost =
            if metric.more_is_better() { ratio_of_medians(a, b) } else { ratio_of_medians(b, a) };
        Some(Row { metric, times: a.len(), medians: [median(a)?, median(b)?], cost: cost? })
    };
    FIGURES.into_iter().filter_map(row).collect()
}

/// The table for people.
#[must_use]
pub fn table(rows: &[Row]) -> String {
    let [a, b] = NAMES;
    let mut text = format!(
        "\n{:<38}{:>6}{a:>12}{b:>12}{:>8}{:>16}\n",
        "median of each", "n", "cost", "95 % interval"
    );
    for row in rows {
        let (label, unit) = row.metric.label();
        let better = if row.metric.more_is_better() { '+' } else { '-' };
        let [a, b] = row.medians.map(short);
        let Ratio { ratio, low, high } = row.cost;
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "{:<38}{:>6}{a:>12}{b:>12}{ratio:>8.3}{:>16}{}",
            format!("{label}, {unit} ({better})"),
            row.times,
            format!("{low:.3}-{high:.3}"),
            match row.is_worse() {
                true => "  WORSE",
                false if row.times < FEWEST => "  too few runs",
                false => "",
            }
        );
    }
    text
}

/// Everything, for programs.
#[must_use]
pub fn json(figures: &Figures, rows: &[Row]) -> Value {
    let row = |row: &Row| {
        let [a, b] = row.medians;
        json!({
            "metric": row.metric,
            "unit": row.metric.label().1,
            "more_is_better": row.metric.more_is_better(),
            "runs": row.times,
            "medians": { "A": a, "B": b },
            "cost": row.cost,
            "worse": row.is_worse(),
        })
    };
    json!({
        "rows": rows.iter().map(row).collect::<Vec<_>>(),
        "tolerance": TOLERANCE,
        "all": figures.json(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(metric: Metric, a: &[f64], b: &[f64]) -> Figures {
        let (scenario, _) = FIGURES.into_iter().find(|(_, known)| *known == metric).unwrap();
        let mut figures = Figures::default();
        for (name, samples) in NAMES.into_iter().zip([a, b]) {
            for &sample in samples {
                figures.sample(scenario, metric, name.to_owned(), sample);
            }
        }
        figures
    }

    /// Twenty samples around `middle`.
    fn around(middle: f64) -> Vec<f64> {
        (0..20).map(|turn| middle * (1.0 + f64::from(turn % 5 - 2) / 1000.0)).collect()
    }

    #[test]
    fn a_cost_above_one_means_that_b_is_worse_for_times_and_for_rates() {
        let rows = |metric, a, b| super::rows(&figures(metric, &around(a), &around(b)));
        let slower = rows(Metric::FirstByte, 50.0, 55.0);
        assert!(slower[0].is_worse() && (slower[0].cost.ratio - 1.1).abs() < 1e-9);
        assert!(!rows(Metric::FirstByte, 55.0, 50.0)[0].is_worse());
        assert!(rows(Metric::SeqRead, 1100.0, 1000.0)[0].is_worse());
        assert!(!rows(Metric::SeqRead, 1000.0, 1100.0)[0].is_worse());
        let few = super::rows(&figures(Metric::SeqRead, &[1100.0; 5], &[1000.0; 5]));
        assert!(!few[0].is_worse() && table(&few).contains("too few runs"));
    }

    #[test]
    fn an_interval_that_reaches_below_the_tolerance_is_no_verdict() {
        // A median that is 5 % higher, with so much noise that it is not significant.
        let noisy: Vec<f64> = (0..20).map(|turn| 53.0 + f64::from(turn * 7 % 20 - 10)).collect();
        let rows = rows(&figures(Metric::FirstByte, &around(50.0), &noisy));
        assert!(rows[0].cost.ratio > TOLERANCE && !rows[0].is_worse(), "{:?}", rows[0]);
    }

    #[test]
    fn what_was_not_measured_is_left_out() {
        let figures = figures(Metric::Private, &around(5000.0), &around(5000.0));
        let rows = rows(&figures);
        assert_eq!(rows.len(), 1);
        let table = table(&rows);
        assert!(table.contains("private memory") && !table.contains("TCP"), "{table}");
        assert!(table.contains("1.000-1.000") && !table.contains("WORSE"), "{table}");
        assert_eq!(json(&figures, &rows)["rows"][0]["runs"], 20);
    }

    #[test]
    fn a_build_is_a_program_or_the_directory_that_it_is_in() {
        let dir = std::env::temp_dir().join(format!("builds.{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let error = program(&dir).unwrap_err().to_string();
        assert!(error.contains("stratovirt does not exist"), "{error}");
        let file = dir.join("stratovirt");
        fs::write(&file, "").unwrap();
        let canonical = fs::canonicalize(&file).unwrap();
        assert_eq!(program(&dir).unwrap(), canonical);
        assert_eq!(program(&file).unwrap(), canonical);
        fs::remove_dir_all(&dir).unwrap();
    }
}
