//! The verbs: the one table from which the command line, completions and manual pages are made.
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::{policy::Then, registry::Name};

/// Create, watch, save and end virtual machines of stratovirt. There is no daemon: a domain is a
/// directory and a running monitor.
#[derive(Debug, Parser)]
#[command(name = "stratoctl", version, max_term_width = 100, arg_required_else_help = true)]
pub struct Line {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub verb: Command,
}

/// What goes with every verb.
#[derive(Debug, Args)]
pub struct Global {
    /// Keep the registry in DIR/run and DIR/state rather than in the system's or the user's place
    #[arg(long, global = true, env = "STRATOCTL_ROOT", value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// The monitor's program, if it is neither beside this one nor on PATH
    #[arg(long, global = true, env = "STRATOVIRT_BIN", value_name = "FILE")]
    pub monitor: Option<PathBuf>,
    /// Answer in JSON
    #[arg(long, global = true)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a domain from a configuration; it is forgotten when it ends
    Create(Create),
    /// Register a domain without starting it
    New(New),
    /// Boot a registered domain
    Start(Start),
    /// Show domains
    #[command(visible_alias = "ls")]
    List(List),
    /// Show all that is known of domains
    Info(List),
    /// Stop the vCPUs; memory, devices and connections stay
    Pause(Domain),
    /// Let the vCPUs run again
    Unpause(Domain),
    /// Save a domain into a directory; it ends, unless -c or -p
    Save(Save),
    /// Go on from a directory made by save
    Restore(Restore),
    /// Save a registered domain into its own store; it ends and stays registered
    Suspend(Domain),
    /// Go on from the domain's own store
    Resume(Resume),
    /// Pull the plug: the same as losing power
    Destroy(Domain),
    /// Forget a registered domain
    Delete(Delete),
    /// Give a domain another name
    Rename(Rename),
    /// Wait until a domain is in a state
    Wait(Wait),
    /// Compare a directory made by save with its checksums
    Check(Check),
    /// Ask the guest to power off, by the guest agent if it answers, else by the power button
    Shutdown(Shutdown),
    /// Ask the guest to reboot, by the guest agent if it answers, else by Ctrl-Alt-Del
    Reboot(Reboot),
    /// Attach to a domain's serial console; Ctrl-] leaves
    Console(Domain),
    /// Show the log of a domain's monitor
    Dmesg(Dmesg),
    /// Show what monitors tell as it happens
    Events(Events),
    /// Talk to a domain's monitor
    Qmp(Qmp),
    /// Print completions for a shell
    Completions(Completions),
    /// Print the manual page, or write a page for each verb into a directory
    Man(Man),
    /// Restart a domain under its name when its guest ends; started by the verbs that need it
    #[command(hide = true)]
    Watch(Domain),
}

/// A verb that takes only a name.
#[derive(Debug, Args)]
pub struct Domain {
    /// Name of the domain
    pub domain: Name,
}

/// What a configuration is and becomes.
#[derive(Debug, Args)]
pub struct Described {
    /// Configuration file of the monitor (JSON), with an optional object "domain"
    pub config: PathBuf,
    /// Name of the domain, if not machine-config.name of the file or the file's own name
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

/// How a domain begins to run.
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
    #[command(flatten)]
    pub begin: Begin,
}

#[derive(Debug, Args)]
pub struct List {
    /// Names of domains; all of them if none is given
    pub domains: Vec<Name>,
}

#[derive(Debug, Args)]
pub struct Save {
    /// Name of the domain
    pub domain: Name,
    /// Directory to save into; what an earlier save left there is replaced once this one is whole
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Let the domain go on running
    #[arg(short = 'c', long = "continue")]
    pub go_on: bool,
    /// Leave the domain paused
    #[arg(short, long, conflicts_with = "go_on")]
    pub paused: bool,
    /// Keep the disks that it can write to with its memory: such a save can be restored as often as one
    /// likes, and each time the domain gets disks of its own
    #[arg(long)]
    pub disks: bool,
}

#[derive(Debug, Args)]
pub struct Restore {
    /// Directory made by save
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Name of the new domain, if not that of the saved one
    #[arg(long)]
    pub name: Option<Name>,
    /// A disk that is in another place now; with format=raw also if it looks like an image of another
    /// format
    #[arg(long, value_name = "ID=PATH[,format=raw]", value_parser = moved_disk)]
    pub disk: Vec<MovedDisk>,
    /// A NIC that has another tap device now
    #[arg(long, value_name = "ID=TAP", value_parser = pair)]
    pub tap: Vec<(String, String)>,
    /// Copy the memory and compare it with its checksums, rather than map it unchecked
    #[arg(long)]
    pub verify: bool,
    /// Take the disks as they are, even if they have changed since: the guest may destroy them
    #[arg(long)]
    pub force: bool,
    /// Where the guest's kvm-clock goes on
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

/// Where a restored guest's clock goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Clock {
    /// Where it stood
    Continue,
    /// Ahead by the time since it was saved
    Realtime,
}

#[derive(Debug, Args)]
pub struct Resume {
    /// Name of the domain
    pub domain: Name,
    /// Take the disks as they are, even if they have changed since: the guest may destroy them
    #[arg(long)]
    pub force: bool,
    /// Where the guest's kvm-clock goes on
    #[arg(long, value_enum, default_value_t = Clock::Continue)]
    pub clock: Clock,
    #[command(flatten)]
    pub begin: Begin,
}

#[derive(Debug, Args)]
pub struct Delete {
    /// Name of the domain
    pub domain: Name,
    /// Also when it is suspended or its record is damaged: discard what is there
    #[arg(short, long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub struct Rename {
    /// Name that the domain has
    pub domain: Name,
    /// Name that it gets
    pub new: Name,
}

#[derive(Debug, Args)]
pub struct Wait {
    /// Name of the domain
    pub domain: Name,
    /// State to wait for
    #[arg(value_enum, default_value = "ended")]
    pub state: crate::commands::WaitFor,
    /// Longest wait, seconds; for ever if not given
    #[arg(short, long, value_name = "SECONDS")]
    pub timeout: Option<f64>,
}

#[derive(Debug, Args)]
pub struct Check {
    /// Directory made by save
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

#[derive(Debug, Args)]
pub struct Shutdown {
    /// Name of the domain
    pub domain: Name,
    /// Wait until the guest has done it
    #[arg(short, long)]
    pub wait: bool,
    /// Destroy the domain if it has not done it in time
    #[arg(short = 'F', long)]
    pub force: bool,
    /// Wait so many seconds at most; with -F 60 if not given
    #[arg(short, long, value_name = "SECONDS")]
    pub timeout: Option<f64>,
}

#[derive(Debug, Args)]
pub struct Reboot {
    /// Name of the domain
    pub domain: Name,
    /// Wait until the guest has done it, and reset the machine if it has not in time
    #[arg(short = 'F', long)]
    pub force: bool,
    /// Wait so many seconds at most; with -F 60 if not given
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
    /// Go on until the domain ends
    #[arg(short, long)]
    pub follow: bool,
}

#[derive(Debug, Args)]
pub struct Events {
    /// Name of the domain, until it ends; all domains if not given, also those to come
    pub domain: Option<Name>,
}

#[derive(Debug, Args)]
pub struct Qmp {
    /// Name of the domain
    pub domain: Name,
    /// Command of the protocol; lines from standard input if not given
    pub command: Option<String>,
    /// Its arguments, a JSON object
    #[arg(value_name = "JSON")]
    pub arguments: Option<String>,
}

#[derive(Debug, Args)]
pub struct Completions {
    /// Shell to complete in
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}

#[derive(Debug, Args)]
pub struct Man {
    /// Directory to write the pages into
    #[arg(value_name = "DIR")]
    pub directory: Option<PathBuf>,
}

fn moved_disk(word: &str) -> Result<MovedDisk, String> {
    let (id, place) = pair(word)?;
    // As in the monitor's -drive: whatever else is guessed or asked for, a disk is raw.
    let (path, raw) = match place.split_once(',') {
        None => (place.as_str(), false),
        Some((path, "format=raw")) if !path.is_empty() => (path, true),
        Some((_, rest)) => {
            return Err(format!(
                "must be ID=PATH or ID=PATH,format=raw, where PATH is without commas; not '{rest}'"
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
