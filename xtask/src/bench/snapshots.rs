//! Saving and restoring, as each monitor does it.
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use std::{io, thread};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Value, json};

use super::control::{Connection, Verb};
use super::monitors::{Found, Guest};
use stories::debian::output;

/// How long a save may take: 4 GiB on a slow, busy disk.
const LIMIT: Duration = Duration::from_secs(240);
/// Time between two checks of a condition.
const POLL_INTERVAL: Duration = Duration::from_micros(500);

/// How a monitor saves a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// `migrate` to `file:DIR`, of a running guest; when it is answered, everything is on the disk.
    Ours,
    /// `migrate` to `file:DIR`, of a stopped guest.
    StratoVirt,
    /// `migrate` through `cat`.
    Qemu,
    /// Firecracker's requests.
    Firecracker,
    /// Cloud Hypervisor's requests.
    CloudHypervisor,
    /// It cannot.
    None,
}

impl Way {
    /// Whether a guest can run on while it is saved.
    #[must_use]
    pub const fn is_live(self) -> bool {
        matches!(self, Self::Ours | Self::Qemu)
    }

    /// Whether a restore needs further commands after the start ([`resume`]).
    #[must_use]
    pub const fn is_told_to_resume(self) -> bool {
        !matches!(self, Self::Ours | Self::None)
    }
}

/// The target of a save while the guest runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target<'a> {
    /// Files in this directory.
    Directory(&'a Path),
    /// A stream that is read as fast as it arrives, and discarded.
    Stream,
}

/// Saves a running guest into `saved`, which is emptied before; returns how long it takes until
/// everything is on the disk. The guest stays stopped.
///
/// # Errors
/// It cannot be saved.
pub fn save(found: &Found, connection: &mut Connection, saved: &Path) -> Result<Duration> {
    empty(saved)?;
    connection.set_limit(LIMIT)?;
    let file = |name: &str| saved.join(name);
    let started = Instant::now();
    match found.monitor.way {
        Way::Ours => to_directory(connection, saved)?,
        Way::StratoVirt => {
            connection.ask(Verb::Stop)?;
            to_directory(connection, saved)?;
        }
        Way::Qemu => {
            connection.ask(Verb::Stop)?;
            qemu_save(connection, &saved.join("stream"))?;
        }
        Way::Firecracker => {
            connection.ask(Verb::Stop)?;
            let body = json!({
                "snapshot_type": "Full",
                "snapshot_path": file("state"),
                "mem_file_path": file("memory"),
            });
            connection.request("PUT", "/snapshot/create", &body)?;
        }
        Way::CloudHypervisor => {
            connection.ask(Verb::Stop)?;
            let body = json!({ "destination_url": format!("file://{}", saved.display()) });
            connection.request("PUT", "/api/v1/vm.snapshot", &body)?;
        }
        Way::None => bail!("{} saves nothing", found.name),
    }
    // For monitors that have done so already, this takes no time.
    sync(saved)?;
    Ok(started.elapsed())
}

fn to_directory(connection: &mut Connection, saved: &Path) -> Result<()> {
    connection.command("migrate", json!({ "uri": format!("file:{}", saved.display()) }))?;
    finished(connection)
}

/// Syncs the files in `dir` and the directory itself.
fn sync(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let synced = File::open(&path).and_then(|file| file.sync_all());
        synced.with_context(|| format!("cannot sync {}", path.display()))?;
    }
    File::open(dir)?.sync_all().with_context(|| format!("cannot sync {}", dir.display()))
}

/// Saves a guest while it runs on; returns how long it was stopped.
///
/// # Errors
/// It cannot be saved; the monitor's [`Way`] is not live.
pub fn save_live(
    found: &Found,
    connection: &mut Connection,
    target: Target<'_>,
) -> Result<Duration> {
    connection.set_limit(LIMIT)?;
    match (found.monitor.way, target) {
        (Way::Ours, Target::Directory(saved)) => {
            empty(saved)?;
            live(connection, &format!("file:{}", saved.display()))?;
        }
        (Way::Ours, Target::Stream) => {
            let (mut reader, writer) = io::pipe()?;
            connection.hand_over("stream", writer.as_fd())?;
            drop(writer);
            let reading = thread::spawn(move || io::copy(&mut reader, &mut io::sink()));
            live(connection, "fd:stream")?;
            // It ends when the monitor has closed its side.
            let read =
                reading.join().map_err(|_| anyhow!("the reader of the stream panicked"))??;
            ensure!(read > 0, "no data came through the stream");
        }
        (Way::Qemu, target) => {
            // Without a bandwidth limit, like all others.
            let unlimited = json!({ "max-bandwidth": 10_u64 << 30, "downtime-limit": 20 });
            connection.command("migrate-set-parameters", unlimited)?;
            match target {
                Target::Directory(saved) => {
                    empty(saved)?;
                    qemu_save(connection, &saved.join("stream"))?;
                }
                Target::Stream => qemu_save(connection, Path::new("/dev/null"))?,
            }
        }
        _ => bail!("{} cannot save a running guest", found.name),
    }
    let pause = downtime(&connection.command("query-migrate", json!({}))?)?;
    if found.monitor.way == Way::Qemu {
        connection.ask(Verb::Cont)?;
    }
    Ok(pause)
}

fn live(connection: &mut Connection, uri: &str) -> Result<()> {
    connection.command("migrate", json!({ "uri": uri, "resume": true }))?;
    finished(connection)
}

/// How long the guest was stopped, by `query-migrate`'s answer: in QEMU's milliseconds, or a finer
/// value if there is one.
fn downtime(answer: &Value) -> Result<Duration> {
    let number = |name: &str| answer.get(name).and_then(Value::as_f64);
    match (number("downtime-us"), number("downtime")) {
        (Some(microseconds), _) => Ok(Duration::from_secs_f64(microseconds / 1e6)),
        (None, Some(milliseconds)) => Ok(Duration::from_secs_f64(milliseconds / 1e3)),
        (None, None) => bail!("no downtime reported: {answer}"),
    }
}

fn qemu_save(connection: &mut Connection, file: &Path) -> Result<()> {
    let uri = format!("exec:cat > '{}'", file.display());
    connection.command("migrate", json!({ "uri": uri }))?;
    finished(connection)
}

/// Waits until the last save is over.
fn finished(connection: &mut Connection) -> Result<()> {
    let over = |status: &str| matches!(status, "completed" | "failed" | "cancelled");
    match until(connection, "query-migrate", over)?.as_str() {
        "completed" => Ok(()),
        _ => bail!("the save failed: {}", connection.command("query-migrate", json!({}))?),
    }
}

/// Repeats the command until the answer's `status` is one to wait for; returns which one.
fn until(
    connection: &mut Connection,
    command: &str,
    awaited: impl Fn(&str) -> bool,
) -> Result<String> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let answer = connection.command(command, json!({}))?;
        match answer.get("status").and_then(Value::as_str) {
            Some(status) if awaited(status) => return Ok(status.to_owned()),
            _ if Instant::now() > deadline => bail!("{command} still answers {answer}"),
            _ => thread::sleep(POLL_INTERVAL),
        }
    }
}

/// The command that restores `guest` from `saved`.
///
/// # Errors
/// Its configuration cannot be written.
pub fn command(
    found: &Found,
    guest: &Guest,
    saved: &Path,
    socket: &Path,
    dir: &Path,
) -> Result<Command> {
    let incoming = |uri: String| {
        let mut command = found.command(guest, socket, dir)?;
        command.args(["-incoming", &uri]);
        Ok(command)
    };
    match found.monitor.way {
        Way::Ours => {
            let mut command = found.program()?;
            command.args(["-incoming", &format!("file:{}", saved.display())]);
            command.arg("-api-channel").arg(format!("unix:{}", socket.display()));
            Ok(command)
        }
        Way::StratoVirt => incoming(format!("file:{}", saved.display())),
        Way::Qemu => incoming(format!("exec:cat '{}'", saved.join("stream").display())),
        Way::Firecracker => {
            let mut command = found.program()?;
            command.arg("--api-sock").arg(socket);
            Ok(command)
        }
        Way::CloudHypervisor => {
            let mut command = found.program()?;
            command.arg("--api-socket").arg(socket);
            command.arg("--restore").arg(format!("source_url=file://{}", saved.display()));
            Ok(command)
        }
        Way::None => bail!("{} restores nothing", found.name),
    }
}

/// Carries out the steps that a monitor started with [`command`] needs before the guest runs, if
/// its [`Way`] has any.
///
/// # Errors
/// It does not answer, or refuses.
pub fn resume(found: &Found, connection: &mut Connection, saved: &Path) -> Result<()> {
    match found.monitor.way {
        Way::Ours | Way::None => Ok(()),
        Way::StratoVirt | Way::Qemu => {
            // QEMU refuses `cont` while the guest is arriving.
            let arrived = |status: &str| status != "inmigrate";
            if until(connection, "query-status", arrived)? != "running" {
                connection.ask(Verb::Cont)?;
            }
            Ok(())
        }
        Way::CloudHypervisor => {
            let deadline = Instant::now() + LIMIT;
            // Its API answers before there is a machine.
            while let Err(error) = connection.ask(Verb::Cont) {
                let gone = error.chain().any(|cause| cause.is::<io::Error>());
                ensure!(!gone && Instant::now() < deadline, error);
                thread::sleep(POLL_INTERVAL);
            }
            Ok(())
        }
        Way::Firecracker => {
            let body = json!({
                "snapshot_path": saved.join("state"),
                "mem_backend": { "backend_type": "File", "backend_path": saved.join("memory") },
                "resume_vm": true,
            });
            connection.set_limit(LIMIT)?;
            connection.request("PUT", "/snapshot/load", &body)
        }
    }
}

/// How long `dd` takes to write, and sync, as many bytes as the files in `saved` occupy.
///
/// # Errors
/// There is no `dd`, or it fails.
pub fn dd(saved: &Path, scratch: &Path) -> Result<Duration> {
    let mut bytes = 0;
    for entry in fs::read_dir(saved)? {
        bytes += entry?.metadata()?.blocks() * 512;
    }
    let source = scratch.with_extension("source");
    // Not zeros, and from the page cache.
    fs::write(&source, vec![0x5a; usize::try_from(bytes)?])?;
    File::create(scratch)?;
    let mut dd = Command::new("dd");
    dd.arg(format!("if={}", source.display())).arg(format!("of={}", scratch.display()));
    let started = Instant::now();
    output(dd.args(["bs=1M", "conv=fsync", "status=none"]))?;
    let took = started.elapsed();
    fs::remove_file(&source)?;
    fs::remove_file(scratch)?;
    Ok(took)
}

fn empty(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => fs::create_dir(dir).with_context(|| format!("cannot make {}", dir.display())),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::bench::control::Protocol;

    /// Answers QMP commands with `answers`, in order; returns the commands.
    fn scripted(answers: &'static [&'static str]) -> (Connection, thread::JoinHandle<Vec<String>>) {
        let path = std::env::temp_dir().join(format!("snapshots.{}", std::process::id()));
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let version = json!({ "qemu": { "major": 9, "minor": 0, "micro": 0 }, "package": "" });
            writeln!(stream, "{}", json!({ "QMP": { "version": version, "capabilities": [] } }))
                .unwrap();
            let mut asked = Vec::new();
            let lines = BufReader::new(stream.try_clone().unwrap()).lines();
            for (line, answer) in lines.zip([r#"{"return":{}}"#].iter().chain(answers)) {
                let line: Value = serde_json::from_str(&line.unwrap()).unwrap();
                asked.push(line["execute"].as_str().unwrap().to_owned());
                writeln!(stream, "{answer}").unwrap();
            }
            asked
        });
        let (connection, _) = Connection::open(Protocol::Qmp, &path).unwrap();
        fs::remove_file(&path).unwrap();
        (connection, server)
    }

    #[test]
    fn a_guest_that_is_still_coming_in_is_waited_for() {
        let (mut connection, server) = scripted(&[
            r#"{"return":{"status":"inmigrate","running":false}}"#,
            r#"{"return":{"status":"inmigrate","running":false}}"#,
            r#"{"return":{"status":"paused","running":false}}"#,
        ]);
        let status = until(&mut connection, "query-status", |status| status != "inmigrate");
        assert_eq!(status.unwrap(), "paused");
        drop(connection);
        assert_eq!(server.join().unwrap()[1..], ["query-status"; 3]);
    }

    #[test]
    fn the_finer_downtime_counts() {
        let pause = downtime(&json!({ "status": "completed", "downtime": 7 })).unwrap();
        assert_eq!(pause, Duration::from_millis(7));
        let pause = downtime(&json!({ "downtime": 2, "downtime-us": 1234 })).unwrap();
        assert_eq!(pause, Duration::from_micros(1234));
        assert!(downtime(&json!({ "status": "completed" })).is_err());
    }
}
