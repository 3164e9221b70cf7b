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
    /// A backup has, or gets, a copy of it. This is shown beside its state, and restricts what its
    /// state allows.
    Protected,
    /// Its term was won: it has no backup. Beside its state, like the one before.
    Degraded,
    /// It is the backup of a domain that runs elsewhere.
    Standby,
    /// Its guest continues at its backup.
    Moved,
}

impl State {
    /// All states: the columns.
    pub const ALL: [Self; 16] = [
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
        Self::Protected,
        Self::Degraded,
        Self::Standby,
        Self::Moved,
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
            Self::Protected => "protected",
            Self::Degraded => "degraded",
            Self::Standby => "standby",
            Self::Moved => "moved",
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
    RemusReport,
    Migrate,
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
    /// It is refused like this without `-F`.
    Unforced(&'static str, &'static str),
}

use Cell::{Kept, No, Unforced, Yes};

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

const PROTECTED: Cell = No(
    "'{}' is protected by a backup, which would not follow",
    "`stratoctl unprotect {}` ends that; `stratoctl failover --planned {}` moves the guest to the \
     backup",
);
const PROTECTED_ALREADY: Cell = No(
    "'{}' is protected already",
    "`stratoctl unprotect {}` ends that; `stratoctl info {}` shows more",
);
const PROTECTED_MIGRATE: Cell = No(
    "'{}' is protected already, and moves to its backup",
    "`stratoctl failover --planned {}` moves it there; `stratoctl unprotect {}` ends the \
     protection, and then it can move elsewhere",
);
const PROTECTED_DESTROY: Cell = Unforced(
    "'{}' is protected: this ends its guest for good, and its backup with it",
    "`stratoctl destroy -F {}` does that; `stratoctl failover --planned {}` moves the guest to the \
     backup; `stratoctl unprotect {}` ends only the protection",
);
const UNPROTECTED: Cell =
    No("'{}' is not protected", "`stratoctl remus {} HOST` protects it by a backup on HOST");
const DEGRADED: Cell = No(
    "'{}' has no backup now, but its protection has not been ended",
    "`stratoctl unprotect {}` ends it; `stratoctl remus {} HOST` gives it another backup",
);
const ALONE: Cell = No("'{}' has no backup now", "`stratoctl remus {} HOST` gives it one");
const STANDBY: Cell = No(
    "'{}' is a backup: the guest runs at its primary",
    "do it there; `stratoctl failover {}` continues the guest here",
);
const STANDBY_NAME: Cell = No(
    "'{}' is a backup, which keeps its name until it runs here",
    "`stratoctl failover {}` continues it here",
);
const STANDBY_END: Cell = No(
    "'{}' is the backup of a protected domain, not the domain",
    "unprotect the domain itself; `stratoctl failover {}` continues it here, and `stratoctl destroy \
     -F {}` ends the backup",
);
const STANDBY_DESTROY: Cell = Unforced(
    "'{}' is a backup: without it the guest at its primary is not protected any more",
    "`stratoctl destroy -F {}` does that; `stratoctl failover {}` continues the guest here; \
     `stratoctl unprotect` at the primary ends both in order",
);
const MOVED: Cell = No(
    "the guest of '{}' has moved to its backup",
    "`stratoctl remus {} HOST` there, with this host, makes it the backup; if the guest certainly \
     runs nowhere, `stratoctl unprotect -F {}` forgets the move, and it can be started",
);
const MOVED_UNPROTECT: Cell = Unforced(
    "the guest of '{}' has moved to its backup, and may run there",
    "if it certainly does not, `stratoctl unprotect -F {}` forgets the move",
);

type Row = (Verb, [Cell; 16]);

/// The table. Columns as in [`State::ALL`].
#[rustfmt::skip]
pub const TABLE: [Row; 25] = [
    //               absent  registered     starting  running       paused         saving suspended          off       crashed        killed hung  ending  protected, degraded, standby, moved
    (Verb::Create,    [Yes,    TAKEN,         TAKEN,    TAKEN,        TAKEN,         TAKEN,  TAKEN,            TAKEN,     TAKEN,         TAKEN,  TAKEN, TAKEN, TAKEN, TAKEN, TAKEN, TAKEN]),
    (Verb::New,       [Yes,    TAKEN,         TAKEN,    TAKEN,        TAKEN,         TAKEN,  TAKEN,            TAKEN,     TAKEN,         TAKEN,  TAKEN, TAKEN, TAKEN, TAKEN, TAKEN, TAKEN]),
    (Verb::Restore,   [Yes,    TAKEN,         TAKEN,    TAKEN,        TAKEN,         TAKEN,  TAKEN,            TAKEN,     TAKEN,         TAKEN,  TAKEN, TAKEN, TAKEN, TAKEN, TAKEN, TAKEN]),
    (Verb::Start,     [ABSENT, Yes,           STARTING, RUNS_ALREADY, PAUSED,        SAVING, SUSPENDED,        OFF_START, CRASHED_START, Yes,    HUNG, ENDING, RUNS_ALREADY, RUNS_ALREADY, STANDBY, MOVED]),
    (Verb::Info,      [ABSENT, Yes,           Yes,      Yes,          Yes,           Yes,    Yes,              Yes,       Yes,           Yes,    Yes, Yes, Yes, Yes, Yes, Yes]),
    (Verb::Pause,     [ABSENT, IDLE,          STARTING, Yes,          Yes,           SAVING, SUSPENDED,        OFF,       CRASHED,       KILLED, HUNG, ENDING, Yes, Yes, STANDBY, MOVED]),
    (Verb::Unpause,   [ABSENT, IDLE,          STARTING, Yes,          Yes,           SAVING, SUSPENDED,        OFF,       CRASHED,       KILLED, HUNG, ENDING, Yes, Yes, STANDBY, MOVED]),
    (Verb::Save,      [ABSENT, IDLE,          STARTING, Yes,          Yes,           SAVING, SUSPENDED,        Yes,       Yes,           KILLED, HUNG, ENDING, PROTECTED, DEGRADED, STANDBY, MOVED]),
    (Verb::Suspend,   [ABSENT, IDLE,          STARTING, Yes,          Yes,           SAVING, SUSPENDED,        OFF,       CRASHED,       KILLED, HUNG, ENDING, PROTECTED, DEGRADED, STANDBY, MOVED]),
    (Verb::Resume,    [ABSENT, NOT_SUSPENDED, STARTING, RUNS_ALREADY, PAUSED,        SAVING, Yes,              OFF,       CRASHED,       KILLED, HUNG, ENDING, RUNS_ALREADY, RUNS_ALREADY, STANDBY, MOVED]),
    (Verb::Reboot,    [ABSENT, IDLE,          STARTING, Yes,          PAUSED,        SAVING, SUSPENDED,        OFF,       CRASHED,       KILLED, HUNG, ENDING, Yes, Yes, STANDBY, MOVED]),
    (Verb::Shutdown,  [ABSENT, IDLE,          STARTING, Yes,          PAUSED,        SAVING, SUSPENDED,        OFF,       CRASHED,       KILLED, HUNG, ENDING, Yes, Yes, STANDBY, MOVED]),
    (Verb::Destroy,   [ABSENT, ENDED_ALREADY, Yes,      Yes,          Yes,           Yes,    Yes,              Yes,       Yes,           Yes,    Yes, Yes, PROTECTED_DESTROY, Yes, STANDBY_DESTROY, ENDED_ALREADY]),
    (Verb::Delete,    [ABSENT, Yes,           STARTING, RUNS,         PAUSED_DELETE, SAVING, SUSPENDED_DELETE, OFF,       CRASHED,       Yes,    HUNG, ENDING, RUNS, RUNS, STANDBY_END, Yes]),
    (Verb::Rename,    [ABSENT, Yes,           Yes,      Yes,          Yes,           SAVING, Yes,              Yes,       Yes,           Yes,    Yes, Yes, Yes, Yes, STANDBY_NAME, Yes]),
    (Verb::Wait,      [ABSENT, Yes,           Yes,      Yes,          Yes,           Yes,    Yes,              Yes,       Yes,           Yes,    Yes, Yes, Yes, Yes, Yes, Yes]),
    (Verb::Console,   [ABSENT, IDLE,          STARTING, Yes,          Yes,           Yes,    SUSPENDED,        Yes,       Yes,           KILLED, HUNG, ENDING, Yes, Yes, STANDBY, MOVED]),
    (Verb::Dmesg,     [ABSENT, Yes,           Yes,      Yes,          Yes,           Yes,    Yes,              Yes,       Yes,           Yes,    Yes, Yes, Yes, Yes, Yes, Yes]),
    (Verb::Events,    [ABSENT, IDLE,          STARTING, Yes,          Yes,           Yes,    SUSPENDED,        Yes,       Yes,           KILLED, HUNG, ENDING, Yes, Yes, Yes, MOVED]),
    (Verb::Qmp,       [ABSENT, IDLE,          STARTING, Yes,          Yes,           Yes,    SUSPENDED,        Yes,       Yes,           KILLED, HUNG, ENDING, Yes, Yes, Yes, MOVED]),
    (Verb::Remus,     [ABSENT, IDLE,          STARTING, Yes,          Yes,           SAVING, SUSPENDED,        OFF,       CRASHED,       KILLED, HUNG, ENDING, PROTECTED_ALREADY, Yes, STANDBY, MOVED]),
    (Verb::RemusReport, [ABSENT, IDLE,        STARTING, Yes,          Yes,           Yes,    SUSPENDED,        Yes,       Yes,           KILLED, HUNG, ENDING, Yes, Yes, STANDBY, MOVED]),
    (Verb::Migrate,   [ABSENT, IDLE,          STARTING, Yes,          Yes,           SAVING, SUSPENDED,        OFF,       CRASHED,       KILLED, HUNG, ENDING, PROTECTED_MIGRATE, Yes, STANDBY, MOVED]),
    (Verb::Failover,  [ABSENT, IDLE,          STARTING, UNPROTECTED,  UNPROTECTED,          SAVING, SUSPENDED,        OFF,       CRASHED,       KILLED, HUNG, ENDING, Yes, ALONE, Yes, MOVED]),
    (Verb::Unprotect, [ABSENT, Yes,           STARTING, Yes,          Yes,           SAVING, Yes,              Yes,       Yes,           Yes,    HUNG, ENDING, Yes, Yes, STANDBY_END, MOVED_UNPROTECT]),
];

/// What `verb` does in `state`.
pub fn cell(verb: Verb, state: State) -> Cell {
    let row = TABLE.iter().find(|(known, _)| *known == verb);
    let column = State::ALL.iter().position(|known| *known == state);
    row.zip(column).and_then(|((_, cells), column)| cells.get(column)).copied().unwrap_or(ABSENT)
}

/// What may be done that is refused otherwise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Leave {
    /// The domain's policy is `rename-restart`.
    pub renames: bool,
    /// `-F` was given.
    pub force: bool,
}

/// Check that `verb` may act on the domain called `name`, which is in `state`.
///
/// # Errors
/// The cause, and what to do.
pub fn admit(verb: Verb, state: State, name: &Name, leave: Leave) -> Result<(), Failure> {
    match cell(verb, state) {
        Yes => Ok(()),
        Kept(..) if leave.renames => Ok(()),
        Unforced(..) if leave.force => Ok(()),
        No(what, hint) | Kept(what, hint) | Unforced(what, hint) => {
            let fill = |text: &str| text.replace("{}", name.as_str());
            Err(Failure::hint(fill(what), fill(hint)))
        }
    }
}

/// The same for a domain that is `beside` its state protected, or was: both have to admit it.
///
/// # Errors
/// The cause, and what to do.
pub fn admit_both(
    verb: Verb,
    (state, beside): (State, Option<State>),
    name: &Name,
    leave: Leave,
) -> Result<(), Failure> {
    let goes_on = matches!(state, State::Running | State::Paused);
    // Without a protection there is nowhere to go.
    if !(verb == Verb::Failover && goes_on && beside.is_some()) {
        admit(verb, state, name, leave)?;
    }
    beside.map_or(Ok(()), |beside| admit(verb, beside, name, leave))
}
