//! Starting, stopping and ending domains.
use std::time::Duration;

use anyhow::Context as _;
use qmp::schema::{Cont, Stop};
use serde_json::json;

use super::{Answer, Context, LockedDomain, attach, end, ended, remus, restart_policy, shutdown};
use crate::{
    configuration, domain,
    failure::Failure,
    matrix::{Leave, State, Verb},
    monitor::{self, More},
    registry::{Description, Lock, Name, Place},
    verbs::{Begin, Create, Delete, Destroy, New, Rename, Start},
};

/// How long the protection of a domain that is destroyed may take to end.
const UNPROTECT_LIMIT: Duration = Duration::from_secs(5);

pub fn create(ctx: &Context, args: &Create) -> anyhow::Result<Answer> {
    let (name, description) = configuration::read(&args.described)?;
    if args.dry_run {
        configuration::check_files(&description.config)?;
        let text = format!("'{name}' could be started");
        return Ok(Answer::new(text, json!({ "name": name, "valid": true })));
    }
    let lock = ctx.take(Verb::Create, &name)?;
    let place = ctx.registry.add(&name, false, &description)?;
    if let Err(e) = remus::permit(ctx, &place, &description, false) {
        ctx.registry.forget(&place).context("after a failed start")?;
        return Err(e);
    }
    begin(ctx, &place, &description, &args.begin, &More::default(), Some(lock))
}

pub fn new(ctx: &Context, args: &New) -> anyhow::Result<Answer> {
    let (name, description) = configuration::read(&args.described)?;
    let _lock = ctx.take(Verb::New, &name)?;
    ctx.registry.add(&name, true, &description)?;
    Ok(Answer::state(&name, State::Registered))
}

pub fn start(ctx: &Context, args: &Start) -> anyhow::Result<Answer> {
    let mut held = ctx.hold(Verb::Start, &args.domain)?;
    remus::refuse_fenced(ctx, &held.place)?;
    let description = described(&held.place)?;
    let is_first = held.status.client.is_none();
    if is_first {
        remus::leave_behind(ctx, Verb::Start, &held.place)?;
    }
    remus::permit(ctx, &held.place, &description, args.force)?;
    if is_first {
        return begin(ctx, &held.place, &description, &args.begin, &More::default(), held.lock);
    }
    // `rename-restart`: its monitor is kept, under another name.
    let fresh = restart_policy::make_way(ctx, &held.place, &description, held.status.client()?)?;
    let kept = fresh.kept.name.clone();
    let description = &fresh.description;
    let mut answer =
        begin(ctx, &fresh.place, description, &args.begin, &More::default(), held.lock)?;
    answer.text = format!("the previous '{}' is preserved as '{kept}'", args.domain);
    if let Some(members) = answer.json.as_object_mut() {
        members.insert("kept".into(), json!(kept));
    }
    Ok(answer)
}

/// The domain's description.
///
/// # Errors
/// When its record is damaged; the error says what to do about it.
pub fn described(place: &Place) -> anyhow::Result<Description> {
    place.description().map_err(|e| {
        let hint = match place.managed {
            true => format!(
                "repair the file, or `stratoctl delete -f {}` and register the domain again",
                place.name
            ),
            false => {
                format!("`stratoctl destroy {}` ends it, which also removes it", place.name)
            }
        };
        let what = anyhow::Error::from(e);
        Failure::hint(format!("{what:#}"), hint).into()
    })
}

/// Start a monitor for the domain at `place`, whose lock the caller holds.
///
/// # Errors
/// The monitor's error; an unmanaged domain is then removed.
pub fn begin(
    ctx: &Context,
    place: &Place,
    description: &Description,
    how: &Begin,
    more: &More,
    lock: Option<Lock>,
) -> anyhow::Result<Answer> {
    // The guest must not run before its events are watched.
    let watched = restart_policy::needed(&description.policy);
    let paused = how.paused || watched;
    let started = monitor::start(&ctx.registry, &ctx.program, place, description, paused, more);
    let id = match started {
        Ok(id) => id,
        Err(e) => {
            if !place.managed {
                ctx.registry.forget(place).context("after a failed start")?;
            }
            return Err(e);
        }
    };
    // Its disks may say that it was protected: then its monitor asks before the guest runs.
    let _ = remus::revive(ctx, place);
    if watched {
        let let_run = || {
            let mut status = domain::query(&ctx.registry, place);
            // A state saved when the guest had ended cannot run on.
            let ended = matches!(status.state, State::Off | State::Crashed);
            if !how.paused && !ended {
                status.client()?.execute(&Cont {})?;
            }
            Ok(())
        };
        if let Err(e) = restart_policy::spawn(ctx, place).and_then(|()| let_run()) {
            let status = domain::query(&ctx.registry, place);
            end(ctx, &mut LockedDomain { place: place.clone(), status, lock: None })?;
            return Err(e);
        }
    }
    let restored = more.words.iter().any(|word| word == "-incoming");
    begun(ctx, place, how, id, lock, restored)
}

/// The answer for a domain that has just started; with `-c`, after its console was left. The guest
/// of a domain that was restored gets its clock set.
///
/// # Errors
/// When its console cannot be attached to.
pub fn begun(
    ctx: &Context,
    place: &Place,
    how: &Begin,
    id: u32,
    lock: Option<Lock>,
    restored: bool,
) -> anyhow::Result<Answer> {
    // An attached console does not keep other verbs from acting on the domain.
    drop(lock);
    let mut status = domain::query(&ctx.registry, place);
    let state = match (status.state, how.paused) {
        (ended @ (State::Off | State::Crashed), _) => ended,
        (_, true) => State::Paused,
        (_, false) => State::Running,
    };
    let json = json!({ "name": place.name, "id": id, "state": state.word() });
    let mut answer = Answer::new("", json);
    if restored
        && state == State::Running
        && let Ok(client) = status.client()
    {
        shutdown::set_clock(client, place, &mut answer);
    }
    drop(status);
    match how.console {
        true => {
            if !answer.text.is_empty() {
                eprintln!("{}", answer.text);
            }
            attach::attach(ctx, place, state)
        }
        false => Ok(answer),
    }
}

pub fn pause(ctx: &Context, name: &Name) -> anyhow::Result<Answer> {
    let mut held = ctx.hold(Verb::Pause, name)?;
    let client = held.status.client()?;
    client.execute(&Stop {})?;
    if !remus::is_known_to_backup(client)? {
        eprintln!(
            "stratoctl: the backup of '{name}' does not know it yet: after a failover it runs"
        );
    }
    Ok(Answer::state(name, State::Paused))
}

pub fn unpause(ctx: &Context, name: &Name) -> anyhow::Result<Answer> {
    let mut held = ctx.hold(Verb::Unpause, name)?;
    let_run(ctx, &mut held)?;
    Ok(Answer::state(name, State::Running))
}

/// Let the guest run. A suspended state that it was restored from must no longer count by then: its
/// memory would not match what the guest writes to its disks.
///
/// # Errors
/// When it does not run; its suspended state counts again then.
pub fn let_run(ctx: &Context, held: &mut LockedDomain) -> anyhow::Result<()> {
    let saved = held.place.managed && held.place.is_saved();
    if saved {
        ctx.registry.invalidate(&held.place)?;
    }
    if let Err(e) = held.status.client()?.execute(&Cont {}) {
        // Unless it does run and only the answer was lost.
        if saved && matches!(e, qmp::client::ClientError::Refused { .. }) {
            ctx.registry.revalidate(&held.place)?;
        }
        return Err(e.into());
    }
    if saved { ctx.registry.discard_invalid(&held.place) } else { Ok(()) }
}

pub fn destroy(ctx: &Context, args: &Destroy) -> anyhow::Result<Answer> {
    let name = &args.domain;
    let mut held = ctx.hold_forced(Verb::Destroy, name, args.force)?;
    let (was, beside) = (held.status.state, held.status.beside());
    let left = match held.status.client.as_mut() {
        Some(client) => {
            client.set_timeout(domain::limit());
            remus::before_the_end(ctx, &held.place, client, UNPROTECT_LIMIT)
        }
        None => Ok(()),
    };
    end(ctx, &mut held)?;
    if held.place.managed && held.place.is_saved() {
        ctx.registry.invalidate(&held.place)?;
        ctx.registry.clear_store(&held.place)?;
    }
    let state = if held.place.managed { State::Registered } else { State::Absent };
    let mut answer = Answer::state(name, state);
    answer.text = match (was, beside, left) {
        (_, Some(_), Err(why)) => {
            format!("'{name}' has ended, but its backup may continue the guest: {why:#}")
        }
        (_, Some(State::Protected), Ok(())) => {
            format!("the protection of '{name}' has ended with it, and so has its backup")
        }
        (State::Standby, ..) => {
            format!("the backup '{name}' has ended: its primary is not protected any more")
        }
        _ => String::new(),
    };
    Ok(answer)
}

pub fn delete(ctx: &Context, args: &Delete) -> anyhow::Result<Answer> {
    let name = &args.domain;
    let held = match (ctx.hold(Verb::Delete, name), args.force) {
        (Ok(held), _) => held,
        (Err(_), true) => ctx.hold_suspended(name)?,
        (Err(e), false) => return Err(e),
    };
    ended(ctx, &held.place)?;
    ctx.registry.forget(&held.place)?;
    Ok(Answer::state(name, State::Absent))
}

impl Context {
    /// For `delete -f`: a state that `resume` could use can also be discarded.
    fn hold_suspended(&self, name: &Name) -> anyhow::Result<LockedDomain> {
        match self.hold(Verb::Resume, name) {
            Ok(held) => Ok(held),
            // The reason why it cannot be deleted is of more use.
            Err(_) => self.hold(Verb::Delete, name),
        }
    }
}

pub fn rename(ctx: &Context, args: &Rename) -> anyhow::Result<Answer> {
    let (old, new) = (&args.domain, &args.new);
    if ctx.registry.find(old).is_none() {
        // For its more specific errors.
        ctx.hold(Verb::Rename, old)?;
    }
    let _locks = ctx.registry.lock_both(old, new)?;
    let (place, status) = ctx.query(old);
    let states = (status.state, status.beside());
    crate::matrix::admit_both(Verb::Rename, states, old, Leave::default())?;
    if old != new {
        crate::matrix::admit(Verb::New, ctx.query(new).1.state, new, Leave::default())?;
        ctx.registry.rename(&place.context("there is no such domain")?, new)?;
    }
    Ok(Answer::new("", json!({ "name": new, "was": old, "state": status.state.word() })))
}
