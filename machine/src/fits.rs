//! Whether this host can run a machine that is offered to it, as far as that can be checked before
//! its memory and state arrive, and without taking anything from the running machine.
use config::{Description, MachineConfig, Tap as TapConfig, topology};
use devices::backend::net::tap::Tap;
use kvm_ioctls::{Cap, Kvm};
use state::cpu::Cpu;

use crate::{
    BuildError, Machine,
    arch::{CpuFeatures, CpuModel, guest_tsc_is_its_own, host_ticks},
    kvm::{self, KvmError, refused},
};

/// How much two frequencies may differ, in millionths: KVM does not scale less.
const TOLERANCE: u64 = 250;

/// Check that this host's CPU has every feature that `cpu` promises to the guest of `description`.
///
/// # Errors
/// [`BuildError::Cpu`] with the first feature missing; when KVM does not report its features.
pub fn check_cpu(description: &Description, cpu: &Cpu) -> Result<(), BuildError> {
    let kvm = kvm::open()?;
    let supported = CpuFeatures::supported(&kvm)?;
    check_model(&kvm, &supported, &description.config, &CpuModel::from(cpu))
}

/// How the TSC of a guest ticks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tsc {
    /// Ticks per millisecond.
    pub khz: u32,
    /// Where the host's stands, in ticks.
    pub ticks: u64,
    /// The guest has one of its own. Otherwise it reads the host's.
    pub own: bool,
}

/// Why a guest cannot have its time here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the error messages describe them")]
pub enum TscMismatch {
    #[error(
        "one of the two hosts gives guests a TSC of their own, the other one (without hardware \
         virtualization) does not"
    )]
    Kind,
    #[error(
        "the guest reads the TSC of its host, and this host's is {behind} ticks behind: the guest's \
         time would go back"
    )]
    Behind { behind: u64 },
    #[error(
        "the guest's TSC ticks at {there} kHz, this host's at {here} kHz, which cannot scale it"
    )]
    Frequency { there: u32, here: u32 },
}

impl Tsc {
    /// The same, as of now.
    #[must_use]
    pub fn as_of_now(self) -> Self {
        Self { ticks: host_ticks(), ..self }
    }

    /// Check that a guest with this TSC, as of a moment ago, can go on on a host with `here`, which
    /// can scale the frequency if it `scales`.
    ///
    /// # Errors
    /// What it would notice.
    pub fn fits(self, here: Self, scales: bool) -> Result<(), TscMismatch> {
        let differs = |there: u32, here: u32| {
            u64::from(there.abs_diff(here)) * 1_000_000 > u64::from(here) * TOLERANCE
        };
        if self.own != here.own {
            return Err(TscMismatch::Kind);
        }
        let scales = scales && here.own;
        if differs(self.khz, here.khz) && !scales {
            return Err(TscMismatch::Frequency { there: self.khz, here: here.khz });
        }
        match self.ticks.checked_sub(here.ticks) {
            Some(behind) if !here.own && behind > 0 => Err(TscMismatch::Behind { behind }),
            _ => Ok(()),
        }
    }

    /// Of a new guest of `kvm`.
    pub(crate) fn of(kvm: &Kvm) -> Result<Self, KvmError> {
        let vm = kvm::create_vm(kvm)?;
        let vcpu = vm.create_vcpu(0).map_err(refused("create a vCPU"))?;
        let khz = vcpu.get_tsc_khz().map_err(refused("report the guest's TSC frequency"))?;
        Ok(Self { khz, ticks: host_ticks(), own: guest_tsc_is_its_own() })
    }
}

/// Check that a guest with this TSC, as of a moment ago, can go on on this host.
///
/// # Errors
/// [`BuildError::Cpu`] with what it would notice; when KVM does not report its frequency.
pub fn check_tsc(tsc: Tsc) -> Result<(), BuildError> {
    let kvm = kvm::open()?;
    let fits = tsc.fits(Tsc::of(&kvm)?, kvm.check_extension(Cap::TscControl));
    fits.map_err(|e| BuildError::Cpu(e.to_string()))
}

impl Machine {
    /// How its TSC ticks.
    ///
    /// # Errors
    /// When KVM does not report its frequency.
    pub fn tsc(&self) -> Result<Tsc, KvmError> {
        let new = Tsc::of(&self.kvm)?;
        Ok(Tsc { khz: self.tsc_khz.unwrap_or(new.khz), ..new })
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_keeps_its_time_or_the_difference_is_said() {
        let here = Tsc { khz: 2_000_000, ticks: 1000, own: true };
        let (shared, other) = (Tsc { own: false, ..here }, Tsc { khz: 2_000_600, ..here });
        assert_eq!(here.fits(Tsc { ticks: 0, ..here }, false), Ok(()), "it has one of its own");
        assert_eq!(Tsc { khz: 2_000_400, ..here }.fits(here, false), Ok(()));
        assert_eq!(other.fits(here, true), Ok(()));
        let frequency = TscMismatch::Frequency { there: 2_000_600, here: 2_000_000 };
        assert_eq!(other.fits(here, false), Err(frequency));
        assert_eq!(Tsc { own: false, ..other }.fits(shared, true), Err(frequency));
        assert_eq!(shared.fits(here, true), Err(TscMismatch::Kind));
        let late = Tsc { ticks: 400, ..shared };
        assert_eq!(shared.fits(late, true), Err(TscMismatch::Behind { behind: 600 }));
        assert_eq!(late.fits(shared, true), Ok(()));
    }

    #[test]
    fn what_this_host_offers_fits_this_host() {
        let tsc = Tsc::of(&kvm::open().unwrap()).unwrap();
        check_tsc(tsc).unwrap();
        let other = Tsc { own: !tsc.own, ..tsc };
        assert!(check_tsc(other).unwrap_err().to_string().contains("TSC of their own"));
    }
}
