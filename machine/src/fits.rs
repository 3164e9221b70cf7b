//! Whether this host can run a machine that is offered to it, as far as that can be checked before
//! its memory and state arrive, and without taking anything from the running machine.
use config::{Description, MachineConfig, Tap as TapConfig, topology};
use devices::backend::net::tap::Tap;
use kvm_ioctls::Kvm;
use state::cpu::Cpu;

use crate::{
    BuildError,
    arch::{CpuFeatures, CpuModel},
    kvm,
};

/// Check that this host's CPU has every feature that `cpu` promises to the guest of `description`.
///
/// # Errors
/// [`BuildError::Cpu`] with the first feature missing; when KVM does not report its features.
pub fn check_cpu(description: &Description, cpu: &Cpu) -> Result<(), BuildError> {
    let kvm = kvm::open()?;
    let supported = CpuFeatures::supported(&kvm)?;
    check_model(&kvm, &supported, &description.config, &CpuModel::from(cpu))
}

/// Check that the named taps of `description` exist and suit their NICs. Another machine may have
/// them.
///
/// # Errors
/// [`BuildError::Tap`] for the first one that does not.
pub fn check_taps(description: &Description) -> Result<(), BuildError> {
    for nic in description.occupied.nics.iter().flatten() {
        if let TapConfig::Name(name) = &nic.tap {
            Tap::look(name.as_str(), nic.queue_pairs.get().into())
                .map_err(|source| BuildError::Tap { id: nic.id.to_string(), source })?;
        }
    }
    Ok(())
}

/// Check that vCPUs of `config` have all features that the guest has seen, on a host with
/// `supported`.
pub(crate) fn check_model(
    kvm: &Kvm,
    supported: &CpuFeatures,
    config: &MachineConfig,
    seen: &CpuModel,
) -> Result<(), BuildError> {
    let ids = topology::cpu_ids(&config.topology, config.cpus)?;
    let first = ids.first().copied().unwrap_or(0);
    match supported.of_vcpu(kvm, first, &config.topology).model().lacks(seen) {
        Some(why) => Err(BuildError::Cpu(why)),
        None => Ok(()),
    }
}
