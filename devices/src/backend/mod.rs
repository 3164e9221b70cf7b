//! What stands behind a device on the host's side.
pub mod char;
pub mod disk;
pub mod file;
pub(crate) mod holder;
pub mod inherited;
pub mod net;
pub mod release;
pub mod sparse;
pub mod writer;
