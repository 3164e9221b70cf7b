//! The parts of KVM that only this architecture has.
// UNSAFETY: some ioctls have no safe wrapper.
#![expect(unsafe_code, reason = "KVM ioctls, RDTSC")]
mod bursts;
pub mod chips;
pub mod clock;
pub mod cpu_model;
mod cpuid;
pub(crate) mod entry;
mod features;
pub mod saved;
pub mod state;
#[cfg(test)]
mod tests;
pub mod vcpu;
pub(crate) mod vm;
