//! The harness: fetches guests, finds or emulates a host for them, starts the monitor, speaks QMP
//! to it, and inspects the guest.
pub mod agent;
pub mod archive;
/// The monitor's own time limits, so that the numbers are defined once.
#[path = "../../vmm/src/bounds.rs"]
pub mod bounds;
mod counted;
pub mod debian;
pub mod emulated;
pub mod frozen;
pub mod guest;
pub mod held;
pub mod host;
pub mod kernel;
pub mod lab;
pub mod loop_device;
pub mod monitor;
pub mod net;
mod output;
pub mod packages;
pub mod paths;
pub mod payloads;
pub mod progress;
pub mod replicated;
pub mod resident;
pub mod seed;
pub mod stream;
