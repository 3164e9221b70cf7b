//! Clocks: the time stamp counter (TSC), and kvm-clock, which gives a guest the time.
use std::time::{Duration, SystemTime};

/// The guest's time stamp counter cannot run at its frequency on this host.
#[derive(Debug, thiserror::Error)]
#[error(
    "the guest's TSC ticks at {saved} kHz, this host's at {here} kHz, and its KVM cannot scale it"
)]
pub struct ClockError {
    /// Ticks per millisecond, as saved.
    pub saved: u32,
    /// Ticks per millisecond of this host.
    pub here: u32,
    /// KVM's answer.
    pub source: kvm_ioctls::Error,
}

/// The value of a stopped paravirtual clock (kvm-clock).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clock {
    /// Its time, in nanoseconds.
    pub nanoseconds: u64,
    /// The host's date at that time, in nanoseconds since 1970 (UTC).
    pub date: Option<u64>,
}

impl Clock {
    /// The time at `date` if the clock had not been stopped. Without a date of its own, or if
    /// `date` is earlier, its time is unchanged.
    pub fn at(self, date: u64) -> u64 {
        self.nanoseconds.saturating_add(date.saturating_sub(self.date.unwrap_or(date)))
    }
}

/// The host's date, in nanoseconds since 1970 (UTC).
pub(super) fn date() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// The host's time stamp counter, in ticks.
pub fn host_ticks() -> u64 {
    // SAFETY: every CPU that has KVM has the instruction, and it accesses no memory.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// A moment, by this host's clocks that never go back.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    /// Time since the host booted, suspended or not.
    booted: Duration,
    /// [`host_ticks`].
    pub(crate) ticks: u64,
}

impl Moment {
    /// This one.
    #[must_use]
    pub fn now() -> Self {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: it writes the time. By the C library, as threads behind a filter may: it needs no
        // other system call, not even the first time.
        unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
        let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
        let nanoseconds = u32::try_from(time.tv_nsec).unwrap_or(0);
        Self { booted: Duration::new(seconds, nanoseconds), ticks: host_ticks() }
    }

    /// How long it is ago.
    #[must_use]
    pub fn elapsed(self) -> Duration {
        Self::now().booted.saturating_sub(self.booted)
    }
}

/// Whether a guest has a TSC of its own. On a host CPU without hardware virtualization (where KVM
/// runs guests like user processes, as PVM does) the guest's RDTSC reads the host's counter, and an
/// offset would only shift the guest's timers away from the clock that it sees.
pub fn guest_tsc_is_its_own() -> bool {
    has_hardware_virtualization()
}

/// Whether this host's CPU has hardware virtualization. A KVM without it runs only kernels made for
/// it.
pub fn has_hardware_virtualization() -> bool {
    use core::arch::x86_64::__cpuid;
    static ANSWER: std::sync::LazyLock<bool> = std::sync::LazyLock::new(|| {
        const VMX: u32 = 1 << 5;
        const SVM: u32 = 1 << 2;
        __cpuid(1).ecx & VMX != 0 || __cpuid(0x8000_0001).ecx & SVM != 0
    });
    *ANSWER
}
