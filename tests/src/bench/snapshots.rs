//! Saving and restoring, as each monitor does it.
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::control::{Connection, Verb};
use super::monitors::{Found, Guest, OURS};
use super::run::Run;
use crate::debian::output;

/// How long a save may take.
const LIMIT: Duration = Duration::from_secs(60);
/// Between two looks whether QEMU has finished.
const LOOK: Duration = Duration::from_micros(500);

/// How a monitor keeps a guest in files.
enum Way {
    /// `migrate` to `file:DIR`.
    Directory,
    /// `migrate` through `cat`.
    Exec,
    /// Firecracker's requests.
    Firecracker,
    /// Cloud Hypervisor's requests.
    CloudHypervisor,
}

fn way(found: &Found) -> Result<Way> {
    Ok(match found.monitor.name {
        "this monitor" | "StratoVirt" => Way::Directory,
        "QEMU microvm" => Way::Exec,
        "Firecracker" => Way::Firecracker,
        "Cloud Hypervisor" => Way::CloudHypervisor,
        name => bail!("nobody knows how {name} saves"),
    })
}

/// Saves a running guest into `saved`, emptied before; how long it stood still. It stays stopped.
///
/// # Errors
/// It cannot be saved.
pub fn save(found: &Found, connection: &mut Connection, saved: &Path) -> Result<Duration> {
    empty(saved)?;
    let file = |name: &str| saved.join(name);
    let started = Instant::now();
    match way(found)? {
        Way::Directory => {
            connection.command("migrate", json!({ "uri": format!("file:{}", saved.display()) }))?;
            finished(connection)?;
        }
        Way::Exec => {
            connection.ask(Verb::Stop)?;
            qemu_save(connection, saved)?;
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
    }
    Ok(started.elapsed())
}

/// Saves a running guest while it runs on; how long it stood still. `None` for a monitor that
/// cannot do this.
///
/// # Errors
/// It cannot be saved.
pub fn save_live(
    found: &Found,
    connection: &mut Connection,
    saved: &Path,
) -> Result<Option<Duration>> {
    empty(saved)?;
    if found.monitor.name == OURS.name {
        let arguments = json!({ "uri": format!("file:{}", saved.display()), "resume": true });
        connection.command("migrate", arguments)?;
    } else if matches!(way(found)?, Way::Exec) {
        // As fast as it can, as it is the case with all others.
        let unlimited = json!({ "max-bandwidth": 10_u64 << 30, "downtime-limit": 20 });
        connection.command("migrate-set-parameters", unlimited)?;
        qemu_save(connection, saved)?;
    } else {
        return Ok(None);
    }
    let status = connection.command("query-migrate", json!({}))?;
    let downtime = status.get("downtime").and_then(Value::as_f64).context("no downtime told")?;
    if matches!(way(found)?, Way::Exec) {
        connection.ask(Verb::Cont)?;
    }
    Ok(Some(Duration::from_secs_f64(downtime / 1e3)))
}

fn qemu_save(connection: &mut Connection, saved: &Path) -> Result<()> {
    let uri = format!("exec:cat > '{}'", saved.join("stream").display());
    connection.command("migrate", json!({ "uri": uri }))?;
    finished(connection)
}

/// Waits until the last save is over.
fn finished(connection: &mut Connection) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let status = connection.command("query-migrate", json!({}))?;
        match status.get("status").and_then(Value::as_str) {
            Some("completed") => return Ok(()),
            Some("failed" | "cancelled") => bail!("the save failed: {status}"),
            _ if Instant::now() > deadline => bail!("the save takes too long: {status}"),
            _ => thread::sleep(LOOK),
        }
    }
}

/// The command that goes on with `guest`, saved in `saved`.
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
    match way(found)? {
        Way::Directory if found.monitor.name == OURS.name => {
            let mut command = found.program()?;
            command.args(["-incoming", &format!("file:{}", saved.display())]);
            command.arg("-api-channel").arg(format!("unix:{}", socket.display()));
            Ok(command)
        }
        Way::Directory => incoming(format!("file:{}", saved.display())),
        Way::Exec => incoming(format!("exec:cat '{}'", saved.join("stream").display())),
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
    }
}

/// What is to be asked of a monitor that was started with [`command`], before the guest runs.
///
/// # Errors
/// It does not answer, or refuses.
pub fn go_on(found: &Found, run: &mut Run, saved: &Path) -> Result<()> {
    match way(found)? {
        Way::Directory if found.monitor.name == OURS.name => Ok(()),
        Way::Directory | Way::Exec | Way::CloudHypervisor => {
            run.connect()?.0.ask(Verb::Cont).map(drop)
        }
        Way::Firecracker => {
            let body = json!({
                "snapshot_path": saved.join("state"),
                "mem_backend": { "backend_type": "File", "backend_path": saved.join("memory") },
                "resume_vm": true,
            });
            run.connect()?.0.request("PUT", "/snapshot/load", &body)
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
