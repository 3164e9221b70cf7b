//! The hardware: KVM, memory, vCPU and I/O threads, interrupts, boot; configuration to machine.
pub mod boot;
pub mod config;
pub mod layout;
