//! The harness: gets guests, finds or emulates a host they run on, starts the monitor, speaks QMP to
//! it, looks inside the guest.
pub mod agent;
pub mod archive;
pub mod bench;
pub mod debian;
pub mod frozen;
pub mod guest;
pub mod held;
pub mod host;
pub mod house;
pub mod kernel;
pub mod loop_device;
pub mod monitor;
pub mod net;
mod output;
pub mod paths;
pub mod progress;
pub mod stream;
