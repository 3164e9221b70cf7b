//! Opening KVM for an incoming machine: steps that take long and are the same for every machine are
//! done while its state is read.
use std::{
    io,
    thread::{Builder, JoinHandle},
};

use kvm_ioctls::{Kvm, VmFd};

use super::{KvmError, create_vm, open};
use crate::arch::CpuFeatures;

/// KVM, and a new, empty virtual machine.
pub(crate) struct Opened {
    pub kvm: Kvm,
    pub vm: VmFd,
    /// The CPU features that vCPUs can have on this host.
    pub supported: CpuFeatures,
}

/// A KVM being opened, by a thread that ends when it is done.
pub struct Opening(JoinHandle<Result<Opened, KvmError>>);

impl Opening {
    /// Start opening.
    ///
    /// # Errors
    /// When the host refuses the thread.
    pub fn begin() -> io::Result<Self> {
        let opened = || {
            let kvm = open()?;
            let (supported, vm) = (CpuFeatures::supported(&kvm)?, create_vm(&kvm)?);
            Ok(Opened { kvm, vm, supported })
        };
        Ok(Self(Builder::new().name("kvm".into()).stack_size(256 << 10).spawn(opened)?))
    }

    /// Wait for the result.
    pub(crate) fn finish(self) -> io::Result<Result<Opened, KvmError>> {
        self.0.join().map_err(|_| io::Error::other("its thread has panicked"))
    }
}
