//! The implementation of each verb: lock the name, find the domain's state, check the matrix, act.
mod attach;
mod lifecycle;
mod list;
mod qmp;
mod remus;
mod restart_policy;
mod restore;
mod save;
mod shutdown;

use std::{path::PathBuf, time::Duration};

use ::qmp::schema::Quit;
use anyhow::Context as _;
use serde_json::{Value, json};

pub use list::WaitFor;

use crate::{
    domain::{self, Status},
    failure::Failure,
    matrix::{self, Leave, State, Verb},
    monitor, pages,
    registry::{Lock, Name, Place, Registry},
    remus::witness,
    verbs::{Command, Line},
};

/// How long a monitor that was asked to end may take before it is killed.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// Context of every verb.
pub struct Context {
    pub registry: Registry,
    /// The monitor's program.
    pub program: PathBuf,
    /// `--root`.
    pub root: Option<PathBuf>,
}

/// The result of a verb.
pub struct Answer {
    pub text: String,
    pub json: Value,
    /// Exit status.
    pub status: u8,
}

impl Answer {
    /// The result of a verb that has succeeded.
    pub fn new(text: impl Into<String>, json: Value) -> Self {
        Self { text: text.into(), json, status: 0 }
    }

    /// The result of a verb that has printed everything while it ran.
    pub fn silent() -> Self {
        Self::new("", Value::Null)
    }

    /// The domain is in `state` now.
    pub fn state(name: &Name, state: State) -> Self {
        Self::new("", json!({ "name": name, "state": state.word() }))
    }
}

/// Run the command line.
///
/// # Errors
/// Why it failed, as a message for the user.
pub fn run(line: Line) -> anyhow::Result<Answer> {
    let ctx = Context {
        registry: Registry::open(line.global.root.as_deref())?,
        program: monitor::program(line.global.monitor.as_deref()),
        root: line.global.root.clone(),
    };
    let as_json = line.global.json;
    match line.verb {
        Command::Create(args) => lifecycle::create(&ctx, &args),
        Command::New(args) => lifecycle::new(&ctx, &args),
        Command::Start(args) => lifecycle::start(&ctx, &args),
        Command::List(args) => list::list(&ctx, &args),
        Command::Info(args) => list::info(&ctx, &args),
        Command::Pause(args) => lifecycle::pause(&ctx, &args.domain),
        Command::Unpause(args) => lifecycle::unpause(&ctx, &args.domain),
        Command::Save(args) => save::save(&ctx, &args),
        Command::Restore(args) => restore::restore(&ctx, &args),
        Command::Suspend(args) => save::suspend(&ctx, &args.domain),
        Command::Resume(args) => restore::resume(&ctx, &args),
        Command::Destroy(args) => lifecycle::destroy(&ctx, &args),
        Command::Delete(args) => lifecycle::delete(&ctx, &args),
        Command::Rename(args) => lifecycle::rename(&ctx, &args),
        Command::Wait(args) => list::wait(&ctx, &args),
        Command::Check(args) => restore::check(&args.file),
        Command::Shutdown(args) => shutdown::shutdown(&ctx, &args),
        Command::Reboot(args) => shutdown::reboot(&ctx, &args),
        Command::Console(args) => attach::console(&ctx, &args.domain),
        Command::Dmesg(args) => attach::dmesg(&ctx, &args),
        Command::Events(args) => attach::events(&ctx, &args, as_json),
        Command::Qmp(args) => qmp::qmp(&ctx, &args),
        Command::Completions(args) => Ok(pages::completions(args.shell)),
        Command::Man(args) => pages::man(args.directory.as_deref()),
        Command::Watch(args) => restart_policy::watch(&ctx, &args.domain),
        Command::Migrate(args) => remus::migrate(&ctx, &args, as_json),
        Command::Remus(args) => remus::remus(&ctx, &args, as_json),
        Command::RemusReport(args) => remus::report(&ctx, &args),
        Command::RemusReceive(args) => remus::receive(&ctx, &args),
        Command::Failover(args) => remus::failover(&ctx, &args),
        Command::Unprotect(args) => remus::unprotect(&ctx, &args),
        Command::Fence(args) => remus::fence(&ctx, &args),
        Command::RemusAgent(args) => remus::agent(&ctx, &args.domain),
        Command::AskWitness(args) => {
            witness::answer_lines(&args.uri, args.identity)?;
            Ok(Answer::silent())
        }
    }
}

/// A domain that no other process acts on.
pub struct LockedDomain {
    pub place: Place,
    pub status: Status,
    /// Released early by verbs that take long.
    pub lock: Option<Lock>,
}

impl Context {
    /// The place and state of the domain called `name`.
    pub fn query(&self, name: &Name) -> (Option<Place>, Status) {
        match self.registry.find(name) {
            None => (None, Status::absent()),
            Some(place) => {
                let status = domain::query(&self.registry, &place);
                (Some(place), status)
            }
        }
    }

    /// Lock the domain called `name` for `verb`, which needs one.
    ///
    /// # Errors
    /// When `verb` may not act on it in its state.
    pub fn hold(&self, verb: Verb, name: &Name) -> anyhow::Result<LockedDomain> {
        self.hold_forced(verb, name, false)
    }

    /// The same, with `-F` if `force`.
    ///
    /// # Errors
    /// When `verb` may not act on it in its state.
    pub fn hold_forced(
        &self,
        verb: Verb,
        name: &Name,
        force: bool,
    ) -> anyhow::Result<LockedDomain> {
        // Without this, the directories of an empty registry would be created.
        if self.registry.find(name).is_none() {
            return Err(self.absent(verb, name));
        }
        let lock = Some(self.registry.lock(name)?);
        let (place, status) = self.query(name);
        if status.state == State::Absent {
            return Err(self.absent(verb, name));
        }
        let place = place.context("there is no such domain")?;
        let registered_only =
            matches!(verb, Verb::Start | Verb::Suspend | Verb::Resume | Verb::Delete);
        let renames = || place.description().is_ok_and(|d| d.policy.renames(status.state));
        let renames = verb == Verb::Start && renames();
        // A backup is never registered, and has better reasons.
        if registered_only && !place.managed && !renames && status.state != State::Standby {
            return Err(unmanaged(verb, name));
        }
        let states = (status.state, status.beside());
        matrix::admit_both(verb, states, name, Leave { renames, force })?;
        if status.client.is_some() {
            // A verb may be the one that ends a domain whose record is damaged.
            let _ = remus::revive(self, &place);
        }
        Ok(LockedDomain { place, status, lock })
    }

    /// Lock a name that is not in use.
    ///
    /// # Errors
    /// When it is in use.
    pub fn take(&self, verb: Verb, name: &Name) -> anyhow::Result<Lock> {
        let lock = self.registry.lock(name)?;
        matrix::admit(verb, self.query(name).1.state, name, Leave::default())?;
        Ok(lock)
    }

    fn absent(&self, verb: Verb, name: &Name) -> anyhow::Error {
        let Err(failure) = matrix::admit(verb, State::Absent, name, Leave::default()) else {
            return Failure::new(format!("there is no domain '{name}'")).into();
        };
        let names = self.registry.names().unwrap_or_default();
        let near = names
            .iter()
            .map(|known| (strsim::damerau_levenshtein(known.as_str(), name.as_str()), known))
            .filter(|(distance, known)| *distance <= 2 && distance * 3 <= known.as_str().len())
            .min();
        match near {
            Some((_, near)) => {
                Failure::hint(failure.to_string(), format!("did you mean '{near}'?")).into()
            }
            None => failure.into(),
        }
    }
}

fn unmanaged(verb: Verb, name: &Name) -> anyhow::Error {
    let hint = match verb {
        Verb::Suspend => {
            format!("`stratoctl save {name} FILE` saves it to a directory of your choice")
        }
        Verb::Delete => format!("`stratoctl destroy {name}` ends it, which also removes it"),
        _ => format!(
            "`create` or `restore` started it without registering it: `stratoctl info {name}`"
        ),
    };
    Failure::hint(format!("'{name}' is not a registered domain"), hint).into()
}

/// End the monitor, gracefully or not, and remove what it leaves. The domain is registered or gone
/// afterwards.
///
/// # Errors
/// When it cannot be ended.
pub fn end(ctx: &Context, held: &mut LockedDomain) -> anyhow::Result<()> {
    let asked = held.status.client.as_mut().is_some_and(|client| {
        client.set_timeout(domain::limit());
        client.execute(&Quit {}).is_ok()
    });
    if let Some(process) = &held.status.process
        && !(asked && process.ends_within(KILL_LIMIT))
    {
        process.kill().with_context(|| format!("cannot kill process {}", process.pid()))?;
        if !process.ends_within(KILL_LIMIT) {
            let pid = process.pid();
            anyhow::bail!(Failure::hint(
                format!("process {pid} was killed and has not ended"),
                format!("it is blocked in the kernel: `cat /proc/{pid}/stack` shows where"),
            ));
        }
    }
    ended(ctx, &held.place)
}

/// Remove what a monitor that has ended has left.
///
/// # Errors
/// When the disk cannot be written.
pub fn ended(ctx: &Context, place: &Place) -> anyhow::Result<()> {
    match place.managed {
        true => ctx.registry.clear(place).and_then(|()| ctx.registry.clear_store(place)),
        false => ctx.registry.forget(place),
    }
}
