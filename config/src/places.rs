//! The virtio-mmio slots: the name of each in a saved state, and its address and interrupt.
use crate::MachineConfig;

/// First virtio-mmio register page; one page per slot.
pub const VIRTIO_MMIO: u64 = 0xf010_0000;
/// Bytes per slot.
pub const VIRTIO_MMIO_STEP: u64 = 0x1000;
/// Interrupts of the virtio-mmio slots, in order of slots. 0 to 4, 8 and 9 have other uses.
pub const VIRTIO_IRQS: [u32; 18] =
    [5, 6, 7, 10, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 13, 3];

/// A virtio-mmio slot as described to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VirtioSlot {
    /// First byte of its register page, below 4 GiB.
    pub address: u32,
    /// Its interrupt: global system interrupt and IOAPIC pin.
    pub irq: u32,
}

/// A slot, without its device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Its name in a saved state.
    pub id: String,
    /// Its address and interrupt.
    pub at: VirtioSlot,
    /// For a restored machine, the queue sizes that the guest has seen there.
    pub queue_sizes: Option<Vec<u16>>,
}

/// The slots of a new machine: those for disks, those for NICs, and those of the other devices.
pub fn at_start(config: &MachineConfig) -> Vec<Place> {
    let disks = (0..config.slots.disks()).map(|slot| format!("{DISK}{slot}"));
    let nics = (0..config.slots.nics()).map(|slot| format!("{NIC}{slot}"));
    let others = config.devices.iter().map(|device| device.facts().slot().to_owned());
    let ids = disks.chain(nics).chain(others);
    let addresses = (0..).map(|index| VIRTIO_MMIO + index * VIRTIO_MMIO_STEP);
    let at = addresses.zip(VIRTIO_IRQS).filter_map(|(address, irq)| {
        Some(VirtioSlot { address: u32::try_from(address).ok()?, irq })
    });
    ids.zip(at).map(|(id, at)| Place { id, at, queue_sizes: None }).collect()
}

/// Prefix of the ids of slots for disks.
pub const DISK: &str = "disk";
/// Prefix of the ids of slots for NICs.
pub const NIC: &str = "nic";
