//! `rename-restart`: a process for each domain whose policy needs it, and for no other. It listens
//! to the monitor; when the guest ends, it gives the domain another name and starts a new one under
//! the old name. It ends with the domain. If the process is killed, the domain is preserved.
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

use super::{Answer, Context, LockedDomain, end};
use crate::{
    configuration, domain,
    failure::Failure,
    matrix::State,
    monitor::{self, More},
    policy::{Policy, Then},
    registry::{Description, Lock, Name, Place},
};

/// A guest that ends sooner than this after a restart is not restarted again: each preserved domain
/// keeps its memory. Tests set a longer time than any host takes.
fn too_soon() -> Duration {
    domain::seconds("STRATOCTL_TOO_SOON", Duration::from_secs(10))
}

/// Most preserved domains for one name.
const MAX_PRESERVED: u32 = 1000;
const EVENT_TIMEOUT: Duration = Duration::from_secs(30);
/// Poll interval for a monitor that does not answer.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// Whether a domain with this policy needs the process.
pub fn needed(policy: &Policy) -> bool {
    [policy.on_poweroff, policy.on_reboot, policy.on_crash].contains(&Then::RenameRestart)
}

/// Start the process for the domain at `place`, whose guest does not run yet; it is listening when
/// this returns.
///
/// # Errors
/// When it does not start.
pub fn spawn(ctx: &Context, place: &Place) -> anyhow::Result<()> {
    let cannot = || format!("cannot start what restarts '{}'", place.name);
    start_verb(ctx, "watch", place).with_context(cannot)
}

/// Start this program in the background, with a verb that writes a byte to its standard output when
/// it is ready.
///
/// # Errors
/// When it ends before.
pub fn start_verb(ctx: &Context, verb: &str, place: &Place) -> anyhow::Result<()> {
    let cannot = || format!("stratoctl {verb}");
    let mut command = Command::new(std::env::current_exe().with_context(cannot)?);
    command.arg(verb).arg(place.name.as_str()).arg("--monitor").arg(&ctx.program);
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
            // It has ended, or does now that its output is not read.
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
    // Detach from the terminal. This fails if the process leads a session already, which serves as
    // well.
    let _ = rustix::process::setsid();
    let place = ctx.registry.find(name).context("there is no such domain")?;
    let mut kept = Kept::listen(&place)?;
    let mut out = io::stdout();
    out.write_all(b"\n").and_then(|()| out.flush())?;
    let mut restarted = false;
    while kept.has_halted(ctx)? {
        let Some(place) = ctx.place_of(kept.id)? else { break };
        if restarted && kept.since.elapsed() < too_soon() {
            log(&place, "the guest has ended again too soon: it is preserved and not restarted");
            continue;
        }
        match ctx.rename_restart(&place, &mut kept) {
            Ok((as_what, new)) => {
                log(&as_what, &format!("restarted; this instance is now '{}'", as_what.name));
                (kept, restarted) = (new, true);
            }
            Err(e) => {
                log(&place, &format!("cannot be restarted: {e:#}"));
                return Err(e);
            }
        }
    }
    Ok(Answer::silent())
}

/// A domain whose monitor is listened to.
struct Kept {
    /// Its number.
    id: u32,
    client: Client,
    description: Description,
    /// When the guest began to run.
    since: Instant,
    /// Why the guest ended, as of the last event that said so.
    reason: String,
}

impl Kept {
    fn listen(place: &Place) -> anyhow::Result<Self> {
        let description = place.description()?;
        let id = place.id().context("it has not been started")?;
        let client = domain::qmp(place)?;
        Ok(Self { id, client, description, since: Instant::now(), reason: String::new() })
    }

    /// Wait until the guest has ended in a way that needs a restart; false if the monitor has
    /// ended.
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

    /// The state that the monitor reports; `None` if it has ended. If the answer is late, the query
    /// is repeated over another connection: on this one the answer would be taken for an event.
    fn status(&mut self, ctx: &Context) -> anyhow::Result<Option<RunState>> {
        loop {
            match self.client.execute(&QueryStatus {}) {
                Ok(info) => return Ok(Some(info.status)),
                Err(ClientError::Timeout { .. }) => {}
                Err(_) => return Ok(None),
            }
            self.client = loop {
                let Some(place) = ctx.place_of(self.id)? else { return Ok(None) };
                let status = domain::query(&ctx.registry, &place);
                match (status.client, status.process) {
                    (Some(client), _) => break client,
                    (None, Some(process)) => drop(process.ends_within(POLL_INTERVAL)),
                    (None, None) => return Ok(None),
                }
            };
        }
    }
}

impl Context {
    /// The place of the domain with that number: it may have been renamed.
    pub fn place_of(&self, id: u32) -> anyhow::Result<Option<Place>> {
        let names = self.registry.names()?;
        let mut places = names.iter().filter_map(|name| self.registry.find(name));
        Ok(places.find(|place| place.id() == Some(id)))
    }

    /// Rename the halted domain, and start one like it under its old name.
    fn rename_restart(&self, old: &Place, kept: &mut Kept) -> anyhow::Result<(Place, Kept)> {
        let name = &old.name;
        let _lock = self.registry.lock(name)?;
        let (there, status) = self.query(name);
        let same = there.is_some_and(|place| place.id() == Some(kept.id));
        if !same || !matches!(status.state, State::Off | State::Crashed) {
            anyhow::bail!(
                "another command has changed it: '{name}' is now {}",
                status.state.word()
            );
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
                log(&fresh.kept, &format!("cannot be restarted as '{name}': {e:#}"));
                // The new one may have started, and would hold disks without being registered.
                let status = domain::query(&self.registry, place);
                end(self, &mut LockedDomain { place: place.clone(), status, lock: None })?;
                Err(e)
            }
        }
    }
}

/// A domain that was renamed so that a new one can have its name.
pub struct Fresh {
    /// Place of the old one.
    pub kept: Place,
    /// Place where the new one is to be started.
    pub place: Place,
    /// Description of the new one.
    pub description: Description,
    /// Lock on the old domain's new name.
    _lock: Lock,
}

/// Rename the halted domain at `place`, so that one like it can be started in its place. The caller
/// holds its lock.
///
/// # Errors
/// When no other name is left, or the disk cannot be written.
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
    let kept = ctx.registry.find(&name).context("the preserved domain no longer exists")?;
    Ok(Fresh { kept, place: new, description: fresh, _lock: lock })
}

/// A name that is not in use: `name-1`, or the next number.
fn spare_name(ctx: &Context, name: &Name) -> anyhow::Result<(Name, Lock)> {
    for number in 1..MAX_PRESERVED {
        let tail = format!("-{number}");
        // A long name is shortened.
        let head: String = name.as_str().chars().take(Name::MAX_BYTES - tail.len()).collect();
        let spare: Name = format!("{head}{tail}").parse()?;
        if let Some(lock) = ctx.registry.try_lock(&spare)
            && ctx.query(&spare).1.state == State::Absent
        {
            return Ok((spare, lock));
        }
    }
    let what = format!("no name is left to preserve '{name}' under");
    Err(Failure::hint(what, "`stratoctl destroy NAME-1` and so on end preserved domains").into())
}

/// Detach from a halted machine what only one machine can hold: disks, taps, the sockets of its
/// consoles. Its memory, registers and serial console stay for inspection.
fn release(client: &mut Client, config: &Value) {
    let each = |section: &str, key: &str| -> Vec<String> {
        let items = config.get(section).and_then(Value::as_array).into_iter().flatten();
        items.filter_map(|item| item.get(key)?.as_str().map(str::to_owned)).collect()
    };
    for id in each("drive", "drive_id").into_iter().chain(each("net", "iface_id")) {
        // It may be gone already; what is still in use is reported when the new one starts.
        let _ = client.execute(&DeviceDel { id });
    }
    for socket in each("console", "socket_path") {
        let _ = fs::remove_file(PathBuf::from(socket));
    }
}

/// Write a line to the domain's log, where `dmesg` shows it.
pub fn log(place: &Place, text: &str) {
    let line = format!("stratoctl: {}\n", text.replace('\n', " "));
    let log = open_regular(&place.run.join("log"), OpenOptions::new().append(true));
    // A failure to write the log cannot be logged.
    let _ = log.and_then(|mut log| log.write_all(line.as_bytes()));
}
