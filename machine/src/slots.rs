//! The virtio-mmio slots. All of them exist from the start and never move: a hot-plugged disk or
//! NIC fills an empty one, as in StratoVirt's microVM.
use std::{io, sync::Arc, time::Duration};

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
            INTERRUPT_ACK, QUEUE_NOTIFY, REMEMBERED, Transport,
            registers::{PAGE, Registers},
        },
    },
};
use kvm_ioctls::IoEventAddress;
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
    /// A saved slot has other queues than its device here.
    #[error(
        "slot {id} was saved with queues of {seen:?} descriptors; this program gives it {has:?}"
    )]
    Queues {
        /// The slot.
        id: String,
        /// The queue sizes that its guest has seen.
        seen: Vec<u16>,
        /// The queue sizes of its device here.
        has: Vec<u16>,
    },
    /// Two slots at one address.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The process has no descriptors left.
    #[error("cannot create an eventfd")]
    EventFd(#[from] io::Error),
}

/// All virtio devices, by slot.
pub struct Slots {
    slots: Vec<Slot>,
    /// Places of the slots still to be added.
    places: std::vec::IntoIter<Place>,
    window: Arc<MmapRegion>,
    memory: Memory,
    /// Receives the acknowledgements of used-buffer interrupts, which need no action: see
    /// [`devices::virtio::mmio::registers`]. It is never read.
    acknowledged: EventFd,
}

struct Slot {
    place: Place,
    queue_sizes: Vec<u16>,
    device: Shared,
    line: Line,
    notifiers: Arc<[EventFd]>,
    thread: Arc<io_thread::Handle>,
}

/// How long to wait for a device that its guest may be resetting.
pub(crate) const DEVICE_LOCK_LIMIT: Duration = Duration::from_millis(20);

/// A device in a slot, for code that knows its type.
pub(crate) type Handle<D> = Arc<Mutex<Transport<D>>>;

impl Slots {
    /// No slots yet; they will be at `places`, over register pages in `window`.
    pub(crate) fn new(
        places: Vec<Place>,
        window: Arc<MmapRegion>,
        memory: Memory,
    ) -> io::Result<Self> {
        let acknowledged = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let places = places.into_iter();
        Ok(Self { slots: Vec::new(), places, window, memory, acknowledged })
    }

    /// A window with a register page for each of `places`, and at least one page: KVM maps no empty
    /// range.
    pub(crate) fn window(places: &[Place]) -> io::Result<Arc<MmapRegion>> {
        let pages = places.iter().map(|place| page(place.at) + 1).max().unwrap_or(1);
        MmapRegion::new(pages * PAGE).map(Arc::new).map_err(io::Error::other)
    }

    /// Put `device` into the next slot.
    pub(crate) fn add<D: VirtioDevice + ?Sized>(
        &mut self,
        mmio: &mut BusBuilder,
        device: Box<D>,
        thread: Arc<io_thread::Handle>,
    ) -> Result<Handle<D>, SlotError> {
        let place = self.places.next().ok_or(SlotError::TooMany)?;
        let has = device.queue_sizes().to_vec();
        if let Some(seen) = place.queue_sizes.as_ref().filter(|seen| **seen != has) {
            return Err(SlotError::Queues { id: place.id, seen: seen.clone(), has });
        }
        let base = u64::from(place.at.address);
        let registers =
            Registers::new(self.window.clone(), page(place.at)).ok_or(SlotError::TooMany)?;
        let (memory, line) = (self.memory.clone(), Line::new()?);
        let transport = Transport::new(device, memory, registers, line.clone(), thread.clone())?;
        let notifiers = transport.notifiers().clone();
        let transport = Arc::new(Mutex::new(transport));
        mmio.attach(base, VIRTIO_MMIO_STEP, transport.clone())?;
        let device = transport.clone();
        self.slots.push(Slot { place, queue_sizes: has, device, line, notifiers, thread });
        Ok(transport)
    }

    /// Connect notifications and interrupts of all slots to `vm`.
    pub(crate) fn bind(&self, vm: &Vm) -> Result<(), KvmError> {
        for slot in &self.slots {
            let base = u64::from(slot.place.at.address);
            vm.bind_line(&slot.line, slot.place.at.irq)?;
            for (offset, len) in REMEMBERED {
                vm.keep_writes(IoEventAddress::Mmio(base + offset as u64), len)?;
            }
            vm.bind_write(base + INTERRUPT_ACK as u64, INT_USED, &self.acknowledged)?;
            for (queue, notifier) in (0u32..).zip(&*slot.notifiers) {
                vm.bind_write(base + QUEUE_NOTIFY as u64, queue, notifier)?;
            }
        }
        Ok(())
    }

    /// Undo [`Slots::bind`] as far as needed to bind another machine.
    pub(crate) fn unbind(&self, vm: &Vm) -> Result<(), KvmError> {
        let unbind = |s: &Slot| vm.unbind_line(&s.line, s.place.at.irq);
        self.slots.iter().try_for_each(unbind)
    }

    /// The register pages.
    pub(crate) fn register_window(&self) -> &Arc<MmapRegion> {
        &self.window
    }

    /// The slots as the guest's boot data list them.
    pub(crate) fn boot_list(&self) -> Vec<VirtioSlot> {
        self.slots.iter().map(|s| s.place.at).collect()
    }

    /// All of them, as devices, with their ids.
    pub(crate) fn devices(&self) -> impl Iterator<Item = (&str, Shared)> {
        self.slots.iter().map(|s| (s.place.id.as_str(), s.device.clone()))
    }

    /// Where they are, and the queues that the guest has seen there.
    pub(crate) fn places(&self) -> impl Iterator<Item = (&Place, &[u16])> {
        self.slots.iter().map(|s| (&s.place, &*s.queue_sizes))
    }

    /// The queues that the guest has seen in slot `index`.
    pub(crate) fn queue_sizes(&self, index: usize) -> &[u16] {
        self.slots.get(index).map_or(&[], |slot| &slot.queue_sizes)
    }

    /// The thread that runs the worker of slot `index`.
    pub(crate) fn thread(&self, index: usize) -> Option<&io_thread::Handle> {
        self.slots.get(index).map(|s| &*s.thread)
    }
}

/// Index of the slot's page in the window.
fn page(at: VirtioSlot) -> usize {
    let offset = u64::from(at.address).saturating_sub(VIRTIO_MMIO);
    usize::try_from(offset / VIRTIO_MMIO_STEP).unwrap_or(usize::MAX)
}
