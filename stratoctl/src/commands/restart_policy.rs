//! `rename-restart`: a process for each domain whose policy asks for it, and for no other. It listens to
//! the monitor; when the guest ends, it gives the domain another name and starts a new one under the
//! old name. It ends with the domain. Without it (somebody killed it), the domain is preserved.
use std::{
    fs::{self, OpenOptions},
    io::{self, Read, Write},
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use qmp::{
    client::{Client, ClientError},
    schema::{Cont, DeviceDel, QueryStatus, RunState},
};
use serde_json::Value;
use state::regular_file::open_regular;

use super::{Answer, Context, Held, end};
use crate::{
    configuration, domain,
    failure::Failure,
    matrix::State,
    monitor::{self, More},
    policy::{Policy, Then},
    registry::{Description, Lock, Name, Place},
};

/// A guest that ends so soon after it was restarted is not restarted again: each that is preserved
/// costs its memory. Stories name a longer time than any host takes.
fn too_soon() -> Duration {
    domain::seconds("STRATOCTL_TOO_SOON", Duration::from_secs(10))
}

/// Most domains preserved from one name.
const MOST: u32 = 1000;
const EVENT_TIMEOUT: Duration = Duration::from_secs(30);
/// Time between two looks at a monitor that does not answer.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// Whether a domain of this policy needs the process.
pub fn needed(policy: &Policy) -> bool {
    [policy.on_poweroff, policy.on_reboot, policy.on_crash].contains(&Then::RenameRestart)
}

/// Start the process for the domain at `place`, whose monitor stands still; it listens when this
/// returns.
///
/// # Errors
/// When it does not start.
pub fn spawn(ctx: &Context, place: &Place) -> anyhow::Result<()> {
    let cannot = || format!("cannot start what restarts '{}'", place.name);
    let mut command = Command::new(std::env::current_exe().with_context(cannot)?);
    command.arg("watch").arg(place.name.as_str()).arg("--monitor").arg(&ctx.program);
    if let Some(root) = &ctx.root {
        command.arg("--root").arg(std::path::absolute(root).with_context(cannot)?);
    }
    command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().with_context(cannot)?;
    let mut word = [0; 1];
    let said = child.stdout.take().map(|mut out| out.read_exact(&mut word));
    match said {
        Some(Ok(())) => Ok(()),
        _ => {
            // It has ended, or does now that nobody listens to it.
            let _ = child.kill();
            let status = child.wait().with_context(cannot)?;
            Err(anyhow::anyhow!(status)).with_context(cannot)
        }
    }
}

/// The process: listens to the monitor of `name` until it hangs up.
///
/// # Errors
/// When the domain is not there, or cannot be restarted.
pub fn watch(ctx: &Context, name: &Name) -> anyhow::Result<Answer> {
    // Not a part of anybody's terminal. Fails in a session of its own, which is as good.
    let _ = rustix::process::setsid();
    let place = ctx.registry.find(name).context("there is no such domain")?;
    let mut kept = Kept::listen(&place)?;
    let mut out = io::stdout();
    out.write_all(b"\n").and_then(|()| out.flush())?;
    let mut restarted = false;
    while kept.has_halted(ctx)? {
        let Some(place) = ctx.placed(kept.id)? else { break };
        if restarted && kept.since.elapsed() < too_soon() {
            note(&place, "it has ended again too soon: it is preserved and not restarted");
            continue;
        }
        match ctx.rename_restart(&place, &mut kept) {
            Ok((as_what, new)) => {
                note(&as_what, &format!("restarted; this one is '{}' now", as_what.name));
                (kept, restarted) = (new, true);
            }
            Err(e) => {
                note(&place, &format!("cannot be restarted: {e:#}"));
                return Err(e);
            }
        }
    }
    Ok(Answer::silent())
}

/// A domain that is listened to.
struct Kept {
    /// Its number.
    id: u32,
    client: Client,
    description: Description,
    /// When it began to run.
    since: Instant,
    /// Why the machine went off, by the last event that said so.
    reason: String,
}

impl Kept {
    fn listen(place: &Place) -> anyhow::Result<Self> {
        let description = place.description()?;
        let id = place.id().context("it has not been started")?;
        let client = domain::qmp(place)?;
        Ok(Self { id, client, description, since: Instant::now(), reason: String::new() })
    }

    /// Wait until the guest has ended in a way that asks for a restart; false when the monitor has.
    fn has_halted(&mut self, ctx: &Context) -> anyhow::Result<bool> {
        loop {
            let event = match self.client.next_event(EVENT_TIMEOUT) {
                Ok(event) => event,
                Err(ClientError::Timeout { .. }) => continue,
                Err(ClientError::Closed { .. } | ClientError::Io(_)) => return Ok(false),
                Err(e) => return Err(e.into()),
            };
            match event.event.as_str() {
                "SHUTDOWN" => {
                    let reason = event.data.get("reason").and_then(Value::as_str);
                    reason.unwrap_or_default().clone_into(&mut self.reason);
                }
                "RESUME" => self.reason.clear(),
                "STOP" => {
                    let Some(status) = self.status(ctx)? else { return Ok(false) };
                    let policy = &self.description.policy;
                    let then = match (status, self.reason.as_str()) {
                        (RunState::GuestPanicked | RunState::InternalError, _) => policy.on_crash,
                        (RunState::Shutdown, "guest-shutdown") => policy.on_poweroff,
                        (RunState::Shutdown, "guest-reset") => policy.on_reboot,
                        _ => continue,
                    };
                    if then == Then::RenameRestart {
                        return Ok(true);
                    }
                }
                _ => {}
            }
        }
    }

    /// What the monitor says how it is; nothing if it has ended. One that is late is asked again by
    /// another connection: on this one its answer would be taken for an event.
    fn status(&mut self, ctx: &Context) -> anyhow::Result<Option<RunState>> {
        loop {
            match self.client.execute(&QueryStatus {}) {
                Ok(info) => return Ok(Some(info.status)),
                Err(ClientError::Timeout { .. }) => {}
                Err(_) => return Ok(None),
            }
            self.client = loop {
                let Some(place) = ctx.placed(self.id)? else { return Ok(None) };
                let seen = domain::look(&ctx.registry, &place);
                match (seen.client, seen.process) {
                    (Some(client), _) => break client,
                    (None, Some(process)) => drop(process.ends_within(POLL_INTERVAL)),
                    (None, None) => return Ok(None),
                }
            };
        }
    }
}

impl Context {
    /// Where the domain with that number is now: it may have been renamed.
    fn placed(&self, id: u32) -> anyhow::Result<Option<Place>> {
        let names = self.registry.names()?;
        let mut places = names.iter().filter_map(|name| self.registry.find(name));
        Ok(places.find(|place| place.id() == Some(id)))
    }

    /// Give the halted domain another name, and start one like it under its old name.
    fn rename_restart(&self, old: &Place, kept: &mut Kept) -> anyhow::Result<(Place, Kept)> {
        let name = &old.name;
        let _lock = self.registry.lock(name)?;
        let (there, seen) = self.look(name);
        let same = there.is_some_and(|place| place.id() == Some(kept.id));
        if !same || !matches!(seen.state, State::Off | State::Crashed) {
            anyhow::bail!("somebody else has acted on it: '{name}' is {} now", seen.state.word());
        }
        let fresh = make_way(self, old, &kept.description, &mut kept.client)?;
        let (place, description) = (&fresh.place, &fresh.description);
        let begun = monitor::start(
            &self.registry,
            &self.program,
            place,
            description,
            true,
            &More::default(),
        )
        .and_then(|_| {
            let mut kept = Kept::listen(place)?;
            kept.client.execute(&Cont {})?;
            Ok(kept)
        });
        match begun {
            Ok(kept) => Ok((fresh.kept, kept)),
            Err(e) => {
                note(&fresh.kept, &format!("cannot be restarted as '{name}': {e:#}"));
                // It may have started, and would keep the disks of one that nobody knows.
                let seen = domain::look(&self.registry, place);
                end(self, &mut Held { place: place.clone(), seen, lock: None })?;
                Err(e)
            }
        }
    }
}

/// A domain that has made way.
pub struct Fresh {
    /// Where the old one is.
    pub kept: Place,
    /// Where the new one is to be started.
    pub place: Place,
    /// What the new one is.
    pub description: Description,
    /// Nobody else has the name of the old one.
    _lock: Lock,
}

/// Give the halted domain at `place` another name, so that one like it can be started in its place.
/// The caller has its lock.
///
/// # Errors
/// When there is no other name left, or the disk cannot be written.
pub fn make_way(
    ctx: &Context,
    place: &Place,
    description: &Description,
    client: &mut Client,
) -> anyhow::Result<Fresh> {
    let (name, lock) = spare_name(ctx, &place.name)?;
    release(client, &description.config);
    let mut fresh = description.clone();
    let new = match place.managed {
        true => ctx.registry.set_aside(place, &name).map(|()| place.clone())?,
        false => {
            ctx.registry.rename(place, &name)?;
            fresh.uuid = configuration::uuid()?;
            ctx.registry.add(&place.name, false, &fresh)?
        }
    };
    let kept = ctx.registry.find(&name).context("what is kept has gone")?;
    Ok(Fresh { kept, place: new, description: fresh, _lock: lock })
}

/// A name that nobody has: `name-1`, or the next one.
fn spare_name(ctx: &Context, name: &Name) -> anyhow::Result<(Name, Lock)> {
    for number in 1..MOST {
        let tail = format!("-{number}");
        // A long name gives way.
        let head: String = name.as_str().chars().take(Name::MAX_BYTES - tail.len()).collect();
        let spare: Name = format!("{head}{tail}").parse()?;
        if let Some(lock) = ctx.registry.try_lock(&spare)
            && ctx.look(&spare).1.state == State::Absent
        {
            return Ok((spare, lock));
        }
    }
    let what = format!("there is no other name left for what is kept of '{name}'");
    Err(Failure::hint(what, "`stratoctl destroy NAME-1` and so on end what is kept").into())
}

/// Take from a halted machine what only one can have: disks, taps, the sockets of its consoles. Its
/// memory, registers and serial console stay to be looked at.
fn release(client: &mut Client, config: &Value) {
    let each = |section: &str, key: &str| -> Vec<String> {
        let items = config.get(section).and_then(Value::as_array).into_iter().flatten();
        items.filter_map(|item| item.get(key)?.as_str().map(str::to_owned)).collect()
    };
    for id in each("drive", "drive_id").into_iter().chain(each("net", "iface_id")) {
        // Gone already, perhaps; what is not free shows at the start of the new one.
        let _ = client.execute(&DeviceDel { id });
    }
    for socket in each("console", "socket_path") {
        let _ = fs::remove_file(PathBuf::from(socket));
    }
}

/// A line in the domain's log, where `dmesg` shows it.
fn note(place: &Place, text: &str) {
    let line = format!("stratoctl: {}\n", text.replace('\n', " "));
    let log = open_regular(&place.run.join("log"), OpenOptions::new().append(true));
    // A log that cannot be written cannot tell so either.
    let _ = log.and_then(|mut log| log.write_all(line.as_bytes()));
}
