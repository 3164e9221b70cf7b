//! KVM, opened for a machine that is still on its way in: what takes long and is the same for every
//! machine is done while that is read.
use std::{
    io,
    thread::{Builder, JoinHandle},
};

use kvm_ioctls::{Kvm, VmFd};

use super::{KvmError, create_vm, open};
use crate::arch::CpuFeatures;

/// KVM, and a virtual machine that has nothing yet.
pub(crate) struct Opened {
    pub kvm: Kvm,
    pub vm: VmFd,
    /// What vCPUs can show on this host.
    pub supported: CpuFeatures,
}

/// It is being opened, by a thread that ends when it is.
pub struct Opening(JoinHandle<Result<Opened, KvmError>>);

impl Opening {
    /// Begin.
    ///
    /// # Errors
    /// When the host has no thread to give.
    pub fn begin() -> io::Result<Self> {
        let opened = || {
            let kvm = open()?;
            let (supported, vm) = (CpuFeatures::supported(&kvm)?, create_vm(&kvm)?);
            Ok(Opened { kvm, vm, supported })
        };
        Ok(Self(Builder::new().name("kvm".into()).stack_size(256 << 10).spawn(opened)?))
    }

    /// Wait for it.
    pub(crate) fn finish(self) -> io::Result<Result<Opened, KvmError>> {
        self.0.join().map_err(|_| io::Error::other("it has panicked"))
    }
}
