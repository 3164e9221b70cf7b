//! What `replication-start` and `-incoming replicate:` set.
use std::time::Duration;

use config::incoming::Arbiter as Given;
use qmp::{
    Error,
    schema::{OnBackupLoss, OnBackupSlow, ReplicationStart},
};
use replication::{Agreement, Arbiter, Digest, OnLoss, Settings, contents};

use super::questions::{leaves, on_loss};

/// In place of the machine: a backup compares that itself, with the offer.
const RUNS_HERE: Digest = Digest(1);
const PERIOD: Duration = Duration::from_millis(200);
const TIMEOUT: Duration = Duration::from_secs(1);
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
