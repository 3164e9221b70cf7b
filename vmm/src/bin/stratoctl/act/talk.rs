//! Listening to a domain, and talking to it: its console, log, events and control socket.
use std::{
    collections::BTreeMap,
    io::{self, BufRead, Read, Write},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, RecvTimeoutError, Sender},
    },
    thread,
    time::Duration,
};

use anyhow::Context as _;
use qmp::client::{Client, ClientError, ReceivedEvent};
use serde_json::{Value, json};
use time::UtcDateTime;

use super::{Answer, Context, watch};
use crate::{
    console::{self, End},
    dial::dial,
    domain::{self, Seen},
    failure::Failure,
    log::Log,
    matrix::{State, Verb, admit},
    registry::{Name, Place},
    verbs::{Dmesg, Events, Qmp},
};

/// Time between two looks at what nobody tells about.
const LOOK: Duration = Duration::from_millis(100);
/// How long a monitor that has hung up may take to end.
const END: Duration = Duration::from_secs(60);
/// How long a reply may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Longest line that is sent to a monitor, bytes.
const LONGEST: u64 = 1 << 20;

impl Context {
    /// The domain called `name`, which `verb` only looks at: nobody is kept from acting on it.
    fn see(&self, verb: Verb, name: &Name) -> anyhow::Result<(Place, Seen)> {
        let (place, seen) = self.look(name);
        let Some(place) = place.filter(|_| seen.state != State::Absent) else {
            return Err(self.absent(verb, name));
        };
        admit(verb, seen.state, name, false)?;
        Ok((place, seen))
    }
}

pub fn console(ctx: &Context, name: &Name) -> anyhow::Result<Answer> {
    let (place, seen) = ctx.see(Verb::Console, name)?;
    attach(ctx, &place, seen.state)
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
        State::Paused => format!("'{name}' is paused; its console goes on when it does. "),
        State::Off | State::Crashed => format!("'{name}' is {}. ", state.word()),
        _ => String::new(),
    };
    eprintln!("{note}Attached to '{name}'; Ctrl-] leaves.");
    let end = console::attach(console).context("the console")?;
    let mut answer = Answer::silent();
    match end {
        End::Left => eprintln!("\nLeft '{name}'."),
        End::HungUp => {
            // It may take its time to give its memory back.
            let (_, seen) = ctx.look(name);
            if let (None, Some(process)) = (&seen.client, &seen.process) {
                process.ends_within(END);
            }
            drop(seen);
            let state = watch::settle(ctx, name);
            eprintln!("\n'{name}' has ended: it is {}.", state.word());
        }
        End::Signal(number) => answer.status = 128 + number,
        End::NobodyReads => {}
    }
    Ok(answer)
}

pub fn dmesg(ctx: &Context, args: &Dmesg) -> anyhow::Result<Answer> {
    let name = &args.domain;
    let (place, seen) = ctx.see(Verb::Dmesg, name)?;
    let mut log = Log::open(&place.run.join("log"), args.lines).map_err(|e| {
        let what = match e.kind() {
            io::ErrorKind::NotFound => format!("'{name}' has no log: it was never started"),
            _ => format!("cannot read the log of '{name}': {e}"),
        };
        Failure::hint(what, format!("`stratoctl info {name}` tells more"))
    })?;
    let mut out = io::stdout().lock();
    loop {
        let over = match (&seen.process, args.follow) {
            (Some(process), true) => process.ends_within(LOOK),
            _ => true,
        };
        // After the look: what was written last is not missed.
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
    let (place, _) = ctx.see(Verb::Events, name)?;
    let mut client = domain::qmp(&place)?;
    let mut out = io::stdout().lock();
    loop {
        let line = match client.read_line(PATIENCE) {
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

/// The events of all domains, also of those that begin later; until somebody ends it.
fn all_events(ctx: &Context, as_json: bool) -> anyhow::Result<Answer> {
    let (tell, told) = mpsc::channel();
    // Socket of the monitor that is listened to, by the domain's number.
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
                let tell = tell.clone();
                thread::spawn(move || listen(client, id, &tell));
            }
        }
        loop {
            let (id, line) = match told.recv_timeout(LOOK) {
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

/// Pass on what a monitor says, and then that it has hung up.
fn listen(mut client: Client, id: u32, tell: &Sender<(u32, Option<String>)>) {
    loop {
        let line = match client.read_line(PATIENCE) {
            Ok(line) => Some(line),
            Err(ClientError::Timeout { .. }) => continue,
            Err(_) => None,
        };
        let over = line.is_none();
        if tell.send((id, line)).is_err() || over {
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

/// An event for people: when, who, what, and its data.
fn plain(name: &Name, line: &str) -> String {
    let Ok(event) = serde_json::from_str::<ReceivedEvent>(line) else {
        return format!("{name} says {line:?}");
    };
    let (when, micros) = (clock(event.timestamp.seconds), event.timestamp.microseconds);
    let mut text = format!("{when}.{micros:06} {name} {}", event.event);
    for (key, value) in event.data.as_object().into_iter().flatten() {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        text += &format!(" {key}={}", value.escape_debug());
    }
    text
}

/// Date and time, UTC, of a moment that many seconds after the beginning of 1970.
fn clock(seconds: u64) -> String {
    let seconds = i64::try_from(seconds).unwrap_or_default();
    let t = UtcDateTime::from_unix_timestamp(seconds).unwrap_or(UtcDateTime::UNIX_EPOCH);
    let (date, (hour, minute, second)) = (t.date(), t.as_hms());
    format!("{date}T{hour:02}:{minute:02}:{second:02}")
}

pub fn qmp(ctx: &Context, args: &Qmp) -> anyhow::Result<Answer> {
    let (place, _) = ctx.see(Verb::Qmp, &args.domain)?;
    let mut client = domain::qmp(&place)?;
    let Some(command) = &args.command else { return converse(client, &args.domain) };
    let arguments = arguments(args.arguments.as_deref())?;
    let value = client.execute_raw(command, arguments).map_err(|e| match e {
        ClientError::Refused { error, .. } => anyhow::Error::from(Failure::hint(
            format!("{command}: {error}"),
            format!("`stratoctl qmp {} query-commands` lists the commands", args.domain),
        )),
        other => other.into(),
    })?;
    Ok(Answer::new(format!("{value:#}"), value))
}

fn arguments(text: Option<&str>) -> anyhow::Result<Value> {
    let Some(text) = text else { return Ok(json!({})) };
    let value: Value = serde_json::from_str(text).map_err(|e| {
        Failure::hint(format!("the arguments are not JSON: {e}"), "such as '{\"id\": \"net1\"}'")
    })?;
    match value {
        Value::Object(_) => Ok(value),
        _ => Err(Failure::new("the arguments must be a JSON object").into()),
    }
}

/// Lines from standard input to the monitor, and what it says to standard output. After the end of
/// the input, until all is answered.
fn converse(mut client: Client, name: &Name) -> anyhow::Result<Answer> {
    let mut to = client.stream().try_clone().context("a second handle")?;
    let asked = Arc::new(AtomicU64::new(0));
    let (count, (tell, over)) = (asked.clone(), mpsc::channel());
    thread::spawn(move || {
        let mut input = io::stdin().lock();
        let done = loop {
            match next_line(&mut input) {
                Ok(Some(line)) if line.trim().is_empty() => {}
                Ok(Some(line)) => {
                    count.fetch_add(1, Ordering::SeqCst);
                    if let Err(e) = to.write_all(request(&line).as_bytes()) {
                        break Err(e);
                    }
                }
                Ok(None) => break Ok(()),
                Err(e) => break Err(e),
            }
        };
        // Nobody listens any more when the process ends.
        let _ = tell.send(done);
    });
    let mut out = io::stdout().lock();
    let (mut answered, mut patience, mut ended) = (0, PATIENCE, false);
    loop {
        if !ended && let Ok(done) = over.try_recv() {
            done.context("standard input")?;
            ended = true;
        }
        if ended && answered >= asked.load(Ordering::SeqCst) {
            return Ok(Answer::silent());
        }
        let line = match client.read_line(LOOK) {
            Ok(line) => line,
            Err(ClientError::Timeout { .. }) => {
                if ended {
                    patience = patience.saturating_sub(LOOK);
                }
                if patience.is_zero() {
                    anyhow::bail!("no answer within {PATIENCE:?}");
                }
                continue;
            }
            Err(ClientError::Closed { .. })
                if ended && answered >= asked.load(Ordering::SeqCst) =>
            {
                return Ok(Answer::silent());
            }
            Err(ClientError::Closed { .. }) => {
                eprintln!("'{name}' has ended.");
                return Ok(Answer::silent());
            }
            Err(e) => return Err(e.into()),
        };
        let message = serde_json::from_str::<Value>(&line).unwrap_or_default();
        if message.get("return").is_some() || message.get("error").is_some() {
            answered += 1;
        }
        if let Err(e) = writeln!(out, "{line}").and_then(|()| out.flush()) {
            return quietly(e);
        }
    }
}

/// A line without its end; `None` at the end of the input.
fn next_line(input: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut line = String::new();
    let n = input.take(LONGEST).read_line(&mut line)?;
    if n as u64 == LONGEST && !line.ends_with('\n') {
        let what = format!("a line is longer than {LONGEST} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    Ok((n > 0).then(|| line.trim_end_matches(['\r', '\n']).to_owned()))
}

/// What is sent for a line: itself if it is JSON, else a command and its arguments.
fn request(line: &str) -> String {
    let line = line.trim();
    if line.starts_with(['{', '[']) {
        return format!("{line}\n");
    }
    let (command, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    match rest.trim() {
        "" => format!("{}\n", json!({ "execute": command })),
        // As it was written: what is wrong with it is for the monitor to say.
        rest => format!("{{\"execute\":{},\"arguments\":{rest}}}\n", json!(command)),
    }
}

/// A reader that has gone has read enough.
fn quietly(error: io::Error) -> anyhow::Result<Answer> {
    match error.kind() {
        io::ErrorKind::BrokenPipe => Ok(Answer::silent()),
        _ => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_shown_as_people_write_it() {
        for (seconds, shown) in [
            (0, "1970-01-01T00:00:00"),
            (951_782_399, "2000-02-28T23:59:59"),
            (951_782_400, "2000-02-29T00:00:00"),
            (1_795_286_130, "2026-11-21T18:35:30"),
            (4_102_444_799, "2099-12-31T23:59:59"),
            (u64::MAX, "1970-01-01T00:00:00"),
        ] {
            assert_eq!(clock(seconds), shown);
        }
    }

    #[test]
    fn an_event_is_a_line() {
        let name = "web".parse().expect("a name");
        let line = r#"{"event":"SHUTDOWN","data":{"guest":true,"reason":"guest-\u001b"},
            "timestamp":{"seconds":0,"microseconds":7}}"#;
        let shown = "1970-01-01T00:00:00.000007 web SHUTDOWN guest=true reason=guest-\\u{1b}";
        assert_eq!(plain(&name, line), shown);
        assert_eq!(plain(&name, "\x1b"), "web says \"\\u{1b}\"");
        let never = line.replace("\"seconds\":0", "\"seconds\":18446744073709551615");
        assert!(plain(&name, &never).contains("SHUTDOWN"));
        assert!(with_name(&name, line).contains(r#""domain":"web""#));
    }

    #[test]
    fn a_line_is_json_or_a_command() {
        assert_eq!(request(" {\"execute\":\"stop\"} "), "{\"execute\":\"stop\"}\n");
        assert_eq!(request("query-status"), "{\"execute\":\"query-status\"}\n");
        assert_eq!(
            request("device_del  {\"id\":\"a\"}"),
            "{\"execute\":\"device_del\",\"arguments\":{\"id\":\"a\"}}\n"
        );
    }

    #[test]
    fn lines_are_bounded() {
        let mut input = io::Cursor::new([b"one\r\n".to_vec(), vec![b'x'; 2 << 20]].concat());
        assert_eq!(next_line(&mut input).expect("a line").as_deref(), Some("one"));
        assert!(next_line(&mut input).is_err());
        assert_eq!(next_line(&mut io::empty()).expect("the end"), None);
    }
}
