//! Which verb may do what in which state: the one table. Every verb asks it, under the domain's
//! lock, before it does anything.
#[cfg(test)]
mod tests;

use crate::{failure::Failure, registry::Name};

/// State of a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// No domain has that name.
    Absent,
    /// Registered, and not running.
    Registered,
    /// Its monitor is starting: it accepts no connections yet.
    Starting,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs do not run.
    Paused,
    /// Its state is being written.
    Saving,
    /// Its state is saved in the registry.
    Suspended,
    /// Its guest has powered off or rebooted, and it is preserved.
    Off,
    /// Its guest has crashed, and it is preserved.
    Crashed,
    /// Its monitor has ended without removing what it leaves.
    Killed,
    /// Its monitor is running and does not answer.
    Hung,
    /// Its monitor has released everything it could; the kernel cannot end its process yet.
    Ending,
}

impl State {
    /// All states: the columns.
    pub const ALL: [Self; 12] = [
        Self::Absent,
        Self::Registered,
        Self::Starting,
        Self::Running,
        Self::Paused,
        Self::Saving,
        Self::Suspended,
        Self::Off,
        Self::Crashed,
        Self::Killed,
        Self::Hung,
        Self::Ending,
    ];

    /// The word that is shown to the user.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Absent => "absent",
            Self::Registered => "registered",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Saving => "saving",
            Self::Suspended => "suspended",
            Self::Off => "off",
            Self::Crashed => "crashed",
            Self::Killed => "killed",
            Self::Hung => "hung",
            Self::Ending => "ending",
        }
    }
}

/// The verbs that act on a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    Create,
    New,
    Restore,
    Start,
    Info,
    Pause,
    Unpause,
    Save,
    Suspend,
    Resume,
    Reboot,
    Shutdown,
    Destroy,
    Delete,
    Rename,
    Wait,
    Console,
    Dmesg,
    Events,
    Qmp,
    Remus,
    Failover,
    Unprotect,
}

/// What a verb does in a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cell {
    /// It is carried out.
    Yes,
    /// It is refused: the cause, and what to do. `{}` is the domain's name.
    No(&'static str, &'static str),
    /// It is refused like this, unless the domain's policy is `rename-restart`.
    Kept(&'static str, &'static str),
}

use Cell::{Kept, No, Yes};

const ABSENT: Cell = No("there is no domain '{}'", "`stratoctl list` shows all domains");
const TAKEN: Cell =
    No("there is a domain '{}' already", "choose another name, or inspect it: `stratoctl info {}`");
const IDLE: Cell = No("'{}' is not running", "`stratoctl start {}` boots it");
const STARTING: Cell = No(
    "'{}' is still starting",
    "wait until it runs: `stratoctl wait {} running`; `stratoctl destroy {}` ends it at once",
);
const RUNS: Cell = No(
    "'{}' is running",
    "`stratoctl shutdown -w {}` asks its guest to end, `stratoctl destroy {}` ends it at once",
);
const RUNS_ALREADY: Cell = No("'{}' is running already", "`stratoctl info {}` shows more");
const PAUSED: Cell = No("'{}' is paused", "`stratoctl unpause {}` resumes it");
const PAUSED_DELETE: Cell =
    No("'{}' is paused, not ended", "`stratoctl destroy {}` ends it at once");
const SAVING: Cell = No(
    "'{}' is being saved",
    "wait for the save to end: `stratoctl wait {} saved`; `stratoctl destroy {}` ends it at once",
);
const SUSPENDED: Cell = No("'{}' is suspended", "`stratoctl resume {}` continues it");
const SUSPENDED_DELETE: Cell = No(
    "'{}' is suspended",
    "`stratoctl resume {}` continues it, `stratoctl delete -f {}` removes it and its saved state",
);
const OFF: Cell = No(
    "the guest of '{}' has ended; the domain is preserved for inspection",
    "`stratoctl destroy {}` ends it",
);
const CRASHED: Cell = No(
    "the guest of '{}' has crashed; the domain is preserved for inspection",
    "`stratoctl destroy {}` ends it",
);
const OFF_START: Cell = Kept(
    "the guest of '{}' has ended; the domain is preserved for inspection",
    "`stratoctl destroy {}` ends it; then it can be started",
);
const CRASHED_START: Cell = Kept(
    "the guest of '{}' has crashed; the domain is preserved for inspection",
    "`stratoctl destroy {}` ends it; then it can be started",
);
const KILLED: Cell = No(
    "the monitor of '{}' has ended unexpectedly",
    "`stratoctl info {}` shows the end of its log, `stratoctl destroy {}` cleans up",
);
const HUNG: Cell = No(
    "the monitor of '{}' does not answer",
    "`stratoctl destroy {}` ends it; `stratoctl info {}` shows its process",
);
const ENDING: Cell = No(
    "'{}' is still ending: the kernel cannot end its monitor's process yet",
    "it ends when the storage that it waits for answers; `stratoctl info {}` shows its process",
);
const NOT_SUSPENDED: Cell = No("'{}' is not suspended", "`stratoctl start {}` boots it");
const ENDED_ALREADY: Cell =
    No("'{}' is not running", "`stratoctl delete {}` removes a registered domain");

type Row = (Verb, [Cell; 12]);

/// The table. Columns as in [`State::ALL`].
#[rustfmt::skip]
pub const TABLE: [Row; 23] = [
    //               absent  registered     starting  running       paused         saving suspended          off       crashed        killed hung  ending
    (Verb::Create,    [Yes,    TAKEN,         TAKEN,    TAKEN,        TAKEN,         TAKEN,  TAKEN,            TAKEN,     TAKEN,         TAKEN,  TAKEN, TAKEN]),
    (Verb::New,       [Yes,    TAKEN,         TAKEN,    TAKEN,        TAKEN,         TAKEN,  TAKEN,            TAKEN,     TAKEN,         TAKEN,  TAKEN, TAKEN]),
    (Verb::Restore,   [Yes,    TAKEN,         TAKEN,    TAKEN,        TAKEN,         TAKEN,  TAKEN,            TAKEN,     TAKEN,         TAKEN,  TAKEN, TAKEN]),
    (Verb::Start,     [ABSENT, Yes,           STARTING, RUNS_ALREADY, PAUSED,        SAVING, SUSPENDED,        OFF_START, CRASHED_START, Yes,    HUNG, ENDING]),
    (Verb::Info,      [ABSENT, Yes,           Yes,      Yes,          Yes,           Yes,    Yes,              Yes,       Yes,           Yes,    Yes, Yes]),
    (Verb::Pause,     [ABSENT, IDLE,          STARTING, Yes,          Yes,           SAVING, SUSPENDED,        OFF,       CRASHED,       KILLED, HUNG, ENDING]),
    (Verb::Unpause,   [ABSENT, IDLE,          STARTING, Yes,          Yes,           SAVING, SUSPENDED,        OFF,       CRASHED,       KILLED, HUNG, ENDING]),
    (Verb::Save,      [ABSENT, IDLE,          STARTING, Yes,          Yes,           SAVING, SUSPENDED,        Yes,       Yes,           KILLED, HUNG, ENDING]),
    (Verb::Suspend,   [ABSENT, IDLE,          STARTING, Yes,          Yes,           SAVING, SUSPENDED,        OFF,       CRASHED,       KILLED, HUNG, ENDING]),
    (Verb::Resume,    [ABSENT, NOT_SUSPENDED, STARTING, RUNS_ALREADY, PAUSED,        SAVING, Yes,              OFF,       CRASHED,       KILLED, HUNG, ENDING]),
    (Verb::Reboot,    [ABSENT, IDLE,          STARTING, Yes,          PAUSED,        SAVING, SUSPENDED,        OFF,       CRASHED,       KILLED, HUNG, ENDING]),
    (Verb::Shutdown,  [ABSENT, IDLE,          STARTING, Yes,          PAUSED,        SAVING, SUSPENDED,        OFF,       CRASHED,       KILLED, HUNG, ENDING]),
    (Verb::Destroy,   [ABSENT, ENDED_ALREADY, Yes,      Yes,          Yes,           Yes,    Yes,              Yes,       Yes,           Yes,    Yes, Yes]),
    (Verb::Delete,    [ABSENT, Yes,           STARTING, RUNS,         PAUSED_DELETE, SAVING, SUSPENDED_DELETE, OFF,       CRASHED,       Yes,    HUNG, ENDING]),
    (Verb::Rename,    [ABSENT, Yes,           Yes,      Yes,          Yes,           SAVING, Yes,              Yes,       Yes,           Yes,    Yes, Yes]),
    (Verb::Wait,      [ABSENT, Yes,           Yes,      Yes,          Yes,           Yes,    Yes,              Yes,       Yes,           Yes,    Yes, Yes]),
    (Verb::Console,   [ABSENT, IDLE,          STARTING, Yes,          Yes,           Yes,    SUSPENDED,        Yes,       Yes,           KILLED, HUNG, ENDING]),
    (Verb::Dmesg,     [ABSENT, Yes,           Yes,      Yes,          Yes,           Yes,    Yes,              Yes,       Yes,           Yes,    Yes, Yes]),
    (Verb::Events,    [ABSENT, IDLE,          STARTING, Yes,          Yes,           Yes,    SUSPENDED,        Yes,       Yes,           KILLED, HUNG, ENDING]),
    (Verb::Qmp,       [ABSENT, IDLE,          STARTING, Yes,          Yes,           Yes,    SUSPENDED,        Yes,       Yes,           KILLED, HUNG, ENDING]),
    (Verb::Remus,     [ABSENT, IDLE,          STARTING, Yes,          Yes,           SAVING, SUSPENDED,        OFF,       CRASHED,       KILLED, HUNG, ENDING]),
    (Verb::Failover,  [ABSENT, IDLE,          STARTING, Yes,          Yes,           SAVING, SUSPENDED,        OFF,       CRASHED,       KILLED, HUNG, ENDING]),
    (Verb::Unprotect, [ABSENT, Yes,           STARTING, Yes,          Yes,           SAVING, Yes,              Yes,       Yes,           Yes,    HUNG, ENDING]),
];

/// What `verb` does in `state`.
pub fn cell(verb: Verb, state: State) -> Cell {
    let row = TABLE.iter().find(|(known, _)| *known == verb);
    let column = State::ALL.iter().position(|known| *known == state);
    row.zip(column).and_then(|((_, cells), column)| cells.get(column)).copied().unwrap_or(ABSENT)
}

/// Check that `verb` may act on the domain called `name`, which is in `state`. `renames` says
/// whether its policy is `rename-restart`.
///
/// # Errors
/// The cause, and what to do.
pub fn admit(verb: Verb, state: State, name: &Name, renames: bool) -> Result<(), Failure> {
    match cell(verb, state) {
        Yes => Ok(()),
        Kept(..) if renames => Ok(()),
        No(what, hint) | Kept(what, hint) => {
            let fill = |text: &str| text.replace("{}", name.as_str());
            Err(Failure::hint(fill(what), fill(hint)))
        }
    }
}
