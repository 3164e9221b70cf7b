//! Protecting a machine by a backup: the crate `replication` decides, and this carries it out.
//!
//! ```text
//!   primary                                        backup
//!   main thread       checkpoint thread            stream thread      incoming thread
//!   (protection)      (protector)                  (standby)          (arrival)
//!       | <--Harvest-- rounds of memory ---------> filled
//!       | --Changed-->
//!   [pause] <-Capture-- every period
//!       | --Captured-> pages, state, End --------> kept
//!       |              release <------------ Ack   applied
//!       |
//!      (dies)                                      suspects, asks --Machine-> builds it
//!                                                  is granted it  --Take----> disks, taps; runs
//! ```
//! The state machines live on the threads that have the connection, so that no wait for the guest
//! or for a file keeps back a sign of life.
pub mod beside;
mod blackhole;
mod copier;
mod disks;
pub mod entrance;
pub mod handed;
pub mod history;
pub mod host;
pub mod keeper;
pub mod offer;
mod outgoing;
pub mod outside;
pub mod process;
mod protection;
pub mod protector;
mod questions;
mod received;
mod rounds;
pub mod settings;
pub mod standby;
#[cfg(test)]
mod tests;
mod throttle;

use std::time::Duration;

pub(crate) use protection::{Bound, Replication};
pub use questions::{Query, changed, show};
pub use standby::{Promotion, ToStandby};

/// Most pieces that are read from a connection at a time, and how long pages are encoded or read:
/// timers and signs of life must not wait for a peer that never stops sending.
const READS: usize = 16;
const SLICE: Duration = Duration::from_millis(5);
