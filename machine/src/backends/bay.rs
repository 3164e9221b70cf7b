//! A bay: the slots for one kind of device, and the back-ends that wait for one of them.
use std::{collections::BTreeMap, iter};

use config::types::Id;
use devices::virtio::VirtioDevice;

use super::PlugError;
use crate::{backends::Backends, slots::Handle};

/// Most back-ends of a kind that may wait for a device.
pub(super) const MAX_WAITING: usize = 16;

/// A kind of device that can be plugged while the machine runs.
pub(super) trait Kind: Sized {
    /// The configuration of a device and its back-end.
    type Config: Clone;
    /// The back-end of a device.
    type Backend;
    /// The device in each slot.
    type Device: VirtioDevice;
    /// What can be reported of a device without locking it.
    type Status;

    /// StratoVirt's word for its slots.
    const NAME: &'static str;

    /// Its bay.
    fn bay(backends: &Backends) -> &Bay<Self>;
    /// As [`Kind::bay`].
    fn bay_mut(backends: &mut Backends) -> &mut Bay<Self>;

    /// The device's id.
    fn id(config: &Self::Config) -> &str;
    /// The back-end's name: the id, if it has none of its own.
    fn backend_name(config: &Self::Config) -> &str;
    /// Name the device `id`; its back-end, from which it had its name, keeps that.
    fn rename(config: &mut Self::Config, id: Id);
    /// The device is gone: keep what belongs to the back-end, if that has a name of its own. False
    /// if it has none, and goes with its device.
    fn detach(config: &mut Self::Config) -> bool;

    /// `backend` set up as `config` says.
    fn refit(backend: Self::Backend, config: &Self::Config) -> Self::Backend;

    /// The status of `device` from now on.
    fn status(device: &Self::Device) -> Self::Status;
    /// Whether `device` can have `backend`.
    fn accepts(device: &Self::Device, backend: &Self::Backend) -> Result<(), PlugError>;
    /// Put `backend` into the empty slot of `device`.
    fn plug(
        device: &mut Self::Device,
        config: &Self::Config,
        backend: Self::Backend,
    ) -> Result<(), PlugError>;
    /// Take the back-end of `device`, called `id`, out of its slot.
    fn unplug(device: &mut Self::Device, id: &str) -> Result<Option<Self::Backend>, PlugError>;
}

/// An open back-end, and its configuration.
pub(super) struct Open<K: Kind> {
    pub config: K::Config,
    pub backend: K::Backend,
}

/// The slots for devices of a kind.
pub(super) struct Bay<K: Kind> {
    /// Index of the first slot among all slots of the machine.
    first: usize,
    waiting: BTreeMap<String, Open<K>>,
    slots: Vec<Slot<K>>,
}

struct Slot<K: Kind> {
    device: Handle<K::Device>,
    /// The device in the slot.
    config: Option<K::Config>,
    status: K::Status,
}

/// A device in a slot.
pub(super) struct Occupied<'a, K: Kind> {
    pub config: &'a K::Config,
    pub status: &'a K::Status,
    pub device: &'a Handle<K::Device>,
}

impl<K: Kind> Bay<K> {
    /// A bay with `devices`, the first of which is slot `first` of the machine, and their
    /// configurations.
    pub fn new(
        first: usize,
        devices: Vec<Handle<K::Device>>,
        occupied: &[Option<K::Config>],
    ) -> Self {
        let configs = occupied.iter().cloned().chain(iter::repeat(None));
        let slots = devices.into_iter().zip(configs).map(|(device, config)| {
            let status = K::status(device.lock().device());
            Slot { device, config, status }
        });
        Self { first, waiting: BTreeMap::new(), slots: slots.collect() }
    }

    /// The configuration in each slot.
    pub fn configs(&self) -> Vec<Option<K::Config>> {
        self.slots.iter().map(|slot| slot.config.clone()).collect()
    }

    /// The status of each slot.
    pub fn statuses(&self) -> impl Iterator<Item = &K::Status> {
        self.slots.iter().map(|slot| &slot.status)
    }

    /// The device of each slot.
    pub fn devices(&self) -> impl Iterator<Item = &Handle<K::Device>> {
        self.slots.iter().map(|slot| &slot.device)
    }

    /// The devices that are in slots, in order.
    pub fn occupied(&self) -> impl Iterator<Item = Occupied<'_, K>> {
        self.slots.iter().filter_map(|Slot { config, status, device }| {
            Some(Occupied { config: config.as_ref()?, status, device })
        })
    }

    /// The back-ends that wait.
    pub fn waiting(&self) -> &BTreeMap<String, Open<K>> {
        &self.waiting
    }

    /// Take all waiting back-ends out.
    pub fn take_waiting(&mut self) -> BTreeMap<String, Open<K>> {
        std::mem::take(&mut self.waiting)
    }

    /// The number of slots, if any.
    fn count(&self) -> Result<usize, PlugError> {
        match self.slots.len() {
            0 => Err(PlugError::NoSlots { what: K::NAME }),
            max => Ok(max),
        }
    }

    fn slot(&self, slot: usize) -> Result<&Slot<K>, PlugError> {
        let max = self.count()?;
        self.slots.get(slot).ok_or(PlugError::NoSlot { what: K::NAME, max })
    }

    /// The index of slot `slot` among all slots of the machine, and its device.
    pub fn locate(&self, slot: usize) -> Result<(usize, &Handle<K::Device>), PlugError> {
        Ok((self.first + slot, &self.slot(slot)?.device))
    }

    /// The first empty slot.
    pub fn first_free(&self) -> Result<usize, PlugError> {
        let max = self.count()?;
        let free = self.slots.iter().position(|slot| slot.config.is_none());
        free.ok_or(PlugError::Full { what: K::NAME, max })
    }

    /// Which slot holds the device `id`.
    pub fn find(&self, id: &str) -> Option<usize> {
        self.position(|config| K::id(config) == id)
    }

    /// Which slot holds the device whose back-end is called `name`.
    pub fn find_backend(&self, name: &str) -> Option<usize> {
        self.position(|config| K::backend_name(config) == name)
    }

    fn position(&self, is: impl Fn(&K::Config) -> bool) -> Option<usize> {
        self.slots.iter().position(|slot| slot.config.as_ref().is_some_and(&is))
    }

    /// Whether `name` is that of a device in a slot, or of a back-end. Both share one namespace, so
    /// that a name is unambiguous.
    pub fn knows(&self, name: &str) -> bool {
        self.waiting.contains_key(name)
            || self.find(name).is_some()
            || self.find_backend(name).is_some()
    }

    /// Whether another back-end may wait: descriptors are limited.
    pub fn has_room(&self) -> Result<(), PlugError> {
        if self.waiting.len() < MAX_WAITING { Ok(()) } else { Err(PlugError::TooManyWait) }
    }

    /// Add a waiting back-end.
    pub fn add(&mut self, open: Open<K>) {
        self.waiting.insert(K::id(&open.config).to_owned(), open);
    }

    /// Remove the back-end `name`; `None` if there is none.
    pub fn remove(&mut self, name: &str) -> Result<Option<Open<K>>, PlugError> {
        match self.waiting.remove(name) {
            None if self.find_backend(name).is_some() => Err(PlugError::InUse(name.into())),
            open => Ok(open),
        }
    }

    /// Take the back-end `name`, if slot `slot` is free for it.
    pub fn take(&mut self, name: &str, slot: usize) -> Result<Open<K>, PlugError> {
        let free = self.slot(slot)?.config.is_none();
        if free {
            return self.waiting.remove(name).ok_or_else(|| PlugError::NoBackend(name.into()));
        }
        let waits = self.waiting.contains_key(name);
        Err(if waits { PlugError::Occupied(slot) } else { PlugError::NoBackend(name.into()) })
    }

    /// Record that slot `slot` holds a device.
    pub fn occupy(&mut self, slot: usize, config: K::Config, status: K::Status) {
        if let Some(slot) = self.slots.get_mut(slot) {
            (slot.config, slot.status) = (Some(config), status);
        }
    }

    /// Record that slot `slot` is empty; returns the configuration of the device that it held.
    pub fn vacate(&mut self, slot: usize, status: K::Status) -> Option<K::Config> {
        let slot = self.slots.get_mut(slot)?;
        slot.status = status;
        slot.config.take()
    }
}
