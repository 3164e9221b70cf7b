//! The virtio-mmio slots. All of them exist from the start and never move: a hot-plugged disk or
//! NIC fills one that is empty, as StratoVirt's microVM does it.
use std::{io, sync::Arc};

use devices::{
    Memory,
    bus::{BusBuilder, BusError},
    irq::Line,
    virtio::{
        VirtioDevice,
        mmio::{INTERRUPT_ACK, QUEUE_NOTIFY, Transport},
        registers::{INT_USED, PAGE, Registers},
    },
};
use parking_lot::Mutex;
use vm_memory::MmapRegion;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::{
    boot::VirtioSlot,
    config::limits::VIRTIO_SLOTS,
    io_thread,
    kvm::{KvmError, Vm},
    layout::{VIRTIO_IRQS, VIRTIO_MMIO, VIRTIO_MMIO_STEP},
    machine::Shared,
};

/// Why a slot could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// There are no more interrupts for virtio-mmio.
    #[error("too many virtio devices: at most {VIRTIO_SLOTS}")]
    TooMany,
    /// Two slots at one address.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The process has no descriptors left.
    #[error("cannot make an eventfd")]
    EventFd(#[from] io::Error),
}

/// All virtio devices, by slot.
pub struct Slots {
    slots: Vec<Slot>,
    window: Arc<MmapRegion>,
    memory: Memory,
    /// Takes the acknowledgements of used-buffer interrupts, which mean nothing: see
    /// [`devices::virtio::registers`]. Nobody ever reads it.
    acknowledged: EventFd,
}

struct Slot {
    transport: Arc<Mutex<Transport>>,
    thread: Arc<io_thread::Handle>,
    at: VirtioSlot,
}

impl Slots {
    /// No slots yet, over register pages in `window`.
    pub(crate) fn new(window: Arc<MmapRegion>, memory: Memory) -> io::Result<Self> {
        let acknowledged = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self { slots: Vec::new(), window, memory, acknowledged })
    }

    /// A window with a register page for each of `count` slots, and one page at least: KVM maps no
    /// empty range.
    pub(crate) fn window(count: usize) -> io::Result<Arc<MmapRegion>> {
        MmapRegion::new(count.max(1) * PAGE).map(Arc::new).map_err(io::Error::other)
    }

    /// Put `device` into the next slot.
    pub(crate) fn add(
        &mut self,
        mmio: &mut BusBuilder,
        device: Box<dyn VirtioDevice>,
        thread: Arc<io_thread::Handle>,
    ) -> Result<(), SlotError> {
        let index = self.slots.len();
        let irq = *VIRTIO_IRQS.get(index).ok_or(SlotError::TooMany)?;
        let base = VIRTIO_MMIO + index as u64 * VIRTIO_MMIO_STEP;
        let at = VirtioSlot { address: u32::try_from(base).map_err(|_| SlotError::TooMany)?, irq };
        let registers = Registers::new(self.window.clone(), index).ok_or(SlotError::TooMany)?;
        let (memory, line) = (self.memory.clone(), Line::new()?);
        let transport = Transport::new(device, memory, registers, line, thread.clone())?;
        let transport = Arc::new(Mutex::new(transport));
        mmio.attach(base, VIRTIO_MMIO_STEP, transport.clone())?;
        self.slots.push(Slot { transport, thread, at });
        Ok(())
    }

    /// Let `vm` carry notifications and interrupts of all slots.
    pub(crate) fn bind(&self, vm: &Vm) -> Result<(), KvmError> {
        for slot in &self.slots {
            let transport = slot.transport.lock();
            let base = u64::from(slot.at.address);
            vm.bind_line(transport.line(), slot.at.irq)?;
            vm.bind_write(base + INTERRUPT_ACK as u64, INT_USED, &self.acknowledged)?;
            for (queue, notifier) in (0u32..).zip(transport.notifiers()) {
                vm.bind_write(base + QUEUE_NOTIFY as u64, queue, notifier)?;
            }
        }
        Ok(())
    }

    /// The end of [`Slots::bind`], as far as another machine could not be bound otherwise.
    pub(crate) fn unbind(&self, vm: &Vm) -> Result<(), KvmError> {
        let unbind = |s: &Slot| vm.unbind_line(s.transport.lock().line(), s.at.irq);
        self.slots.iter().try_for_each(unbind)
    }

    /// The register pages.
    pub(crate) fn register_window(&self) -> &Arc<MmapRegion> {
        &self.window
    }

    /// What the guest is told of them.
    pub(crate) fn boot_list(&self) -> Vec<VirtioSlot> {
        self.slots.iter().map(|s| s.at).collect()
    }

    /// All of them, as devices.
    pub(crate) fn devices(&self) -> impl Iterator<Item = Shared> {
        self.slots.iter().map(|s| s.transport.clone() as Shared)
    }

    /// The transport in slot `index`, and the thread that carries its worker.
    pub(crate) fn get(&self, index: usize) -> Option<(&Mutex<Transport>, &io_thread::Handle)> {
        self.slots.get(index).map(|s| (&*s.transport, &*s.thread))
    }
}
