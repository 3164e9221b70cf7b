//! What state a domain is in: found out each time, by asking its monitor.
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
    schema::{Command, MigrationStatus, QueryMigrate, QueryStatus, RunState},
};

use crate::{
    dial::dial,
    matrix::State,
    process::{Found, Process, find, search},
    registry::{Place, Registry},
};

/// How long a monitor may take to say how it is. Stories that are not about monitors that hang name a
/// longer one: where many processes share a processor, any of them may stand still for seconds.
pub fn patience() -> Duration {
    seconds("STRATOCTL_PATIENCE", Duration::from_secs(2))
}

/// A time, in seconds, for which the environment may name another.
pub fn seconds(variable: &str, usual: Duration) -> Duration {
    let named = env::var(variable).ok().and_then(|text| text.parse::<u16>().ok());
    named.map_or(usual, |seconds| Duration::from_secs(seconds.into()))
}

/// Time between two looks at a monitor that nobody can connect to.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// A start or an end that takes longer is shown as one, and not waited for.
const START: Duration = Duration::from_millis(100);

/// The monitor's control socket, in its directory. The last thing that a monitor makes when it starts.
const SOCKET: &str = "qmp.sock";

/// A domain as it was found.
pub struct Status {
    /// Its state.
    pub state: State,
    /// Its monitor, if it lives.
    pub process: Option<Process>,
    /// The connection to its monitor, if it answers.
    pub client: Option<Client>,
}

impl Status {
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

/// Another connection to a monitor.
///
/// # Errors
/// When it does not answer.
pub fn qmp(place: &Place) -> anyhow::Result<Client> {
    let cannot = || format!("cannot talk to the monitor of '{}'", place.name);
    let stream = dial(&place.run, Path::new(SOCKET)).with_context(cannot)?;
    Client::on(stream, patience()).with_context(cannot)
}

/// See how the domain at `place` is.
pub fn look(registry: &Registry, place: &Place) -> Status {
    Query::new(place).answer(registry, place)
}

/// A domain whose monitor has been asked how it is. Many are asked before the first answer is read.
pub struct Query {
    call: io::Result<UnixStream>,
    since: Instant,
}

impl Query {
    /// Ask the monitor of the domain at `place`, if there is one.
    pub fn new(place: &Place) -> Self {
        Self { call: call(place), since: Instant::now() }
    }

    /// How the domain at `place` is, which was asked.
    pub fn answer(mut self, registry: &Registry, place: &Place) -> Status {
        let deadline = self.since + patience();
        loop {
            let absent = matches!(&self.call, Err(e) if e.kind() == io::ErrorKind::NotFound);
            let answer = self.call.ok().map(|stream| listen(stream, deadline));
            let late = matches!(answer, Some(Err(ClientError::Timeout { .. })));
            if let Some(Ok(answer)) = answer {
                return answered(registry, place, answer);
            }
            let process = match found(place) {
                Found::Alive(process) => process,
                Found::Nobody => return Status::without_monitor(idle(place)),
                // What is in the store is whole, and its guest has not run since.
                Found::Gone if idle(place) == State::Suspended => {
                    return Status::without_monitor(State::Suspended);
                }
                Found::Gone => return Status::without_monitor(State::Killed),
            };
            // One that nobody listens for, or that hangs up, may be on its way in, or out.
            let slow = absent && self.since.elapsed() >= START;
            let starting = slow && !place.has_been_up();
            let ending = slow && place.has_been_up() || process.is_only_a_number();
            if starting || ending || late || Instant::now() >= deadline {
                let state = match () {
                    () if ending => State::Ending,
                    () if starting => State::Starting,
                    () => State::Hung,
                };
                return Status { state, process: Some(process), client: None };
            }
            process.ends_within(POLL_INTERVAL);
            self.call = call(place);
        }
    }
}

fn answered(registry: &Registry, place: &Place, answer: Answer) -> Status {
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
    Status { state, process, client: Some(client) }
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

/// Connect to the monitor and ask all there is to ask, in one go.
fn call(place: &Place) -> io::Result<UnixStream> {
    let mut stream = dial(&place.run, Path::new(SOCKET))?;
    let commands = [QueryStatus::NAME, QueryMigrate::NAME];
    stream.write_all(
        commands.map(|name| format!("{{\"execute\":\"{name}\"}}\n")).concat().as_bytes(),
    )?;
    Ok(stream)
}

/// What a monitor that was asked says; an error if it does not say it in time.
fn listen(stream: UnixStream, deadline: Instant) -> Result<Answer, ClientError> {
    // What has come by now counts, however long it took to ask all the others.
    let left = || deadline.saturating_duration_since(Instant::now()).max(POLL_INTERVAL);
    let mut client = Client::on(stream, left())?;
    client.set_patience(left());
    let status = client.receive::<QueryStatus>()?.status;
    let migration = client.receive::<QueryMigrate>()?.status;
    Ok((client, status, migration))
}
