//! Fences: the certainty that the other side does not run, where there is no witness to ask, or
//! to free what it holds.
//!
//! Where the fence decides, both sides may reach for it. The order excludes that both succeed: who
//! fences writes `fencing` into its own mark first, then `stratoctl fence` on the other host writes
//! `fenced` into that side's. Both are written under the side's lock, and exclude each other: a
//! primary that is fencing refuses to be fenced, a backup obeys.
mod marks;
mod target;

use std::{fmt, path::PathBuf, process::Command, str::FromStr, time::Duration};

use replication::{Lineage, Side, Term};

pub use marks::{InRegistry, Mark, Marks};
pub use target::{Fenced, KILL_LIMIT, begin, yield_to};

use super::{Unknown, bounded::run, uuid::Uuid, wire::SideText};

/// How long a fence may take.
const LIMIT: Duration = Duration::from_secs(60);
/// Exit status of `stratoctl fence` where it refuses.
pub const REFUSED: u8 = 1;
/// Exit status of `stratoctl fence` where it is not known whether the other side runs.
pub const UNSURE: u8 = 4;

/// Which fence: `local`, `ssh:HOST` or `exec:COMMAND`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Uri {
    Local,
    Ssh(String),
    Exec(String),
}

impl Uri {
    /// Its kind: what both sides have to agree on.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Ssh(_) => "ssh",
            Self::Exec(_) => "exec",
        }
    }

    /// Make sure that `side` of this lineage does not run in `term`. `own` runs this program on
    /// this host, with its global options.
    ///
    /// # Errors
    /// It refuses, or cannot be sure.
    pub fn bring_down(
        &self,
        own: &[PathBuf],
        lineage: Lineage,
        term: Term,
        side: Side,
    ) -> Result<(), Unknown> {
        let (lineage, term) = (Uuid(lineage.0).to_string(), term.0.to_string());
        let verb = ["fence", &lineage, &term, "--side", SideText::from(side).word()];
        let mut command = match self {
            Self::Local => {
                let mut words = own.iter();
                let program = words.next().cloned().unwrap_or_default();
                let mut command = Command::new(program);
                command.args(words).args(verb);
                command
            }
            Self::Ssh(host) => {
                let mut command = Command::new("ssh");
                command.args(["-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "--"]);
                command.arg(host).arg("stratoctl").args(verb);
                command
            }
            Self::Exec(line) => {
                let mut command = Command::new("/bin/sh");
                command.args(["-c", &format!("{line} \"$@\""), "fence", &lineage, &term]);
                command
            }
        };
        let done = run(&mut command, LIMIT)?;
        match done.code {
            Some(0) => Ok(()),
            Some(code) => {
                Err(Unknown::new(format!("fence {self}: status {code}: {}", done.complaint())))
            }
            None => Err(Unknown::new(format!("fence {self}: a signal has ended it"))),
        }
    }
}

impl FromStr for Uri {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "local" => Ok(Self::Local),
            // A host that begins like an option would be one.
            Some(("ssh", host)) if !host.is_empty() && !host.starts_with('-') => {
                Ok(Self::Ssh(host.to_owned()))
            }
            Some(("exec", line)) if !line.trim().is_empty() => Ok(Self::Exec(line.to_owned())),
            _ => Err("a fence is local, ssh:HOST or exec:COMMAND".into()),
        }
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local => f.write_str("local"),
            Self::Ssh(host) => write!(f, "ssh:{host}"),
            Self::Exec(line) => write!(f, "exec:{line}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERM: Term = Term(3);

    fn exec(script: &str) -> Result<(), Unknown> {
        let uri: Uri = format!("exec:{script}").parse().unwrap();
        uri.bring_down(&[], Lineage(7), TERM, Side::Backup)
    }

    #[test]
    fn fences_are_named_by_uris() {
        for good in ["local", "ssh:root@b", "exec:fence_ipmilan -a 10.0.0.7 -o off"] {
            assert_eq!(good.parse::<Uri>().map(|uri| uri.to_string()).as_deref(), Ok(good));
        }
        for wrong in ["", "local:", "ssh:", "ssh:-oProxyCommand=x", "exec:", "stonith:x"] {
            assert!(wrong.parse::<Uri>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn only_status_0_is_proof() {
        let uuid = Uuid(7);
        assert_eq!(exec(&format!("sh -c '[ \"$1 $2\" = \"{uuid} 3\" ]' fence")), Ok(()));
        for (script, says) in
            [("false", "status 1"), ("sh -c 'echo no route >&2; exit 7'", "status 7: no route")]
        {
            let said = exec(script).unwrap_err().to_string();
            assert!(said.contains(says), "{said}");
        }
        assert!(exec("sh -c 'kill -9 $$'").is_err());
        assert!(exec("/no/such/program").is_err());
    }
}
