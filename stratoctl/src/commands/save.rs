//! Saving a domain: into a directory that the user names, or into its own store.
use std::{
    fs,
    path::Path,
    sync::{Arc, atomic::AtomicBool, atomic::Ordering},
    time::Duration,
};

use anyhow::Context as _;
use qmp::{
    client::{Client, ClientError},
    schema::{Migrate, MigrateCancel, MigrationInfo, MigrationStats, QueryMigrate, QueryStatus},
};
use serde_json::json;

use super::{Answer, Context, LockedDomain, end, lifecycle, restore};
use crate::{
    domain::{self, Status},
    failure::Failure,
    matrix::{self, Leave, State, Verb},
    process::Process,
    progress,
    registry::{self, Lock, Name, Saved},
    verbs::Save,
};

/// Limit on the duration of a save.
const SAVE_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

/// What happens to the domain afterwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum After {
    Ends,
    Paused,
    GoesOn,
}

pub fn save(ctx: &Context, args: &Save) -> anyhow::Result<Answer> {
    let held = ctx.hold(Verb::Save, &args.domain)?;
    let directory = restore::directory(&args.file)?;
    fit_for_a_save(&directory)?;
    let after = match (args.keep_running, args.paused) {
        (true, _) => After::GoesOn,
        (_, true) => After::Paused,
        _ => After::Ends,
    };
    let saved = Saved { name: args.domain.clone(), domain: lifecycle::described(&held.place)? };
    let own = ctx.registry.own_disks(&saved.domain.uuid);
    if after == After::Ends && !args.disks && !own.is_empty() {
        let what =
            format!("the disks of '{}' were made for it and are removed when it ends", args.domain);
        let hint = "--disks saves them, too; with -c or --paused the domain does not end";
        return Err(Failure::hint(what, hint).into());
    }
    let beside = directory.join(restore::RECORD_FILE);
    write_out(ctx, held, &directory, after, args.disks, |ctx| {
        registry::write(ctx.registry.disk(), &beside, &saved)
            .with_context(|| format!("cannot write {}", beside.display()))
    })
}

/// Check that `directory` does not exist, is empty, or holds an earlier save.
fn fit_for_a_save(directory: &Path) -> anyhow::Result<()> {
    // The monitor refuses what is no directory or cannot be read.
    let Ok(entries) = fs::read_dir(directory) else { return Ok(()) };
    let names: Vec<_> =
        entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    let own = ["state", "memory", "disk-", restore::RECORD_FILE];
    let of_a_save = |name: &str| own.iter().any(|own| name.starts_with(own));
    let is_save = names.iter().any(|name| name == "state");
    match names.iter().find(|name| !of_a_save(name)) {
        Some(other) if !is_save => {
            let what = format!("{} contains other files, such as '{other}'", directory.display());
            let hint =
                "a save needs a directory of its own: name a new one, or one with an earlier save";
            Err(Failure::hint(what, hint).into())
        }
        _ => Ok(()),
    }
}

pub fn suspend(ctx: &Context, name: &Name) -> anyhow::Result<Answer> {
    let held = ctx.hold(Verb::Suspend, name)?;
    let directory = held.place.saved();
    restore::text(&directory)?;
    write_out(ctx, held, &directory, After::Ends, false, |_| Ok(()))
}

/// Save the domain into `directory`, with its disks if `disks`, then do `also`, then what `after`
/// says. If anything fails, the domain is unchanged.
fn write_out(
    ctx: &Context,
    mut held: LockedDomain,
    directory: &Path,
    after: After,
    disks: bool,
    also: impl FnOnce(&Context) -> anyhow::Result<()>,
) -> anyhow::Result<Answer> {
    let name = held.place.name.clone();
    let uuid = lifecycle::described(&held.place)?.uuid;
    let ran = held.status.state == State::Running;
    let Some(saving) = ctx.registry.lock_save(&name)? else {
        matrix::admit(Verb::Save, State::Saving, &name, Leave::default())?;
        anyhow::bail!("'{name}' is being saved");
    };
    // This takes long. Other verbs see meanwhile that the domain is being saved.
    held.lock = None;
    let client = held.status.client.take().context("the monitor does not answer")?;
    let command = Migrate {
        uri: format!("file:{}", restore::text(directory)?),
        resume: Some(after == After::GoesOn && ran),
        disks: Some(disks),
        ..Migrate::default()
    };
    let written = migrate(&held, client, command).and_then(|info| {
        also(ctx)?;
        Ok(info)
    });
    let info = match written {
        Ok(info) => info,
        Err(e) => {
            // The save has succeeded and left the domain paused, but a later step has failed.
            if ran
                && let Ok(Ok(mut now)) = again(ctx, &held, &uuid, saving)
                && now.status.client.is_some()
            {
                let _ = lifecycle::let_run(ctx, &mut now);
            }
            return Err(e);
        }
    };
    let state = finish(ctx, &held, &uuid, saving, after)?;
    let written = |stats: Option<MigrationStats>| stats.map_or(0, |stats| stats.transferred);
    Ok(Answer::new(
        "",
        json!({
            "name": name,
            "state": state.word(),
            "directory": directory,
            "bytes": written(info.ram) + written(info.disk),
            "milliseconds": info.total_time,
            "downtime": info.downtime,
        }),
    ))
}

/// Do what is to happen to the domain after the save.
fn finish(
    ctx: &Context,
    held: &LockedDomain,
    uuid: &str,
    saving: Lock,
    after: After,
) -> anyhow::Result<State> {
    match (after, held.status.state) {
        (After::Paused, State::Running) => return Ok(State::Paused),
        (After::Paused | After::GoesOn, was) => return Ok(was),
        (After::Ends, _) => {}
    }
    let mut now = match again(ctx, held, uuid, saving)? {
        Ok(now) => now,
        Err(state) => return Ok(state),
    };
    if let Some(client) = &mut now.status.client
        && client.execute(&QueryStatus {})?.running
    {
        let place = &now.place;
        if place.is_saved() {
            ctx.registry.invalidate(place)?;
            ctx.registry.clear_store(place)?;
        }
        let what = format!(
            "'{}' was saved, but it has been resumed meanwhile, so it is not ended",
            place.name
        );
        return Err(Failure::new(what).into());
    }
    end(ctx, &mut now)?;
    Ok(match (now.place.managed, now.place.is_saved()) {
        (true, true) => State::Suspended,
        (true, false) => State::Registered,
        (false, _) => State::Absent,
    })
}

/// Lock the saved domain again. It may have ended meanwhile, and another one of the same name may
/// have started, which is left alone: its state is returned then.
fn again(
    ctx: &Context,
    held: &LockedDomain,
    uuid: &str,
    saving: Lock,
) -> anyhow::Result<Result<LockedDomain, State>> {
    let name = &held.place.name;
    let lock = Some(ctx.registry.lock(name)?);
    // Under the lock, no other process can begin to act on it.
    drop(saving);
    let place = ctx.registry.find(name);
    let Some(place) = place.filter(|place| place.description().is_ok_and(|d| d.uuid == uuid))
    else {
        return Ok(Err(State::Absent));
    };
    let status = domain::query(&ctx.registry, &place);
    let pid = |status: &Status| status.process.as_ref().map(Process::pid);
    let ended = held.status.process.as_ref().is_some_and(|old| old.ends_within(Duration::ZERO));
    Ok(match pid(&status) {
        Some(_) if ended || pid(&status) != pid(&held.status) => Err(status.state),
        _ => Ok(LockedDomain { place, status, lock }),
    })
}

/// Let the monitor save, show its progress, and cancel it at an interrupt.
fn migrate(
    held: &LockedDomain,
    mut client: Client,
    command: Migrate,
) -> anyhow::Result<MigrationInfo> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted))
            .context("cannot listen for an interrupt")?;
    }
    let mut watcher = domain::qmp(&held.place)?;
    client.set_timeout(SAVE_TIMEOUT);
    let bar = progress::bar(&format!("Saving {}", held.place.name));
    let mut cancelled = false;
    let poll = || {
        if interrupted.load(Ordering::Relaxed) && !cancelled {
            cancelled = watcher.execute(&MigrateCancel {}).is_ok();
        }
        if let Ok(info) = watcher.execute(&QueryMigrate {}) {
            let parts = || info.ram.iter().chain(&info.disk);
            let total = parts().map(|part| part.total).sum::<u64>();
            bar.set_length(total);
            bar.set_position(total.saturating_sub(parts().map(|part| part.remaining).sum()));
        }
    };
    let done = progress::during(move || client.execute(&command), poll);
    bar.finish_and_clear();
    let name = &held.place.name;
    match done? {
        Ok(_) => Ok(watcher.execute(&QueryMigrate {})?),
        Err(ClientError::Refused { .. }) if interrupted.load(Ordering::Relaxed) => {
            Err(Failure::new(format!("interrupted: '{name}' was not saved and continues")).into())
        }
        Err(ClientError::Refused { error, .. }) => {
            Err(Failure::new(format!("'{name}' was not saved and continues: {error}")).into())
        }
        Err(e) => {
            let e = anyhow::Error::from(e);
            Err(e.context(format!(
                "'{name}' was not saved: its monitor has ended or does not answer"
            )))
        }
    }
}
