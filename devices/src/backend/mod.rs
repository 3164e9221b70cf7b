//! What stands behind a device on the host's side.
pub mod char;
pub mod net;
