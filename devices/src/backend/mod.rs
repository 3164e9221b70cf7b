//! Back-ends: the host's side of devices.
pub mod char;
pub mod dirty_log;
pub mod disk;
pub mod gate;
#[cfg(test)]
#[path = "gate/tests.rs"]
mod gate_tests;
pub(crate) mod holder;
pub mod inherited;
pub mod net;
pub mod release;
pub mod sparse;
pub mod writer;
