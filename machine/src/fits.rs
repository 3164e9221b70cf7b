//! Whether a machine that is offered to this host can run here, as far as that can be told before
//! its memory and its state are there, and without taking anything from the machine that it is.
use config::{Description, MachineConfig, Tap as TapConfig, topology};
use devices::backend::net::tap::Tap;
use kvm_ioctls::Kvm;
use state::cpu::Cpu;

use crate::{
    BuildError,
    arch::{CpuFeatures, CpuModel},
    kvm,
};

/// Whether this host's CPU has what `cpu` promises to the guest of `description`.
///
/// # Errors
/// [`BuildError::Cpu`] with the first thing missing; when KVM does not tell.
pub fn check_cpu(description: &Description, cpu: &Cpu) -> Result<(), BuildError> {
    let kvm = kvm::open()?;
    let supported = CpuFeatures::supported(&kvm)?;
    check_model(&kvm, &supported, &description.config, &CpuModel::from(cpu))
}

/// Whether the taps of `description` that have a name are there, and are such as their NICs need.
/// Another machine may have them.
///
/// # Errors
/// [`BuildError::Tap`] for the first one that is not.
pub fn check_taps(description: &Description) -> Result<(), BuildError> {
    for nic in description.occupied.nics.iter().flatten() {
        if let TapConfig::Name(name) = &nic.tap {
            Tap::look(name.as_str(), nic.queue_pairs.get().into())
                .map_err(|source| BuildError::Tap { id: nic.id.clone(), source })?;
        }
    }
    Ok(())
}

/// Whether vCPUs of `config` show all that a guest has seen, on a host that can show `supported`.
pub(crate) fn check_model(
    kvm: &Kvm,
    supported: &CpuFeatures,
    config: &MachineConfig,
    seen: &CpuModel,
) -> Result<(), BuildError> {
    let ids = topology::apic_ids(&config.topology, config.cpus)?;
    let first = ids.first().copied().unwrap_or(0);
    match supported.of_vcpu(kvm, first, &config.topology).model().lacks(seen) {
        Some(why) => Err(BuildError::Cpu(why)),
        None => Ok(()),
    }
}
