//! The whole state of one vCPU, as KVM reads and writes it.
use std::ops::Range;

use kvm_bindings::{
    KVM_MAX_MSR_ENTRIES, Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, KvmNestedStateBuffer, VcpuFd};
use zerocopy::IntoBytes;

use super::clock::{ClockError, guest_tsc_is_its_own, host_ticks};
use crate::kvm::{KvmError, refused};

/// MSR of the time stamp counter.
pub const MSR_IA32_TSC: u32 = 0x10;
/// MSR of the TSC deadline timer: armed only in deadline mode, so restored after the LAPIC.
const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;
/// MSR that permits VMX.
const MSR_IA32_FEATURE_CONTROL: u32 = 0x3a;

/// MSRs that a guest can set and KVM reads and writes, but does not list: memory types (MTRRs;
/// eight variable ones), TSC_AUX (which only some KVMs list).
const UNLISTED: [std::ops::RangeInclusive<u32>; 7] = [
    0x200..=0x20f,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26f,
    0x2ff..=0x2ff,
    0xc000_0103..=0xc000_0103,
    // Four registers for each of the up to 32 machine check banks of KVM.
    0x400..=0x47f,
];

/// Address of the page through which a guest of PVM masks interrupts. PVM does not list it; other
/// KVMs do not have it, and reading it there fails, so it is not saved.
const MSR_PVM_VIF: u32 = 0x4b56_4d10;

/// The complete state of a vCPU. Plain data: KVM checks its values on restore.
#[derive(Debug, Clone)]
pub struct VcpuState {
    pub(crate) regs: kvm_regs,
    pub(super) sregs: kvm_sregs,
    /// The XSAVE area in words of 32 bits.
    pub(super) xsave: Vec<u32>,
    pub(super) xcrs: kvm_xcrs,
    pub(super) debug: kvm_debugregs,
    pub(super) lapic: kvm_lapic_state,
    pub(super) mp: kvm_mp_state,
    pub(super) events: kvm_vcpu_events,
    /// Pairs of index and value.
    pub(super) msrs: Vec<(u32, u64)>,
    /// Frequency of the TSC in ticks per millisecond.
    pub(super) tsc_khz: u32,
    /// The same of the host that saved it.
    pub(super) host_khz: u32,
    /// [`host_ticks`] when it was read; of no use on another host.
    pub(super) read_at: u64,
    /// Nested virtualization state, as `KVM_GET_NESTED_STATE` returns it; empty if KVM has none.
    pub(super) nested: Vec<u8>,
}

/// How many ticks a guest's TSC advances while the host's advances by `ticks`, at these frequencies
/// in ticks per millisecond. KVM does not scale differences below its tolerance of 250 ppm.
pub fn guest_ticks(ticks: u64, guest_khz: u32, host_khz: u32) -> u64 {
    let (guest, host) = (u128::from(guest_khz), u128::from(host_khz));
    if host == 0 || guest.abs_diff(host) * 1_000_000 <= host * 250 {
        return ticks;
    }
    u64::try_from(u128::from(ticks) * guest / host).unwrap_or(u64::MAX)
}

/// The MSRs that belong to a vCPU's state: those that this host's KVM lists, and a few more. Others
/// are not touched: some KVMs announce an MSR in CPUID that cannot be set.
///
/// # Errors
/// When KVM does not list them.
pub fn msr_list(kvm: &Kvm) -> Result<Vec<u32>, KvmError> {
    let listed = kvm.get_msr_index_list().map_err(refused("list its MSRs"))?;
    let listed = listed.as_slice();
    let others = UNLISTED.into_iter().flatten().chain([MSR_PVM_VIF]);
    let others = others.filter(|index| !listed.contains(index));
    Ok(listed.iter().copied().chain(others).collect())
}

/// MSRs of kvm-clock by its old numbers.
const OLD_KVM_MSRS: std::ops::RangeInclusive<u32> = 0x11..=0x12;
/// KVM's own MSRs: most of them name a structure in guest memory that KVM writes.
const KVM_MSRS: std::ops::RangeInclusive<u32> = 0x4b56_4d00..=0x4b56_4dff;
/// Bytes of the largest of these structures (asynchronous page faults; the others have fewer).
const LARGEST_STRUCTURE: u64 = 64;

impl VcpuState {
    /// Guest-physical addresses that KVM may write before the guest's first instruction, as the
    /// MSRs name them. An MSR that names none names low memory here, which does no harm.
    pub fn shared_with_kvm(&self) -> impl Iterator<Item = Range<u64>> {
        let named = |index: &u32| KVM_MSRS.contains(index) || OLD_KVM_MSRS.contains(index);
        self.msrs.iter().filter(move |(index, _)| named(index)).map(|(_, value)| {
            // The lowest bits are flags.
            let at = value & !3;
            at..at.saturating_add(LARGEST_STRUCTURE)
        })
    }

    /// Frequency of its TSC in ticks per millisecond.
    pub fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// Set the time stamp counter to what it was when the host's was at `ticks` ([`host_ticks`]),
    /// before it was read.
    pub fn hold_back(&mut self, ticks: u64) {
        let since = self.read_at.saturating_sub(ticks);
        let by = guest_ticks(since, self.tsc_khz, self.host_khz);
        for (index, value) in &mut self.msrs {
            if *index == MSR_IA32_TSC {
                *value = value.wrapping_sub(by);
            }
        }
    }

    /// Read a vCPU that is not running and has no access pending.
    ///
    /// # Errors
    /// When KVM refuses to read a part.
    pub fn save(fd: &VcpuFd, msr_list: &[u32], host_khz: u32) -> Result<Self, KvmError> {
        Ok(Self {
            // First, because reading it makes KVM settle pending INIT and SIPI.
            mp: fd.get_mp_state().map_err(refused("read a vCPU's run state"))?,
            regs: fd.get_regs().map_err(refused("read a vCPU's registers"))?,
            sregs: fd.get_sregs().map_err(refused("read a vCPU's system registers"))?,
            xsave: fd.get_xsave().map_err(refused("read a vCPU's extended state"))?.region.to_vec(),
            xcrs: fd.get_xcrs().map_err(refused("read a vCPU's XCRs"))?,
            debug: fd.get_debug_regs().map_err(refused("read a vCPU's debug registers"))?,
            lapic: fd.get_lapic().map_err(refused("read a vCPU's local APIC"))?,
            read_at: host_ticks(),
            msrs: get_msrs(fd, msr_list)?,
            tsc_khz: fd.get_tsc_khz().map_err(refused("report the guest's TSC frequency"))?,
            host_khz,
            nested: get_nested(fd)?,
            // Last, after all steps that may still raise an event.
            events: fd.get_vcpu_events().map_err(refused("read a vCPU's pending events"))?,
        })
    }

    /// Restore this state into a vCPU that is not running. Returns the frequencies, in ticks per
    /// millisecond, of its TSC and of the host's.
    ///
    /// # Errors
    /// When KVM refuses a part; the vCPU is then unusable until another restore.
    pub fn restore(&self, fd: &VcpuFd) -> Result<(u32, u32), KvmError> {
        let here = fd.get_tsc_khz().map_err(refused("report the guest's TSC frequency"))?;
        if here != self.tsc_khz {
            fd.set_tsc_khz(self.tsc_khz).map_err(|source| ClockError {
                saved: self.tsc_khz,
                here,
                source,
            })?;
        }
        fd.set_mp_state(self.mp).map_err(refused("set a vCPU's run state"))?;
        fd.set_regs(&self.regs).map_err(refused("set a vCPU's registers"))?;
        fd.set_sregs(&self.sregs).map_err(refused("set a vCPU's system registers"))?;
        if !self.nested.is_empty() {
            // Nested state needs VMX, which is on only if this MSR permits it and the system registers
            // enable it.
            let feature_control = self.msrs.iter().filter(|(i, _)| *i == MSR_IA32_FEATURE_CONTROL);
            set_msrs(fd, &feature_control.copied().collect::<Vec<_>>())?;
            set_nested(fd, &self.nested)?;
        }
        // Empty on a host without XSAVE, where KVM would refuse an empty list.
        if self.xcrs.nr_xcrs > 0 {
            fd.set_xcrs(&self.xcrs).map_err(refused("set a vCPU's XCRs"))?;
        }
        let mut xsave = kvm_xsave::default();
        xsave.region.iter_mut().zip(&self.xsave).for_each(|(to, from)| *to = *from);
        // SAFETY: no dynamically enabled XSAVE feature is in use, so the state is 4 KiB long.
        unsafe { fd.set_xsave(&xsave) }.map_err(refused("set a vCPU's extended state"))?;
        fd.set_debug_regs(&self.debug).map_err(refused("set a vCPU's debug registers"))?;
        fd.set_lapic(&self.lapic).map_err(refused("set a vCPU's local APIC"))?;
        let settable = |index: u32| index != MSR_IA32_TSC || guest_tsc_is_its_own();
        let (deadline, others): (Vec<_>, Vec<_>) = self
            .msrs
            .iter()
            .filter(|(index, _)| settable(*index))
            .partition(|(index, _)| *index == MSR_IA32_TSC_DEADLINE);
        set_msrs(fd, &others)?;
        set_msrs(fd, &deadline)?;
        fd.set_vcpu_events(&self.events).map_err(refused("set a vCPU's pending events"))?;
        Ok((self.tsc_khz, here))
    }
}

/// The nested virtualization state (KVM API, 4.114).
fn get_nested(fd: &VcpuFd) -> Result<Vec<u8>, KvmError> {
    let mut state = KvmNestedStateBuffer::empty();
    match fd.nested_state(&mut state) {
        Ok(_) => {
            let length = usize::try_from(state.size).unwrap_or(usize::MAX);
            Ok(state.as_bytes().iter().take(length).copied().collect())
        }
        // This KVM has no nested virtualization.
        Err(e) if [libc::EINVAL, libc::ENOTTY].contains(&e.errno()) => Ok(Vec::new()),
        Err(e) => Err(refused("read a vCPU's nested state")(e)),
    }
}

/// KVM reads no more than a whole buffer, whatever length the state claims.
fn set_nested(fd: &VcpuFd, bytes: &[u8]) -> Result<(), KvmError> {
    let mut state = KvmNestedStateBuffer::empty();
    state.as_mut_bytes().iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    fd.set_nested_state(&state).map_err(refused("set a vCPU's nested state"))
}

/// Let KVM compute again when the timer is due that the guest has set by its TSC, which was changed.
pub(super) fn rearm(fd: &VcpuFd) -> Result<(), KvmError> {
    let mut deadline = get_msrs(fd, &[MSR_IA32_TSC_DEADLINE])?;
    // Not armed.
    deadline.retain(|(_, ticks)| *ticks != 0);
    set_msrs(fd, &deadline)
}

/// Read any number of MSRs; those that KVM cannot read here are left out.
pub(crate) fn get_msrs(fd: &VcpuFd, list: &[u32]) -> Result<Vec<(u32, u64)>, KvmError> {
    let mut values = Vec::with_capacity(list.len());
    let mut rest = list;
    while !rest.is_empty() {
        let (batch, _) = rest.split_at(rest.len().min(KVM_MAX_MSR_ENTRIES));
        let mut msrs = entries(batch.iter().map(|index| (*index, 0)))?;
        let n = fd.get_msrs(&mut msrs).map_err(refused("read a vCPU's MSRs"))?;
        values.extend(msrs.as_slice().iter().take(n).map(|e| (e.index, e.data)));
        // KVM stops at the first one that it does not know: skip it.
        let stopped = usize::from(n < batch.len());
        rest = rest.get(n + stopped..).ok_or_else(more_than_asked)?;
    }
    Ok(values)
}

/// Write MSRs; those that KVM refuses are logged and stay unchanged.
pub(crate) fn set_msrs(fd: &VcpuFd, values: &[(u32, u64)]) -> Result<(), KvmError> {
    let mut rest = values;
    while !rest.is_empty() {
        let (batch, _) = rest.split_at(rest.len().min(KVM_MAX_MSR_ENTRIES));
        let msrs = entries(batch.iter().copied())?;
        let n = fd.set_msrs(&msrs).map_err(refused("set a vCPU's MSRs"))?;
        if let Some((index, value)) = batch.get(n) {
            log::warn!("KVM does not accept {value:#x} for MSR {index:#x}");
        }
        let stopped = usize::from(n < batch.len());
        rest = rest.get(n + stopped..).ok_or_else(more_than_asked)?;
    }
    Ok(())
}

fn more_than_asked() -> KvmError {
    KvmError::Ioctl {
        what: "handle exactly the MSRs that it was given",
        source: kvm_ioctls::Error::new(libc::EOVERFLOW),
    }
}

fn entries(values: impl Iterator<Item = (u32, u64)>) -> Result<Msrs, KvmError> {
    let list: Vec<_> =
        values.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
    Msrs::from_entries(&list).map_err(|_| KvmError::Ioctl {
        what: "accept so many MSRs",
        source: kvm_ioctls::Error::new(libc::E2BIG),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_of_another_frequency_counts_a_pause_in_its_own_ticks() {
        assert_eq!(guest_ticks(30_000, 2_000_000, 3_000_000), 20_000);
        assert_eq!(guest_ticks(20_000, 3_000_000, 2_000_000), 30_000);
        // Not scaled: never restored, equal, or within the tolerance.
        for (guest, host) in [(0, 0), (2_000_000, 2_000_000), (2_000_400, 2_000_000)] {
            assert_eq!(guest_ticks(30_000, guest, host), 30_000);
        }
        assert_eq!(guest_ticks(u64::MAX, u32::MAX, 1), u64::MAX);
    }
}
