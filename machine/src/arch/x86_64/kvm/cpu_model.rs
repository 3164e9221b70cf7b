//! The CPU features that a guest relies on: the leaves of CPUID.
use config::Topology;
use kvm_bindings::CpuId;
use kvm_ioctls::Kvm;
use state::cpu as saved;

use super::{
    cpuid,
    features::{self, Leaf},
};
use crate::kvm::KvmError;

/// CPU features that vCPUs can have, or are to have.
#[derive(Clone)]
pub struct CpuFeatures(CpuId);

impl CpuFeatures {
    /// The features of this host.
    ///
    /// # Errors
    /// When KVM does not report them.
    pub fn supported(kvm: &Kvm) -> Result<Self, KvmError> {
        cpuid::supported(kvm).map(Self)
    }

    /// The same for vCPU `id` of a machine with `topology`.
    pub fn of_vcpu(&self, kvm: &Kvm, id: u8, topology: &Topology) -> Self {
        Self(cpuid::for_vcpu(kvm, &self.0, id, topology))
    }

    /// The saved form.
    pub fn model(&self) -> CpuModel {
        CpuModel { leaves: features::leaves(&self.0) }
    }

    pub(super) fn as_kvm(&self) -> &CpuId {
        &self.0
    }
}

impl TryFrom<&CpuModel> for CpuFeatures {
    type Error = KvmError;

    /// Fails when there are more leaves than KVM takes.
    fn try_from(model: &CpuModel) -> Result<Self, KvmError> {
        features::cpuid(&model.leaves).map(Self)
    }
}

/// The CPU features that the guest relies on, as the boot vCPU reports them.
#[derive(Debug, Clone)]
pub struct CpuModel {
    leaves: Vec<Leaf>,
}

impl CpuModel {
    /// The first feature that a guest that has seen `seen` would miss on CPUs like this one, if
    /// any.
    pub fn lacks(&self, seen: &Self) -> Option<String> {
        features::missing(&self.leaves, &seen.leaves)
    }
}

impl From<CpuModel> for saved::Cpu {
    fn from(model: CpuModel) -> Self {
        Self { cpuid: model.leaves.into_iter().map(saved::Leaf::from).collect() }
    }
}

impl From<&saved::Cpu> for CpuModel {
    fn from(cpu: &saved::Cpu) -> Self {
        Self { leaves: cpu.cpuid.iter().copied().map(Leaf::from).collect() }
    }
}
