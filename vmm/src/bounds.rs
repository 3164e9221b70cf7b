//! Upper bounds on waiting for the monitor, whatever a guest, disk, file, peer or client does
//! meanwhile.
use std::time::Duration;

/// `query-status` and all other queries are answered within this.
pub const QUESTION: Duration = Duration::from_millis(100);
/// `stop`, `quit` and the start of a save are answered within this, if need be with an error that
/// names what is busy.
pub const COMMAND: Duration = Duration::from_secs(1);
/// This long after a signal that ends the process, it has ended, or only its process id is left.
pub const SIGNAL: Duration = Duration::from_secs(5);

/// How long a command waits for the machine to come to rest, or for a kernel that is being read
/// without progress, before it is refused. Shorter than [`COMMAND`], so that the refusal keeps that
/// bound.
pub const REST: Duration = Duration::from_millis(900);
/// The same where the guest has ended or reset itself, and cannot run on.
pub const GUEST_REST: Duration = Duration::from_secs(5);
/// How long the shutdown still waits for what hangs, after it has waited for as long as a command
/// may.
pub const LAST_LOOK: Duration = Duration::from_millis(100);
/// How long the end of a replicated machine waits until its backup is known not to continue the
/// guest. With the rest of the shutdown, shorter than [`SIGNAL`].
pub const PARTING: Duration = Duration::from_millis(2500);
/// How often an operation is retried meanwhile, after a first try that waits for what is about to
/// happen.
pub const RETRY: Duration = Duration::from_millis(2);
/// How long the guest's writes to a disk may wait, without any progress, for a save that copies it;
/// the save is given up after that.
pub const DISK_COPY: Duration = Duration::from_secs(2);

/// How long a command waits for the thread for files while that is busy with another command's file.
pub const FILE: Duration = Duration::from_secs(1);
/// How long a query waits for what only a file system knows; after that it is answered without.
pub const FILE_QUESTION: Duration = Duration::from_millis(80);
