//! The command line and the JSON file: the flags of both StratoVirt generations and the file,
//! converted into one [`MachineConfig`] and the settings of the process itself.
//!
//! ```text
//! arguments --tokens--> flags with values --table--> Draft <--json-- file
//!                                                      |
//!                                           resolve: names to things
//!                                                      v
//!                                          Invocation, or all Problems
//! ```
//!
//! Only syntax and consistency are checked here; whether files exist is for the builder to find
//! out. For its errors, [`Places`] records where each part was requested.
use std::ffi::OsString;
use std::path::PathBuf;

use crate::MachineConfig;
use crate::actions::Actions;
use crate::incoming::Incoming;

mod action;
pub(crate) mod chars;
mod describe;
mod device;
mod disk;
pub(crate) mod draft;
pub(crate) mod fields;
mod flags;
mod help;
mod json;
pub(crate) mod kinds;
mod net;
mod objects;
pub(crate) mod problem;
mod process;
pub(crate) mod resolve;
mod system;
pub(crate) mod table;
mod tokens;

#[cfg(test)]
mod tests;

pub use describe::{Described, models, object_kinds, options};
pub use disk::{detect_zeroes, media};
pub use fields::Kind;
pub use kinds::{FileKey, files};
pub use problem::{Places, Problems};

/// What the command line asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Run a machine.
    Run(Box<Invocation>),
    /// Print this and exit with 0.
    PrintHelp(String),
    /// Print this and exit with 0.
    PrintVersion(String),
}

/// A machine to run, and the settings of the process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invocation {
    /// The machine.
    pub machine: MachineConfig,
    /// Sockets to serve QMP on, at least one.
    pub control: Vec<Control>,
    /// `-machine none`: there is no machine, and only commands that need none work.
    pub no_machine: bool,
    /// Where to write the process id.
    pub pidfile: Option<PathBuf>,
    /// Leave the vCPUs stopped until `cont`.
    pub paused: bool,
    /// What to do when the guest powers off, reboots or crashes.
    pub actions: Actions,
    /// Where the log goes.
    pub log: Log,
    /// Install no system call filter.
    pub disable_seccomp: bool,
    /// Programs may be started while the guest runs.
    pub spawn: bool,
    /// The saved state to restore.
    pub incoming: Option<Incoming>,
    /// Settings that were accepted and have no effect, to be logged.
    pub warnings: Vec<String>,
    /// Where the machine's parts were requested, for errors of the builder.
    pub places: Places,
}

/// A socket to serve QMP on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Control {
    /// Where it is.
    pub path: PathBuf,
    /// A client listens there and the monitor connects; otherwise the monitor listens.
    pub connects: bool,
}

/// Where the log goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Log {
    /// Nowhere: no `-D`.
    Off,
    /// `-D` alone.
    Stderr,
    /// `-D FILE`, appended to.
    File(PathBuf),
}

/// Whether a command line requests the background: `-daemonize`, without `-h` or `-V`.
pub fn daemonizes(args: impl Iterator<Item = OsString>) -> bool {
    let (given, _) = tokens::scan(args);
    let has = |name| given.iter().any(|g| g.flag.is(name));
    has("daemonize") && !has("help") && !has("version")
}

/// Parse a command line without the program's name, and the file it may name.
///
/// # Errors
/// All problems of both at once.
pub fn parse(args: impl Iterator<Item = OsString>) -> Result<Action, Problems> {
    let (given, problems) = tokens::scan(args);
    if given.iter().any(|g| g.flag.is("help")) {
        return Ok(Action::PrintHelp(help::text()));
    }
    if given.iter().any(|g| g.flag.is("version")) {
        return Ok(Action::PrintVersion(help::version()));
    }
    let mut draft = draft::Draft { problems, ..Default::default() };
    // The file first: the command line replaces its single values and adds to its lists.
    let (files, flags): (Vec<_>, Vec<_>) = given.iter().partition(|g| g.flag.is("config"));
    for given in files.into_iter().chain(flags) {
        given.apply(&mut draft);
    }
    table::check(&given, &mut draft);
    resolve::resolve(draft).map(|invocation| Action::Run(Box::new(invocation)))
}
