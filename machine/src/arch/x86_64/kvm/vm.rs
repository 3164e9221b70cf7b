//! The parts of a KVM virtual machine that only x86 has: interrupt controllers and timer, CPUID,
//! kvm-clock.
use config::Topology;
use kvm_bindings::{KVM_CLOCK_REALTIME, KVM_PIT_SPEAKER_DUMMY, kvm_clock_data, kvm_pit_config};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use super::{
    clock::{Clock, date},
    cpu_model::CpuFeatures,
    entry,
};
use crate::{
    arch::layout,
    kvm::{KvmError, Vm, refused},
};

/// KVM capabilities that this monitor requires on x86, and what for.
pub(crate) const REQUIRED: [(Cap, &str, &str); 2] = [
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR", "real mode on Intel CPUs"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID", "selecting the features of the guest's CPUs"),
];

/// Features of a virtual machine's KVM.
pub(crate) struct Own {
    /// KVM_SET_CLOCK accepts the date that a clock belongs to (Linux 5.16).
    pub(super) takes_date: bool,
}

/// Set-up that must precede the memory slots.
///
/// # Errors
/// When KVM refuses a step.
pub(crate) fn before_memory(kvm: &Kvm, fd: &VmFd) -> Result<Own, KvmError> {
    let tss = usize::try_from(layout::KVM_TSS).unwrap_or(usize::MAX);
    fd.set_identity_map_address(layout::KVM_IDENTITY)
        .map_err(refused("set the identity map address"))?;
    fd.set_tss_address(tss).map_err(refused("set the TSS address"))?;
    let flags = u32::try_from(kvm.check_extension_int(Cap::AdjustClock)).unwrap_or(0);
    let takes_date = flags & KVM_CLOCK_REALTIME != 0;
    Ok(Own { takes_date })
}

/// Set-up that must follow the memory slots: a slot that is set after this costs milliseconds.
///
/// # Errors
/// When KVM refuses.
pub(crate) fn after_memory(fd: &VmFd) -> Result<(), KvmError> {
    fd.create_irq_chip().map_err(refused("create the interrupt controllers"))
}

impl Vm {
    /// Create the timer, and the vCPUs with these APIC ids and the CPUID leaves of `features`. KVM
    /// starts a kernel thread for the timer and waits for it, so this is best done in parallel with
    /// other work.
    ///
    /// # Errors
    /// When KVM refuses a step.
    pub fn create_vcpus(
        &self,
        kvm: &Kvm,
        cpu_ids: &[u8],
        topology: &Topology,
        features: &CpuFeatures,
    ) -> Result<Vec<VcpuFd>, KvmError> {
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        self.fd.create_pit2(pit).map_err(refused("create the timer (PIT)"))?;
        let create = |id: &u8| {
            let fd = self.fd.create_vcpu(u64::from(*id)).map_err(refused("create a vCPU"))?;
            let shown = features.of_vcpu(kvm, *id, topology);
            fd.set_cpuid2(shown.as_kvm()).map_err(refused("set a vCPU's CPUID"))?;
            entry::as_firmware_leaves_it(&fd)?;
            Ok(fd)
        };
        cpu_ids.iter().map(create).collect()
    }

    /// The guest's paravirtual clock now, and the host's date at that moment.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn clock(&self) -> Result<Clock, KvmError> {
        let now = self.fd.get_clock().map_err(refused("read the guest's clock"))?;
        // KVM reports the date only if the host's own clock is its TSC.
        let date = if now.flags & KVM_CLOCK_REALTIME == 0 { date() } else { now.realtime };
        Ok(Clock { nanoseconds: now.clock, date: Some(date) })
    }

    /// Set the guest's paravirtual clock to `clock`; with `advance`, and if its date is known, to
    /// the time that it would show by now had it not been stopped. It never goes back.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn set_clock(&self, clock: Clock, advance: bool) -> Result<(), KvmError> {
        let mut data = kvm_clock_data { clock: clock.nanoseconds, ..Default::default() };
        match clock.date.filter(|_| advance) {
            Some(realtime) if self.own.takes_date => {
                data = kvm_clock_data { flags: KVM_CLOCK_REALTIME, realtime, ..data };
            }
            Some(_) => data.clock = clock.at(date()),
            None => {}
        }
        self.fd.set_clock(&data).map_err(refused("set the guest's clock"))
    }
}
