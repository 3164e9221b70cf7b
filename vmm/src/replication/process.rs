//! The peer's process, where that is on this host: a descriptor of it tells at once when it has ended.
//!
//! The kernel says who is at the other end of a Unix socket, but that may be a process which only
//! passes on what others send. So each side says which process it is, too, and it counts only if
//! both agree. What is found so decides nothing: it saves waiting for a process that has ended, and
//! keeps back an answer of the fence `local` while that process lives.
use std::{
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
};

use config::incoming::Arbiter;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use transport::Link;

/// The kind of fence that ends processes of this host.
const LOCAL: &str = "local";

/// A process of some host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Process {
    /// Of the host's boot.
    boot: String,
    /// Of its PID namespace.
    namespace: u64,
    /// Its number there.
    pid: u32,
}

/// Why there is no descriptor of the peer's process.
#[derive(Debug, thiserror::Error)]
pub enum NoProcess {
    /// One of the two has no procfs.
    #[error("which process it is cannot be compared: /proc is missing at one of the two sides")]
    Unknown,
    /// It is not on this host.
    #[error("it runs on another host")]
    Elsewhere,
    /// Its number means another process here.
    #[error("it is in another PID namespace")]
    Namespace,
    /// The kernel does not know.
    #[error("the connection is no Unix socket between the two monitors")]
    Connection(#[source] io::Error),
    /// Somebody is in between.
    #[error("process {0} passes the connection on")]
    Between(i32),
}

impl Process {
    /// This one; `None` if the host does not say.
    pub fn own() -> Option<Self> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        let namespace = fs::metadata("/proc/self/ns/pid").ok()?.ino();
        Some(Self { boot: boot.trim().to_owned(), namespace, pid: std::process::id() })
    }
}

/// The process of a peer that says to be `said`.
///
/// # Errors
/// Why that cannot be known for certain.
pub fn find(
    link: &Link,
    own: Option<&Process>,
    said: Option<&Process>,
) -> Result<Watched, NoProcess> {
    let (Some(own), Some(said)) = (own, said) else { return Err(NoProcess::Unknown) };
    if own.boot != said.boot {
        return Err(NoProcess::Elsewhere);
    }
    if own.namespace != said.namespace {
        return Err(NoProcess::Namespace);
    }
    let (process, fd) = link.process().map_err(NoProcess::Connection)?;
    match process.pid.ok_or(NoProcess::Namespace)? {
        pid if pid.cast_unsigned() == said.pid => Ok(Watched { fd, ended: false, told: false }),
        other => Err(NoProcess::Between(other)),
    }
}

/// Whether this fence needs the peer's process.
pub fn is_needed(arbiter: &Arbiter) -> bool {
    matches!(arbiter, Arbiter::Fence(kind) if kind == LOCAL)
}

/// Why a peer is refused whose process is needed.
pub fn refusal(why: &NoProcess) -> String {
    format!("the fence '{LOCAL}' needs the other side's process: {}", qmp::Error::generic(why))
}

/// Whether the peer may be down, as an agent says: a fence that ends processes of this host must have
/// ended the one that is known.
pub fn may_be_down(arbiter: &Arbiter, peer: &mut Option<Watched>) -> bool {
    let lives = peer.as_mut().is_some_and(|peer| !peer.has_ended());
    if is_needed(arbiter) && lives {
        log::warn!(
            "replication: the agent says that the other side is down, but its process lives"
        );
        return false;
    }
    true
}

/// The peer's process.
pub struct Watched {
    fd: OwnedFd,
    ended: bool,
    told: bool,
}

impl Watched {
    /// What to wait for: its end, unless that is known.
    pub fn interest(&self) -> Option<PollFd<'_>> {
        (!self.ended).then(|| PollFd::new(&self.fd, PollFlags::IN))
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(self.fd.as_fd(), PollFlags::IN)];
        self.ended |= matches!(poll(&mut fds, Some(&Timespec::default())), Ok(1));
        self.ended
    }

    /// Whether it has ended and that was not told yet; it is now.
    pub fn tells_end(&mut self) -> bool {
        !self.told && self.has_ended() && !std::mem::replace(&mut self.told, true)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use transport::Descriptors;

    use super::*;

    #[test]
    fn only_a_process_that_both_know_is_found() {
        let (near, _far) = UnixStream::pair().unwrap();
        let link = Link::plain(Descriptors::socket(near.into()).unwrap(), false).unwrap();
        let own = Process::own().unwrap();
        let mut found = find(&link, Some(&own), Some(&own)).ok().unwrap();
        assert!(!found.has_ended() && !found.tells_end());
        let failed = |said: Option<&Process>| find(&link, Some(&own), said).err().unwrap();
        assert!(matches!(failed(None), NoProcess::Unknown));
        let elsewhere = Process { boot: "another".into(), ..own.clone() };
        assert!(matches!(failed(Some(&elsewhere)), NoProcess::Elsewhere));
        let confined = Process { namespace: 1, ..own.clone() };
        assert!(refusal(&failed(Some(&confined))).contains("in another PID namespace"));
        let relayed = Process { pid: own.pid + 1, ..own.clone() };
        assert!(matches!(failed(Some(&relayed)), NoProcess::Between(pid) if pid > 0));
    }

    #[test]
    fn the_end_of_a_process_is_seen_and_told_once() {
        let mut child =
            std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let pid = rustix::process::Pid::from_child(&child);
        let fd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
        let mut watched = Some(Watched { fd, ended: false, told: false });
        let (local, ssh) = (Arbiter::Fence("local".into()), Arbiter::Fence("ssh".into()));
        assert!(!may_be_down(&local, &mut watched), "it lives");
        assert!(may_be_down(&ssh, &mut watched), "that fence knows better");
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(may_be_down(&local, &mut watched));
        let mut watched = watched.unwrap();
        assert!(watched.tells_end() && !watched.tells_end() && watched.interest().is_none());
    }
}
