//! Tools for working on the project: `cargo demo`, `cargo compare`, `cargo remus-soak` and the
//! project's own lints (`cargo check-house`). Their programs are in `bin/`.
#[cfg(feature = "harness")]
pub mod bench;
pub mod lints;
#[cfg(feature = "harness")]
pub mod protected;
#[cfg(feature = "harness")]
pub mod soak;
