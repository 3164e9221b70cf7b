//! `cargo compare`: compares this monitor with the others on this machine, and with other builds of
//! itself.
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
use xtask::bench::density;
use xtask::bench::figures::{Failure, Figures};
use xtask::bench::held::answers::Answers;
use xtask::bench::measure::{INITRAMFS, MEASURE, STRATOCTL, Subject, Task, measure};
use xtask::bench::options::{Options, USAGE, What};
use xtask::bench::{
    Message, Scenario, builds, chart, goals, guests, held, monitors, remus, scattered,
};

/// The names of the files with figures and chart for the default comparison.
const FILES: [&str; 2] = ["figures.json", "chart.svg"];
/// How long the measuring process may be silent.
const TIMEOUT: Duration = Duration::from_secs(300);

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
        What::Scattered | What::Remus | What::Density | What::Goals | What::Held => {
            agent::prepare_with(&agent::monitor()?)?
        }
    };
    let out = paths.cache.join("../../compare");
    fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
    let out = fs::canonicalize(&out)?;
    let step = Step::spinner("Building the guests' init");
    let initramfs = guests::make_initramfs(&debian, &out)?;
    step.done();

    let with_linux = host == Host::Native || env::var_os(GUEST_KERNEL).is_some();
    if !with_linux && !matches!(options.what, What::Held | What::Density) {
        eprintln!(
            "{GUEST_KERNEL} is not set to a kernel that runs natively here: Linux is not measured \
             on this machine's own KVM."
        );
    }
    let mut run = Run { paths: &paths, debian: &debian, initramfs: &initramfs, stratoctl: None };
    // With twenty turns of the goals' figures, short ones are enough.
    let short = options.quick || options.what == What::Goals;
    let seconds = if short { 0.5 } else { 1.0 };
    let counts = options.counts;
    let task = |subject| Task { subject, seconds, counts, peers: options.peers.clone() };
    let mut results = Results::default();
    results.figures.title = "stratovirt beside other monitors".to_owned();
    results.figures.about = About::here_and_now();
    match options.what {
        What::Monitors => {}
        What::Scattered => {
            ensure!(with_linux, "--scattered needs a Linux that runs natively: see {GUEST_KERNEL}");
            let runs = options.runs(scattered::RUNS);
            results.figures.runs = runs;
            let subject = Subject::Monitors(vec![Scenario::Scattered], runs);
            run.run(&Host::Native, &task(subject), &mut results)?;
            return report(&results.figures, &out, FILES);
        }
        What::Remus => {
            ensure!(with_linux, "--remus needs a Linux that runs natively: see {GUEST_KERNEL}");
            let turns = options.runs(remus::TURNS);
            results.figures.runs = turns;
            results.figures.title = "what protecting a machine costs".to_owned();
            let plan = remus::Plan { turns, seconds: options.seconds, only: options.only.clone() };
            run.run(&Host::Native, &task(Subject::Remus(plan)), &mut results)?;
            return report(&results.figures, &out, ["remus.json", "remus.svg"]);
        }
        What::Density => {
            counts.check()?;
            let runs = options.runs(density::RUNS);
            results.figures.runs = runs;
            results.figures.title = counts.title();
            note_missing(&mut results.figures, &paths, &debian);
            let subject = Subject::Monitors(vec![Scenario::Density], runs);
            run.run(&Host::Native, &task(subject), &mut results)?;
            return report(&results.figures, &out, ["density.json", "density.svg"]);
        }
        What::Goals => {
            counts.check()?;
            results.figures.title = format!("{}; single ones; Linux's I/O", counts.title());
            let plan = goals::Plan { runs: options.runs, linux: with_linux };
            run.run(&Host::Native, &task(Subject::Goals(plan)), &mut results)?;
            return report_goals(&results.figures, &out);
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

    note_missing(&mut results.figures, &paths, &debian);
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
    report(&results.figures, &out, FILES)
}

/// The monitors that this machine does not have.
fn note_missing(figures: &mut Figures, paths: &Paths, debian: &Debian) {
    let missing = monitors::find(paths, debian).1;
    for name in &missing {
        eprintln!("{name}: not found on PATH.");
    }
    figures.missing = missing.into_iter().map(str::to_owned).collect();
}

fn report(figures: &Figures, out: &Path, [json, svg]: [&str; 2]) -> Result<()> {
    for (name, version) in &figures.monitors {
        println!("{name}: {version}");
    }
    print!("{}", figures.table());
    println!(
        "\nMedians (min-max); xN: the median divided by this monitor's; + more is better, - less is better."
    );
    for line in scattered::verdict(figures).into_iter().chain(remus::verdict(figures)) {
        println!("{line}");
    }
    for failure in &figures.failed {
        let Failure { scenario, part, monitor, error } = failure;
        println!("{}, {part}: {monitor} failed: {error}", scenario.title());
    }
    let json = out.join(json);
    fs::write(&json, serde_json::to_string_pretty(&figures.json())?)?;
    let svg = out.join(svg);
    fs::write(&svg, chart::draw(figures))?;
    println!("{}\n{}", json.display(), svg.display());
    Ok(())
}

fn report_goals(figures: &Figures, out: &Path) -> Result<()> {
    for (name, version) in &figures.monitors {
        println!("{name}: {version}");
    }
    print!("{}", figures.table());
    let rows = goals::rows(figures);
    print!("{}", goals::table(&rows));
    let [json, svg, page] =
        ["json", "svg", "md"].map(|kind| out.join("goals").with_extension(kind));
    fs::write(&json, serde_json::to_string_pretty(&goals::json(figures, &rows))?)?;
    fs::write(&svg, chart::draw(figures))?;
    fs::write(&page, goals::page(figures, &rows))?;
    println!("\n{}\n{}\n{}", json.display(), svg.display(), page.display());
    let not_met = goals::not_met(&rows);
    ensure!(not_met == 0, "{not_met} of {} goals are missed or were not measured", rows.len());
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
    /// Only needed for domains.
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
