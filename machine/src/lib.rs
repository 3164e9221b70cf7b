//! The hardware: KVM, memory, vCPU and I/O threads, interrupts, boot; configuration to machine.
pub mod boot;
pub mod config;
pub mod io_thread;
pub mod kvm;
pub mod layout;
pub mod memory;
pub mod vcpu;
