//! What `replication-start` and `-incoming replicate:` set.
use std::{ops::RangeInclusive, time::Duration};

use config::incoming::Arbiter as Given;
use machine::memory::staging;
use qmp::{
    Error,
    schema::{OnBackupLoss, OnBackupSlow, ReplicationBlackhole, ReplicationStart},
};
use replication::{Agreement, Arbiter, Digest, OnLoss, Settings, contents};

use super::{
    protector::Manner,
    questions::{leaves, on_loss},
};
use crate::durations::milliseconds;

/// In place of the machine: a backup compares that itself, with the offer.
const RUNS_HERE: Digest = Digest(1);
const PERIOD: Duration = Duration::from_millis(200);
/// Most bytes of output that are held: what a gate has room for.
pub const MOST_HELD: u64 = 64 << 20;
/// Most bytes of memory that are copied aside.
const MOST_STAGED: u64 = 1 << 40;
/// As little as both may be.
const LEAST_ROOM: u64 = 1 << 20;
/// Milliseconds from one epoch to the next.
const PERIODS: RangeInclusive<u64> = 1..=60_000;
const TIMEOUT: Duration = Duration::from_secs(1);
/// Between two signs of life.
const LEAST_HEARTBEAT: Duration = Duration::from_millis(1);
/// As many have to be lost before a side is suspected.
const MOST_BEATS: u32 = 3;
const ACK_LIMIT: Duration = Duration::from_secs(10);

fn named(name: &str) -> Digest {
    contents::chain(Digest::default(), [crc32fast::hash(name.as_bytes())])
}

/// What both sides have to agree on.
pub fn agreement(arbiter: &Given, runs_here: bool) -> Agreement {
    let arbiter = match arbiter {
        Given::Witness(identity) => Arbiter::Witness(named(identity)),
        Given::Fence(kind) => Arbiter::Fence(named(kind)),
        Given::None => Arbiter::None,
    };
    // An offer that cannot run here is refused by the protocol as something not agreed on.
    let machine = if runs_here { RUNS_HERE } else { Digest(0) };
    Agreement { arbiter, machine }
}

/// The settings of a primary, and who decides.
///
/// # Errors
/// Which of them are not possible.
pub fn of_primary(start: &ReplicationStart) -> Result<(Settings, Given), Error> {
    let arbiter = match (&start.witness, &start.fence) {
        (Some(_), Some(_)) => {
            return Err(Error::text(
                "Parameter 'fence' is not allowed beside 'witness': the witness decides",
            ));
        }
        (Some(witness), None) => Given::Witness(witness.clone()),
        (None, Some(fence)) => Given::Fence(fence.clone()),
        (None, None) => Given::None,
    };
    let agreement = agreement(&arbiter, true);
    let on_loss = match (start.on_backup_loss, agreement.arbiter) {
        (Some(wanted), _) => on_loss(wanted),
        (None, Arbiter::None) => OnLoss::Stall,
        (None, _) => on_loss(OnBackupLoss::Witness),
    };
    let leave_slow = leaves(start.on_backup_slow.unwrap_or(OnBackupSlow::Solo));
    let settings = Settings {
        agreement,
        timeout: start.heartbeat_timeout.map_or(TIMEOUT, Duration::from_millis),
        period: start.interval.map_or(PERIOD, Duration::from_millis),
        ack_limit: start.ack_limit.map_or(ACK_LIMIT, Duration::from_millis),
        on_loss,
        leave_slow,
    };
    settings.check().map_err(|e| Error::generic(&e))?;
    Ok((settings, arbiter))
}

/// How a machine is protected.
///
/// # Errors
/// All that is unsafe and was not declared to be.
pub fn manner(start: &ReplicationStart) -> Result<Manner, Error> {
    let manner = Manner {
        compress: start.compression != Some(false),
        // Where nothing is captured, nothing would be released.
        hold: start.network != Some(false)
            && start.blackhole != Some(ReplicationBlackhole::Harvest),
        blackhole: start.blackhole,
        disks: start.disks != Some(false),
        heartbeat: start.heartbeat_interval.map(Duration::from_millis),
        longest: start.max_period.map(Duration::from_millis),
        strict: start.timer == Some(true),
        max_staging: start.max_staging.unwrap_or(staging::MAX_BYTES),
        max_held: start.max_held.unwrap_or(MOST_HELD),
    };
    for (name, value, most) in
        [("max-staging", manner.max_staging, MOST_STAGED), ("max-held", manner.max_held, MOST_HELD)]
    {
        if !(LEAST_ROOM..=most).contains(&value) {
            return Err(Error::text(format!(
                "Invalid parameter '{name}': {value}: must be {LEAST_ROOM} to {most} bytes"
            )));
        }
    }
    let timeout = start.heartbeat_timeout.map_or(TIMEOUT, Duration::from_millis);
    if let Some(heartbeat) = manner.heartbeat
        && !(LEAST_HEARTBEAT..=timeout / MOST_BEATS).contains(&heartbeat)
    {
        return Err(Error::text(format!(
            "Invalid parameter 'heartbeat-interval': {}: must be 1 to {} milliseconds, a third of \
             heartbeat-timeout",
            milliseconds(heartbeat),
            milliseconds(timeout / MOST_BEATS)
        )));
    }
    if let (Some(_), Some(_)) = (start.interval, start.max_period) {
        return Err(Error::text(
            "Parameter 'max-period' is not allowed beside 'interval': the one adapts what the other \
             fixes",
        ));
    }
    for (name, value) in [("interval", start.interval), ("max-period", start.max_period)] {
        if value.is_some_and(|ms| !PERIODS.contains(&ms)) {
            return Err(Error::text(format!(
                "Invalid parameter '{name}': must be {} to {} milliseconds",
                PERIODS.start(),
                PERIODS.end()
            )));
        }
    }
    let reasons: Vec<_> = [
        (manner.blackhole.is_some(), "'blackhole': there is no backup that could continue"),
        (
            !manner.hold && manner.blackhole.is_none(),
            "'network': output that is not held is seen before the backup could continue from it",
        ),
        (
            !manner.disks,
            "'disks': the backup does not get what the guest writes; where both hosts have the same \
             images, the guest finds there what it has written after its last checkpoint",
        ),
    ]
    .into_iter()
    .filter_map(|(is_so, reason)| is_so.then_some(reason))
    .collect();
    if reasons.is_empty() || start.r#unsafe == Some(true) {
        return Ok(manner);
    }
    Err(Error::text(format!(
        "this does not protect the machine; 'unsafe' accepts that: {}",
        reasons.join("; ")
    )))
}

/// How often a backup sends signs of life, which an offer asks for.
pub fn heartbeat(wanted: Option<Duration>, timeout: Duration) -> Option<Duration> {
    let most = (timeout / MOST_BEATS).max(LEAST_HEARTBEAT);
    wanted.map(|wanted| wanted.clamp(LEAST_HEARTBEAT, most))
}

/// The settings of a backup, which waits for a peer as long as the offer says.
pub fn of_backup(arbiter: &Given, timeout: Duration, runs_here: bool) -> Settings {
    Settings {
        agreement: agreement(arbiter, runs_here),
        timeout: timeout.max(Duration::from_millis(10)),
        period: PERIOD,
        ack_limit: ACK_LIMIT,
        on_loss: OnLoss::Stall,
        leave_slow: false,
    }
}
