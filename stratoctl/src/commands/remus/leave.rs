//! `unprotect` and `failover`: the ends of a protection.
use std::time::{Duration, Instant};

use anyhow::Context as _;
use qmp::{
    client::{Client, ClientError},
    schema::{
        QueryReplication, ReplicationFailover, ReplicationSide, ReplicationStatus, ReplicationStop,
    },
};
use serde_json::json;

use super::{
    super::{Answer, Context, KILL_LIMIT, ended},
    agent::revive,
    alone::leave_behind,
    fence, follow, receive,
};
use crate::{
    failure::Failure,
    matrix::Verb,
    registry::{Name, Place},
    remus::{dial::Dial, protection::Protection},
    verbs::{Failover, Unprotect},
};

/// How long the witness, the fence and the other side may take.
const LIMIT: Duration = Duration::from_secs(40);

pub fn unprotect(ctx: &Context, args: &Unprotect) -> anyhow::Result<Answer> {
    let name = &args.domain;
    let mut held = ctx.hold_forced(Verb::Unprotect, name, args.force)?;
    match held.status.client.as_mut() {
        Some(client) => stop(client, name, args.force, LIMIT)?,
        None if args.force => {}
        None => leave_behind(ctx, Verb::Unprotect, &held.place)?,
    }
    forget(ctx, &held.place)?;
    if args.force {
        fence::forget(ctx, &held.place)?;
    }
    Ok(Answer::new("", json!({ "name": name, "protected": false })))
}

/// End the protection of a domain that is to be ended: otherwise its backup would continue it. If
/// that takes longer than `limit`, it may.
///
/// # Errors
/// Why it may continue it.
pub fn before_the_end(
    ctx: &Context,
    place: &Place,
    client: &mut Client,
    limit: Duration,
) -> anyhow::Result<()> {
    if is_backup(client)? {
        return Ok(());
    }
    stop(client, &place.name, false, limit)?;
    forget(ctx, place)
}

/// Stop the replication of a primary, and wait for that: it needs its process to ask the witness.
///
/// # Errors
/// The term could not be closed.
pub fn stop(client: &mut Client, name: &Name, force: bool, limit: Duration) -> anyhow::Result<()> {
    let off = |client: &mut Client| {
        client.execute(&QueryReplication {}).map(|info| info.state == ReplicationStatus::Off)
    };
    if off(client)? {
        return Ok(());
    }
    client.execute(&ReplicationStop { force: force.then_some(true) })?;
    let still = |why: &str| {
        let hint = match force {
            true => format!("`stratoctl info {name}` shows what it waits for"),
            false => format!(
                "`stratoctl unprotect -F {name}` does not wait, although the backup may continue \
                 the guest, too"
            ),
        };
        Failure::hint(format!("'{name}' is still protected: {why}"), hint)
    };
    let deadline = Instant::now() + limit;
    while !off(client)? {
        if let Some(why) = follow::next(client)?.as_ref().and_then(follow::Change::failure) {
            return Err(still(why).into());
        }
        if Instant::now() >= deadline {
            return Err(still(&format!("that has not ended within {limit:?}")).into());
        }
    }
    Ok(())
}

/// Forget a protection that has ended, and end a backup beside the domain.
fn forget(ctx: &Context, place: &Place) -> anyhow::Result<()> {
    let record = Protection::of(place).ok().flatten();
    // The domain's process ends when it sees that.
    Protection::forget(&ctx.registry, place).context("cannot remove the record")?;
    match record {
        Some(Protection { dial: Some(Dial::Unix(_)), lineage, .. }) => {
            receive::undo(ctx, place, lineage)
        }
        _ => Ok(()),
    }
}

/// Whether the monitor is a backup, and does not run the guest itself.
pub fn is_backup(client: &mut Client) -> Result<bool, ClientError> {
    let info = client.execute(&QueryReplication {})?;
    Ok(info.role == Some(ReplicationSide::Backup))
}

pub fn failover(ctx: &Context, args: &Failover) -> anyhow::Result<Answer> {
    let name = &args.domain;
    let mut held = ctx.hold(Verb::Failover, name)?;
    revive(ctx, &held.place)?;
    let client = held.status.client()?;
    let backup = is_backup(client)?;
    if backup && args.planned {
        let what = format!("--planned: '{name}' is the backup, and only its primary can move");
        let hint = format!("`stratoctl failover {name}` continues the guest here, from its copy");
        return Err(Failure::hint(what, hint).into());
    }
    client.execute(&ReplicationFailover { force: args.force.then_some(true) })?;
    moved(client, name, backup)?;
    if !backup {
        // Its monitor has ended, as the guest runs elsewhere.
        if held.status.process.as_ref().is_none_or(|process| process.ends_within(KILL_LIMIT)) {
            ended(ctx, &held.place)?;
        }
        if held.place.managed
            && let Some(protection) = Protection::of(&held.place)?
        {
            let moved = Protection { moved: true, ..protection };
            moved.record(&ctx.registry, &held.place).context("cannot record that it has moved")?;
        }
    }
    let runs = if backup { "here" } else { "at the backup" };
    Ok(Answer::new("", json!({ "name": name, "runs": runs })))
}

/// Wait until the guest runs at the other side.
fn moved(client: &mut Client, name: &Name, backup: bool) -> anyhow::Result<()> {
    let deadline = Instant::now() + LIMIT;
    let failed = |why: &str| {
        let hint = format!("`stratoctl info {name}` shows its state");
        Failure::hint(format!("the guest of '{name}' has not moved: {why}"), hint)
    };
    let mut last = String::new();
    loop {
        let turn = is_backup(client).and_then(|now| Ok((now, follow::next(client)?)));
        let (is_backup, change) = match turn {
            Err(ClientError::Closed { .. } | ClientError::Io(_)) if !backup => return Ok(()),
            Err(ClientError::Closed { .. } | ClientError::Io(_)) => {
                return Err(failed(&format!("the backup has ended: {last}")).into());
            }
            other => other?,
        };
        if backup && !is_backup {
            return Ok(());
        }
        if let Some(change) = change {
            if let Some(why) = change.failure() {
                return Err(failed(why).into());
            }
            last = change.reason;
        }
        if Instant::now() >= deadline {
            return Err(failed(&format!("not within {LIMIT:?}; {last}")).into());
        }
    }
}
