//! One monitor that runs one guest, and its timing.
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::OFlags;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use super::control::{Connection, Protocol};
use super::monitors::{Found, Guest};
use super::{smaps, snapshots};

/// How long the control socket may take to answer.
const API_LIMIT: Duration = Duration::from_secs(20);
/// Time between two checks for the control socket.
const POLL_INTERVAL: Duration = Duration::from_micros(100);

/// The monitor's standard error, a file in its directory.
const ERRORS: &str = "stderr";

/// A running monitor. Killed when dropped.
pub struct Run {
    child: Child,
    started: Instant,
    output: Receiver<(Instant, Vec<u8>)>,
    seen: Vec<u8>,
    at: Instant,
    protocol: Protocol,
    socket: PathBuf,
}

impl Run {
    /// Starts `found` with `guest`; `dir` is for its files.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(found: &Found, guest: &Guest, dir: &Path) -> Result<Self> {
        Self::launch(found, dir, |socket| found.command(guest, socket, dir))
    }

    /// Starts `found` so that it restores `guest`, which was saved in `saved`.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn restore(found: &Found, guest: &Guest, saved: &Path, dir: &Path) -> Result<Self> {
        Self::launch(found, dir, |socket| snapshots::command(found, guest, saved, socket, dir))
    }

    /// Starts `found` with the command that `command` makes for a control socket.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn launch(
        found: &Found,
        dir: &Path,
        command: impl FnOnce(&Path) -> Result<Command>,
    ) -> Result<Self> {
        let socket = dir.join("api.sock");
        match fs::remove_file(&socket) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        let Started { child, mut out, at: started } = spawn(found, command(&socket)?, dir)?;
        let (sender, output) = channel();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = out.read(&mut buffer) {
                let bytes = buffer.get(..length).unwrap_or_default().to_vec();
                if sender.send((Instant::now(), bytes)).is_err() {
                    return;
                }
            }
        });
        let protocol = found.monitor.protocol;
        let (seen, at) = (Vec::new(), started);
        Ok(Self { child, started, output, seen, at, protocol, socket })
    }

    /// Waits until the control socket answers; returns the time since exec.
    ///
    /// # Errors
    /// It does not, or the monitor ends.
    pub fn connect(&mut self) -> Result<(Connection, Duration)> {
        let deadline = Instant::now() + API_LIMIT;
        loop {
            let error = match Connection::open(self.protocol, &self.socket) {
                Ok((connection, at)) => return Ok((connection, at - self.started)),
                Err(error) => error,
            };
            if self.child.try_wait()?.is_some() || Instant::now() > deadline {
                return Err(self.explained("the control socket does not answer").context(error));
            }
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// Waits for the guest's first byte; returns the time since exec.
    ///
    /// # Errors
    /// It does not come within `limit`.
    pub fn wait_byte(&mut self, byte: u8, limit: Duration) -> Result<Duration> {
        let deadline = Instant::now() + limit;
        while !self.seen.contains(&byte) {
            self.more(deadline).context("the guest's first byte did not arrive")?;
        }
        Ok(self.at - self.started)
    }

    /// Waits for the guest's next `bench NAME VALUE`; returns name, value and the time since exec.
    ///
    /// # Errors
    /// It does not come within `limit`, or it reports a failure.
    pub fn wait_figure(&mut self, limit: Duration) -> Result<(String, f64, Duration)> {
        let deadline = Instant::now() + limit;
        loop {
            let Some(end) = self.seen.iter().position(|&byte| byte == b'\n') else {
                self.more(deadline).context("the guest prints nothing")?;
                continue;
            };
            let line: Vec<u8> = self.seen.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            let Some((_, said)) = line.trim_end().split_once("bench ") else { continue };
            match said.split_once(' ') {
                Some(("failed", why)) => bail!("in the guest: {why}"),
                // The kernel's own lines may contain the word, too, because it prints its command
                // line.
                Some((name, value)) => {
                    if let Ok(value) = value.parse() {
                        return Ok((name.to_owned(), value, self.at - self.started));
                    }
                }
                None => {}
            }
        }
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The control socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// KiB of private memory beyond the guest's RAM of `mib`.
    ///
    /// # Errors
    /// The process has ended, or none of its mappings is the guest's RAM.
    pub fn private_kib(&self, mib: u64) -> Result<u64> {
        let smaps = fs::read_to_string(format!("/proc/{}/smaps", self.child.id()))?;
        Ok(smaps::shares(&smaps, mib << 10)?.private)
    }

    /// More output.
    fn more(&mut self, deadline: Instant) -> Result<()> {
        let left = deadline.saturating_duration_since(Instant::now());
        match self.output.recv_timeout(left) {
            Ok((at, bytes)) => {
                self.at = at;
                self.seen.extend(bytes);
                Ok(())
            }
            Err(RecvTimeoutError::Timeout) => Err(self.explained("no more output came in time")),
            Err(RecvTimeoutError::Disconnected) => {
                let status = self.child.wait()?;
                Err(self.explained(&format!("the monitor has ended ({status})")))
            }
        }
    }

    /// An error with the last output of the guest.
    fn explained(&self, what: &str) -> anyhow::Error {
        anyhow::anyhow!("{what}: {}", tail(&self.seen))
    }
}

/// A monitor that has been started.
pub struct Started {
    /// Its process.
    pub child: Child,
    /// What it writes to standard output.
    pub out: File,
    /// The moment before its exec.
    pub at: Instant,
}

/// Starts `command` of the monitor `found`; its standard error is a file in `dir`.
///
/// # Errors
/// It cannot be started.
pub fn spawn(found: &Found, mut command: Command, dir: &Path) -> Result<Started> {
    command.stderr(File::create(dir.join(ERRORS))?);
    let mut terminal = None;
    if found.monitor.terminal {
        let (ours, its) = self::terminal().context("cannot make a terminal")?;
        command.stdin(its.try_clone()?).stdout(its);
        terminal = Some(ours);
    } else {
        command.stdin(Stdio::null()).stdout(Stdio::piped());
    }
    let at = Instant::now();
    let mut child = command.spawn().with_context(|| format!("cannot start {}", found.name))?;
    // The monitor's end of the terminal must not stay open here, or this end would never see it
    // closed.
    drop(command);
    let out = match (terminal, child.stdout.take()) {
        (Some(terminal), _) => terminal,
        (None, out) => OwnedFd::from(out.context("a child without output")?).into(),
    };
    Ok(Started { child, out, at })
}

/// The end of the standard error of the monitor that was last started with files in `dir`.
#[must_use]
pub fn last_words(dir: &Path) -> String {
    // Without the file, no monitor was started.
    tail(&fs::read(dir.join(ERRORS)).unwrap_or_default())
}

/// The last lines of `bytes`, as one.
#[must_use]
pub fn tail(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes).trim().to_owned();
    let lines: Vec<_> = text.lines().collect();
    lines.get(lines.len().saturating_sub(4)..).unwrap_or_default().join(" | ")
}

impl Drop for Run {
    fn drop(&mut self) {
        // An error here means that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A terminal in raw mode: this side of it, and the monitor's.
fn terminal() -> Result<(File, File)> {
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
    grantpt(&ours)?;
    unlockpt(&ours)?;
    let name = ptsname(&ours, Vec::new())?;
    let path = Path::new(OsStr::from_bytes(name.as_bytes()));
    let flags = OFlags::NOCTTY.bits().cast_signed();
    let its = File::options().read(true).write(true).custom_flags(flags).open(path)?;
    let mut settings = tcgetattr(&its)?;
    settings.make_raw();
    tcsetattr(&its, OptionalActions::Now, &settings)?;
    Ok((ours.into(), its))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_terminal_changes_no_byte() {
        let (mut ours, mut its) = terminal().unwrap();
        let bytes: Vec<u8> = (0..=255).collect();
        its.write_all(&bytes).unwrap();
        let mut came = [0; 256];
        ours.read_exact(&mut came).unwrap();
        assert_eq!(came[..], bytes);
        drop(its);
        assert!(ours.read(&mut came).is_err(), "no end when its side is closed");
    }
}
