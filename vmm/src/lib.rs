//! The life cycle of one virtual machine: which commands may run when, and how they are carried
//! out.
#![forbid(unsafe_code)]
pub mod announce;
mod arch;
pub mod arriving;
mod balloon;
pub mod bare;
pub mod bounds;
pub mod checkpoint;
mod commands;
pub mod daemon;
mod deferred;
mod durations;
pub mod ending;
pub mod event_loop;
pub mod explain;
pub mod files;
pub mod last_words;
pub mod lifecycle;
pub mod logging;
pub mod pidfile;
pub mod replication;
mod saving;
pub mod seccomp;
pub mod signals;
pub mod spawner;
pub mod terminal;
pub mod threads;
pub mod vmm;
pub mod wake;
