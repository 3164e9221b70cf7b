//! The slots of a saved machine, and what fits into them.
use std::path::PathBuf;

use state::{config as saved, hex::Hex};

use super::{DescriptionError, checked};
use crate::{
    Aio, DeviceConfig, DiskConfig, Expect, NicConfig, Tap,
    places::{DISK, NIC, Place, VIRTIO_IRQS, VIRTIO_MMIO, VIRTIO_MMIO_STEP, VirtioSlot},
    types::Id,
};

/// A slot's position in the builder's order.
pub(super) fn order(slot: &saved::Slot) -> Result<(u8, usize), DescriptionError> {
    let number = |prefix: &str| {
        let number = slot.id.strip_prefix(prefix)?.parse().ok()?;
        (slot.id == format!("{prefix}{number}")).then_some(number)
    };
    let order = match &slot.contents {
        saved::Contents::Disk(_) => number(DISK).map(|n| (0, n)),
        saved::Contents::Nic(_) => number(NIC).map(|n| (1, n)),
        other => DeviceConfig::restored(other, None)?
            .filter(|device| device.facts().slot() == slot.id)
            .map(|device| (2 + device.order(), 0)),
    };
    order.ok_or_else(|| failed(slot, "this kind of slot cannot hold its contents".into()))
}

/// Check that each slot exists once, none is missing, and no two are at one address.
pub(super) fn check_places(slots: &[((u8, usize), &saved::Slot)]) -> Result<(), DescriptionError> {
    let mut before: Option<(u8, usize)> = None;
    for (order @ (kind, number), slot) in slots {
        let expected = match before {
            Some((same, last)) if same == *kind => last + 1,
            _ => 0,
        };
        if *number != expected {
            return Err(failed(slot, "it is duplicated, or the one before it is missing".into()));
        }
        before = Some(*order);
    }
    for (index, (_, slot)) in slots.iter().enumerate() {
        let mut others = slots.iter().take(index);
        let shared = others
            .find(|(_, other)| other.address == slot.address || other.interrupt == slot.interrupt);
        if let Some((_, other)) = shared {
            return Err(failed(
                slot,
                format!("its address or interrupt is also that of {}", other.id),
            ));
        }
    }
    Ok(())
}

pub(super) fn place(slot: &saved::Slot) -> Result<Place, DescriptionError> {
    let Hex(address) = slot.address;
    let end = VIRTIO_MMIO + VIRTIO_IRQS.len() as u64 * VIRTIO_MMIO_STEP;
    let inside = (VIRTIO_MMIO..end).contains(&address) && address.is_multiple_of(VIRTIO_MMIO_STEP);
    if !inside || !VIRTIO_IRQS.contains(&slot.interrupt) {
        let what = format!("no slot is at address {address:#x} with interrupt {}", slot.interrupt);
        return Err(failed(slot, what));
    }
    let address = u32::try_from(address).map_err(|_| failed(slot, "address".into()))?;
    let at = VirtioSlot { address, irq: slot.interrupt };
    let queue_sizes = Some(slot.queue_sizes.clone());
    Ok(Place { id: slot.id.clone(), at, queue_sizes })
}

/// The queues of a slot for disks, as those of a disk that was there at the start.
pub(super) fn disk_shape(slot: &saved::Slot) -> Result<DiskConfig, DescriptionError> {
    let (queues, queue_size) = same_size(slot, &slot.queue_sizes)?;
    let queues = checked("queues of a disk", queues)?;
    let queue_size = checked("queue size of a disk", queue_size)?;
    Ok(DiskConfig {
        id: checked("slot", slot.id.clone())?,
        path: PathBuf::new(),
        readonly: false,
        direct: false,
        serial: None,
        aio: Aio::Auto,
        discard: false,
        iops: None,
        bps: None,
        queues,
        queue_size,
        iothread: iothread(slot)?,
        backend: None,
        probe: false,
        expect: Expect::Saved,
    })
}

/// The queues of a slot for NICs: two for each pair, and one for control.
pub(super) fn nic_shape(slot: &saved::Slot) -> Result<NicConfig, DescriptionError> {
    let data = slot.queue_sizes.split_last().map_or(&[][..], |(_, data)| data);
    let (queues, queue_size) = same_size(slot, data)?;
    if !queues.is_multiple_of(2) {
        return Err(failed(slot, format!("{} queues", slot.queue_sizes.len())));
    }
    let queue_pairs = checked("queue pairs of a NIC", queues / 2)?;
    let queue_size = checked("queue size of a NIC", queue_size)?;
    Ok(NicConfig {
        id: checked("slot", slot.id.clone())?,
        tap: Tap::Fds(Vec::new()),
        mac: None,
        queue_pairs,
        queue_size,
        pps: None,
        bps: None,
        iothread: iothread(slot)?,
        backend: None,
    })
}

pub(super) fn iothread(slot: &saved::Slot) -> Result<Option<Id>, DescriptionError> {
    slot.iothread.clone().map(|id| checked("I/O thread", id)).transpose()
}

/// The number of queues, and their size, which must be the same for all.
fn same_size(slot: &saved::Slot, sizes: &[u16]) -> Result<(u16, u16), DescriptionError> {
    let count = u16::try_from(sizes.len()).ok();
    match (sizes.first(), count) {
        (Some(size), Some(count)) if sizes.iter().all(|other| other == size) => Ok((count, *size)),
        _ => Err(failed(slot, format!("queues of {:.99?} descriptors", slot.queue_sizes))),
    }
}

fn failed(slot: &saved::Slot, what: String) -> DescriptionError {
    DescriptionError::Slot { id: slot.id.clone(), what }
}
