//! What state a domain is in: found out each time, by asking its monitor.
use std::{
    fs::File,
    io,
    os::{fd::AsRawFd, unix::net::UnixStream},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Context;
use qmp::{
    client::{Client, ClientError},
    schema::{MigrationStatus, QueryMigrate, QueryStatus, RunState},
};

use crate::{
    matrix::State,
    process::{Found, Process, find, search},
    registry::{Place, Registry},
};

/// How long a monitor may take to say how it is.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// Time between two looks at a monitor that nobody can connect to.
const LOOK: Duration = Duration::from_millis(5);

/// A domain as it was found.
pub struct Seen {
    /// Its state.
    pub state: State,
    /// Its monitor, if it lives.
    pub process: Option<Process>,
    /// The connection to its monitor, if it answers.
    pub client: Option<Client>,
}

impl Seen {
    fn without_monitor(state: State) -> Self {
        Self { state, process: None, client: None }
    }

    /// There is no domain.
    pub fn nobody() -> Self {
        Self::without_monitor(State::Absent)
    }

    /// The connection.
    ///
    /// # Errors
    /// When there is none, which the state has told already.
    pub fn client(&mut self) -> anyhow::Result<&mut Client> {
        self.client.as_mut().context("the monitor does not answer")
    }
}

/// Connect to a socket in the directory `run`, however long its path is.
///
/// # Errors
/// When nobody listens there.
pub fn connect(run: &Path, socket: &str) -> io::Result<UnixStream> {
    // A socket's path has at most 107 bytes; a directory's may have more.
    let directory = File::open(run)?;
    UnixStream::connect(format!("/proc/self/fd/{}/{socket}", directory.as_raw_fd()))
}

/// Another connection to a monitor.
///
/// # Errors
/// When it does not answer.
pub fn qmp(place: &Place) -> anyhow::Result<Client> {
    let cannot = || format!("cannot talk to the monitor of '{}'", place.name);
    let stream = connect(&place.run, "qmp.sock").with_context(cannot)?;
    Client::on(stream, PATIENCE).with_context(cannot)
}

/// See how the domain at `place` is.
pub fn look(registry: &Registry, place: &Place) -> Seen {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let asked = ask(place);
        if let Some(Ok(answer)) = asked {
            return answered(registry, place, answer);
        }
        let process = match found(place) {
            Found::Alive(process) => process,
            Found::Nobody => return Seen::without_monitor(idle(place)),
            // What is in the store is whole, and its guest has not run since.
            Found::Gone if idle(place) == State::Suspended => {
                return Seen::without_monitor(State::Suspended);
            }
            Found::Gone => return Seen::without_monitor(State::Killed),
        };
        // One that nobody listens for, or that hangs up, may be on its way in, or out.
        let late = matches!(asked, Some(Err(ClientError::Timeout { .. })));
        if late || Instant::now() >= deadline {
            return Seen { state: State::Hung, process: Some(process), client: None };
        }
        process.ends_within(LOOK);
    }
}

fn answered(registry: &Registry, place: &Place, answer: Answer) -> Seen {
    let (mut client, status, migration) = answer;
    let saving = migration == MigrationStatus::Active || registry.is_being_saved(&place.name);
    let state = match status {
        _ if saving => State::Saving,
        RunState::Running => State::Running,
        RunState::Shutdown => State::Off,
        RunState::GuestPanicked | RunState::InternalError | RunState::IoError => State::Crashed,
        RunState::Paused | RunState::Prelaunch | RunState::Inmigrate | RunState::Postmigrate => {
            State::Paused
        }
    };
    client.set_patience(Duration::from_secs(30));
    let process = match find(&place.run) {
        Found::Alive(process) => Some(process),
        Found::Nobody | Found::Gone => search(&place.run),
    };
    Seen { state, process, client: Some(client) }
}

/// What a domain without a monitor is.
fn idle(place: &Place) -> State {
    match (place.managed, place.is_saved()) {
        (true, true) => State::Suspended,
        (true, false) => State::Registered,
        (false, _) => State::Absent,
    }
}

fn found(place: &Place) -> Found {
    match find(&place.run) {
        Found::Nobody if place.has_begun() => {
            search(&place.run).map_or(Found::Nobody, Found::Alive)
        }
        found => found,
    }
}

type Answer = (Client, RunState, MigrationStatus);

/// What the monitor says, if there is one; an error if it does not say it in time.
fn ask(place: &Place) -> Option<Result<Answer, ClientError>> {
    let stream = connect(&place.run, "qmp.sock").ok()?;
    let ask = || {
        let mut client = Client::on(stream, PATIENCE)?;
        client.set_patience(PATIENCE);
        let status = client.execute(&QueryStatus {})?.status;
        let migration = client.execute(&QueryMigrate {})?.status;
        Ok((client, status, migration))
    };
    Some(ask())
}
