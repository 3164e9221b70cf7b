//! KVM: opening it, and the virtual machine's own descriptor.
//!
//! The order of set-up is the cheap one: memory slots first, then the interrupt controllers, then
//! vCPUs. A slot that is set later costs milliseconds.
// UNSAFETY: guest memory is handed to KVM by address, and some ioctls have no safe wrapper.
#![expect(unsafe_code, reason = "KVM ioctls")]
pub mod chips;
pub mod cpuid;
pub mod entry;
pub mod features;
pub mod opening;
mod permission;
pub mod saved;
pub mod state;
#[cfg(test)]
mod tests;
pub mod vcpu;

use std::{io, sync::Arc, time::SystemTime};

use config::Topology;
use devices::{Memory, irq::Line};
use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CLOCK_REALTIME, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY,
    KVM_PIT_SPEAKER_DUMMY, kvm_clock_data, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MmapRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::layout;

/// What this monitor cannot do without, and what for.
const REQUIRED: [(Cap, &str, &str); 8] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP", "in-kernel interrupt controllers"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY", "guest memory"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR", "real mode on Intel CPUs"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID", "choosing what the guest's CPUs announce"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD", "virtio notifications"),
    (Cap::Irqfd, "KVM_CAP_IRQFD", "interrupts"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT", "stopping vCPUs"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM", "virtio registers that are read without an exit"),
];

/// Why KVM cannot be used, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum KvmError {
    #[error(
        "/dev/kvm does not exist: load the module (modprobe kvm_amd or modprobe kvm_intel); if that \
         fails, enable virtualization in the firmware, or nested virtualization where this is itself \
         a virtual machine"
    )]
    Missing,
    #[error("no permission to open /dev/kvm: {fix}")]
    Permission { fix: String },
    #[error("cannot open /dev/kvm")]
    Open(#[source] io::Error),
    #[error(
        "/dev/kvm is there but is not KVM: make it anew, as root: rm /dev/kvm && mknod /dev/kvm c 10 \
         232; a container is given the host's (--device /dev/kvm)"
    )]
    NotKvm,
    #[error("/dev/kvm speaks API version {0}; version 12 is needed (Linux 2.6.22 or newer)")]
    ApiVersion(i32),
    #[error("this host's KVM lacks {name}, needed for {what}: update the host's kernel")]
    MissingCapability { name: &'static str, what: &'static str },
    #[error("{cpus} vCPUs asked for; this host's KVM allows at most {max}")]
    TooManyCpus { cpus: u8, max: usize },
    #[error(
        "the guest's TSC ticks at {saved} kHz, this host's at {here} kHz, and its KVM cannot scale it"
    )]
    TscFrequency {
        saved: u32,
        here: u32,
        #[source]
        source: kvm_ioctls::Error,
    },
    #[error("KVM refuses to {what}")]
    Ioctl {
        what: &'static str,
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// Names what an ioctl was for.
pub(crate) fn refused(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError::Ioctl { what, source }
}

/// Open /dev/kvm and check that it can do what is needed.
///
/// # Errors
/// When it is not there, not permitted, or lacks something; the message names the fix.
pub fn open() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(|e| match e.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::Missing,
        libc::EACCES | libc::EPERM => KvmError::Permission { fix: permission::fix() },
        errno => KvmError::Open(io::Error::from_raw_os_error(errno)),
    })?;
    match kvm.get_api_version() {
        v if u32::try_from(v) == Ok(KVM_API_VERSION) => {}
        // The file does not know the question.
        ..0 => return Err(KvmError::NotKvm),
        v => return Err(KvmError::ApiVersion(v)),
    }
    for (cap, name, what) in REQUIRED {
        if !kvm.check_extension(cap) {
            return Err(KvmError::MissingCapability { name, what });
        }
    }
    Ok(kvm)
}

/// A virtual machine that has nothing yet.
///
/// # Errors
/// When KVM refuses.
pub fn create_vm(kvm: &Kvm) -> Result<VmFd, KvmError> {
    loop {
        // Interrupted by a signal: nothing was made, so try again.
        match kvm.create_vm() {
            Err(e) if e.errno() == libc::EINTR => {}
            other => return other.map_err(refused("create a virtual machine")),
        }
    }
}

/// The virtual machine as KVM sees it.
pub struct Vm {
    fd: VmFd,
    /// Kept because KVM uses its pages for as long as `fd` lives.
    memory: Memory,
    /// As `memory`: the register pages of the virtio-mmio slots.
    _window: Arc<MmapRegion>,
    /// KVM_SET_CLOCK takes the date that a clock belongs to (Linux 5.16).
    takes_date: bool,
}

impl Vm {
    /// The virtual machine `fd`, with its memory and interrupt controllers.
    ///
    /// # Errors
    /// When KVM refuses a step.
    pub fn new(
        kvm: &Kvm,
        fd: VmFd,
        memory: &Memory,
        window: &Arc<MmapRegion>,
    ) -> Result<Self, KvmError> {
        let tss = usize::try_from(layout::KVM_TSS).unwrap_or(usize::MAX);
        fd.set_identity_map_address(layout::KVM_IDENTITY)
            .map_err(refused("set the identity map address"))?;
        fd.set_tss_address(tss).map_err(refused("set the TSS address"))?;
        let flags = u32::try_from(kvm.check_extension_int(Cap::AdjustClock)).unwrap_or(0);
        let takes_date = flags & KVM_CLOCK_REALTIME != 0;
        let vm = Self { fd, memory: memory.clone(), _window: window.clone(), takes_date };
        let mut slot = 0;
        for region in memory.iter() {
            vm.map(slot, region.start_addr().raw_value(), region.as_ptr(), region.len(), 0)?;
            slot += 1;
        }
        let size = window.size() as u64;
        vm.map(slot, layout::VIRTIO_MMIO, window.as_ptr(), size, KVM_MEM_READONLY)?;
        vm.fd.create_irq_chip().map_err(refused("create the interrupt controllers"))?;
        Ok(vm)
    }

    /// The timer, and the vCPUs with these APIC ids. They show the CPUID leaves `seen`, else what
    /// this host has. KVM starts a kernel thread
    /// for the timer and waits for it, so this is best done beside other work.
    ///
    /// # Errors
    /// When KVM refuses a step.
    pub fn create_vcpus(
        &self,
        kvm: &Kvm,
        apic_ids: &[u8],
        topology: &Topology,
        seen: Option<&CpuId>,
    ) -> Result<Vec<VcpuFd>, KvmError> {
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        self.fd.create_pit2(pit).map_err(refused("create the timer (PIT)"))?;
        let leaves = match seen {
            Some(leaves) => leaves.clone(),
            None => cpuid::supported(kvm)?,
        };
        let create = |id: &u8| {
            let fd = self.fd.create_vcpu(u64::from(*id)).map_err(refused("create a vCPU"))?;
            let cpuid = cpuid::for_vcpu(kvm, &leaves, *id, topology);
            fd.set_cpuid2(&cpuid).map_err(refused("set a vCPU's CPUID"))?;
            entry::as_firmware_leaves_it(&fd)?;
            Ok(fd)
        };
        apic_ids.iter().map(create).collect()
    }

    /// Begin or end to note which pages of guest memory the vCPUs write.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn log_dirty(&self, on: bool) -> Result<(), KvmError> {
        let flags = if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        for (slot, region) in (0..).zip(self.memory.iter()) {
            let at = region.start_addr().raw_value();
            self.map(slot, at, region.as_ptr(), region.len(), flags)?;
        }
        Ok(())
    }

    /// The pages that the vCPUs have written since the last time, for each region of memory a bit
    /// a page; then forget them.
    ///
    /// # Errors
    /// When KVM refuses, as it does when it does not note them.
    pub fn dirty(&self) -> Result<Vec<Vec<u64>>, KvmError> {
        (0..)
            .zip(self.memory.iter())
            .map(|(slot, region)| self.fd.get_dirty_log(slot, region.size()))
            .collect::<Result<_, _>>()
            .map_err(refused("tell which pages the guest has written"))
    }

    fn map(&self, slot: u32, at: u64, host: *mut u8, len: u64, flags: u32) -> Result<(), KvmError> {
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: at,
            memory_size: len,
            userspace_addr: host as u64,
        };
        // SAFETY: host..host+len is a mapping that `self` keeps alive as long as the descriptor.
        unsafe { self.fd.set_user_memory_region(region) }
            .map_err(refused("map guest memory (is enough memory free?)"))
    }

    /// Let an edge on `line` raise `gsi` in the guest.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn bind_line(&self, line: &Line, gsi: u32) -> Result<(), KvmError> {
        self.fd.register_irqfd(line.eventfd(), gsi).map_err(refused("bind an interrupt line"))
    }

    /// Take `line` from `gsi` again: an eventfd can belong to one machine at a time.
    ///
    /// # Errors
    /// When it was not bound.
    pub fn unbind_line(&self, line: &Line, gsi: u32) -> Result<(), KvmError> {
        self.fd.unregister_irqfd(line.eventfd(), gsi).map_err(refused("unbind an interrupt line"))
    }

    /// Let a 32-bit guest write of `value` to `address` signal `eventfd` without an exit.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn bind_write(&self, address: u64, value: u32, eventfd: &EventFd) -> Result<(), KvmError> {
        self.fd
            .register_ioevent(eventfd, &IoEventAddress::Mmio(address), value)
            .map_err(refused("bind a notification register"))
    }

    /// The guest's paravirtual clock now, and the host's date at that moment.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn clock(&self) -> Result<Clock, KvmError> {
        let now = self.fd.get_clock().map_err(refused("read the guest's clock"))?;
        // KVM tells the date only where the host's own clock is its TSC.
        let date = if now.flags & KVM_CLOCK_REALTIME == 0 { date() } else { now.realtime };
        Ok(Clock { nanoseconds: now.clock, date: Some(date) })
    }

    /// Set the guest's paravirtual clock to `clock`; with `advance`, and where its date is known, to
    /// what it would show by now had it gone on since. It never goes back.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn set_clock(&self, clock: Clock, advance: bool) -> Result<(), KvmError> {
        let mut data = kvm_clock_data { clock: clock.nanoseconds, ..Default::default() };
        match clock.date.filter(|_| advance) {
            Some(realtime) if self.takes_date => {
                data = kvm_clock_data { flags: KVM_CLOCK_REALTIME, realtime, ..data };
            }
            Some(_) => data.clock = clock.at(date()),
            None => {}
        }
        self.fd.set_clock(&data).map_err(refused("set the guest's clock"))
    }
}

/// A guest's paravirtual clock (kvm-clock) that stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clock {
    /// What it shows, in nanoseconds.
    pub nanoseconds: u64,
    /// The host's date when it showed this, in nanoseconds since 1970 (UTC).
    pub date: Option<u64>,
}

impl Clock {
    /// What it would show at `date` had it not stood. A date before its own is no gap, and neither is
    /// one where its own is not known.
    pub fn at(self, date: u64) -> u64 {
        self.nanoseconds.saturating_add(date.saturating_sub(self.date.unwrap_or(date)))
    }
}

/// The host's date, in nanoseconds since 1970 (UTC).
fn date() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// The host's time stamp counter.
pub fn host_tsc() -> u64 {
    // SAFETY: every CPU that has KVM has the instruction, and it touches no memory.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Whether a guest sees its own TSC. On a host CPU without hardware virtualization (KVM then runs
/// guests as user processes do, as PVM does) the guest's RDTSC reads the host's counter itself, and
/// an offset would only shift the guest's timers away from the clock that it sees.
pub fn guest_tsc_is_its_own() -> bool {
    has_hardware_virtualization()
}

/// Whether this host's CPU can run guests itself. Where it cannot and there is a KVM nevertheless, that
/// runs only kernels made for it.
pub fn has_hardware_virtualization() -> bool {
    use core::arch::x86_64::__cpuid;
    static ANSWER: std::sync::LazyLock<bool> = std::sync::LazyLock::new(|| {
        const VMX: u32 = 1 << 5;
        const SVM: u32 = 1 << 2;
        __cpuid(1).ecx & VMX != 0 || __cpuid(0x8000_0001).ecx & SVM != 0
    });
    *ANSWER
}
