//! What stands behind a device on the host's side.
pub mod char;
pub mod disk;
pub mod file;
pub mod inherited;
pub mod net;
pub mod release;
pub mod writer;
