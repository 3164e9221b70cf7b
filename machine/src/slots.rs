//! The virtio-mmio slots. All of them exist from the start and never move: a hot-plugged disk or
//! NIC fills one that is empty, as StratoVirt's microVM does it.
use std::{io, sync::Arc};

use config::{
    limits::VIRTIO_SLOTS,
    places::{Place, VirtioSlot},
};
use devices::{
    Memory,
    bus::{BusBuilder, BusError},
    irq::Line,
    virtio::{
        VirtioDevice,
        interrupt::INT_USED,
        mmio::{
            INTERRUPT_ACK, QUEUE_NOTIFY, Transport,
            registers::{PAGE, Registers},
        },
    },
};
use parking_lot::Mutex;
use vm_memory::MmapRegion;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::{
    io_thread,
    kvm::{KvmError, Vm},
    layout::{VIRTIO_MMIO, VIRTIO_MMIO_STEP},
    machine::Shared,
};

/// Why a slot could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// There are no more interrupts for virtio-mmio.
    #[error("too many virtio devices: at most {VIRTIO_SLOTS}")]
    TooMany,
    /// A slot that was saved with queues that its device does not have.
    #[error(
        "slot {id} was saved with queues of {seen:?} descriptors; this program gives it {has:?}"
    )]
    Queues {
        /// The slot.
        id: String,
        /// What its guest has seen.
        seen: Vec<u16>,
        /// What its device has here.
        has: Vec<u16>,
    },
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
    /// [`devices::virtio::mmio::registers`]. Nobody ever reads it.
    acknowledged: EventFd,
}

struct Slot {
    place: Place,
    queue_sizes: Vec<u16>,
    transport: Arc<Mutex<Transport>>,
    thread: Arc<io_thread::Handle>,
}

impl Slots {
    /// No slots yet, over register pages in `window`.
    pub(crate) fn new(window: Arc<MmapRegion>, memory: Memory) -> io::Result<Self> {
        let acknowledged = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self { slots: Vec::new(), window, memory, acknowledged })
    }

    /// A window with a register page for each of `places`, and one page at least: KVM maps no empty
    /// range.
    pub(crate) fn window(places: &[Place]) -> io::Result<Arc<MmapRegion>> {
        let pages = places.iter().map(|place| page(place.at) + 1).max().unwrap_or(1);
        MmapRegion::new(pages * PAGE).map(Arc::new).map_err(io::Error::other)
    }

    /// Put `device` into a slot at `place`.
    pub(crate) fn add(
        &mut self,
        mmio: &mut BusBuilder,
        place: Place,
        device: Box<dyn VirtioDevice>,
        thread: Arc<io_thread::Handle>,
    ) -> Result<(), SlotError> {
        let has = device.queue_sizes().to_vec();
        if let Some(seen) = place.queue_sizes.as_ref().filter(|seen| **seen != has) {
            return Err(SlotError::Queues { id: place.id, seen: seen.clone(), has });
        }
        let base = u64::from(place.at.address);
        let registers =
            Registers::new(self.window.clone(), page(place.at)).ok_or(SlotError::TooMany)?;
        let (memory, line) = (self.memory.clone(), Line::new()?);
        let transport = Transport::new(device, memory, registers, line, thread.clone())?;
        let transport = Arc::new(Mutex::new(transport));
        mmio.attach(base, VIRTIO_MMIO_STEP, transport.clone())?;
        self.slots.push(Slot { place, queue_sizes: has, transport, thread });
        Ok(())
    }

    /// Let `vm` carry notifications and interrupts of all slots.
    pub(crate) fn bind(&self, vm: &Vm) -> Result<(), KvmError> {
        for slot in &self.slots {
            let transport = slot.transport.lock();
            let base = u64::from(slot.place.at.address);
            vm.bind_line(transport.line(), slot.place.at.irq)?;
            vm.bind_write(base + INTERRUPT_ACK as u64, INT_USED, &self.acknowledged)?;
            for (queue, notifier) in (0u32..).zip(transport.notifiers()) {
                vm.bind_write(base + QUEUE_NOTIFY as u64, queue, notifier)?;
            }
        }
        Ok(())
    }

    /// The end of [`Slots::bind`], as far as another machine could not be bound otherwise.
    pub(crate) fn unbind(&self, vm: &Vm) -> Result<(), KvmError> {
        let unbind = |s: &Slot| vm.unbind_line(s.transport.lock().line(), s.place.at.irq);
        self.slots.iter().try_for_each(unbind)
    }

    /// The register pages.
    pub(crate) fn register_window(&self) -> &Arc<MmapRegion> {
        &self.window
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.slots.len()
    }

    /// What the guest is told of them.
    pub(crate) fn boot_list(&self) -> Vec<VirtioSlot> {
        self.slots.iter().map(|s| s.place.at).collect()
    }

    /// All of them, as devices, with their ids.
    pub(crate) fn devices(&self) -> impl Iterator<Item = (&str, Shared)> {
        self.slots.iter().map(|s| (s.place.id.as_str(), s.transport.clone() as Shared))
    }

    /// Where they are, and the queues that the guest has seen there.
    pub(crate) fn places(&self) -> impl Iterator<Item = (&Place, &[u16])> {
        self.slots.iter().map(|s| (&s.place, &*s.queue_sizes))
    }

    /// The queues that the guest has seen in slot `index`.
    pub(crate) fn queue_sizes(&self, index: usize) -> &[u16] {
        self.slots.get(index).map_or(&[], |slot| &slot.queue_sizes)
    }

    /// The transport in slot `index`, and the thread that carries its worker.
    pub(crate) fn get(&self, index: usize) -> Option<(&Mutex<Transport>, &io_thread::Handle)> {
        self.slots.get(index).map(|s| (&*s.transport, &*s.thread))
    }
}

/// Which page of the window belongs to a slot there.
fn page(at: VirtioSlot) -> usize {
    let offset = u64::from(at.address).saturating_sub(VIRTIO_MMIO);
    usize::try_from(offset / VIRTIO_MMIO_STEP).unwrap_or(usize::MAX)
}
