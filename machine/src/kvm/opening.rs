//! Opening KVM for an incoming machine: steps that take long and are the same for every machine are
//! done while its state is read.
use std::io;

use kvm_ioctls::{Kvm, VmFd};

use super::{KvmError, create_vm, open};
use crate::{
    arch::CpuFeatures,
    helpers::{Helpers, Pending},
};

/// KVM, and a new, empty virtual machine.
pub(crate) struct Opened {
    pub kvm: Kvm,
    pub vm: VmFd,
    /// The CPU features that vCPUs can have on this host.
    pub supported: CpuFeatures,
}

/// A KVM being opened, by another thread.
pub struct Opening(Pending<Result<Opened, KvmError>>);

impl Opening {
    /// Have one of `helpers` open it.
    pub fn begin(helpers: &Helpers) -> Self {
        Self(helpers.run(|| {
            let kvm = open()?;
            let (supported, vm) = (CpuFeatures::supported(&kvm)?, create_vm(&kvm)?);
            Ok(Opened { kvm, vm, supported })
        }))
    }

    /// Wait for the result.
    pub(crate) fn finish(self) -> io::Result<Result<Opened, KvmError>> {
        self.0.wait()
    }
}
