//! The verbs of replication. Options have xl's letters where xl has them.
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use qmp::schema::{OnBackupLoss, OnBackupSlow};

use super::{MovedDisk, moved_disk};
use crate::{
    registry::Name,
    remus::{fence, uuid::Uuid, wire::SideText, witness},
};

/// Milliseconds between the checkpoints of a domain that moves: the last one should be short.
const MOVING: u64 = 25;

#[derive(Debug, Args)]
pub struct Remus {
    /// Name of the domain
    pub domain: Name,
    /// Host of the backup; with -s '' a command that receives the domain
    #[arg(required_unless_present_any = ["local", "blackhole"])]
    pub host: Option<String>,
    /// Keep the backup on this host: it survives the monitor's death, not the host's
    #[arg(long, conflicts_with_all = ["host", "shell", "port"])]
    pub local: bool,
    /// Time between checkpoints in milliseconds; auto: as soon as output waits, if the cost allows it
    #[arg(short, long, value_name = "MS", default_value = "200", value_parser = interval)]
    pub interval: Interval,
    /// With -i auto: the longest time between checkpoints in milliseconds (200)
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..=60_000))]
    pub max_period: Option<u64>,
    /// Stop the domain when a checkpoint is due and the backup is two behind
    #[arg(long)]
    pub timer: bool,
    /// Send pages as they are, neither packed nor as differences
    #[arg(short = 'u', long = "no-compression")]
    pub uncompressed: bool,
    /// Command that reaches the host instead of ssh; '' runs HOST itself as a command
    #[arg(short, long = "shell", value_name = "COMMAND", conflicts_with = "port")]
    pub shell: Option<String>,
    /// Connect to `stratoctl remus-receive -p PORT` on the host
    #[arg(short, long)]
    pub port: Option<u16>,
    /// Receiver: return once the domain runs there, do not wait for its end
    #[arg(short = 'e', long)]
    pub no_wait: bool,
    /// Refused: output is held by the monitor itself, not by a script
    #[arg(short = 'N', hide = true)]
    pub no_script: bool,
    /// Accept -b, -d and -n, and that there is neither witness nor fence (then a failover is by hand only)
    #[arg(short = 'F', long)]
    pub force: bool,
    /// Send checkpoints nowhere: shows what protection costs, and protects nothing (needs -F)
    #[arg(short, long)]
    pub blackhole: bool,
    /// Do not hold output: others may see what the backup does not know (needs -F)
    #[arg(short = 'n', long = "no-net")]
    pub no_hold: bool,
    /// Do not replicate what the domain writes to its disks: both hosts have the same ones (needs -F)
    #[arg(short = 'd', long)]
    pub no_disks: bool,
    /// With --local: the image of a disk at the backup (that of the domain, with .backup appended)
    #[arg(long = "disk", value_name = "ID=PATH", value_parser = moved_disk, requires = "local")]
    pub disk: Vec<MovedDisk>,
    /// What decides who continues: dir:PATH, exec:COMMAND or
    /// etcd:URL,.. (with prefix=KEY and tls=DIR, if wanted, behind commas); the same on both hosts
    #[arg(long, value_name = "URI")]
    pub witness: Option<witness::Uri>,
    /// What ends the other side: local, ssh:HOST or exec:COMMAND
    #[arg(long, value_name = "URI")]
    pub fence: Option<fence::Uri>,
    /// What happens when the backup is lost
    #[arg(long, value_enum, value_name = "ACTION")]
    pub on_backup_loss: Option<OnLoss>,
    /// What happens when the backup is too slow
    #[arg(long, value_enum, value_name = "ACTION")]
    pub on_backup_slow: Option<OnSlow>,
    /// How long output may be held, in milliseconds, before the backup is too slow (10000)
    #[arg(long, value_name = "MS")]
    pub ack_limit: Option<u64>,
    /// Most memory that is copied aside until the backup has it (256M); beyond it the domain is
    /// stopped until there is room
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub max_staging: Option<u64>,
    /// Most output that is held (64M); likewise
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub max_held: Option<u64>,
    /// Milliseconds between two signs of life (a tenth of --timeout)
    #[arg(long, value_name = "MS")]
    pub heartbeat: Option<u64>,
    /// Milliseconds without a sign of life after which the other side is suspected (1000)
    #[arg(long, value_name = "MS")]
    pub timeout: Option<u64>,
    /// Send signs of life to the other host by a second path, too (UDP): its address there, where
    /// `remus-receive --heartbeat-path` listens
    #[arg(long, value_name = "HOST:PORT", conflicts_with = "local")]
    pub heartbeat_path: Option<String>,
    /// With -p: encrypt, with ca-cert.pem, client-cert.pem and client-key.pem in this directory
    #[arg(long, value_name = "DIR")]
    pub tls: Option<PathBuf>,
}

/// A size in bytes: `N[K|M]`.
fn size(word: &str) -> Result<u64, String> {
    config::value::size(word, 1 << 20..=u32::MAX).map(u64::from)
}

/// Time between checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interval {
    Auto,
    Milliseconds(u64),
}

fn interval(word: &str) -> Result<Interval, String> {
    let wrong = || "must be 'auto' or milliseconds, from 1 to 60000".to_owned();
    match word {
        "auto" => Ok(Interval::Auto),
        number => {
            let number = number.parse().map_err(|_| wrong())?;
            (1..=60_000)
                .contains(&number)
                .then_some(Interval::Milliseconds(number))
                .ok_or_else(wrong)
        }
    }
}

/// What a primary does when it has lost its backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnLoss {
    /// Ask the witness, or fence, and continue alone
    Witness,
    /// Hold the guest's output until somebody decides
    Stall,
    /// Park the guest and end
    Stop,
    /// Continue alone without asking
    Continue,
}

impl From<OnLoss> for OnBackupLoss {
    fn from(action: OnLoss) -> Self {
        match action {
            OnLoss::Witness => Self::Witness,
            OnLoss::Stall => Self::Stall,
            OnLoss::Stop => Self::Stop,
            OnLoss::Continue => Self::Continue,
        }
    }
}

/// What a primary does when its backup is too slow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnSlow {
    /// Continue alone, if the witness or the fence allows
    Solo,
    /// Hold the guest's output
    Stall,
}

impl From<OnSlow> for OnBackupSlow {
    fn from(action: OnSlow) -> Self {
        match action {
            OnSlow::Solo => Self::Solo,
            OnSlow::Stall => Self::Stall,
        }
    }
}

#[derive(Debug, Args)]
pub struct Migrate {
    /// Name of the domain
    pub domain: Name,
    /// The other host; with -s '' a command that receives the domain
    pub host: String,
    /// Command that reaches the host instead of ssh; '' runs HOST itself as a command
    #[arg(short, long = "shell", value_name = "COMMAND", conflicts_with = "port")]
    pub shell: Option<String>,
    /// Connect to `stratoctl remus-receive -p PORT` on the host
    #[arg(short, long)]
    pub port: Option<u16>,
    /// With -p: encrypt, with ca-cert.pem, client-cert.pem and client-key.pem in this directory
    #[arg(long, value_name = "DIR")]
    pub tls: Option<PathBuf>,
    /// What decides who has the guest if a host fails meanwhile: as for remus
    #[arg(long, value_name = "URI")]
    pub witness: Option<witness::Uri>,
}

impl Migrate {
    /// The protection by which the domain moves.
    pub fn protection(&self) -> Remus {
        Remus {
            domain: self.domain.clone(),
            host: Some(self.host.clone()),
            local: false,
            interval: Interval::Milliseconds(MOVING),
            max_period: None,
            timer: false,
            uncompressed: false,
            shell: self.shell.clone(),
            port: self.port,
            no_wait: true,
            no_script: false,
            force: true,
            blackhole: false,
            no_hold: false,
            no_disks: false,
            disk: Vec::new(),
            witness: self.witness.clone(),
            fence: None,
            on_backup_loss: None,
            on_backup_slow: None,
            ack_limit: None,
            max_staging: None,
            max_held: None,
            heartbeat: None,
            timeout: None,
            heartbeat_path: None,
            tls: self.tls.clone(),
        }
    }
}

#[derive(Debug, Args)]
pub struct RemusReceive {
    /// Wait for a sender on this port, not on standard input and output; without --tls only on the
    /// loopback device
    #[arg(short, long)]
    pub port: Option<u16>,
    /// With -p: encrypt, with ca-cert.pem, server-cert.pem and server-key.pem in this directory
    #[arg(long, value_name = "DIR", requires = "port")]
    pub tls: Option<PathBuf>,
    /// Return once the domain runs here, do not wait for its end
    #[arg(short = 'e', long)]
    pub no_wait: bool,
    /// The image of a disk here (default: the sender's path)
    #[arg(long = "disk", value_name = "ID=PATH", value_parser = moved_disk)]
    pub disk: Vec<MovedDisk>,
    /// Name of the domain here (default: that of the sender)
    #[arg(long)]
    pub name: Option<Name>,
    /// Take signs of life by a second path, too (UDP): an address of this host
    #[arg(long, value_name = "HOST:PORT")]
    pub heartbeat_path: Option<String>,
    /// The sender's witness
    #[arg(long, value_name = "URI")]
    pub witness: Option<witness::Uri>,
    /// What ends the sender's side
    #[arg(long, value_name = "URI")]
    pub fence: Option<fence::Uri>,
}

#[derive(Debug, Args)]
pub struct RemusReport {
    /// Name of the domain
    pub domain: Name,
    /// Directory for DOMAIN-remus.csv and DOMAIN-remus.svg, which are replaced (default: this one)
    #[arg(value_name = "DIR", default_value = ".", hide_default_value = true)]
    pub directory: PathBuf,
}

#[derive(Debug, Args)]
pub struct Failover {
    /// Name of the domain
    pub domain: Name,
    /// Move the guest to the backup, without loss (primary)
    #[arg(long, conflicts_with = "force")]
    pub planned: bool,
    /// Continue here although neither witness nor fence has said so: there may be two copies then
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub struct Unprotect {
    /// Name of the domain
    pub domain: Name,
    /// Even if the term cannot be closed: the backup may continue the guest, too
    #[arg(short = 'F', long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub struct Fence {
    /// UUID of the protected domain
    pub lineage: Uuid,
    /// Term in which the other side is to continue
    pub term: u64,
    /// Which side is to end, where both are on this host
    #[arg(long, value_enum)]
    pub side: Option<SideText>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_is_a_time_or_auto() {
        assert_eq!(interval("auto"), Ok(Interval::Auto));
        assert_eq!(interval("25"), Ok(Interval::Milliseconds(25)));
        for wrong in ["", "0", "-1", "60001", "1s", "Auto"] {
            assert!(interval(wrong).is_err(), "{wrong}");
        }
    }
}
