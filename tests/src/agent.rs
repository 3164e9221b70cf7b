//! Tests run one after another in one process on the host ([`serve`]); the test program asks that
//! process for one test at a time ([`Agents`]). If a test hangs, that process, or the whole
//! emulated host, is replaced for the next test.
use std::fs;
use std::io::{BufRead, IsTerminal, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{env, io};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::debian::{Debian, output};
use crate::guest;
use crate::host::{CONTROL, Host, Job, Running, Said, make_initramfs};
use crate::paths::{BINARY, Paths, STRATOCTL, workspace};
use crate::progress::Step;

/// The argument that makes a test program serve.
pub const SERVE: &str = "--serve-stories";
/// The example configurations: their place in the workspace and in the cache.
pub const EXAMPLES: &str = "config-examples";
/// How long a host may take to come up, the slowest one included.
const HOST_LIMIT: Duration = Duration::from_secs(120);
/// How long one test may take.
const STORY_LIMIT: Duration = Duration::from_secs(300);

/// What a test is given.
pub struct Story {
    /// Its name.
    pub name: String,
    /// Where files are.
    pub paths: Paths,
    /// An empty directory of its own.
    pub dir: PathBuf,
    /// Tools.
    pub debian: Debian,
}

/// The body of a test.
pub type Test = fn(&Story) -> Result<()>;
/// A test: its name and its body.
pub type NamedTest = (String, Test);

#[derive(Serialize, Deserialize)]
struct Request {
    run: String,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    Ready(bool),
    Done(Option<String>),
    Exit(i32),
}

/// Runs the tests that are requested on standard input, until it closes or an empty line comes.
///
/// # Errors
/// The paths are not set, or the requesting process has ended.
pub fn serve(stories: &[NamedTest]) -> Result<()> {
    let paths = Paths::from_env()?;
    answer(&Answer::Ready(true))?;
    for line in io::stdin().lock().lines() {
        let line = line?;
        if line.is_empty() {
            break;
        }
        let request: Request = serde_json::from_str(&line).context("cannot read what to run")?;
        let error = match stories.iter().find(|(name, _)| *name == request.run) {
            Some((name, body)) => run(&paths, name, *body).err().map(|error| format!("{error:#}")),
            None => Some("no such test".to_owned()),
        };
        answer(&Answer::Done(error))?;
    }
    Ok(())
}

fn run(paths: &Paths, name: &str, body: Test) -> Result<()> {
    let dir = paths.fresh_scratch(name)?;
    let story = Story {
        name: name.to_owned(),
        paths: paths.clone(),
        dir: dir.clone(),
        debian: Debian::unpacked(paths),
    };
    match catch_unwind(AssertUnwindSafe(|| body(&story))) {
        Ok(result) => result?,
        Err(_) => bail!("the test panicked"),
    }
    fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))
}

/// Reports to the program outside the host how the job inside has ended; see [`outcome`].
///
/// # Errors
/// The program outside no longer reads.
pub fn tell_outcome(result: &Result<()>) -> Result<()> {
    answer(&Answer::Done(result.as_ref().err().map(|error| format!("{error:#}"))))
}

/// Passes on to standard output what a job says to the user. Returns its outcome, once `said`, which
/// the job has said last, is that; also when it has ended without one, or has said nothing in time.
///
/// # Errors
/// Standard output is closed.
pub fn pass_on(said: Option<Said>, job: &Running) -> Result<Option<Result<(), String>>> {
    match said {
        Some(Said::Text(text)) => {
            io::stdout().write_all(&text)?;
            io::stdout().flush()?;
            Ok(None)
        }
        Some(Said::Control(message)) => Ok(outcome(&message)),
        Some(Said::End) => Ok(Some(Err(format!("the host ended early\n{}", job.console())))),
        None => Ok(Some(Err(format!("no more output came in time\n{}", job.console())))),
    }
}

/// The end of the job inside as a control message reports it; `None` for other messages.
fn outcome(message: &Value) -> Option<Result<(), String>> {
    match serde_json::from_value(message.clone()) {
        Ok(Answer::Done(error)) => Some(error.map_or(Ok(()), Err)),
        Ok(Answer::Exit(code)) => {
            Some(Err(format!("the program inside ended early, with status {code}")))
        }
        Ok(Answer::Ready(_)) | Err(_) => None,
    }
}

fn answer(answer: &Answer) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(&[CONTROL])?;
    serde_json::to_writer(&mut out, answer)?;
    out.write_all(b"\n")?;
    out.flush().context("the channel is closed")
}

/// How a test's run went.
enum Outcome {
    /// It ran to its end, passed or failed.
    Finished(Result<()>),
    /// It was interrupted.
    HostLost(anyhow::Error),
}

/// The processes that run tests, seen from outside: as many as tests run at once. Each is started
/// when it is first needed.
pub struct Agents {
    show: bool,
    /// Where they run, if not where Debian's kernel runs.
    host: Option<Host>,
    /// Locked while it is being started: a second thread waits and then uses it.
    ready: Mutex<Option<(Host, Paths, Debian)>>,
    idle: Mutex<Vec<Running>>,
}

impl Agents {
    /// Agents that show what tests print at once (`show`) or only when they fail.
    #[must_use]
    pub const fn new(show: bool) -> Self {
        Self { show, host: None, ready: Mutex::new(None), idle: Mutex::new(Vec::new()) }
    }

    /// Agents on this machine, whatever its KVM can do: for guests that can run there.
    #[must_use]
    pub const fn native(show: bool) -> Self {
        let host = Some(Host::Native);
        Self { show, host, ready: Mutex::new(None), idle: Mutex::new(Vec::new()) }
    }

    /// Runs one test. If the emulated host breaks down meanwhile, which is not the test's fault,
    /// reports that and runs the test once more in a new host.
    ///
    /// # Errors
    /// It failed, or there is no host for it; the error includes all output.
    pub fn run(&self, name: &str) -> Result<()> {
        for last in [false, true] {
            match self.attempt(name)? {
                Outcome::Finished(result) => return result,
                Outcome::HostLost(_) if !last && self.emulates() => {
                    eprintln!("  The emulated host broke down: running {name} in a new one");
                }
                Outcome::HostLost(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn emulates(&self) -> bool {
        matches!(*lock(&self.ready), Some((Host::Emulated(_), ..)))
    }

    fn attempt(&self, name: &str) -> Result<Outcome> {
        let idle = lock(&self.idle).pop();
        let mut running = match idle {
            Some(running) => running,
            None => self.start()?,
        };
        let mut request = serde_json::to_vec(&Request { run: name.to_owned() })?;
        request.push(b'\n');
        running.send(&request)?;
        let mut printed = Vec::new();
        let answer = self.wait(&running, Instant::now() + STORY_LIMIT, &mut printed);
        let error = match answer {
            Ok(Answer::Done(None)) => {
                lock(&self.idle).push(running);
                return Ok(Outcome::Finished(Ok(())));
            }
            Ok(Answer::Done(Some(ref error))) => error.clone(),
            Ok(Answer::Ready(_) | Answer::Exit(_)) => "the emulated host ended".to_owned(),
            Err(ref error) => format!("{error:#}"),
        };
        let printed = String::from_utf8_lossy(&printed);
        if matches!(answer, Ok(Answer::Done(_))) && !running.is_broken() {
            lock(&self.idle).push(running);
            return Ok(Outcome::Finished(Err(anyhow::anyhow!("{}\n{error}", printed.trim_end()))));
        }
        let console = running.console();
        Ok(Outcome::HostLost(anyhow::anyhow!("{}\n{error}\n{console}", printed.trim_end())))
    }

    /// Ends the hosts.
    ///
    /// # Errors
    /// One no longer reads, or its files cannot be removed.
    pub fn finish(&self) -> Result<()> {
        for mut running in lock(&self.idle).drain(..) {
            running.send(b"\n")?;
            running.finish(Instant::now() + Duration::from_secs(20))?;
        }
        Ok(())
    }

    fn start(&self) -> Result<Running> {
        let mut ready = lock(&self.ready);
        let (host, paths, debian) = match &*ready {
            Some(ready) => ready.clone(),
            None => {
                let made = self.host.clone().map_or_else(prepare, prepare_on)?;
                ready.insert(made).clone()
            }
        };
        drop(ready);
        let step = Step::spinner(match &host {
            Host::Native => "Starting",
            Host::Emulated(_) => "Booting the emulated host",
        });
        let mut job = Job::this_program(&[SERVE])?;
        for entry in fs::read_dir(workspace().join(EXAMPLES)).into_iter().flatten() {
            let entry = entry?;
            job.files.push((
                entry.path(),
                format!("{EXAMPLES}/{}", entry.file_name().to_string_lossy()),
            ));
        }
        let running = host.start(&paths, &debian, &job)?;
        let mut printed = Vec::new();
        match self.wait(&running, Instant::now() + HOST_LIMIT, &mut printed) {
            Ok(Answer::Ready(true)) => {}
            Ok(_) => bail!("the emulated host did not boot\n{}", running.console()),
            Err(error) => {
                bail!("{error}\n{}{}", String::from_utf8_lossy(&printed), running.console())
            }
        }
        step.done();
        Ok(running)
    }

    fn wait(&self, running: &Running, deadline: Instant, printed: &mut Vec<u8>) -> Result<Answer> {
        loop {
            match running.next(deadline) {
                Some(Said::Control(value)) => return Ok(serde_json::from_value(value)?),
                Some(Said::Text(text)) => {
                    if self.show {
                        io::stderr().write_all(&text)?;
                    }
                    printed.extend(text);
                }
                Some(Said::End) => bail!("the process that runs the tests has ended"),
                None => bail!("no more output came in time"),
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Prepares everything that a host needs before it starts: packages, guests, the monitor.
///
/// # Errors
/// A part of it cannot be obtained.
pub fn prepare() -> Result<(Host, Paths, Debian)> {
    let host = Host::detect()?;
    if let Some(reason) = host.reason() {
        eprintln!("{reason}.");
    }
    prepare_on(host)
}

/// The same with an existing monitor, whose path has no symbolic links.
///
/// # Errors
/// A part of it cannot be obtained.
pub fn prepare_with(monitor: &Path) -> Result<(Host, Paths, Debian)> {
    let (paths, debian) = artefacts()?;
    Ok((Host::detect()?, Paths { stratovirt: monitor.to_owned(), ..paths }, debian))
}

fn prepare_on(host: Host) -> Result<(Host, Paths, Debian)> {
    let (mut paths, debian) = artefacts()?;
    paths.stratovirt = monitor()?;
    Ok((host, paths, debian))
}

fn artefacts() -> Result<(Paths, Debian)> {
    let paths = Paths::on_this_machine()?;
    let lock = paths.lock()?;
    let debian = Debian::get(&paths)?;
    guest::make(&paths, &debian)?;
    make_initramfs(&paths, &debian)?;
    drop(lock);
    Ok((paths, debian))
}

/// The monitor's binary: the one that `STRATOVIRT_BIN` names, or built now in the profile that this
/// program was built in; for a release as `cargo monitor` builds it.
///
/// # Errors
/// There is none of that name, or it does not build.
pub fn monitor() -> Result<PathBuf> {
    binary("stratovirt", BINARY)
}

/// `stratoctl`: the one that `STRATOCTL_BIN` names, or built now like [`monitor`].
///
/// # Errors
/// There is none of that name, or it does not build.
pub fn stratoctl() -> Result<PathBuf> {
    binary("stratoctl", STRATOCTL)
}

fn binary(name: &str, variable: &str) -> Result<PathBuf> {
    if let Some(named) = env::var_os(variable) {
        return fs::canonicalize(&named)
            .with_context(|| format!("{variable}={} does not exist", named.display()));
    }
    let exe = env::current_exe()?;
    let profile = exe.ancestors().find(|dir| dir.ends_with("debug") || dir.ends_with("release"));
    let profile = profile.context("built in a profile that is neither debug nor release")?;
    let target = profile.parent().context("a profile without a target directory")?;
    let mut build = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    build.current_dir(workspace()).env("CARGO_TARGET_DIR", target);
    let is_watched = io::stderr().is_terminal();
    if !is_watched {
        // First, because what follows an alias goes to the compiler.
        build.arg("--quiet");
    }
    // For the whole workspace, as in `cargo test`: with other features the dependencies would be
    // built again.
    match (name, profile.ends_with("release")) {
        ("stratovirt", true) => build.arg("monitor"),
        (_, true) => build.args(["build", "--workspace", "--bin", name, "--release"]),
        (_, false) => build.args(["build", "--workspace", "--bin", name]),
    };
    // Shows cargo's progress and errors to the user.
    if is_watched {
        eprintln!("  Building {name}");
        let status = build.stdin(Stdio::null()).status().context("cannot run cargo")?;
        ensure!(status.success(), "{name} does not build");
    } else {
        let step = Step::spinner(&format!("Building {name}"));
        output(&mut build).with_context(|| format!("{name} does not build"))?;
        step.done();
    }
    Ok(profile.join(name))
}
