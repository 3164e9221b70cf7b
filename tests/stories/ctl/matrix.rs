//! Every verb in every state, compared with the table in the documentation: it is carried out, or
//! refused with the message given there, and nothing changes.
use std::fs::{self, File, OpenOptions};
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{FlockOperation, flock};
use rustix::process::Signal;

use crate::rig::Rig;

const DOCUMENT: &str = include_str!("../../../docs/stratoctl.md");
const NAME: &str = "dom";

/// What a verb does in a state.
#[derive(Clone, PartialEq, Eq)]
enum Cell {
    Yes,
    /// It is refused for this reason.
    No(String),
    /// It is refused for this reason without `-F`.
    Unforced(String),
}

/// A verb, and what it does in each state.
type Row = (String, Vec<Cell>);

fn table() -> Result<(Vec<String>, Vec<Row>)> {
    let (_, rest) = DOCUMENT.split_once("<!-- the matrix").context("no matrix")?;
    let (text, _) = rest.split_once("<!-- end").context("no end")?;
    let reasons: Vec<&str> = text
        .lines()
        .filter_map(|line| {
            line.split_once(". ").filter(|(number, _)| number.parse::<u32>().is_ok())
        })
        .map(|(_, reason)| reason)
        .collect();
    let mut lines = text.lines().filter(|line| line.starts_with('|')).map(|line| {
        line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>()
    });
    let states = lines.next().context("no heading")?.split_off(1);
    let mut rows = Vec::new();
    for mut cells in lines.skip(1) {
        let verb = cells.remove(0);
        let cells = cells.iter().map(|cell| match cell.as_str() {
            "yes" => Ok(Cell::Yes),
            number => {
                let plain = number.trim_end_matches('*').trim_end_matches("-F");
                let reason = reasons.get(plain.parse::<usize>()? - 1).context("no such reason")?;
                let reason = reason.replace("NAME", NAME);
                Ok(if number.ends_with("-F") { Cell::Unforced(reason) } else { Cell::No(reason) })
            }
        });
        rows.push((verb, cells.collect::<Result<Vec<_>>>()?));
    }
    Ok((states, rows))
}

/// What a test needs to bring a domain into any state.
struct Stage {
    rig: Rig,
    /// Another host, as far as the registry goes.
    far: Rig,
    config: String,
    saved: PathBuf,
    /// The lock that another `stratoctl` holds while it saves.
    saving: Option<File>,
}

impl Stage {
    fn new(story: &str) -> Result<Self> {
        let rig = Rig::new(story)?;
        let config = rig.config("vm.json", "hello", "halt")?.to_string_lossy().into_owned();
        rig.ok(&["create", &config, "--name", "first"])?;
        let saved = rig.file("first.saved");
        rig.ok(&["save", "first", &saved.to_string_lossy()])?;
        let far = Rig::new(&format!("{story}-far"))?;
        fs::create_dir(rig.file("witness"))?;
        Ok(Self { rig, far, config, saved, saving: None })
    }

    /// Protects the domain at `from`; its backup is at `to`.
    fn protect(&self, from: &Rig, to: &Rig) -> Result<()> {
        let witness = format!("dir:{}", self.rig.file("witness").display());
        let receive = to.receiver(&format!("--witness '{witness}'"));
        let words = ["remus", "-i", "25", "--witness", &witness, "-s", "", NAME, &receive];
        from.ok(&words).map(drop)
    }

    fn enter(&mut self, state: &str) -> Result<()> {
        self.saving = None;
        let (rig, far) = (&self.rig, &self.far);
        for of in [far, rig] {
            of.clean(NAME)?;
        }
        let new = |config: &str, more: &[&str]| {
            rig.ok(&[&["new", config, "--name", NAME], more].concat()).map(drop)
        };
        let start = || rig.ok(&["start", NAME]).map(drop);
        if !["absent", "off", "crashed", "standby"].contains(&state) {
            new(&self.config, &[])?;
            if !["registered", "starting"].contains(&state) {
                start()?;
            }
        }
        match state {
            "absent" | "registered" | "running" => {}
            "paused" => drop(rig.ok(&["pause", NAME])?),
            "suspended" => drop(rig.ok(&["suspend", NAME])?),
            "killed" => rig.kill(NAME)?,
            "protected" => self.protect(rig, far)?,
            "degraded" => {
                self.protect(rig, far)?;
                far.kill(NAME)?;
                rig.wait_replication(NAME, "state", state)?;
            }
            "standby" => {
                far.ok(&["create", &self.config, "--name", NAME])?;
                self.protect(far, rig)?;
                rig.wait_replication(NAME, "state", state)?;
            }
            "moved" => {
                self.protect(rig, far)?;
                rig.ok(&["failover", "--planned", NAME])?;
            }
            "hung" => rig.signal(rig.pid(NAME)?, Signal::STOP)?,
            "ending" => {
                rig.signal(rig.pid(NAME)?, Signal::STOP)?;
                let run = rig.file("r/state").join(NAME).join("run");
                for name in ["qmp.sock", "pid"] {
                    fs::remove_file(run.join(name))?;
                }
            }
            "saving" => {
                let path = rig.file("r/run/.lock").join(format!("{NAME}.save"));
                let file = OpenOptions::new().create(true).append(true).open(path)?;
                flock(&file, FlockOperation::NonBlockingLockExclusive)?;
                self.saving = Some(file);
            }
            "starting" => {
                self.rig.hold()?;
                let mut child = self.rig.command(&["start", NAME]).spawn()?;
                self.rig.wait_state(NAME, state)?;
                // It would make the others wait.
                child.kill()?;
                child.wait()?;
            }
            "off" | "crashed" => {
                let (word, flag) = match state {
                    "off" => ("poweroff", "--on-poweroff"),
                    _ => ("panic", "--on-crash"),
                };
                let config = rig.config("ends.json", "hello", word)?;
                new(&config.to_string_lossy(), &[flag, "preserve"])?;
                start()?;
                rig.wait_state(NAME, state)?;
            }
            other => bail!("no such state: {other}"),
        }
        let now = self.rig.state(NAME)?;
        ensure!(now == shown(state), "it is {now}, not {state}");
        Ok(())
    }

    /// The verb's command line, and the state that it leads to from `state`.
    fn invocation<'a>(&'a self, verb: &'a str, state: &'a str) -> Result<(Vec<&'a str>, &'a str)> {
        let saved = self.saved.to_str().context("a path")?;
        Ok(match verb {
            "create" => (vec![verb, &self.config, "--name", NAME], "running"),
            "new" => (vec![verb, &self.config, "--name", NAME], "registered"),
            "restore" => (vec![verb, saved, "--name", NAME], "running"),
            "start" | "resume" | "unpause" => (vec![verb, NAME], "running"),
            "pause" => (vec![verb, NAME], "paused"),
            "save" => (vec![verb, NAME, "dom.saved"], "registered"),
            "suspend" => (vec![verb, NAME], "suspended"),
            // A backup is not registered.
            "destroy" if state == "standby" => (vec![verb, NAME], "absent"),
            "destroy" => (vec![verb, NAME], "registered"),
            "delete" => (vec![verb, NAME], "absent"),
            "rename" => (vec![verb, NAME, NAME], state),
            "info" => (vec![verb, NAME], state),
            "wait" => {
                let to = match state {
                    "running" | "paused" => state,
                    "protected" | "degraded" => "running",
                    "starting" | "hung" | "ending" | "standby" => "saved",
                    _ => "ended",
                };
                (vec![verb, NAME, to, "-t", "0"], state)
            }
            "remus" => (vec![verb, NAME, "host", "-F"], state),
            "migrate" => (vec![verb, NAME, "host"], state),
            "remus-report" => (vec![verb, NAME], state),
            "unprotect" if state == "moved" => (vec![verb, NAME], "registered"),
            "failover" | "unprotect" => (vec![verb, NAME], state),
            other => bail!("how to try {other} is not known"),
        })
    }
}

/// The state that is shown: protection is shown beside it.
fn shown(state: &str) -> &str {
    match state {
        "protected" | "degraded" => "running",
        other => other,
    }
}

/// Verbs that have tests of their own: they need a guest that answers, or a terminal.
const ELSEWHERE: [&str; 6] = ["reboot", "shutdown", "console", "dmesg", "events", "qmp"];

/// Verbs that need a backup, or checkpoints, where they are allowed.
const REFUSED_HERE: [&str; 5] = ["remus", "remus-report", "migrate", "failover", "unprotect"];

fn column(state: &str) -> Result<()> {
    let (states, rows) = table()?;
    let at = states.iter().position(|known| known == state).context("no such column")?;
    ensure!(states.len() == 16 && rows.len() == 25);
    let mut stage = Stage::new(&format!("m-{state}"))?;
    if state == "hung" {
        stage.rig.patience = "2";
    }
    stage.enter(state)?;
    for (verb, cells) in &rows {
        if ELSEWHERE.contains(&verb.as_str()) {
            continue;
        }
        let (args, leads_to) = stage.invocation(verb, state)?;
        let cell = cells.get(at).context("a short row")?;
        if let Cell::No(reason) | Cell::Unforced(reason) = cell {
            let (what, hint) = stage.rig.refused(&args)?;
            ensure!(format!("{what}: {hint}") == *reason, "{verb}: {what}: {hint}");
        }
        let carried_out = match cell {
            Cell::Yes if verb == "wait" && state == "saving" => {
                let (what, _) = stage.rig.refused(&args)?;
                ensure!(what.contains("is still saving"), "{what}");
                continue;
            }
            Cell::Yes if REFUSED_HERE.contains(&verb.as_str()) => continue,
            Cell::No(_) => continue,
            Cell::Yes => args,
            Cell::Unforced(_) => [&args[..], &["-F"]].concat(),
        };
        stage.rig.ok(&carried_out)?;
        let now = stage.rig.state(NAME)?;
        ensure!(now == shown(leads_to), "{verb} of a domain that is {state} makes it {now}");
        // What ends it has ended its backup, too.
        if now != shown(state) || matches!(cell, Cell::Unforced(_)) {
            stage.enter(state)?;
        }
    }
    // Nothing that was refused has changed anything.
    ensure!(stage.rig.state(NAME)? == shown(state));
    Ok(())
}

#[test]
fn absent() -> Result<()> {
    column("absent")
}

#[test]
fn registered() -> Result<()> {
    column("registered")
}

#[test]
fn starting() -> Result<()> {
    column("starting")
}

#[test]
fn running() -> Result<()> {
    column("running")
}

#[test]
fn paused() -> Result<()> {
    column("paused")
}

#[test]
fn saving() -> Result<()> {
    column("saving")
}

#[test]
fn suspended() -> Result<()> {
    column("suspended")
}

#[test]
fn off() -> Result<()> {
    column("off")
}

#[test]
fn crashed() -> Result<()> {
    column("crashed")
}

#[test]
fn killed() -> Result<()> {
    column("killed")
}

#[test]
fn ending() -> Result<()> {
    column("ending")
}

#[test]
fn hung() -> Result<()> {
    column("hung")
}

#[test]
fn protected() -> Result<()> {
    column("protected")
}

#[test]
fn degraded() -> Result<()> {
    column("degraded")
}

#[test]
fn standby() -> Result<()> {
    column("standby")
}

#[test]
fn moved() -> Result<()> {
    column("moved")
}
