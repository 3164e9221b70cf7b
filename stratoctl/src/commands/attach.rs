//! Following a domain: its console, log and events.
use std::{
    collections::BTreeMap,
    io::{self, Write},
    path::Path,
    sync::mpsc::{self, RecvTimeoutError, Sender},
    thread,
    time::Duration,
};

use anyhow::Context as _;
use qmp::client::{Client, ClientError, ReceivedEvent};
use serde_json::{Value, json};
use time::UtcDateTime;

use super::{Answer, Context, list};
use crate::{
    console::{self, End},
    dial::dial,
    domain::{self, Status},
    failure::Failure,
    log::Log,
    matrix::{Leave, State, Verb, admit_both},
    registry::{Name, Place},
    verbs::{Dmesg, Events},
};

/// Poll interval for changes that no event reports.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// How long a monitor that has hung up may take to end.
const END_LIMIT: Duration = Duration::from_secs(60);
/// How long a monitor may be silent before it is checked that it is still there.
const SILENCE_LIMIT: Duration = Duration::from_secs(30);

impl Context {
    /// The domain called `name`, which `verb` only reads: other verbs are not kept from acting on
    /// it.
    pub(super) fn inspect(&self, verb: Verb, name: &Name) -> anyhow::Result<(Place, Status)> {
        let (place, status) = self.query(name);
        let Some(place) = place.filter(|_| status.state != State::Absent) else {
            return Err(self.absent(verb, name));
        };
        admit_both(verb, (status.state, status.beside()), name, Leave::default())?;
        Ok((place, status))
    }
}

pub fn console(ctx: &Context, name: &Name) -> anyhow::Result<Answer> {
    let (place, status) = ctx.inspect(Verb::Console, name)?;
    attach(ctx, &place, status.state)
}

/// Attach to the console of the domain at `place`. The caller has no lock on it.
///
/// # Errors
/// When it has none, or the host refuses.
pub fn attach(ctx: &Context, place: &Place, state: State) -> anyhow::Result<Answer> {
    let name = &place.name;
    let console = dial(&place.run, Path::new("console.sock"))
        .with_context(|| format!("cannot attach to the console of '{name}'"))?;
    let note = match state {
        State::Paused => format!("'{name}' is paused; its console continues when it resumes.  "),
        State::Off | State::Crashed => format!("'{name}' is {}. ", state.word()),
        _ => String::new(),
    };
    eprintln!("{note}Attached to '{name}'; Ctrl-] leaves.");
    let end = console::attach(console).context("the console")?;
    let mut answer = Answer::silent();
    match end {
        End::Left => eprintln!("\nLeft '{name}'."),
        End::HungUp => {
            // The monitor may take its time to release its memory.
            let (_, status) = ctx.query(name);
            if let (None, Some(process)) = (&status.client, &status.process) {
                process.ends_within(END_LIMIT);
            }
            drop(status);
            let state = list::settle(ctx, name);
            eprintln!("\n'{name}' has ended: it is {}.", state.word());
        }
        End::Signal(number) => answer.status = 128 + number,
        End::NobodyReads => {}
    }
    Ok(answer)
}

pub fn dmesg(ctx: &Context, args: &Dmesg) -> anyhow::Result<Answer> {
    let name = &args.domain;
    let (place, status) = ctx.inspect(Verb::Dmesg, name)?;
    let mut log = Log::open(&place.run.join("log"), args.lines).map_err(|e| {
        let what = match e.kind() {
            io::ErrorKind::NotFound => format!("'{name}' has no log: it was never started"),
            _ => format!("cannot read the log of '{name}': {e}"),
        };
        Failure::hint(what, format!("`stratoctl info {name}` shows more"))
    })?;
    let mut out = io::stdout().lock();
    loop {
        let over = match (&status.process, args.follow) {
            (Some(process), true) => process.ends_within(POLL_INTERVAL),
            _ => true,
        };
        // After the state was read, so that the last output is not missed.
        if let Err(e) = log.pour(&mut out) {
            return quietly(e);
        }
        if over {
            return Ok(Answer::silent());
        }
    }
}

pub fn events(ctx: &Context, args: &Events, as_json: bool) -> anyhow::Result<Answer> {
    let Some(name) = &args.domain else { return all_events(ctx, as_json) };
    let (place, _) = ctx.inspect(Verb::Events, name)?;
    let mut client = domain::qmp(&place)?;
    let mut out = io::stdout().lock();
    loop {
        let line = match client.read_line(SILENCE_LIMIT) {
            Ok(line) => line,
            Err(ClientError::Timeout { .. }) => continue,
            Err(ClientError::Closed { .. } | ClientError::Io(_)) => return Ok(Answer::silent()),
            Err(e) => return Err(e.into()),
        };
        let shown = if as_json { line } else { plain(name, &line) };
        if let Err(e) = writeln!(out, "{shown}").and_then(|()| out.flush()) {
            return quietly(e);
        }
    }
}

/// The events of all domains, including those that start later; until the user ends it.
fn all_events(ctx: &Context, as_json: bool) -> anyhow::Result<Answer> {
    let (sender, receiver) = mpsc::channel();
    // The sockets of the monitors that are listened to, by the domains' numbers.
    let mut known = BTreeMap::new();
    let mut out = io::stdout().lock();
    loop {
        for name in ctx.registry.names()? {
            let Some(place) = ctx.registry.find(&name) else { continue };
            let Some(id) = place.id() else { continue };
            if known.contains_key(&id) {
                continue;
            }
            if let Ok(client) = domain::qmp(&place) {
                known.insert(id, name.clone());
                let sender = sender.clone();
                thread::spawn(move || listen(client, id, &sender));
            }
        }
        loop {
            let (id, line) = match receiver.recv_timeout(POLL_INTERVAL) {
                Ok(heard) => heard,
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => return Ok(Answer::silent()),
            };
            let Some(line) = line else {
                known.remove(&id);
                continue;
            };
            let Some(name) = known.get(&id) else { continue };
            let shown = if as_json { with_name(name, &line) } else { plain(name, &line) };
            if let Err(e) = writeln!(out, "{shown}").and_then(|()| out.flush()) {
                return quietly(e);
            }
        }
    }
}

/// Pass on the lines of a monitor, and finally that it has hung up.
fn listen(mut client: Client, id: u32, sender: &Sender<(u32, Option<String>)>) {
    loop {
        let line = match client.read_line(SILENCE_LIMIT) {
            Ok(line) => Some(line),
            Err(ClientError::Timeout { .. }) => continue,
            Err(_) => None,
        };
        let over = line.is_none();
        if sender.send((id, line)).is_err() || over {
            return;
        }
    }
}

fn with_name(name: &Name, line: &str) -> String {
    let mut message = serde_json::from_str::<Value>(line).unwrap_or_default();
    if let Some(members) = message.as_object_mut() {
        members.insert("domain".to_owned(), json!(name));
    }
    message.to_string()
}

/// An event as text: its time, domain, name and data.
fn plain(name: &Name, line: &str) -> String {
    let Ok(event) = serde_json::from_str::<ReceivedEvent>(line) else {
        return format!("{name} sent {line:?}");
    };
    let (when, micros) = (date_time(event.timestamp.seconds), event.timestamp.microseconds);
    let mut text = format!("{when}.{micros:06} {name} {}", event.event);
    for (key, value) in event.data.as_object().into_iter().flatten() {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        text += &format!(" {key}={}", value.escape_debug());
    }
    text
}

/// A reader that has closed its end wants no more output.
pub(super) fn quietly(error: io::Error) -> anyhow::Result<Answer> {
    match error.kind() {
        io::ErrorKind::BrokenPipe => Ok(Answer::silent()),
        _ => Err(error.into()),
    }
}

/// Date and time (UTC) `seconds` after the beginning of 1970, in RFC 3339 format, to the second.
pub(super) fn date_time(seconds: u64) -> String {
    let seconds = i64::try_from(seconds).unwrap_or_default();
    let t = UtcDateTime::from_unix_timestamp(seconds).unwrap_or(UtcDateTime::UNIX_EPOCH);
    let (date, (hour, minute, second)) = (t.date(), t.as_hms());
    format!("{date}T{hour:02}:{minute:02}:{second:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_a_line() {
        let name = "web".parse().expect("a name");
        let line = r#"{"event":"SHUTDOWN","data":{"guest":true,"reason":"guest-\u001b"},
            "timestamp":{"seconds":0,"microseconds":7}}"#;
        let shown = "1970-01-01T00:00:00.000007 web SHUTDOWN guest=true reason=guest-\\u{1b}";
        assert_eq!(plain(&name, line), shown);
        assert_eq!(plain(&name, "\x1b"), "web sent \"\\u{1b}\"");
        let never = line.replace("\"seconds\":0", "\"seconds\":18446744073709551615");
        assert!(plain(&name, &never).contains("SHUTDOWN"));
        assert!(with_name(&name, line).contains(r#""domain":"web""#));
    }
}
