//! A domain that is stopped, or let run again, while it is protected: the backup learns of that with
//! the next checkpoint.
use std::{
    thread,
    time::{Duration, Instant},
};

use qmp::{
    client::{Client, ClientError},
    schema::{QueryReplication, ReplicationStatus},
};

/// How long a checkpoint may take. A backup that is slower is waited for by nobody.
const LIMIT: Duration = Duration::from_secs(5);
/// Poll interval meanwhile.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Wait until the backup of a protected domain, if it has one, knows what has just been done to it:
/// before that, a failover would undo it. Whether it does.
///
/// # Errors
/// The monitor does not answer.
pub fn is_known_to_backup(client: &mut Client) -> Result<bool, ClientError> {
    use ReplicationStatus::{Arming, Protected, Stalled};
    let mut info = client.execute(&QueryReplication {})?;
    let (since, term, deadline) = (info.epoch, info.term, Instant::now() + LIMIT);
    loop {
        let has_backup = matches!(info.state, Arming | Protected | Stalled) && info.term == term;
        if !has_backup || info.acked > since {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        thread::sleep(POLL_INTERVAL);
        info = client.execute(&QueryReplication {})?;
    }
}
