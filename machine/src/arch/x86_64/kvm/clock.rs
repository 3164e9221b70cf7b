//! Clocks: the time stamp counter (TSC), and kvm-clock, by which a guest is told of it.
use std::time::SystemTime;

/// A guest's paravirtual clock (kvm-clock) that stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clock {
    /// What it shows, in nanoseconds.
    pub nanoseconds: u64,
    /// The host's date when it showed this, in nanoseconds since 1970 (UTC).
    pub date: Option<u64>,
}

impl Clock {
    /// What it would show at `date` had it not stood. A date before its own is no gap, and neither
    /// is one where its own is not known.
    pub fn at(self, date: u64) -> u64 {
        self.nanoseconds.saturating_add(date.saturating_sub(self.date.unwrap_or(date)))
    }
}

/// The host's date, in nanoseconds since 1970 (UTC).
pub(super) fn date() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// What the host's time stamp counter shows, in ticks.
pub fn host_ticks() -> u64 {
    // SAFETY: every CPU that has KVM has the instruction, and it touches no memory.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Whether a guest sees its own TSC. On a host CPU without hardware virtualization (KVM then runs
/// guests as user processes do, as PVM does) the guest's RDTSC reads the host's counter itself, and
/// an offset would only shift the guest's timers away from the clock that it sees.
pub fn guest_tsc_is_its_own() -> bool {
    has_hardware_virtualization()
}

/// Whether this host's CPU can run guests itself. Where it cannot and there is a KVM nevertheless,
/// that runs only kernels made for it.
pub fn has_hardware_virtualization() -> bool {
    use core::arch::x86_64::__cpuid;
    static ANSWER: std::sync::LazyLock<bool> = std::sync::LazyLock::new(|| {
        const VMX: u32 = 1 << 5;
        const SVM: u32 = 1 << 2;
        __cpuid(1).ecx & VMX != 0 || __cpuid(0x8000_0001).ecx & SVM != 0
    });
    *ANSWER
}
