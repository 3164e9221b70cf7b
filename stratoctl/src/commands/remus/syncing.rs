//! From the order to protect a domain until it is protected: a progress bar on a terminal, lines
//! elsewhere.
use std::{
    io::IsTerminal as _,
    time::{Duration, Instant},
};

use indicatif::ProgressBar;
use qmp::{
    client::Client,
    schema::{QueryReplication, ReplicationInfo, ReplicationStatus, ReplicationStop, SyncProgress},
};

use super::follow;
use crate::{failure::Failure, progress, registry::Name, show};

/// How long a backup may take to answer. To be filled, it may take any time.
const CONNECT_LIMIT: Duration = Duration::from_secs(40);
/// A line is printed when another part of this size is done, in per cent.
const PART: u64 = 25;

/// Wait until the domain is protected; its state then. `quiet` shows nothing meanwhile.
///
/// # Errors
/// It is not protected.
pub fn until_protected(
    client: &mut Client,
    name: &Name,
    quiet: bool,
) -> anyhow::Result<ReplicationInfo> {
    let mut shown = Shown::new(name, quiet);
    let connected_by = Instant::now() + CONNECT_LIMIT;
    let mut given_up = false;
    let mut reason = "its backup has not answered".to_owned();
    let info = loop {
        let info = client.execute(&QueryReplication {})?;
        shown.show(&info);
        match info.state {
            ReplicationStatus::Protected | ReplicationStatus::Blackhole => break Some(info),
            ReplicationStatus::Off => break None,
            ReplicationStatus::Connecting if !given_up && Instant::now() >= connected_by => {
                given_up = true;
                client.execute(&ReplicationStop::default())?;
            }
            _ => {}
        }
        if let Some(change) = follow::next(client)? {
            if !given_up {
                reason = change.reason;
            }
            // Where the guest has come by a failover, there is no other way back.
            if change.state == ReplicationStatus::Degraded {
                break None;
            }
        }
    };
    shown.end();
    info.ok_or_else(|| {
        let what = format!("'{name}' is not protected: {reason}");
        Failure::hint(what, format!("`stratoctl dmesg {name}` shows more")).into()
    })
}

/// How the progress is shown.
enum Shown {
    Nothing,
    Bar(ProgressBar),
    Lines(Lines),
}

impl Shown {
    fn new(name: &Name, quiet: bool) -> Self {
        match (quiet, std::io::stderr().is_terminal()) {
            (true, _) => Self::Nothing,
            (false, true) => Self::Bar(progress::bar(&format!("Protecting {name}: memory"))),
            (false, false) => Self::Lines(Lines::new(name)),
        }
    }

    fn show(&mut self, info: &ReplicationInfo) {
        match self {
            Self::Nothing => {}
            Self::Bar(bar) => {
                if let Some(SyncProgress { done, total }) = info.sync {
                    bar.set_length(total);
                    bar.set_position(done);
                }
            }
            Self::Lines(lines) => {
                if let Some(line) = lines.next(info) {
                    eprintln!("{line}");
                }
            }
        }
    }

    fn end(&self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

/// Says what is new, in lines.
struct Lines {
    name: Name,
    last: ReplicationStatus,
    /// Parts of the copy that were reported.
    parts: u64,
}

impl Lines {
    fn new(name: &Name) -> Self {
        Self { name: name.clone(), last: ReplicationStatus::Off, parts: 0 }
    }

    /// A line, if there is something new.
    fn next(&mut self, info: &ReplicationInfo) -> Option<String> {
        let name = &self.name;
        let is_new = std::mem::replace(&mut self.last, info.state) != info.state;
        match (info.state, info.sync) {
            (ReplicationStatus::Connecting, _) if is_new => {
                Some(format!("{name}: connecting to the backup"))
            }
            (ReplicationStatus::Syncing, Some(SyncProgress { done, total })) if total > 0 => {
                let parts = done.saturating_mul(100 / PART) / total;
                let more = parts > self.parts || is_new;
                self.parts = parts.max(self.parts);
                let line = || {
                    let (done, total) = (show::bytes(done), show::bytes(total));
                    format!("{name}: copying memory: {done} of {total}")
                };
                more.then(line)
            }
            (ReplicationStatus::Protected, _) if is_new => {
                Some(format!("{name}: protected in term {}", info.term))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_say_what_is_new() {
        let mut lines = Lines::new(&"web".parse().unwrap());
        let at = |state, sync: Option<(u64, u64)>| ReplicationInfo {
            state,
            sync: sync.map(|(done, total)| SyncProgress { done, total }),
            term: 1,
            ..ReplicationInfo::default()
        };
        let syncing = |done: u64| at(ReplicationStatus::Syncing, Some((done << 20, 64 << 20)));
        let mut said = Vec::new();
        for info in [
            at(ReplicationStatus::Connecting, None),
            at(ReplicationStatus::Connecting, None),
            at(ReplicationStatus::Syncing, Some((0, 0))),
            syncing(3),
            syncing(20),
            syncing(21),
            syncing(64),
            at(ReplicationStatus::Arming, None),
            at(ReplicationStatus::Protected, None),
            at(ReplicationStatus::Protected, None),
        ] {
            said.extend(lines.next(&info));
        }
        assert_eq!(
            said,
            [
                "web: connecting to the backup",
                "web: copying memory: 20 MiB of 64 MiB",
                "web: copying memory: 64 MiB of 64 MiB",
                "web: protected in term 1",
            ]
        );
    }
}
