//! `cargo compare`: this monitor beside the others that this machine has, and beside other builds
//! of itself.
use std::collections::VecDeque;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{env, io};

use anyhow::{Context, Result, bail, ensure};
use stories::agent;
use stories::debian::Debian;
use stories::host::{Host, Job, Said};
use stories::paths::{GUEST_KERNEL, Paths};
use stories::progress::Step;
use xtask::bench::about::About;
use xtask::bench::figures::{Failure, Figures};
use xtask::bench::held::answers::Answers;
use xtask::bench::measure::{INITRAMFS, MEASURE, STRATOCTL, Subject, Task, measure};
use xtask::bench::{Message, Scenario, builds, chart, guests, held, monitors, scattered};

const USAGE: &str = "\
Runs the same guests under this monitor and under every other one on PATH, in turns.

Usage: cargo compare [-- OPTIONS]
  -n RUNS      runs of each monitor on this machine's own KVM (default 7)
  --quick      two short runs
  --native     only on this machine's own KVM
  --emulated   only in the emulated host
  --payload    no Linux: only payloads of a few instructions
  --scattered  only the pauses of saves while Linux writes all over its memory (10 of each kind
               in a run, 5 runs)
  --builds A B only two builds of this monitor: programs, or directories with a `stratovirt`; 200
               runs of each for what takes milliseconds, 20 for block and network, or RUNS.
               Fails if B is certainly slower or larger than A by more than 3 %.
  --held       only how this monitor answers (50 times, or RUNS) while a file, a disk or the guest
               holds what it needs. Needs root. Fails if an answer comes too late.
  -h           this text

STRATOVIRT_GUEST_KERNEL names a kernel that runs natively where an unmodified one does not.
The figures go to target/compare: figures.json and chart.svg, builds.json, held.json.
";

/// How long the measuring may be silent.
const TIMEOUT: Duration = Duration::from_secs(300);

/// What is compared.
#[derive(PartialEq, Eq)]
enum What {
    Monitors,
    Scattered,
    Builds([PathBuf; 2]),
    Held,
}

struct Options {
    what: What,
    runs: Option<usize>,
    quick: bool,
    native: bool,
    emulated: bool,
    payload: bool,
}

impl Options {
    /// What the command line asks for; none if it asks for help.
    fn parse(mut words: VecDeque<String>) -> Result<Option<Self>> {
        let mut options = Self {
            what: What::Monitors,
            runs: None,
            quick: false,
            native: true,
            emulated: true,
            payload: false,
        };
        while let Some(word) = words.pop_front() {
            match word.as_str() {
                "-n" => {
                    let runs = words.pop_front().and_then(|runs| runs.parse().ok());
                    let runs = runs.filter(|&runs| runs > 0);
                    options.runs = Some(runs.context("-n takes a number of runs, 1 or more")?);
                }
                "--quick" => options.quick = true,
                "--native" => options.emulated = false,
                "--emulated" => options.native = false,
                "--payload" => (options.payload, options.emulated) = (true, false),
                "--scattered" => options.only(What::Scattered)?,
                "--builds" => {
                    let (a, b) = words.pop_front().zip(words.pop_front()).context(
                        "--builds takes two builds of stratovirt, each a program or the directory that it is in",
                    )?;
                    let [a, b] = [a, b].map(|build| builds::program(Path::new(&build)));
                    options.only(What::Builds([a?, b?]))?;
                }
                "--held" => options.only(What::Held)?,
                "-h" | "--help" => return Ok(None),
                // The alias ends with one already.
                "--" => {}
                _ => bail!("{word} is not an option\n\n{USAGE}"),
            }
        }
        Ok(Some(options))
    }

    fn only(&mut self, what: What) -> Result<()> {
        ensure!(
            self.what == What::Monitors,
            "--scattered, --builds and --held are mutually \
                                              exclusive"
        );
        self.what = what;
        Ok(())
    }

    /// Runs, where `usual` ones are enough for a sound figure.
    fn runs(&self, usual: usize) -> usize {
        self.runs.unwrap_or(if self.quick { 2 } else { usual })
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
    let (host, paths, debian) = match &options.what {
        What::Monitors => agent::prepare()?,
        What::Builds([a, _]) => agent::prepare_with(a)?,
        What::Scattered | What::Held => agent::prepare_with(&agent::monitor()?)?,
    };
    let out = paths.cache.join("../../compare");
    fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
    let out = fs::canonicalize(&out)?;
    let step = Step::spinner("Building the guests' init");
    let initramfs = guests::make_initramfs(&debian, &out)?;
    step.done();

    let with_linux = host == Host::Native || env::var_os(GUEST_KERNEL).is_some();
    if !with_linux && options.what != What::Held {
        eprintln!(
            "{GUEST_KERNEL} is not set to a kernel that runs natively here: Linux is not measured \
             on this machine's own KVM."
        );
    }
    let mut run = Run { paths: &paths, debian: &debian, initramfs: &initramfs, stratoctl: None };
    let seconds = if options.quick { 0.5 } else { 1.0 };
    let task = |subject| Task { subject, seconds };
    let mut results = Results::default();
    results.figures.about = About::here_and_now();
    match options.what {
        What::Monitors => {}
        What::Scattered => {
            ensure!(with_linux, "--scattered needs a Linux that runs natively: see {GUEST_KERNEL}");
            let runs = options.runs(scattered::RUNS);
            results.figures.runs = runs;
            let subject = Subject::Monitors(vec![Scenario::Scattered], runs);
            run.run(&Host::Native, &task(subject), &mut results)?;
            return report(&results.figures, &out);
        }
        What::Builds(ref programs) => {
            let plan = builds::Plan {
                programs: programs.clone(),
                times: options.runs(builds::TIMES),
                io_times: if with_linux && !options.payload {
                    options.runs(builds::IO_TIMES)
                } else {
                    0
                },
            };
            run.run(&Host::Native, &task(Subject::Builds(plan)), &mut results)?;
            return report_builds(&results.figures, programs, &out);
        }
        What::Held => {
            let subject = Subject::Held(options.runs(held::TIMES));
            run.run(&Host::Native, &task(subject), &mut results)?;
            return report_held(&results, &out);
        }
    }

    let missing = monitors::find(&paths, &debian).1;
    for name in &missing {
        eprintln!("{name}: not found on PATH.");
    }
    results.figures.missing = missing.into_iter().map(str::to_owned).collect();
    let stratoctl = agent::stratoctl()?;
    run.stratoctl = Some(&stratoctl);
    let runs = options.runs(7);
    results.figures.runs = runs;
    if options.native {
        let mut scenarios = vec![Scenario::Payload, Scenario::Snapshots, Scenario::Domains];
        if with_linux && !options.payload {
            scenarios.push(Scenario::Linux);
            scenarios.push(Scenario::Scattered);
        }
        run.run(&Host::Native, &task(Subject::Monitors(scenarios, runs)), &mut results)?;
    }
    if options.emulated && host != Host::Native {
        // Everything takes ten times as long there.
        let subject = Subject::Monitors(vec![Scenario::Emulated], runs.div_ceil(2));
        run.run(&host, &task(subject), &mut results)?;
    }
    report(&results.figures, &out)
}

fn report(figures: &Figures, out: &Path) -> Result<()> {
    for (name, version) in &figures.monitors {
        println!("{name}: {version}");
    }
    print!("{}", figures.table());
    println!(
        "\nMedians (min-max); xN: the median divided by this monitor's; + more is better, - less is better."
    );
    for line in scattered::verdict(figures) {
        println!("{line}");
    }
    for failure in &figures.failed {
        let Failure { scenario, part, monitor, error } = failure;
        println!("{}, {part}: {monitor} failed: {error}", scenario.title());
    }
    let json = out.join("figures.json");
    fs::write(&json, serde_json::to_string_pretty(&figures.json())?)?;
    let svg = out.join("chart.svg");
    fs::write(&svg, chart::draw(figures))?;
    println!("{}\n{}", json.display(), svg.display());
    Ok(())
}

fn report_builds(figures: &Figures, programs: &[PathBuf; 2], out: &Path) -> Result<()> {
    for ((name, version), program) in figures.monitors.iter().zip(programs) {
        println!("{name}: {version}, {}", program.display());
    }
    let rows = builds::rows(figures);
    print!("{}", builds::table(&rows));
    println!(
        "\ncost: B's median divided by A's, or A's by B's where more is better; above 1, B is worse. + more is better, - less is better."
    );
    let json = out.join("builds.json");
    fs::write(&json, serde_json::to_string_pretty(&builds::json(figures, &rows))?)?;
    println!("{}", json.display());
    let worse = rows.iter().filter(|row| row.is_worse());
    let worse: Vec<_> = worse.map(|row| row.metric.label().0).collect();
    ensure!(
        worse.is_empty(),
        "B is worse than A: the interval lies wholly above {} for {}",
        builds::TOLERANCE,
        worse.join("; ")
    );
    Ok(())
}

fn report_held(results: &Results, out: &Path) -> Result<()> {
    for (name, version) in &results.figures.monitors {
        println!("{name}: {version}");
    }
    print!("{}", results.held.table());
    let json = out.join("held.json");
    fs::write(&json, serde_json::to_string_pretty(&results.held.json())?)?;
    println!("\n{}", json.display());
    for (hold, error) in &results.held.not_held {
        println!("{}: not held: {error}", hold.title());
    }
    let late = results.held.late();
    ensure!(late == 0, "{late} answers came too late, or not at all");
    ensure!(results.held.not_held.is_empty(), "not everything could be measured");
    Ok(())
}

/// The messages of the measuring process so far.
#[derive(Default)]
struct Results {
    figures: Figures,
    held: Answers,
}

/// What every measuring process needs.
struct Run<'a> {
    paths: &'a Paths,
    debian: &'a Debian,
    initramfs: &'a [PathBuf; 2],
    /// Only for domains.
    stratoctl: Option<&'a Path>,
}

impl Run<'_> {
    /// Measures on `host`.
    fn run(&self, host: &Host, task: &Task, results: &mut Results) -> Result<()> {
        let mut job = Job::this_program(&[MEASURE, &serde_json::to_string(task)?])?;
        for (file, name) in self.initramfs.iter().zip(INITRAMFS) {
            job.files.push((file.clone(), name.to_owned()));
        }
        job.own_mounts = matches!(task.subject, Subject::Held(_));
        match host {
            Host::Native => {
                let stratoctl = self.stratoctl.map(|file| (file.to_owned(), STRATOCTL.to_owned()));
                job.files.extend(stratoctl);
            }
            Host::Emulated(_) => job.files.extend(monitors::files(self.paths, self.debian)?),
        }
        let running = host.start(self.paths, self.debian, &job)?;
        let mut step = Step::spinner("Starting");
        loop {
            let said = running.next(Instant::now() + TIMEOUT);
            let message = match said {
                Some(Said::Text(text)) => {
                    io::stderr().write_all(&text)?;
                    continue;
                }
                Some(Said::Control(value)) => serde_json::from_value(value)?,
                Some(Said::End) => bail!("the measuring process ended\n{}", running.console()),
                None => bail!("no more output came in time\n{}", running.console()),
            };
            match message {
                Message::Plan(steps) => step = Step::count("Measuring", steps),
                Message::Monitor { name, version } => results.figures.monitor(name, version),
                Message::Step(what) => {
                    step.advance();
                    step.say(&what);
                }
                Message::Sample { scenario, metric, monitor, value } => {
                    results.figures.sample(scenario, metric, monitor, value);
                }
                Message::Failed { scenario, part, monitor, error } => {
                    results.figures.failed.push(Failure { scenario, part, monitor, error });
                }
                Message::Held { hold, question, answer } => {
                    results.held.add(hold, question, answer);
                }
                Message::NotHeld { hold, error } => results.held.not_held.push((hold, error)),
                Message::Done(None) => break,
                Message::Done(Some(error)) => bail!("{error}"),
            }
        }
        step.done();
        running.finish(Instant::now() + Duration::from_secs(20))
    }
}
