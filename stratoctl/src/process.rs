//! The monitor's process: found by its pid file, and never confused with another process.
use std::{
    fs::{self, File},
    io::Read,
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use state::regular_file::open_regular;

/// Ticks per second of the times in `/proc/PID/stat`; the same on every x86_64 (`USER_HZ`).
const TICKS_PER_SECOND: f64 = 100.0;
/// Longest pid file, in bytes: a number and the end of its line.
const MAX_PID_FILE: u64 = 12;
/// Bytes of a page in `/proc/PID/statm`.
const PAGE_SIZE: u64 = 4096;

/// A running monitor.
pub struct Process {
    pid: u32,
    fd: OwnedFd,
}

/// The result of reading the pid file in a directory.
pub enum Found {
    /// No monitor: there is no pid file, or an empty one.
    Nobody,
    /// It has ended and left its pid file behind.
    Gone,
    /// It is running.
    Alive(Process),
}

/// Find the monitor whose working directory is `run`.
pub fn find(run: &Path) -> Found {
    let read = || {
        let mut text = String::new();
        let file = open_regular(&run.join("pid"), File::options().read(true)).ok()?;
        file.take(MAX_PID_FILE).read_to_string(&mut text).ok()?;
        (!text.trim().is_empty()).then_some(text)
    };
    let mut now = read();
    while let Some(text) = now {
        if let Some(process) = text.trim().parse().ok().and_then(|pid| Process::open(pid, run)) {
            return Found::Alive(process);
        }
        // It may have ended in order since the file was read, and another one may have started.
        now = read();
        if now.as_ref() == Some(&text) {
            return Found::Gone;
        }
    }
    Found::Nobody
}

/// Find a monitor whose working directory is `run` and that has no pid file: one that was started
/// by a `stratoctl` which was killed has none at first. Reads all of `/proc`.
pub fn search(run: &Path) -> Option<Process> {
    let entries = fs::read_dir("/proc").ok()?;
    let mut pids = entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok());
    pids.find_map(|pid| Process::open(pid, run).filter(Process::is_monitor))
}

/// The kernel's directories for the threads of `pid`, the first thread first: when that one has
/// ended and others have not, the kernel reports nothing more for the process as a whole.
fn tasks(pid: u32) -> Vec<PathBuf> {
    let first = PathBuf::from(format!("/proc/{pid}"));
    if fs::read_link(first.join("cwd")).is_ok() {
        return vec![first];
    }
    let tasks = fs::read_dir(first.join("task")).into_iter().flatten().flatten();
    tasks.map(|task| task.path()).collect()
}

impl Process {
    /// Whether it runs a monitor, and not another program such as a shell.
    fn is_monitor(&self) -> bool {
        // If the first thread of a process has ended, the others show it.
        let read = || {
            let lines =
                tasks(self.pid).into_iter().filter_map(|t| fs::read(t.join("cmdline")).ok());
            lines.into_iter().find(|line| !line.is_empty()).unwrap_or_default()
        };
        let mut text = read();
        // It has none for a moment while it executes another program.
        for _ in 0..100 {
            if !text.is_empty() || self.ends_within(Duration::from_millis(1)) {
                break;
            }
            text = read();
        }
        text.split(|byte| *byte == 0).any(|word| word == b"-pidfile")
    }

    /// Process `pid`, if it is a monitor started in `run`: the id may have been reused.
    fn open(pid: u32, run: &Path) -> Option<Self> {
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw)?;
        let fd = pidfd_open(number, PidfdFlags::empty()).ok()?;
        let process = Self { pid, fd };
        let at = |path: &Path| fs::metadata(path).ok().map(|m| (m.dev(), m.ino()));
        let run = at(run)?;
        let here = tasks(pid).into_iter().any(|task| at(&task.join("cwd")) == Some(run));
        // Alive now, so the checks above were about this very process.
        (here && !process.ends_within(Duration::ZERO)).then_some(process)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it has ended, or ends within `limit`.
    pub fn ends_within(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(timeout) = Timespec::try_from(left) else { return false };
            match poll(&mut [PollFd::new(&self.fd, PollFlags::IN)], Some(&timeout)) {
                Ok(0) | Err(Errno::INTR) if !left.is_zero() => {}
                Ok(ready) => return ready > 0,
                Err(_) => return false,
            }
        }
    }

    /// Whether it only exists because the kernel cannot end one of its threads yet.
    pub fn is_only_a_number(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        // Field 3; the second one is in parentheses and may contain anything.
        stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z'))
    }

    /// Kill it, even if it is busy.
    ///
    /// # Errors
    /// When it belongs to another user.
    pub fn kill(&self) -> std::io::Result<()> {
        match pidfd_send_signal(&self.fd, Signal::KILL) {
            Err(Errno::SRCH) => Ok(()),
            other => other.map_err(Into::into),
        }
    }

    /// Bytes of memory that it occupies.
    pub fn rss(&self) -> Option<u64> {
        let text = fs::read_to_string(format!("/proc/{}/statm", self.pid)).ok()?;
        text.split_whitespace().nth(1)?.parse::<u64>().ok().map(|pages| pages * PAGE_SIZE)
    }

    /// Bytes that it has read until now.
    pub fn read(&self) -> Option<u64> {
        let text = fs::read_to_string(format!("/proc/{}/io", self.pid)).ok()?;
        text.lines().find_map(|line| line.strip_prefix("rchar: "))?.parse().ok()
    }

    /// Seconds since it was started.
    pub fn uptime(&self) -> Option<f64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).ok()?;
        // Field 22; the second one is in parentheses and may contain anything.
        let started: f64 = stat.rsplit(')').next()?.split_whitespace().nth(19)?.parse().ok()?;
        let now = fs::read_to_string("/proc/uptime").ok()?;
        let now: f64 = now.split_whitespace().next()?.parse().ok()?;
        Some((now - started / TICKS_PER_SECOND).max(0.0))
    }
}
