//! Starts a monitor in the background, in its own directory.
use std::{
    env, io,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::Duration,
};

use anyhow::Context;
use serde_json::{Value, json};

use crate::{
    failure::Failure,
    process::{self, Found},
    progress,
    registry::{CONFIG, Description, Place, Registry},
};

/// The monitor's program: the one that was named, the one beside this program, or the one on PATH.
pub fn program(named: Option<&Path>) -> PathBuf {
    let beside = || {
        let own = env::current_exe().ok()?;
        Some(own.with_file_name("stratovirt")).filter(|path| path.is_file())
    };
    // A relative path would be resolved in the monitor's working directory.
    let named = named.map(|path| match path.components().count() {
        1 => path.to_owned(),
        _ => std::path::absolute(path).unwrap_or_else(|_| path.to_owned()),
    });
    named.or_else(beside).unwrap_or_else(|| "stratovirt".into())
}

/// How long a monitor that was killed may take to end.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// What a monitor needs beyond the domain's description.
#[derive(Debug, Default)]
pub struct More {
    /// Words for its command line.
    pub words: Vec<String>,
    /// Bytes that it reads before it answers, if they are many.
    pub reads: Option<u64>,
}

/// Start the domain at `place`; returns its number. The caller holds its lock. It stays paused if
/// `paused`.
///
/// # Errors
/// The monitor's messages; of its files, only the log is left.
pub fn start(
    registry: &Registry,
    program: &Path,
    place: &Place,
    description: &Description,
    paused: bool,
    more: &More,
) -> anyhow::Result<u32> {
    let incoming = more.words.iter().any(|word| word == "-incoming");
    let id = registry.prepare(place, description, &config(description, incoming))?;
    let mut command = Command::new(program);
    // All paths are relative, so they are as short as possible, and stay valid after a rename.
    command.current_dir(&place.run);
    command.args(["-daemonize", "-pidfile", "pid", "-D", "log", "-qmp"]);
    command.args(["unix:qmp.sock,server,nowait", "-serial"]);
    command.arg("socket,path=console.sock,server,nowait,replay=64K");
    command.args(["-name", place.name.as_str(), "-uuid", &description.uuid]);
    command.args(["-config", CONFIG]);
    if paused {
        command.arg("-S");
    }
    command.args(&more.words);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let done = watched(command, place, more.reads)?.map_err(|e| {
        let what = format!("cannot run the monitor, {}: {e}", program.display());
        anyhow::Error::from(Failure::hint(what, "name its program with --monitor FILE"))
    });
    let said = match done {
        Ok(done) if done.status.success() && !is_monitor(program, place) => {
            let what = format!(
                "'{}' does not start: {} exited without output, so it is not stratovirt",
                place.name,
                program.display()
            );
            Failure::hint(what, "name the monitor's program with --monitor FILE").into()
        }
        Ok(done) if done.status.success() => {
            // Without this mark, a monitor that takes long to end is shown as one that is starting.
            let _ = registry.is_up(place);
            return Ok(id);
        }
        Ok(done) => {
            let said = String::from_utf8_lossy(&done.stderr).trim().to_owned();
            let said = if said.is_empty() { done.status.to_string() } else { said };
            let said = if incoming { in_own_words(&said) } else { said };
            anyhow::Error::from(Failure::new(format!("'{}' does not start: {said}", place.name)))
        }
        Err(e) => e,
    };
    end_left(place).and_then(|()| registry.clear(place)).context("after a failed start")?;
    Err(said)
}

/// Whether `program`, which has exited successfully, leaves a monitor behind. The monitor at
/// `place` shows that; it may have ended by itself already, and then the program's own output
/// decides.
fn is_monitor(program: &Path, place: &Place) -> bool {
    if matches!(process::find(&place.run), Found::Alive(_)) {
        return true;
    }
    let said = Command::new(program).arg("-version").stdin(Stdio::null()).output();
    said.is_ok_and(|said| said.stdout.starts_with(b"StratoVirt "))
}

/// A monitor's error about its flags for a restored machine, in the words of `stratoctl restore`.
fn in_own_words(said: &str) -> String {
    let mut text = said
        .replace("leave clock=realtime out", "leave --clock realtime out")
        .replace("clock=realtime: ", "--clock realtime: ")
        .replace("give -drive with", "give --disk with")
        .replace("format=raw (\"driver\": \"raw\" in blockdev-add)", "--disk ID=PATH,format=raw")
        .replace("-drive id=ID,file=COPY", "--disk ID=COPY")
        .replace(" (-incoming ...,force=on)", "")
        .replace("give -netdev with", "give --tap with");
    for (begin, end, flag, what) in [
        ("-drive id=", ",file=PATH", "--disk ", "=PATH"),
        ("-netdev tap,id=", ",ifname=TAP", "--tap ", "=TAP"),
    ] {
        text = text.replace(begin, flag).replace(end, what);
    }
    text
}

/// End the monitor that is still running in the directory of `place` after the process that was
/// started has failed, because only that process was killed.
fn end_left(place: &Place) -> anyhow::Result<()> {
    let left = || match process::find(&place.run) {
        Found::Alive(process) => Some(process),
        Found::Gone | Found::Nobody => process::search(&place.run),
    };
    while let Some(process) = left() {
        let pid = process.pid();
        process.kill().with_context(|| format!("cannot kill process {pid}"))?;
        anyhow::ensure!(
            process.ends_within(KILL_LIMIT),
            "process {pid} was killed and has not ended"
        );
    }
    Ok(())
}

/// Run `command`, which ends when the monitor at `place` answers, and show the progress.
fn watched(
    mut command: Command,
    place: &Place,
    reads: Option<u64>,
) -> anyhow::Result<io::Result<Output>> {
    let what = format!("Starting {}", place.name);
    let shown = if reads.is_some() { progress::bar(&what) } else { progress::spinner(&what) };
    let poll = || match (reads, process::find(&place.run)) {
        (Some(total), Found::Alive(process)) => {
            shown.set_length(total);
            shown.set_position(process.read().unwrap_or(0).min(total));
        }
        (Some(_), _) => {}
        (None, _) => progress::turn(&shown),
    };
    let done = progress::during(move || command.output(), poll);
    shown.finish_and_clear();
    done
}

/// The monitor's configuration file. A restored machine brings its own description.
fn config(description: &Description, incoming: bool) -> Value {
    let mut config = if incoming { json!({}) } else { description.config.clone() };
    if let Some(members) = config.as_object_mut() {
        members.insert("domain".into(), json!(description.policy));
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restore_speaks_of_its_own_flags() {
        for (said, shown) in [
            (
                "disk 'a': cannot open /x; give its path with -drive id=a,file=PATH: No such file",
                "disk 'a': cannot open /x; give its path with --disk a=PATH: No such file",
            ),
            (
                "/x is a QCOW2 image; say so with format=raw (\"driver\": \"raw\" in blockdev-add)",
                "/x is a QCOW2 image; say so with --disk ID=PATH,format=raw",
            ),
            (
                "give the copy with -drive id=ID,file=COPY; or say so with --force (-incoming ...,force=on)",
                "give the copy with --disk ID=COPY; or say so with --force",
            ),
            ("give it a tap with -netdev tap,id=n,ifname=TAP", "give it a tap with --tap n=TAP"),
            (
                "the saved machine has no disk 'x'; it has a, b: give -drive with one of these",
                "the saved machine has no disk 'x'; it has a, b: give --disk with one of these",
            ),
            (
                "clock=realtime: it does not tell; leave clock=realtime out, and",
                "--clock realtime: it does not tell; leave --clock realtime out, and",
            ),
        ] {
            assert_eq!(in_own_words(said), shown);
        }
    }
}
