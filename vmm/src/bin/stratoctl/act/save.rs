//! Saving a domain: into a directory of the user's, or into its own store.
use std::{
    path::Path,
    sync::{Arc, atomic::AtomicBool, atomic::Ordering},
    time::Duration,
};

use anyhow::Context as _;
use qmp::{
    client::{Client, ClientError},
    schema::{Migrate, MigrateCancel, MigrationInfo, QueryMigrate, QueryStatus},
};
use serde_json::json;

use super::{Answer, Context, Held, end, life, store};
use crate::{
    domain,
    failure::Failure,
    matrix::{State, Verb},
    progress,
    registry::{self, Lock, Name, Saved},
    verbs::Save,
};

/// Longest save.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// What becomes of the domain afterwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum After {
    Ends,
    Paused,
    GoesOn,
}

pub fn save(ctx: &Context, args: &Save) -> anyhow::Result<Answer> {
    let held = ctx.hold(Verb::Save, &args.domain)?;
    let directory = store::directory(&args.file)?;
    let after = match (args.go_on, args.paused) {
        (true, _) => After::GoesOn,
        (_, true) => After::Paused,
        _ => After::Ends,
    };
    let saved = Saved { name: args.domain.clone(), domain: life::described(&held.place)? };
    let beside = directory.join(store::BESIDE);
    write_out(ctx, held, &directory, after, |ctx| {
        registry::write(ctx.registry.disk(), &beside, &saved)
            .with_context(|| format!("cannot write {}", beside.display()))
    })
}

pub fn suspend(ctx: &Context, name: &Name) -> anyhow::Result<Answer> {
    let held = ctx.hold(Verb::Suspend, name)?;
    let directory = held.place.saved();
    store::text(&directory)?;
    write_out(ctx, held, &directory, After::Ends, |_| Ok(()))
}

/// Save the domain into `directory`, then do `also`, then what `after` says. If anything fails the
/// domain is what it was.
fn write_out(
    ctx: &Context,
    mut held: Held,
    directory: &Path,
    after: After,
    also: impl FnOnce(&Context) -> anyhow::Result<()>,
) -> anyhow::Result<Answer> {
    let name = held.place.name.clone();
    let uuid = life::described(&held.place)?.uuid;
    let was = held.seen.state;
    let ran = was == State::Running;
    let Some(saving) = ctx.registry.lock_save(&name)? else {
        crate::matrix::admit(Verb::Save, State::Saving, &name, false)?;
        anyhow::bail!("'{name}' is being saved");
    };
    // It takes long. Whoever wants the domain meanwhile sees that it is being saved.
    held.lock = None;
    let client = held.seen.client.take().context("the monitor does not answer")?;
    let written =
        migrate(&held, client, directory, after == After::GoesOn && ran).and_then(|info| {
            also(ctx)?;
            Ok(info)
        });
    let info = match written {
        Ok(info) => info,
        Err(e) => {
            // A save that succeeded and could not be made use of has left it paused.
            if ran && let Ok(client) = domain::qmp(&held.place) {
                held.seen.client = Some(client);
                let _ = life::let_run(ctx, &mut held);
            }
            return Err(e);
        }
    };
    let state = finish(ctx, name.clone(), &uuid, saving, after, was)?;
    let stats = info.ram.unwrap_or_default();
    Ok(Answer::new(
        "",
        json!({
            "name": name,
            "state": state.word(),
            "directory": directory,
            "bytes": stats.transferred,
            "milliseconds": info.total_time,
            "downtime": info.downtime,
        }),
    ))
}

/// What becomes of a domain that has been saved.
fn finish(
    ctx: &Context,
    name: Name,
    uuid: &str,
    saving: Lock,
    after: After,
    was: State,
) -> anyhow::Result<State> {
    match (after, was) {
        (After::Paused, State::Running) => return Ok(State::Paused),
        (After::Paused | After::GoesOn, _) => return Ok(was),
        (After::Ends, _) => {}
    }
    let lock = Some(ctx.registry.lock(&name)?);
    // Somebody may have ended it meanwhile, and even begun another one of the same name.
    let place = ctx.registry.find(&name);
    let Some(place) = place.filter(|place| place.description().is_ok_and(|d| d.uuid == uuid))
    else {
        return Ok(State::Absent);
    };
    let mut seen = domain::look(&ctx.registry, &place);
    if let Some(client) = &mut seen.client
        && client.execute(&QueryStatus {})?.running
    {
        if place.is_saved() {
            ctx.registry.spend(&place)?;
            ctx.registry.clear_store(&place)?;
        }
        let what =
            format!("'{name}' was saved, but somebody has let it run on, so it is not ended");
        return Err(Failure::new(what).into());
    }
    drop(saving);
    let mut held = Held { place, seen, lock };
    end(ctx, &mut held)?;
    Ok(match (held.place.managed, held.place.is_saved()) {
        (true, true) => State::Suspended,
        (true, false) => State::Registered,
        (false, _) => State::Absent,
    })
}

/// Let the monitor save, show how far it is, and call it off at an interrupt.
fn migrate(
    held: &Held,
    mut client: Client,
    directory: &Path,
    resume: bool,
) -> anyhow::Result<MigrationInfo> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted))
            .context("cannot listen for an interrupt")?;
    }
    let mut watcher = domain::qmp(&held.place)?;
    let uri = format!("file:{}", store::text(directory)?);
    let command = Migrate { uri, resume: Some(resume), incremental: None, track: None };
    client.set_patience(LONGEST);
    let bar = progress::bar(&format!("Saving {}", held.place.name));
    let mut cancelled = false;
    let look = || {
        if interrupted.load(Ordering::Relaxed) && !cancelled {
            cancelled = watcher.execute(&MigrateCancel {}).is_ok();
        }
        if let Ok(info) = watcher.execute(&QueryMigrate {}) {
            let ram = info.ram.unwrap_or_default();
            bar.set_length(ram.total);
            bar.set_position(ram.total.saturating_sub(ram.remaining));
        }
    };
    let done = progress::during(move || client.execute(&command), look);
    bar.finish_and_clear();
    let name = &held.place.name;
    match done? {
        Ok(_) => Ok(watcher.execute(&QueryMigrate {})?),
        Err(ClientError::Refused { .. }) if interrupted.load(Ordering::Relaxed) => {
            Err(Failure::new(format!("interrupted: '{name}' is not saved and goes on")).into())
        }
        Err(ClientError::Refused { error, .. }) => {
            Err(Failure::new(format!("'{name}' is not saved and goes on: {error}")).into())
        }
        Err(e) => {
            let e = anyhow::Error::from(e);
            Err(e.context(format!(
                "'{name}' is not saved: its monitor has ended or does not answer"
            )))
        }
    }
}
