//! Listing domains, and waiting for changes of their state.
use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::ValueEnum;
use qmp::client::ClientError;
use rustix::process::{Resource, getrlimit};
use serde_json::{Value, json};

use super::{Answer, Context, ended, remus};
use crate::{
    domain::{Query, Status},
    failure::Failure,
    matrix::{Leave, State, Verb, admit},
    process::Process,
    registry::{Description, Name, Place},
    show::{self, Table},
    verbs::{List, Wait},
};

/// Most domains that are queried at the same time, each over a connection of its own.
const MAX_QUERIES: u64 = 256;
/// Poll interval for a domain whose monitor does not answer.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// Poll interval for a domain that is being saved, as events do not report everything about the end
/// of a save.
const SAVING_POLL_INTERVAL: Duration = Duration::from_millis(200);
/// Poll interval for a domain whose events report its changes: another monitor may take its name.
const EVENTS_POLL_INTERVAL: Duration = Duration::from_secs(2);
/// Number of log lines that are shown.
const LOG_LINES: usize = 10;

/// One domain.
struct Row {
    name: Name,
    state: State,
    managed: bool,
    id: Option<u32>,
    pid: Option<u32>,
    uptime: Option<f64>,
    rss: Option<u64>,
    description: Result<Description, String>,
    /// Of a protected domain.
    replication: Option<Value>,
    place: Place,
}

impl Row {
    fn new(place: Place, status: &Status) -> Self {
        let replication = remus::describe(&place, status);
        let process = status.process.as_ref();
        Self {
            name: place.name.clone(),
            state: status.state,
            managed: place.managed,
            id: process.and_then(|_| place.id()),
            pid: process.map(Process::pid),
            uptime: process.and_then(Process::uptime),
            rss: process.and_then(Process::rss),
            description: place.description().map_err(|e| format!("{:#}", anyhow::Error::from(e))),
            replication,
            place,
        }
    }

    fn json(&self) -> Value {
        let description = self.description.as_ref().ok();
        json!({
            "name": self.name,
            "id": self.id,
            "state": self.state.word(),
            "managed": self.managed,
            "vcpus": description.map(|d| d.vcpus),
            "memory": description.map(|d| d.memory),
            "uptime": self.uptime,
            "rss": self.rss,
            "pid": self.pid,
            "replication": self.replication,
            "damaged": self.description.as_ref().err(),
        })
    }

    fn cells(&self) -> [String; 8] {
        let none = || "-".to_owned();
        let of = |get: fn(&Description) -> String| {
            self.description.as_ref().map_or_else(|_| "damaged".to_owned(), get)
        };
        [
            self.name.to_string(),
            self.id.map_or_else(none, |id| id.to_string()),
            self.state.word().to_owned(),
            of(|d| d.vcpus.to_string()),
            of(|d| show::bytes(d.memory)),
            self.uptime.map_or_else(none, show::duration),
            self.rss.map_or_else(none, show::bytes),
            self.replication.as_ref().map_or_else(String::new, remus::summary),
        ]
    }
}

/// The domains of these names, or all. All of a batch are queried before the first answer is read.
fn rows(ctx: &Context, names: &[Name]) -> anyhow::Result<Vec<Row>> {
    let all: Vec<Name> = match names {
        [] => ctx.registry.names()?.into_iter().collect(),
        names => names.to_vec(),
    };
    // Some descriptors are needed for other purposes.
    let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let at_once = (files / 2).clamp(1, MAX_QUERIES) as usize;
    let mut rows = Vec::with_capacity(all.len());
    for batch in all.chunks(at_once) {
        let query: Vec<_> = batch
            .iter()
            .map(|name| {
                let place = ctx.registry.find(name)?;
                Some((Query::new(&place), place))
            })
            .collect();
        for (name, query) in batch.iter().zip(query) {
            match query.and_then(|(query, place)| row(ctx, query, place)) {
                Some(row) => rows.push(row),
                // It existed a moment ago.
                None if names.is_empty() => {}
                None => return Err(ctx.absent(Verb::Info, name)),
            }
        }
    }
    Ok(rows)
}

/// The row of the domain at `place`, which was queried; `None` if it has ended.
fn row(ctx: &Context, query: Query, place: Place) -> Option<Row> {
    let status = query.answer(&ctx.registry, &place);
    let ended = status.state == State::Absent;
    if ended || status.state == State::Registered && place.has_begun() {
        tidy(ctx, &place.name);
    }
    (!ended).then(|| Row::new(place, &status))
}

/// Remove what a domain that has ended by itself left behind, unless another process acts on it.
fn tidy(ctx: &Context, name: &Name) {
    if let Some(_lock) = ctx.registry.try_lock(name)
        && let (Some(place), status) = ctx.query(name)
        && matches!(status.state, State::Absent | State::Registered)
    {
        // A later call will retry.
        let _ = ended(ctx, &place);
    }
}

/// The domain's state, after removing what it may have left.
pub fn settle(ctx: &Context, name: &Name) -> State {
    let (place, status) = ctx.query(name);
    if place.is_some_and(|place| status.state == State::Absent || place.has_begun())
        && matches!(status.state, State::Absent | State::Registered)
    {
        tidy(ctx, name);
    }
    status.state
}

pub fn list(ctx: &Context, args: &List) -> anyhow::Result<Answer> {
    let rows = rows(ctx, &args.domains)?;
    let protected = rows.iter().any(|row| row.replication.is_some());
    let last = if protected { "REMUS" } else { "" };
    let mut table = Table::new(["NAME", "ID", "STATE", "VCPUS", "MEMORY", "UPTIME", "RSS", last]);
    rows.iter().for_each(|row| table.row(row.cells()));
    Ok(Answer::new(table.to_string(), rows.iter().map(Row::json).collect()))
}

pub fn info(ctx: &Context, args: &List) -> anyhow::Result<Answer> {
    let mut text = String::new();
    let mut objects = Vec::new();
    for row in rows(ctx, &args.domains)? {
        let mut object = row.json();
        let description = row.description.as_ref().ok();
        let last = match row.state {
            State::Killed | State::Hung | State::Ending | State::Crashed | State::Off => {
                show::last_lines(&row.place.run.join("log"), LOG_LINES)
            }
            _ => Vec::new(),
        };
        if let Some(members) = object.as_object_mut() {
            members.extend([
                ("uuid".to_owned(), json!(description.map(|d| &d.uuid))),
                ("policy".to_owned(), json!(description.map(|d| d.policy))),
                ("disks".to_owned(), json!(description.map(|d| ctx.registry.own_disks(&d.uuid)))),
                ("home".to_owned(), json!(row.place.home)),
                ("run".to_owned(), json!(row.place.run)),
                ("log".to_owned(), json!(last)),
                ("config".to_owned(), json!(description.map(|d| &d.config))),
            ]);
        }
        if !text.is_empty() {
            text.push('\n');
        }
        text.push_str(&show::members(&object));
        objects.push(object);
    }
    Ok(Answer::new(text, Value::Array(objects)))
}

/// Events that report a change of state.
const CHANGES: [&str; 6] = ["MIGRATION", "STOP", "RESUME", "SHUTDOWN", "RESET", "GUEST_PANICKED"];

/// What can be waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum WaitFor {
    /// Its guest has ended, for any reason
    Ended,
    /// It is running
    Running,
    /// It is paused
    Paused,
    /// It is not being saved
    Saved,
}

impl WaitFor {
    const fn is_there(self, state: State) -> bool {
        match self {
            Self::Ended => {
                use State::{Ending, Hung, Paused, Running, Saving, Standby, Starting};
                !matches!(state, Starting | Running | Paused | Saving | Hung | Ending | Standby)
            }
            Self::Running => matches!(state, State::Running),
            Self::Paused => matches!(state, State::Paused),
            Self::Saved => !matches!(state, State::Saving),
        }
    }
}

pub fn wait(ctx: &Context, args: &Wait) -> anyhow::Result<Answer> {
    let name = &args.domain;
    let timeout = args.timeout.map(Duration::try_from_secs_f64).transpose().context("--timeout")?;
    // A deadline beyond the range of `Instant` is none.
    let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    let mut first = true;
    loop {
        let (_, status) = ctx.query(name);
        if first && admit(Verb::Wait, status.state, name, Leave::default()).is_err() {
            return Err(ctx.absent(Verb::Wait, name));
        }
        first = false;
        if args.state.is_there(status.state) {
            return Ok(Answer::state(name, status.state));
        }
        if status.state == State::Absent {
            return Err(Failure::new(format!("'{name}' has ended")).into());
        }
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            let what = format!("'{name}' is still {}", status.state.word());
            return Err(Failure::new(what).into());
        }
        until_changed(status, left);
    }
}

/// Wait until the domain may be in another state, for at most `left`.
fn until_changed(status: Status, left: Option<Duration>) {
    let within = |pause: Duration| left.map_or(pause, |left| left.min(pause));
    if let Some(mut client) = status.client {
        let pause = within(if status.state == State::Saving {
            SAVING_POLL_INTERVAL
        } else {
            EVENTS_POLL_INTERVAL
        });
        let deadline = Instant::now() + pause;
        loop {
            match client.next_event(deadline.saturating_duration_since(Instant::now())) {
                Ok(event) if CHANGES.contains(&event.event.as_str()) => return,
                Ok(_) => {}
                Err(ClientError::Timeout { .. }) => return,
                // It has hung up, and may take its time to end.
                Err(_) => break,
            }
        }
    }
    match status.process {
        Some(process) => drop(process.ends_within(within(POLL_INTERVAL))),
        None => thread::sleep(within(POLL_INTERVAL)),
    }
}
