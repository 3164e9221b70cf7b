//! `fence`: ends a side of a protected domain for good, on request of the other side.
use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use replication::Side;
use serde_json::json;

use super::super::{Answer, Context};
use crate::{
    domain,
    failure::Failure,
    process::Found,
    registry::Place,
    remus::{
        fence::{Fenced, KILL_LIMIT, Mark, Marks, REFUSED, UNSURE, yield_to},
        protection::{Protection, lock_marks, marks},
    },
    verbs::Fence,
};

/// Poll interval while another command acts on the domain.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

pub fn fence(ctx: &Context, args: &Fence) -> anyhow::Result<Answer> {
    // Anything that goes wrong is doubt, and not the refusal of a side that continues.
    let (status, text) = match try_fence(ctx, args) {
        Ok(Fenced::Down) => (0, String::new()),
        Ok(Fenced::Refused(why)) => (REFUSED, why),
        Err(e) => (UNSURE, format!("{e:#}")),
    };
    if status != 0 {
        eprintln!("stratoctl: {text}");
    }
    let json = json!({ "lineage": args.lineage, "term": args.term, "down": status == 0 });
    Ok(Answer { status, ..Answer::new("", json) })
}

fn try_fence(ctx: &Context, args: &Fence) -> anyhow::Result<Fenced> {
    let (place, side) = target(ctx, args)?;
    let lock = lock_marks(&place).context("cannot lock the mark")?;
    let noted = yield_to(&marks(&ctx.registry, &place), side, args.lineage, args.term)?;
    drop(lock);
    if noted != Fenced::Down {
        return Ok(noted);
    }
    // A start that is under way has not seen the mark, perhaps. It holds the name's lock.
    let deadline = Instant::now() + KILL_LIMIT;
    loop {
        let lock = ctx.registry.try_lock(&place.name);
        kill(&place, deadline)?;
        if lock.is_some() {
            return Ok(Fenced::Down);
        }
        anyhow::ensure!(Instant::now() < deadline, "another command acts on '{}'", place.name);
        thread::sleep(POLL_INTERVAL);
    }
}

/// Kill the domain's monitor, if there is one.
fn kill(place: &Place, deadline: Instant) -> anyhow::Result<()> {
    if let Found::Alive(process) = domain::found(place) {
        let pid = process.pid();
        process.kill().with_context(|| format!("cannot kill process {pid}"))?;
        anyhow::ensure!(
            process.ends_within(deadline.saturating_duration_since(Instant::now())),
            "process {pid} was killed and has not ended within {KILL_LIMIT:?}"
        );
    }
    Ok(())
}

/// The side that is meant.
fn target(ctx: &Context, args: &Fence) -> anyhow::Result<(Place, Side)> {
    let mut found = Vec::new();
    for name in ctx.registry.names()? {
        let Some(place) = ctx.registry.find(&name) else { continue };
        let Some(protection) = Protection::of(&place)? else { continue };
        let meant = args.side.is_none_or(|side| side == protection.side);
        if meant && protection.lineage == args.lineage {
            found.push((place, protection.side));
        }
    }
    match (found.pop(), found.is_empty()) {
        (Some((place, side)), true) => Ok((place, side.into())),
        // It may run elsewhere: nothing is known.
        (None, _) => Err(Failure::new("no protected domain here has this lineage").into()),
        (Some(_), false) => Err(Failure::hint(
            "both sides of this lineage are on this host",
            "name one: --side primary or --side backup",
        )
        .into()),
    }
}

/// Refuse to start a domain that was fenced: the other side has the guest.
///
/// # Errors
/// It was fenced, or the mark cannot be read.
pub fn refuse_fenced(ctx: &Context, place: &Place) -> anyhow::Result<()> {
    match marks(&ctx.registry, place).read()? {
        Some(stored) if stored.mark == Mark::Fenced => {
            let what = format!(
                "'{}' was fenced in term {}: the other side continues the guest",
                place.name, stored.term
            );
            let hint = format!(
                "if the other side certainly does not run, `stratoctl unprotect -F {}` forgets that",
                place.name
            );
            Err(Failure::hint(what, hint).into())
        }
        _ => Ok(()),
    }
}

/// Forget what was noted about fences.
///
/// # Errors
/// The disk cannot be written.
pub fn forget(ctx: &Context, place: &Place) -> anyhow::Result<()> {
    let _lock = lock_marks(place).context("cannot lock the mark")?;
    marks(&ctx.registry, place).forget()?;
    Ok(())
}
