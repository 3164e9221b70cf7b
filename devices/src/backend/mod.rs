//! What stands behind a device on the host's side.
pub mod char;
pub mod dirty_log;
pub mod disk;
pub(crate) mod holder;
pub mod inherited;
pub mod net;
pub mod release;
pub mod sparse;
pub mod writer;
