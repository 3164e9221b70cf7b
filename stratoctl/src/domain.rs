//! The state of a domain, found by asking its monitor each time.
use std::{
    env,
    io::{self, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Context;
use qmp::{
    client::{Client, ClientError},
    schema::{
        Command, MigrationStatus, QueryMigrate, QueryReplication, QueryStatus, ReplicationInfo,
        ReplicationSide, ReplicationStatus, RunState,
    },
};

use crate::{
    dial::dial,
    matrix::State,
    process::{Found, Process, find, search},
    registry::{Place, Registry},
    remus::protection::Protection,
};

/// How long a monitor may take to report its state. Tests that are not about hanging monitors set a
/// longer time: where many processes share a processor, any of them may be delayed by seconds.
pub fn limit() -> Duration {
    seconds("STRATOCTL_QUERY_TIMEOUT", Duration::from_secs(2))
}

/// A time in seconds, which an environment variable may override.
pub fn seconds(variable: &str, usual: Duration) -> Duration {
    let named = env::var(variable).ok().and_then(|text| text.parse::<u16>().ok());
    named.map_or(usual, |seconds| Duration::from_secs(seconds.into()))
}

/// Poll interval for a monitor that accepts no connections.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// A start or an end that takes longer is shown as one, and is not waited for.
const SHOWN_AFTER: Duration = Duration::from_millis(100);

/// The monitor's control socket, in its directory. A starting monitor creates it last.
const SOCKET: &str = "qmp.sock";

/// A domain as it was found.
pub struct Status {
    /// Its state.
    pub state: State,
    /// Its monitor, if that is running.
    pub process: Option<Process>,
    /// The connection to its monitor, if that answers.
    pub client: Option<Client>,
    /// What its monitor says of replication.
    pub replication: Option<ReplicationInfo>,
}

impl Status {
    fn without_monitor(state: State) -> Self {
        Self { state, process: None, client: None, replication: None }
    }

    /// There is no domain.
    pub fn absent() -> Self {
        Self::without_monitor(State::Absent)
    }

    /// What it is beside its state: protected, or without its backup.
    pub fn beside(&self) -> Option<State> {
        let info = self.replication.as_ref()?;
        match (info.role, info.state) {
            (Some(ReplicationSide::Backup) | None, _) => None,
            (_, ReplicationStatus::Off | ReplicationStatus::Over) => None,
            (_, ReplicationStatus::Degraded) => Some(State::Degraded),
            _ => Some(State::Protected),
        }
    }

    /// The connection to the monitor.
    ///
    /// # Errors
    /// When there is none; the state has shown that already.
    pub fn client(&mut self) -> anyhow::Result<&mut Client> {
        self.client.as_mut().context("the monitor does not answer")
    }
}

/// Open another connection to a monitor.
///
/// # Errors
/// When it does not answer.
pub fn qmp(place: &Place) -> anyhow::Result<Client> {
    let cannot = || format!("cannot connect to the monitor of '{}'", place.name);
    let stream = dial(&place.run, Path::new(SOCKET)).with_context(cannot)?;
    Client::on(stream, limit()).with_context(cannot)
}

/// Find the state of the domain at `place`.
pub fn query(registry: &Registry, place: &Place) -> Status {
    Query::new(place).answer(registry, place)
}

/// A domain whose monitor has been queried. Many are queried before the first answer is read.
pub struct Query {
    connect: io::Result<UnixStream>,
    since: Instant,
}

impl Query {
    /// Query the monitor of the domain at `place`, if there is one.
    pub fn new(place: &Place) -> Self {
        Self { connect: connect(place), since: Instant::now() }
    }

    /// The state of the domain at `place`, which was queried.
    pub fn answer(mut self, registry: &Registry, place: &Place) -> Status {
        let deadline = self.since + limit();
        loop {
            let absent = matches!(&self.connect, Err(e) if e.kind() == io::ErrorKind::NotFound);
            let answer = self.connect.ok().map(|stream| listen(stream, deadline));
            let late = matches!(answer, Some(Err(ClientError::Timeout { .. })));
            if let Some(Ok(answer)) = answer {
                return answered(registry, place, answer);
            }
            let process = match found(place) {
                Found::Alive(process) => process,
                Found::Nobody => return Status::without_monitor(idle(place)),
                // The state in the store is complete, and the guest has not run since.
                Found::Gone if idle(place) == State::Suspended => {
                    return Status::without_monitor(State::Suspended);
                }
                Found::Gone if idle(place) == State::Moved => {
                    return Status::without_monitor(State::Moved);
                }
                Found::Gone => return Status::without_monitor(State::Killed),
            };
            // A monitor that does not listen, or that hangs up, may be starting or ending.
            let slow = absent && self.since.elapsed() >= SHOWN_AFTER;
            let starting = slow && !place.has_been_up();
            let ending = slow && place.has_been_up() || process.is_only_a_number();
            if starting || ending || late || Instant::now() >= deadline {
                let state = match () {
                    () if ending => State::Ending,
                    () if starting => State::Starting,
                    () => State::Hung,
                };
                let process = Some(process);
                return Status { process, ..Status::without_monitor(state) };
            }
            process.ends_within(POLL_INTERVAL);
            self.connect = connect(place);
        }
    }
}

fn answered(registry: &Registry, place: &Place, answer: Answer) -> Status {
    let (mut client, status, migration, replication) = answer;
    let saving = migration == MigrationStatus::Active || registry.is_being_saved(&place.name);
    let role = replication.as_ref().and_then(|info| info.role);
    let state = match status {
        _ if saving => State::Saving,
        RunState::Inmigrate if role == Some(ReplicationSide::Backup) => State::Standby,
        RunState::Running => State::Running,
        RunState::Shutdown => State::Off,
        RunState::GuestPanicked | RunState::InternalError | RunState::IoError => State::Crashed,
        RunState::Paused | RunState::Prelaunch | RunState::Inmigrate | RunState::Postmigrate => {
            State::Paused
        }
    };
    client.set_timeout(Duration::from_secs(30));
    let process = match find(&place.run) {
        Found::Alive(process) => Some(process),
        Found::Nobody | Found::Gone => search(&place.run),
    };
    Status { state, process, client: Some(client), replication }
}

/// The state of a domain without a monitor.
fn idle(place: &Place) -> State {
    let moved = || Protection::of(place).ok().flatten().is_some_and(|known| known.moved);
    match (place.managed, place.is_saved()) {
        (true, false) if moved() => State::Moved,
        (true, true) => State::Suspended,
        (true, false) => State::Registered,
        (false, _) => State::Absent,
    }
}

/// The monitor's process, also if it is only starting.
pub fn found(place: &Place) -> Found {
    match find(&place.run) {
        Found::Nobody if place.has_begun() => {
            search(&place.run).map_or(Found::Nobody, Found::Alive)
        }
        found => found,
    }
}

type Answer = (Client, RunState, MigrationStatus, Option<ReplicationInfo>);

/// Connect to the monitor and send all queries at once.
fn connect(place: &Place) -> io::Result<UnixStream> {
    let mut stream = dial(&place.run, Path::new(SOCKET))?;
    let commands = [QueryStatus::NAME, QueryMigrate::NAME, QueryReplication::NAME];
    stream.write_all(
        commands.map(|name| format!("{{\"execute\":\"{name}\"}}\n")).concat().as_bytes(),
    )?;
    Ok(stream)
}

/// The answers of a monitor that was queried; an error if they do not come in time.
fn listen(stream: UnixStream, deadline: Instant) -> Result<Answer, ClientError> {
    // Answers that have arrived by now count, however long it took to query all the others.
    let left = || deadline.saturating_duration_since(Instant::now()).max(POLL_INTERVAL);
    let mut client = Client::on(stream, left())?;
    client.set_timeout(left());
    let status = client.receive::<QueryStatus>()?.status;
    let migration = client.receive::<QueryMigrate>()?.status;
    // A monitor from before replication does not know the command.
    let replication = match client.receive::<QueryReplication>() {
        Err(ClientError::Refused { .. }) => None,
        other => Some(other?),
    };
    Ok((client, status, migration, replication))
}
