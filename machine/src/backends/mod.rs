//! Back-ends of hot-pluggable devices: opened, waiting for a slot, or in one.
//!
//! Each kind of device has a [`Bay`]. Plugging and unplugging for all kinds is here; what is
//! specific to a kind is in its own file.
mod bay;
mod disks;
mod nics;
#[cfg(test)]
mod tests;

use std::{io, path::PathBuf};

use config::{Occupancy, types::Id};
use devices::{
    backend::{disk::DiskError, net::tap::TapError},
    virtio::{
        blk::{self, Block},
        net::{self, Net},
    },
};

pub use self::disks::{OpenDisk, PluggedDisk};
use self::{
    bay::{Bay, Kind, MAX_WAITING, Open},
    disks::Disks,
    nics::Nics,
};
pub(crate) use self::{
    disks::{limited, open, options, same_file},
    nics::tap,
};
use crate::{Machine, RunError, slots::Handle};

/// The kinds of slots, in StratoVirt's words.
const BLOCK: &str = "block";
const NET: &str = "net";

/// Why a back-end or device could not be added or removed.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the error messages describe them")]
pub enum PlugError {
    #[error("{0} is already registered.")]
    Duplicate(String),
    #[error("Failed to find device configuration: no unused back-end is called '{0}'")]
    NoBackend(String),
    #[error("Device {0} not found")]
    NoDevice(String),
    #[error("'{0}' is in use; unplug its device first, with device_del")]
    InUse(String),
    #[error("The slot {0} is occupied already.")]
    Occupied(usize),
    #[error("A maximum of {max} {what} replaceable devices are supported: addr is 0 to {}", max - 1)]
    NoSlot { what: &'static str, max: usize },
    #[error(
        "All {max} {what} slots are occupied; unplug a device first, with device_del, or start the \
         machine with more: -machine {}=N",
        key(what)
    )]
    Full { what: &'static str, max: usize },
    #[error("This machine has no {what} slots; start it with some: -machine {}=N", key(what))]
    NoSlots { what: &'static str },
    #[error(
        "{MAX_WAITING} back-ends are unused already; remove some with blockdev-del or netdev_del"
    )]
    TooManyWait,
    #[error(
        "{} is already the image of '{id}' in this machine; remove that first, with device_del or \
         blockdev-del, or make both read-only",
        path.display()
    )]
    OwnImage { path: PathBuf, id: String },
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Tap(#[from] TapError),
    #[error(transparent)]
    Block(#[from] blk::PlugError),
    #[error(transparent)]
    Net(#[from] net::PlugError),
    #[error("{id}: its I/O thread does not answer")]
    Thread { id: String, source: io::Error },
    #[error(transparent)]
    Run(#[from] RunError),
}

/// What the driver of a slot has seen since it started, whichever device is plugged in.
pub struct Shape {
    /// Descriptors of each queue.
    pub queue_sizes: Vec<u16>,
    /// The I/O thread by its configured name; `None`: the default one.
    pub iothread: Option<Id>,
}

/// The bays, one per kind.
pub(crate) struct Backends {
    disks: Bay<Disks>,
    nics: Bay<Nics>,
}

impl Backends {
    /// The slots of a machine, which begin with those for disks, then those for NICs, and their
    /// contents.
    pub fn new(occupied: &Occupancy, disks: Vec<Handle<Block>>, nics: Vec<Handle<Net>>) -> Self {
        let first_nic = disks.len();
        Self {
            disks: Bay::new(0, disks, &occupied.disks),
            nics: Bay::new(first_nic, nics, &occupied.nics),
        }
    }

    /// The current contents of the slots.
    pub fn occupancy(&self) -> Occupancy {
        Occupancy { disks: self.disks.configs(), nics: self.nics.configs() }
    }

    fn knows(&self, name: &str) -> bool {
        self.disks.knows(name) || self.nics.knows(name)
    }
}

/// The configuration key that sets the number of slots for `what`.
fn key(what: &str) -> &'static str {
    if what == BLOCK { "disk-slots" } else { "nic-slots" }
}

impl Machine {
    /// Whether a device or back-end has this name.
    fn knows(&self, name: &str) -> bool {
        let mut others = self.config.devices.iter();
        self.backends.knows(name) || others.any(|device| *device.facts().id() == *name)
    }

    /// Check the id of a new device: it must be its back-end's name, or unused.
    fn check_id(&self, id: &str, backend: &str) -> Result<(), PlugError> {
        match id != backend && self.knows(id) {
            true => Err(PlugError::Duplicate(id.into())),
            false => Ok(()),
        }
    }

    /// Check that a back-end of this name can be added.
    fn admits<K: Kind>(&self, name: &str) -> Result<(), PlugError> {
        if self.knows(name) {
            return Err(PlugError::Duplicate(name.into()));
        }
        K::bay(&self.backends).has_room()
    }

    fn shape<K: Kind>(&self, slot: usize, iothread: Option<&Id>) -> Result<Shape, PlugError> {
        let (index, _) = K::bay(&self.backends).locate(slot)?;
        let queue_sizes = self.slots.queue_sizes(index).to_vec();
        Ok(Shape { queue_sizes, iothread: iothread.cloned() })
    }

    /// Change the device in slot `slot` of a kind, as [`Machine::change`] does.
    fn change_slot<K: Kind, R>(
        &mut self,
        slot: usize,
        change: impl FnOnce(&mut K::Device) -> R,
    ) -> Result<R, PlugError> {
        let (index, device) = K::bay(&self.backends).locate(slot)?;
        let device = device.clone();
        Ok(self.change(index, &device, change)?)
    }

    /// Put the back-end `backend` into slot `slot`, as the device `id`; `edit` completes its
    /// configuration.
    ///
    /// # Errors
    /// When there is no such back-end or slot, another device has the id, or the device cannot use
    /// the back-end: it then still waits. When the host lacks a resource that the device needs: the
    /// back-end is then closed.
    fn plug<K: Kind>(
        &mut self,
        id: &Id,
        backend: &str,
        slot: usize,
        edit: impl FnOnce(&mut K::Config),
    ) -> Result<(), PlugError> {
        self.check_id(id, backend)?;
        let mut waiting = Some(K::bay_mut(&mut self.backends).take(backend, slot)?);
        let plugged = self.change_slot::<K, _>(slot, |device| {
            if let Some(open) = &waiting {
                K::accepts(device, &open.backend)?;
            }
            let Some(Open { mut config, backend: open }) = waiting.take() else { return Ok(None) };
            edit(&mut config);
            K::rename(&mut config, id.clone());
            K::plug(device, &config, open)?;
            Ok::<_, PlugError>(Some((config, K::status(device))))
        });
        let bay = K::bay_mut(&mut self.backends);
        if let Some(open) = waiting {
            bay.add(open);
        }
        if let Some((config, status)) = plugged?? {
            bay.occupy(slot, config, status);
        }
        Ok(())
    }

    /// Take the device `id` out of slot `slot`; its back-end waits again, or is returned.
    fn unplug_from<K: Kind>(
        &mut self,
        id: &str,
        slot: usize,
    ) -> Result<Option<Open<K>>, PlugError> {
        let (backend, status) = self.change_slot::<K, _>(slot, |device| {
            let backend = K::unplug(device, id)?;
            Ok::<_, PlugError>((backend, K::status(device)))
        })??;
        let bay = K::bay_mut(&mut self.backends);
        let (Some(backend), Some(mut config)) = (backend, bay.vacate(slot, status)) else {
            return Ok(None);
        };
        let waits = K::detach(&mut config);
        let open = Open { backend: K::refit(backend, &config), config };
        if !waits {
            return Ok(Some(open));
        }
        bay.add(open);
        Ok(None)
    }

    /// Take the device `id` out of its slot. Its back-end goes with it if it has the same name;
    /// otherwise it waits again. Requests in flight are finished first. The caller drops a disk
    /// that is returned.
    ///
    /// # Errors
    /// When no slot holds it, or its storage hangs.
    pub fn unplug(&mut self, id: &str) -> Result<Option<OpenDisk>, PlugError> {
        if let Some(slot) = self.backends.disks.find(id) {
            return Ok(self.unplug_from::<Disks>(id, slot)?.map(OpenDisk::from));
        }
        let slot = self.backends.nics.find(id).ok_or_else(|| PlugError::NoDevice(id.into()))?;
        self.unplug_from::<Nics>(id, slot)?;
        Ok(None)
    }
}
