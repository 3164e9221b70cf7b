//! x86-64.
pub mod boot;
pub mod kvm;
pub mod layout;
pub(crate) mod legacy;
