//! How long anybody waits for the monitor, whatever a guest, disk, file, peer or client does meanwhile.
use std::time::Duration;

/// `query-status` and every other question are answered within this.
pub const QUESTION: Duration = Duration::from_millis(100);
/// `stop`, `quit` and a save's beginning are answered within this, if need be by what is busy.
pub const COMMAND: Duration = Duration::from_secs(1);
/// The process has ended, or is only a process id, this long after a signal that ends it.
pub const SIGNAL: Duration = Duration::from_secs(5);

/// How long the guest's writes to a disk may wait for a save that copies it, without any progress. Then the
/// save is given up.
pub const DISK_COPY: Duration = Duration::from_secs(2);

/// How long a command waits for the thread that opens files, while that one is busy with another
/// command's file.
pub const FILE: Duration = Duration::from_secs(1);
/// How long a question waits for what only a file system can tell, before it is answered without.
pub const FILE_QUESTION: Duration = Duration::from_millis(80);
