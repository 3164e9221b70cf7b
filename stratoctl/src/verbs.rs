//! The verbs: the one table from which the command line, completions and manual pages are made.
mod remus;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub use remus::*;

use crate::{policy::Then, registry::Name, remus::witness::Uri};

/// Create, watch, save and end stratovirt virtual machines. There is no daemon: a domain is a
/// directory and a running monitor.
#[derive(Debug, Parser)]
#[command(name = "stratoctl", version, max_term_width = 100, arg_required_else_help = true)]
pub struct Line {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub verb: Command,
}

/// Options of every verb.
#[derive(Debug, Args)]
pub struct Global {
    /// Keep the registry in DIR/run and DIR/state, not in the system's or the user's directories
    #[arg(long, global = true, env = "STRATOCTL_ROOT", value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// The monitor's program, if it is neither beside this one nor on PATH
    #[arg(long, global = true, env = "STRATOVIRT_BIN", value_name = "FILE")]
    pub monitor: Option<PathBuf>,
    /// Print results as JSON
    #[arg(long, global = true)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a domain from a configuration file; it is removed when it ends
    Create(Create),
    /// Register a domain without starting it
    New(New),
    /// Boot a registered domain
    Start(Start),
    /// List domains
    #[command(visible_alias = "ls")]
    List(List),
    /// Show details of domains
    Info(List),
    /// Stop the vCPUs; memory, devices and connections stay
    Pause(Domain),
    /// Resume the vCPUs
    Unpause(Domain),
    /// Save a snapshot of a domain to a directory; the domain ends, unless -c or -p
    Save(Save),
    /// Restore a domain from a snapshot made by save
    Restore(Restore),
    /// Save a registered domain in the registry; it ends, and resume continues it
    Suspend(Domain),
    /// Continue a suspended domain
    Resume(Resume),
    /// End a domain at once, as a power failure would
    Destroy(Destroy),
    /// Remove a registered domain
    Delete(Delete),
    /// Rename a domain
    Rename(Rename),
    /// Wait until a domain reaches a state
    Wait(Wait),
    /// Verify a snapshot against its checksums
    Check(Check),
    /// Ask the guest to power off, by the guest agent if it answers, else by the power button
    Shutdown(Shutdown),
    /// Ask the guest to reboot, by the guest agent if it answers, else by Ctrl-Alt-Del
    Reboot(Reboot),
    /// Attach to a domain's serial console; Ctrl-] leaves
    Console(Domain),
    /// Show the log of a domain's monitor
    Dmesg(Dmesg),
    /// Show the QMP events of monitors as they happen
    Events(Events),
    /// Send QMP commands to a domain's monitor
    Qmp(Qmp),
    /// Protect a running domain: another host continues it when this one fails
    Remus(Box<Remus>),
    /// Receive a protected domain: be its backup; started by remus on the other host
    RemusReceive(RemusReceive),
    /// Show what the last checkpoints of a protected domain cost, and write a CSV file and a picture
    RemusReport(RemusReport),
    /// Move a running domain to another host, with a pause of milliseconds
    Migrate(Migrate),
    /// Continue a protected domain at its backup
    Failover(Failover),
    /// Stop protecting a domain
    Unprotect(Unprotect),
    /// End this host's side of a protected domain, so that the other one can continue; status 0 if it
    /// certainly does not run
    Fence(Fence),
    /// Print shell completions
    Completions(Completions),
    /// Print the manual page, or write the pages of all verbs to a directory
    Man(Man),
    /// Restart a domain under its name when its guest ends; started by the verbs that need it
    #[command(hide = true)]
    Watch(Domain),
    /// Answer the monitor of a protected domain; started by the verbs that need it
    #[command(hide = true)]
    RemusAgent(Domain),
    /// Ask a witness what is read from standard input, line by line; started by the verbs that need it
    #[command(hide = true)]
    AskWitness(AskWitness),
}

/// A verb that takes only a name.
#[derive(Debug, Args)]
pub struct Domain {
    /// Name of the domain
    pub domain: Name,
}

/// A configuration file, and what overrides it.
#[derive(Debug, Args)]
pub struct Described {
    /// Configuration file of the monitor (JSON), with an optional object "domain"
    pub config: PathBuf,
    /// Name of the domain; by default machine-config.name of the file, or the file's own name
    #[arg(long)]
    pub name: Option<Name>,
    /// What happens when the guest powers off (destroy)
    #[arg(long, value_name = "ACTION")]
    pub on_poweroff: Option<Then>,
    /// What happens when the guest reboots (restart)
    #[arg(long, value_name = "ACTION")]
    pub on_reboot: Option<Then>,
    /// What happens when the guest crashes (destroy)
    #[arg(long, value_name = "ACTION")]
    pub on_crash: Option<Then>,
}

#[derive(Debug, Args)]
pub struct Create {
    #[command(flatten)]
    pub described: Described,
    #[command(flatten)]
    pub begin: Begin,
    /// Only check the configuration
    #[arg(short = 'n', long, conflicts_with_all = ["paused", "console"])]
    pub dry_run: bool,
}

/// How a domain starts.
#[derive(Debug, Args)]
pub struct Begin {
    /// Leave it paused
    #[arg(short, long)]
    pub paused: bool,
    /// Attach to its console
    #[arg(short, long, conflicts_with = "json")]
    pub console: bool,
}

#[derive(Debug, Args)]
pub struct New {
    #[command(flatten)]
    pub described: Described,
}

#[derive(Debug, Args)]
pub struct Start {
    /// Name of the domain
    pub domain: Name,
    /// Start although its guest may run on another host, where it was protected: it runs twice then
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    pub begin: Begin,
}

#[derive(Debug, Args)]
pub struct List {
    /// Names of domains (default: all)
    pub domains: Vec<Name>,
}

#[derive(Debug, Args)]
pub struct Save {
    /// Name of the domain
    pub domain: Name,
    /// Directory to save to; an earlier save in it is replaced once this one is complete
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Leave the domain running
    #[arg(short = 'c', long = "continue")]
    pub keep_running: bool,
    /// Leave the domain paused
    #[arg(short, long, conflicts_with = "keep_running")]
    pub paused: bool,
    /// Save its writable disks with its memory: such a snapshot can be restored any number of times, each
    /// time with disks of its own
    #[arg(long)]
    pub disks: bool,
}

#[derive(Debug, Args)]
pub struct Restore {
    /// Directory written by save
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Name of the new domain (default: that of the saved one)
    #[arg(long)]
    pub name: Option<Name>,
    /// New path of a disk; format=raw accepts a raw disk whose content looks like another format
    #[arg(long, value_name = "ID=PATH[,format=raw]", value_parser = moved_disk)]
    pub disk: Vec<MovedDisk>,
    /// New tap device of a NIC
    #[arg(long, value_name = "ID=TAP", value_parser = pair)]
    pub tap: Vec<(String, String)>,
    /// Copy the memory and verify its checksums, instead of mapping it unchecked
    #[arg(long)]
    pub verify: bool,
    /// Use the disks even if they have changed since the save: the guest may corrupt them
    #[arg(long)]
    pub force: bool,
    /// The time at which the guest's kvm-clock resumes
    #[arg(long, value_enum, default_value_t = Clock::Continue)]
    pub clock: Clock,
    #[command(flatten)]
    pub begin: Begin,
}

/// A disk of a saved machine, and where it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MovedDisk {
    pub id: String,
    pub path: PathBuf,
    /// It is raw, whatever it looks like.
    pub raw: bool,
}

/// The time at which a restored guest's clock resumes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Clock {
    /// The time of the save
    Continue,
    /// The time of the save plus the time passed since then
    Realtime,
}

#[derive(Debug, Args)]
pub struct Resume {
    /// Name of the domain
    pub domain: Name,
    /// Use the disks even if they have changed since the save: the guest may corrupt them
    #[arg(long)]
    pub force: bool,
    /// The time at which the guest's kvm-clock resumes
    #[arg(long, value_enum, default_value_t = Clock::Continue)]
    pub clock: Clock,
    #[command(flatten)]
    pub begin: Begin,
}

#[derive(Debug, Args)]
pub struct Destroy {
    /// Name of the domain
    pub domain: Name,
    /// Even if it is protected, which ends its backup, or is a backup, which leaves its primary
    /// without one
    #[arg(short = 'F', long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub struct Delete {
    /// Name of the domain
    pub domain: Name,
    /// Even if it is suspended or its record is damaged; its saved state is discarded
    #[arg(short, long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub struct Rename {
    /// Current name of the domain
    pub domain: Name,
    /// New name
    pub new: Name,
}

#[derive(Debug, Args)]
pub struct Wait {
    /// Name of the domain
    pub domain: Name,
    /// State to wait for
    #[arg(value_enum, default_value = "ended")]
    pub state: crate::commands::WaitFor,
    /// Longest wait in seconds (default: no limit)
    #[arg(short, long, value_name = "SECONDS")]
    pub timeout: Option<f64>,
}

#[derive(Debug, Args)]
pub struct Check {
    /// Directory written by save
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

#[derive(Debug, Args)]
pub struct Shutdown {
    /// Name of the domain
    pub domain: Name,
    /// Wait until the guest has powered off
    #[arg(short, long)]
    pub wait: bool,
    /// Destroy the domain if the guest has not powered off in time
    #[arg(short = 'F', long)]
    pub force: bool,
    /// Longest wait in seconds; 60 by default with -F
    #[arg(short, long, value_name = "SECONDS")]
    pub timeout: Option<f64>,
}

#[derive(Debug, Args)]
pub struct Reboot {
    /// Name of the domain
    pub domain: Name,
    /// Wait until the guest has rebooted, and reset the machine if it has not in time
    #[arg(short = 'F', long)]
    pub force: bool,
    /// Longest wait in seconds; 60 by default with -F
    #[arg(short, long, value_name = "SECONDS")]
    pub timeout: Option<f64>,
}

#[derive(Debug, Args)]
pub struct Dmesg {
    /// Name of the domain
    pub domain: Name,
    /// Only the last lines
    #[arg(short = 'n', long, value_name = "LINES")]
    pub lines: Option<usize>,
    /// Keep printing new lines until the domain ends
    #[arg(short, long)]
    pub follow: bool,
}

#[derive(Debug, Args)]
pub struct Events {
    /// Name of the domain, followed until it ends (default: all domains, also later ones)
    pub domain: Option<Name>,
}

#[derive(Debug, Args)]
pub struct Qmp {
    /// Name of the domain
    pub domain: Name,
    /// QMP command (default: commands from standard input, one per line)
    pub command: Option<String>,
    /// Its arguments, a JSON object
    #[arg(value_name = "JSON")]
    pub arguments: Option<String>,
}

#[derive(Debug, Args)]
pub struct Completions {
    /// Shell to complete for
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}

#[derive(Debug, Args)]
pub struct AskWitness {
    /// Witness to ask
    pub uri: Uri,
    /// Identity that it must have
    pub identity: Option<String>,
}

#[derive(Debug, Args)]
pub struct Man {
    /// Directory to write the pages to
    #[arg(value_name = "DIR")]
    pub directory: Option<PathBuf>,
}

pub fn moved_disk(word: &str) -> Result<MovedDisk, String> {
    let (id, place) = pair(word)?;
    // As in the monitor's -drive: every disk is raw, so no other format can be named.
    let (path, raw) = match place.split_once(',') {
        None => (place.as_str(), false),
        Some((path, "format=raw")) if !path.is_empty() => (path, true),
        Some((_, rest)) => {
            return Err(format!(
                "must be ID=PATH or ID=PATH,format=raw, where PATH has no comma; not '{rest}'"
            ));
        }
    };
    Ok(MovedDisk { id, path: path.into(), raw })
}

fn pair(word: &str) -> Result<(String, String), String> {
    match word.split_once('=') {
        Some((id, to)) if !id.is_empty() && !to.is_empty() => Ok((id.into(), to.into())),
        _ => Err("must be ID=WHERE".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moved_disk_may_be_called_raw_and_nothing_else() {
        let disk = |raw| MovedDisk { id: "root".into(), path: "/a=b".into(), raw };
        assert_eq!(moved_disk("root=/a=b").unwrap(), disk(false));
        assert_eq!(moved_disk("root=/a=b,format=raw").unwrap(), disk(true));
        for wrong in ["root=/a,format=qcow2", "root=/a,readonly=on", "root=/a,", "root=,format=raw"]
        {
            let said = moved_disk(wrong).unwrap_err();
            assert!(said.contains("ID=PATH,format=raw"), "{wrong}: {said}");
        }
        for wrong in ["root", "root=", "=/a"] {
            assert!(moved_disk(wrong).is_err(), "{wrong}");
        }
    }
}
