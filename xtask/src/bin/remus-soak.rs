//! `cargo remus-soak`: a guest that loses its host again and again.
use std::env;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use stories::agent::{monitor, pass_on, prepare_with, tell_outcome};
use stories::debian::Debian;
use stories::host::{Host, Job};
use stories::paths::{GUEST_KERNEL, Paths};
use xtask::bench::interrupt::Interrupt;
use xtask::soak::{Plan, USAGE, run};

/// The argument of the part of this program that runs on the host; a plan follows.
const INSIDE: &str = "--inside";
/// How long the program on the host may be silent.
const TIMEOUT: Duration = Duration::from_secs(180);

fn main() -> Result<ExitCode> {
    let args: Vec<String> = env::args().skip(1).collect();
    // The alias ends with -- already; cargo's users are used to giving one themselves.
    let args: Vec<&str> = args.iter().map(String::as_str).filter(|arg| *arg != "--").collect();
    match args.as_slice() {
        ["-h" | "--help"] => print!("{USAGE}"),
        [INSIDE, plan] => tell_outcome(&inside(plan))?,
        words => outside(&Plan::parse(words)?)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Prepares everything and passes on the output of the program on the host.
fn outside(plan: &Plan) -> Result<()> {
    let (host, paths, debian) = prepare_with(&monitor()?)?;
    // With a kernel for this machine's own KVM, whatever that can do.
    let host = if env::var_os(GUEST_KERNEL).is_some() { Host::Native } else { host };
    let job = Job::this_program(&[INSIDE, &serde_json::to_string(plan)?])?;
    let running = host.start(&paths, &debian, &job)?;
    let result = loop {
        if let Some(result) = pass_on(running.next(Instant::now() + TIMEOUT), &running)? {
            break result;
        }
    };
    running.finish(Instant::now() + Duration::from_secs(20))?;
    match result {
        Ok(()) => Ok(()),
        Err(error) => bail!("{error}"),
    }
}

fn inside(plan: &str) -> Result<()> {
    let plan = serde_json::from_str(plan).context("cannot read the plan")?;
    let paths = Paths::from_env()?;
    let debian = Debian::unpacked(&paths);
    run(&plan, &paths, &debian, &Interrupt::watch()?)
}
