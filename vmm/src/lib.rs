//! The life of one virtual machine.
pub mod cli;
