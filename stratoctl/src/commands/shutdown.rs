//! Asking a guest to end: through the agent if it answers, else by the power button or
//! Ctrl-Alt-Del. The guest may ignore it.
use std::{
    path::Path,
    time::{Duration, Instant, SystemTime},
};

use qmp::{
    client::{Client, ClientError, ReceivedEvent},
    schema::{
        KeyValue, KeyValueKind, QKeyCode, QueryChardev, SendKey, SystemPowerdown, SystemReset,
    },
};
use serde_json::{Value, json};

use super::{Answer, Context, LockedDomain, end, list};
use crate::{
    agent::{self, AgentError, Mode},
    dial::dial,
    failure::Failure,
    matrix::{State, Verb},
    registry::{Name, Place},
    verbs::{Reboot, Shutdown},
};

/// How long a guest that was asked may take before `-F` forces it.
const FORCE_AFTER: Duration = Duration::from_secs(60);
/// How long a monitor may take to end once it has hung up.
const END_LIMIT: Duration = Duration::from_secs(60);
/// How long to wait for an event in one go, where the whole wait has no limit.
const EVENT_TIMEOUT: Duration = Duration::from_secs(60);

pub fn shutdown(ctx: &Context, args: &Shutdown) -> anyhow::Result<Answer> {
    let name = &args.domain;
    let mut held = ctx.hold(Verb::Shutdown, name)?;
    let place = held.place.clone();
    let client = held.status.client()?;
    let asked = match by_agent(client, &place, Mode::Powerdown) {
        Ok(asked) => asked,
        Err(why) => {
            client.execute(&SystemPowerdown {})?;
            Means::by("power button", why)
        }
    };
    if !(args.wait || args.force || args.timeout.is_some()) {
        return Ok(asked.answer(name));
    }
    let limit = limit(args.timeout, args.force)?;
    // Other verbs may act on it meanwhile.
    held.lock = None;
    match wait(&mut held, limit)? {
        Some(outcome) => finished(ctx, name, &held, &asked, outcome),
        None if args.force => {
            let mut held = ctx.hold_forced(Verb::Destroy, name, true)?;
            end(ctx, &mut held)?;
            let state = if held.place.managed { State::Registered } else { State::Absent };
            let text = format!(
                "asked by the {}; the guest did not power off in time, and '{name}' was destroyed",
                asked.way
            );
            Ok(asked.done(text, json!({ "name": name, "state": state.word(), "forced": true })))
        }
        None => Err(still_there(name, &asked, "shutdown", "ends")),
    }
}

pub fn reboot(ctx: &Context, args: &Reboot) -> anyhow::Result<Answer> {
    let name = &args.domain;
    let mut held = ctx.hold(Verb::Reboot, name)?;
    let place = held.place.clone();
    let client = held.status.client()?;
    let asked = match by_agent(client, &place, Mode::Reboot) {
        Ok(asked) => asked,
        Err(why) => match client.execute(&ctrl_alt_del()) {
            Ok(_) => Means::by("Ctrl-Alt-Del key", why),
            Err(ClientError::Refused { error, .. }) if args.force => {
                return reset(client, name, &format!("it cannot be asked ({error})"));
            }
            Err(ClientError::Refused { error, .. }) => {
                return Err(Failure::hint(
                    format!("'{name}' cannot be asked: {error}"),
                    format!("`stratoctl reboot -F {name}` resets it anyway"),
                )
                .into());
            }
            Err(e) => return Err(e.into()),
        },
    };
    if !args.force && args.timeout.is_none() {
        return Ok(asked.answer(name));
    }
    let limit = limit(args.timeout, true)?;
    held.lock = None;
    match wait(&mut held, limit)? {
        Some(outcome) => finished(ctx, name, &held, &asked, outcome),
        None if !args.force => Err(still_there(name, &asked, "reboot", "resets")),
        None => {
            let mut held = ctx.hold(Verb::Reboot, name)?;
            let why = format!("asked by the {}; the guest did not reboot in time", asked.way);
            reset(held.status.client()?, name, &why)
        }
    }
}

fn reset(client: &mut Client, name: &Name, why: &str) -> anyhow::Result<Answer> {
    client.execute(&SystemReset {})?;
    let json = json!({ "name": name, "state": State::Running.word(), "forced": true });
    Ok(Answer::new(format!("{why}, and '{name}' was reset"), json))
}

fn limit(timeout: Option<f64>, force: bool) -> anyhow::Result<Option<Duration>> {
    match timeout {
        Some(seconds) => Duration::try_from_secs_f64(seconds).map(Some).map_err(|_| {
            Failure::new(format!("--timeout {seconds}: must be seconds, 0 and more")).into()
        }),
        None => Ok(force.then_some(FORCE_AFTER)),
    }
}

fn ctrl_alt_del() -> SendKey {
    let key = |data| KeyValue { r#type: KeyValueKind::Qcode, data };
    SendKey {
        keys: [QKeyCode::Ctrl, QKeyCode::Alt, QKeyCode::Delete].map(key).into(),
        hold_time: None,
    }
}

/// How a guest was asked.
struct Means {
    way: &'static str,
    /// Why not through the agent, where there should be one.
    instead: Option<String>,
}

impl Means {
    fn by(way: &'static str, instead: Option<AgentError>) -> Self {
        Self { way, instead: instead.map(|why| format!("the guest agent: {why}")) }
    }

    fn answer(&self, name: &Name) -> Answer {
        let text = format!("asked by the {}; the guest has not reacted yet", self.way);
        self.done(text, json!({ "name": name, "state": State::Running.word() }))
    }

    fn done(&self, text: String, mut json: Value) -> Answer {
        if let Some(members) = json.as_object_mut() {
            members.insert("asked".to_owned(), json!(self.way));
            members.insert("instead".to_owned(), json!(self.instead));
        }
        match &self.instead {
            Some(why) => Answer::new(format!("{text} ({why})"), json),
            None => Answer::new(text, json),
        }
    }
}

/// Make the agent of a guest that has just been resumed set its clock to the host's date, and add
/// the outcome to `answer`; does nothing if the domain has no console for the agent.
pub fn set_clock(client: &mut Client, place: &Place, answer: &mut Answer) {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let date = u64::try_from(since.as_nanos()).unwrap_or(u64::MAX);
    let (text, set) = match by_agent(client, place, Mode::SetTime(date)) {
        Ok(_) => ("the guest's clock was set".to_owned(), true),
        Err(Some(why)) => {
            (format!("the guest's clock was not set (the guest agent: {why})"), false)
        }
        Err(None) => return,
    };
    answer.text = text;
    if let Some(members) = answer.json.as_object_mut() {
        members.insert("clock_set".to_owned(), json!(set));
    }
}

/// Ask the agent, on its own console and on no other.
fn by_agent(client: &mut Client, place: &Place, mode: Mode) -> Result<Means, Option<AgentError>> {
    let chardevs = client.execute(&QueryChardev {}).map_err(|_| None)?;
    let console = chardevs.into_iter().find(|chardev| chardev.label == agent::CONSOLE);
    let name = console.ok_or(None)?.filename;
    let path = name.strip_prefix("unix:").and_then(|rest| rest.strip_suffix(",server=on"));
    let stream = dial(&place.run, Path::new(path.ok_or(None)?)).map_err(|e| Some(e.into()))?;
    agent::ask(stream, mode).map_err(Some)?;
    Ok(Means::by("guest agent", None))
}

/// The reaction of a guest that was asked, with the reason that the monitor gives.
enum Outcome {
    /// It ended, and its domain with it.
    Ended(String),
    /// It ended, and its domain is kept.
    Halted(String),
    /// It rebooted.
    Reset(String),
}

/// Wait for the guest's reaction; `None` if there is none in time.
fn wait(held: &mut LockedDomain, limit: Option<Duration>) -> anyhow::Result<Option<Outcome>> {
    // A deadline beyond the range of `Instant` is none.
    let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
    let client = held.status.client()?;
    let mut why = None;
    let reason = |event: &ReceivedEvent| {
        event.data.get("reason").and_then(Value::as_str).unwrap_or("unknown").to_owned()
    };
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            return Ok(None);
        }
        match client.next_event(left.unwrap_or(EVENT_TIMEOUT)) {
            Ok(event) => match event.event.as_str() {
                "SHUTDOWN" => why = Some(reason(&event)),
                "RESET" => return Ok(Some(Outcome::Reset(reason(&event)))),
                "GUEST_PANICKED" => why = Some("guest-panic".to_owned()),
                "STOP" if why.is_some() => {
                    return Ok(Some(Outcome::Halted(why.unwrap_or_default())));
                }
                _ => {}
            },
            Err(ClientError::Timeout { .. }) => {}
            Err(ClientError::Closed { .. } | ClientError::Io(_)) => {
                return Ok(Some(Outcome::Ended(why.unwrap_or_else(|| "unknown".to_owned()))));
            }
            Err(e) => return Err(e.into()),
        }
    }
}

fn finished(
    ctx: &Context,
    name: &Name,
    held: &LockedDomain,
    asked: &Means,
    outcome: Outcome,
) -> anyhow::Result<Answer> {
    let (did, reason) = match outcome {
        Outcome::Ended(reason) => {
            // It has hung up, and may take its time to release its memory.
            if let Some(process) = &held.status.process {
                process.ends_within(END_LIMIT);
            }
            ("has ended", reason)
        }
        Outcome::Halted(reason) => ("has ended and is preserved", reason),
        Outcome::Reset(reason) => ("has rebooted", reason),
    };
    let state = list::settle(ctx, name);
    let text = format!("asked by the {}; '{name}' {did} ({reason})", asked.way);
    let json = json!({ "name": name, "state": state.word(), "reason": reason, "forced": false });
    Ok(asked.done(text, json))
}

fn still_there(name: &Name, asked: &Means, verb: &str, does: &str) -> anyhow::Error {
    Failure::hint(
        format!("asked by the {}; '{name}' is still running", asked.way),
        format!("`stratoctl {verb} -F {name}` {does} it anyway"),
    )
    .into()
}
