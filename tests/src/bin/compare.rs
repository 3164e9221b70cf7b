//! `cargo compare`: this monitor beside the others that this machine has.
use std::collections::VecDeque;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{env, io};

use anyhow::{Context, Result, bail};
use stories::agent::{self, prepare};
use stories::bench::figures::Figures;
use stories::bench::measure::{INITRAMFS, MEASURE, STRATOCTL, Task, measure};
use stories::bench::{Message, Scenario, chart, guests, monitors};
use stories::debian::Debian;
use stories::host::{Host, Job, Said};
use stories::paths::{GUEST_KERNEL, Paths};
use stories::progress::Step;

const USAGE: &str = "\
Runs the same guests under this monitor and under every other one on PATH, in turns.

Usage: cargo compare [-- OPTIONS]
  -n RUNS      runs of each monitor on this machine's own KVM (default 7)
  --quick      two short runs
  --native     only on this machine's own KVM
  --emulated   only in the emulated host
  --payload    no Linux: only payloads of a few instructions
  -h           this text

STRATOVIRT_GUEST_KERNEL names a kernel that runs natively where an unmodified one does not.
The figures go to target/compare/figures.json, the chart to target/compare/chart.svg.
";

/// How long the measuring may be silent.
const PATIENCE: Duration = Duration::from_secs(300);

struct Options {
    runs: usize,
    quick: bool,
    native: bool,
    emulated: bool,
    payload: bool,
}

impl Options {
    /// What the command line asks for; none if it asks for help.
    fn parse(mut words: VecDeque<String>) -> Result<Option<Self>> {
        let mut options =
            Self { runs: 7, quick: false, native: true, emulated: true, payload: false };
        while let Some(word) = words.pop_front() {
            match word.as_str() {
                "-n" => {
                    let runs = words.pop_front().and_then(|runs| runs.parse().ok());
                    options.runs = runs
                        .filter(|&runs| runs > 0)
                        .context("-n takes a number of runs, 1 or more")?;
                }
                "--quick" => (options.quick, options.runs) = (true, options.runs.min(2)),
                "--native" => options.emulated = false,
                "--emulated" => options.native = false,
                "--payload" => (options.payload, options.emulated) = (true, false),
                "-h" | "--help" => return Ok(None),
                // The alias ends with one already.
                "--" => {}
                _ => bail!("{word} is no option\n\n{USAGE}"),
            }
        }
        Ok(Some(options))
    }
}

fn main() -> Result<()> {
    let mut words: VecDeque<String> = env::args().skip(1).collect();
    if words.front().is_some_and(|word| word == MEASURE) {
        let task = words.pop_back().context("no task")?;
        return measure(&serde_json::from_str(&task).context("cannot read the task")?);
    }
    let Some(options) = Options::parse(words)? else {
        print!("{USAGE}");
        return Ok(());
    };
    let (host, paths, debian) = prepare()?;
    let out = paths.cache.join("../../compare");
    fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
    let out = fs::canonicalize(&out)?;
    let step = Step::spinner("Building the guests' init");
    let initramfs = guests::make_initramfs(&debian, &out)?;
    step.done();

    let mut figures = Figures::default();
    let missing = monitors::find(&paths, &debian).1;
    for name in &missing {
        eprintln!("{name}: not found on PATH.");
    }
    figures.missing = missing.into_iter().map(str::to_owned).collect();

    let with_linux = host == Host::Native || env::var_os(GUEST_KERNEL).is_some();
    let stratoctl = agent::stratoctl()?;
    let run = Run { paths: &paths, debian: &debian, initramfs: &initramfs, stratoctl: &stratoctl };
    let mut task = Task {
        scenarios: vec![Scenario::Payload, Scenario::Snapshots, Scenario::Domains],
        runs: options.runs,
        seconds: if options.quick { 0.5 } else { 1.0 },
    };
    if with_linux && !options.payload {
        task.scenarios.push(Scenario::Linux);
    } else if !with_linux {
        eprintln!(
            "{GUEST_KERNEL} names no kernel that runs natively here: no Linux on this machine's own KVM."
        );
    }
    if options.native {
        run.run(&Host::Native, &task, &mut figures)?;
    }
    if options.emulated && host != Host::Native {
        task.scenarios = vec![Scenario::Emulated];
        // Everything takes ten times as long there.
        task.runs = task.runs.div_ceil(2);
        run.run(&host, &task, &mut figures)?;
    }
    report(&figures, &out)
}

fn report(figures: &Figures, out: &Path) -> Result<()> {
    for (name, version) in &figures.monitors {
        println!("{name}: {version}");
    }
    print!("{}", figures.table());
    println!(
        "\nMedians (min-max); xN: the median divided by this monitor's; + more is better, - less is better."
    );
    for (scenario, monitor, error) in &figures.failed {
        println!("{}: {monitor} failed: {error}", scenario.title());
    }
    let json = out.join("figures.json");
    fs::write(&json, serde_json::to_string_pretty(&figures.json())?)?;
    let svg = out.join("chart.svg");
    fs::write(&svg, chart::draw(figures))?;
    println!("{}\n{}", json.display(), svg.display());
    Ok(())
}

/// What every measuring process needs.
struct Run<'a> {
    paths: &'a Paths,
    debian: &'a Debian,
    initramfs: &'a [PathBuf; 2],
    stratoctl: &'a Path,
}

impl Run<'_> {
    /// Measures on `host`.
    fn run(&self, host: &Host, task: &Task, figures: &mut Figures) -> Result<()> {
        let mut job = Job::this_program(&[MEASURE, &serde_json::to_string(task)?])?;
        for (file, name) in self.initramfs.iter().zip(INITRAMFS) {
            job.files.push((file.clone(), name.to_owned()));
        }
        match host {
            Host::Native => job.files.push((self.stratoctl.to_owned(), STRATOCTL.to_owned())),
            _ => job.files.extend(monitors::files(self.paths, self.debian)?),
        }
        let running = host.start(self.paths, self.debian, &job)?;
        let mut step = Step::spinner("Starting");
        loop {
            let said = running.next(Instant::now() + PATIENCE);
            let message = match said {
                Some(Said::Text(text)) => {
                    io::stderr().write_all(&text)?;
                    continue;
                }
                Some(Said::Control(value)) => serde_json::from_value(value)?,
                Some(Said::End) => bail!("the measuring process ended\n{}", running.console()),
                None => bail!("nothing more came in time\n{}", running.console()),
            };
            match message {
                Message::Plan(steps) => step = Step::count("Measuring", steps),
                Message::Monitor { name, version } => figures.monitor(name, version),
                Message::Step(what) => {
                    step.advance();
                    step.say(&what);
                }
                Message::Sample { scenario, metric, monitor, value } => {
                    figures.sample(scenario, metric, monitor, value);
                }
                Message::Failed { scenario, monitor, error } => {
                    figures.failed.push((scenario, monitor, error));
                }
                Message::Done(None) => break,
                Message::Done(Some(error)) => bail!("{error}"),
            }
        }
        step.done();
        running.finish(Instant::now() + Duration::from_secs(20))
    }
}
