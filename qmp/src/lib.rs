//! The QEMU Machine Protocol, on the wire and as types. Knows nothing of virtual machines beyond
//! the names and arguments of commands and events.
//!
//! ```text
//!  bytes -> stream (one message) -> request (execute, arguments, id) -> table -> handler
//!                                                                                   |
//!  bytes <----------------------- server (one output queue a client) <-- reply, events
//! ```
//!
//! The server is driven by the caller's event loop: [`server::Server::ready`] takes an mio event,
//! [`server::Server::next_request`] returns one request, [`table::Table::dispatch`] runs it, and
//! [`server::Server::reply`] answers. Clients receive what the caller broadcasts before the reply
//! ahead of it.
#![forbid(unsafe_code)]

pub mod client;
mod decode;
mod error;
mod request;
pub mod schema;
pub mod server;
mod stream;
pub mod table;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use error::{Error, ErrorClass};
pub use request::Request;
