//! KVM: opening it, and the virtual machine's own descriptor.
//!
//! Set-up in the cheapest order: memory slots first, then the interrupt controllers, then vCPUs. A
//! slot that is set later costs milliseconds.
// UNSAFETY: guest memory is handed to KVM by address, and some ioctls have no safe wrapper.
#![expect(unsafe_code, reason = "KVM ioctls")]
pub(crate) mod coalesced;
pub mod opening;
mod permission;
pub(crate) mod shared_page;

use std::{io, sync::Arc};

use devices::{Memory, irq::Line};
use kvm_bindings::{
    KVM_API_VERSION, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MmapRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::{ClockError, layout, vm};

/// KVM capabilities that this monitor requires, and what for.
const REQUIRED: [(Cap, &str, &str); 6] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP", "in-kernel interrupt controllers"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY", "guest memory"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD", "virtio notifications"),
    (Cap::Irqfd, "KVM_CAP_IRQFD", "interrupts"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT", "stopping vCPUs"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM", "virtio registers that are read without an exit"),
];

/// Why KVM cannot be used, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the error messages describe them")]
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
        "/dev/kvm is there but is not KVM: recreate it, as root: rm /dev/kvm && mknod /dev/kvm c \
         10 232; give a container the host's (--device /dev/kvm)"
    )]
    NotKvm,
    #[error("/dev/kvm speaks API version {0}; version 12 is needed (Linux 2.6.22 or newer)")]
    ApiVersion(i32),
    #[error("this host's KVM lacks {name}, needed for {what}: update the host's kernel")]
    MissingCapability { name: &'static str, what: &'static str },
    #[error("{cpus} vCPUs requested; this host's KVM allows at most {max}")]
    TooManyCpus { cpus: u8, max: usize },
    #[error(transparent)]
    Clock(#[from] ClockError),
    #[error("KVM failed to {what}")]
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

/// Open /dev/kvm and check that it has all required capabilities.
///
/// # Errors
/// When it is missing, not permitted, or lacks a capability; the message names the fix.
pub fn open() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(|e| match e.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::Missing,
        libc::EACCES | libc::EPERM => KvmError::Permission { fix: permission::fix() },
        errno => KvmError::Open(io::Error::from_raw_os_error(errno)),
    })?;
    match kvm.get_api_version() {
        v if u32::try_from(v) == Ok(KVM_API_VERSION) => {}
        // The file does not support this ioctl.
        ..0 => return Err(KvmError::NotKvm),
        v => return Err(KvmError::ApiVersion(v)),
    }
    for (cap, name, what) in REQUIRED.into_iter().chain(vm::REQUIRED) {
        if !kvm.check_extension(cap) {
            return Err(KvmError::MissingCapability { name, what });
        }
    }
    Ok(kvm)
}

/// A new, empty virtual machine.
///
/// # Errors
/// When KVM refuses.
pub fn create_vm(kvm: &Kvm) -> Result<VmFd, KvmError> {
    loop {
        // Interrupted by a signal: nothing was created, so try again.
        match kvm.create_vm() {
            Err(e) if e.errno() == libc::EINTR => {}
            other => return other.map_err(refused("create a virtual machine")),
        }
    }
}

/// The virtual machine as KVM sees it.
pub struct Vm {
    pub(crate) fd: Arc<VmFd>,
    /// Kept because KVM uses its pages for as long as `fd` lives.
    memory: Memory,
    /// As `memory`: the register pages of the virtio-mmio slots.
    _window: Arc<MmapRegion>,
    /// KVM can keep writes to ports and registers, see [`coalesced`] (Linux 5.0).
    pub(crate) coalesces: bool,
    /// What is specific to this architecture.
    pub(crate) own: vm::Own,
}

impl Vm {
    /// The virtual machine `fd`, with its memory and interrupt controllers. If it `logs`, what
    /// vCPUs and KVM write to memory is logged from the beginning.
    ///
    /// # Errors
    /// When KVM refuses a step.
    pub fn new(
        kvm: &Kvm,
        fd: VmFd,
        memory: &Memory,
        window: &Arc<MmapRegion>,
        logs: bool,
    ) -> Result<Self, KvmError> {
        let own = vm::before_memory(kvm, &fd)?;
        let coalesces = kvm.check_extension(Cap::CoalescedPio);
        let fd = Arc::new(fd);
        let vm = Self { fd, memory: memory.clone(), _window: window.clone(), coalesces, own };
        let mut slot = 0;
        let flags = if logs { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        for region in memory.iter() {
            vm.map(slot, region.start_addr().raw_value(), region.as_ptr(), region.len(), flags)?;
            slot += 1;
        }
        let size = window.size() as u64;
        vm.map(slot, layout::VIRTIO_MMIO, window.as_ptr(), size, KVM_MEM_READONLY)?;
        vm::after_memory(&vm.fd)?;
        Ok(vm)
    }

    /// Start or stop logging the pages of guest memory that vCPUs write.
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

    /// The pages that the vCPUs have written since the last call, with a bit per page for each
    /// region of memory; clears the log.
    ///
    /// # Errors
    /// When KVM refuses, as it does when logging is off.
    pub fn dirty(&self) -> Result<Vec<Vec<u64>>, KvmError> {
        (0..)
            .zip(self.memory.iter())
            .map(|(slot, region)| self.fd.get_dirty_log(slot, region.size()))
            .collect::<Result<_, _>>()
            .map_err(refused("report which pages the guest has written"))
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

    /// Make an edge on `line` raise `gsi` in the guest.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn bind_line(&self, line: &Line, gsi: u32) -> Result<(), KvmError> {
        self.fd.register_irqfd(line.eventfd(), gsi).map_err(refused("bind an interrupt line"))
    }

    /// Unbind `line` from `gsi`: an eventfd can belong to one machine at a time.
    ///
    /// # Errors
    /// When it was not bound.
    pub fn unbind_line(&self, line: &Line, gsi: u32) -> Result<(), KvmError> {
        self.fd.unregister_irqfd(line.eventfd(), gsi).map_err(refused("unbind an interrupt line"))
    }

    /// Make a 32-bit guest write of `value` to `address` signal `eventfd` without an exit.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn bind_write(&self, address: u64, value: u32, eventfd: &EventFd) -> Result<(), KvmError> {
        self.fd
            .register_ioevent(eventfd, &IoEventAddress::Mmio(address), value)
            .map_err(refused("bind a notification register"))
    }

    /// Keep guest writes to the `len` bytes of ports or addresses from `at` on, see [`coalesced`].
    /// Where KVM cannot do that, they exit as all others do.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn keep_writes(&self, at: IoEventAddress, len: u32) -> Result<(), KvmError> {
        if !self.coalesces {
            return Ok(());
        }
        self.fd.register_coalesced_mmio(at, len).map_err(refused("keep writes to a register"))
    }
}
