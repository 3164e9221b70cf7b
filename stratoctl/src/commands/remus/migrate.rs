//! `migrate`: moves a domain: it is protected, handed over, and not protected any more.
use std::time::{Duration, Instant};

use anyhow::Context as _;
use qmp::schema::{QueryReplication, ReplicationSide};
use serde_json::json;

use super::{
    super::{Answer, Context},
    leave::{self, failover, unprotect},
    protect,
};
use crate::{
    domain,
    registry::Place,
    remus::protection::Protection,
    verbs::{Failover, Migrate, Unprotect},
};

/// How long the new owner may take to run the guest and to have that confirmed.
const LIMIT: Duration = Duration::from_secs(40);
/// Poll interval meanwhile.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

pub fn migrate(ctx: &Context, args: &Migrate, quiet: bool) -> anyhow::Result<Answer> {
    protect::protect(ctx, &args.protection(), true, quiet)?;
    let domain = args.domain.clone();
    let moved = failover(ctx, &Failover { domain: domain.clone(), planned: true, force: false });
    if let Err(e) = moved {
        // It is here still, or nobody knows; in the latter case this fails, too.
        let stays = unprotect(ctx, &Unprotect { domain, force: false });
        return Err(e.context(match stays {
            Ok(_) => "the domain stays here, as it was",
            Err(_) => "the domain is still protected",
        }));
    }
    Ok(Answer::new("", json!({ "name": domain, "host": args.host })))
}

/// The other side of it: when the guest runs in the domain at `place`, which was to move here, that
/// is a domain like any other. Whether it was to move here.
///
/// # Errors
/// It does not run here.
pub fn arrived(ctx: &Context, place: &Place) -> anyhow::Result<bool> {
    if !Protection::of(place)?.is_some_and(|protection| protection.moves) {
        return Ok(false);
    }
    let mut client = domain::qmp(place)?;
    let deadline = Instant::now() + LIMIT;
    loop {
        let info = client.execute(&QueryReplication {})?;
        let owner = info.role == Some(ReplicationSide::Primary);
        let left = match owner && info.waiting_for.is_none() {
            // It may have to be confirmed yet that the guest runs here.
            true => leave::stop(&mut client, &place.name, false, LIMIT),
            false => Err(anyhow::anyhow!("the guest of '{}' has not come here", place.name)),
        };
        match left {
            Ok(()) => break,
            Err(e) if Instant::now() >= deadline => return Err(e),
            Err(_) => std::thread::sleep(POLL_INTERVAL),
        }
    }
    Protection::forget(&ctx.registry, place).context("cannot remove the record")?;
    Ok(true)
}
