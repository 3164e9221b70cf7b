//! NICs in their bay.
use std::{io, mem, os::fd::OwnedFd, sync::Arc, time::Instant};

use config::{NicConfig, Tap as TapConfig, separate, types::Id};
use devices::{
    backend::{
        inherited,
        net::{
            NetBackend,
            gated::NetKeeper,
            tap::{Tap, TapError},
        },
    },
    virtio::net::Net,
};

use super::{
    Backends, PlugError, Shape,
    bay::{Bay, Kind, Occupied, Open},
};
use crate::{Captured, Machine, RunError, slots::DEVICE_LOCK_LIMIT};

/// The kind.
pub(super) struct Nics;

impl Kind for Nics {
    type Config = NicConfig;
    type Backend = Arc<dyn NetBackend>;
    type Device = Net;
    type Status = ();

    const NAME: &'static str = super::NET;

    fn bay(backends: &Backends) -> &Bay<Self> {
        &backends.nics
    }

    fn bay_mut(backends: &mut Backends) -> &mut Bay<Self> {
        &mut backends.nics
    }

    fn id(config: &NicConfig) -> &str {
        &config.id
    }

    fn backend_name(config: &NicConfig) -> &str {
        config.backend()
    }

    fn rename(config: &mut NicConfig, id: Id) {
        let backend = mem::replace(&mut config.id, id);
        config.backend = separate(backend, &config.id);
    }

    fn detach(config: &mut NicConfig) -> bool {
        let Some(name) = config.backend.take() else { return false };
        (config.id, config.mac) = (name, None);
        true
    }

    fn refit(backend: Arc<dyn NetBackend>, _: &NicConfig) -> Arc<dyn NetBackend> {
        backend
    }

    fn status(_: &Net) {}

    fn accepts(device: &Net, backend: &Arc<dyn NetBackend>) -> Result<(), PlugError> {
        Ok(device.accepts(&**backend)?)
    }

    fn plug(
        device: &mut Net,
        config: &NicConfig,
        backend: Arc<dyn NetBackend>,
    ) -> Result<(), PlugError> {
        Ok(device.plug(backend, config.mac)?)
    }

    fn unplug(device: &mut Net, id: &str) -> Result<Option<Arc<dyn NetBackend>>, PlugError> {
        device.unplug().map_err(|source| PlugError::Thread { id: id.into(), source })
    }
}

/// Open a NIC's tap device.
pub(crate) fn tap(config: &NicConfig) -> Result<Tap, TapError> {
    match &config.tap {
        TapConfig::Name(name) => Tap::open(name.as_str(), usize::from(config.queue_pairs.get())),
        TapConfig::Fds(numbers) => {
            let take = |fd: &i32| {
                inherited::take(*fd).map_err(|source| TapError::NotTapFd { fd: *fd, source })
            };
            Tap::from_fds(numbers.iter().map(take).collect::<Result<_, _>>()?)
        }
    }
}

impl Captured<'_> {
    /// Put a new, open gate in front of each NIC's back-end.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub(crate) fn gate_nics(&mut self) -> Result<Vec<NetKeeper>, RunError> {
        let each = self.machine().backends.nics.occupied();
        let keepers = each.map(|nic| nic.device.lock().device_mut().gate());
        Ok(keepers.collect::<io::Result<Vec<_>>>()?.into_iter().flatten().collect())
    }
}

impl Machine {
    /// Detach the named taps of a paused machine: they can be attached again by name.
    pub(crate) fn release_taps(&mut self) {
        self.each_named_tap(|net, _| net.unplug().map(drop).map_err(RunError::from)).ok();
    }

    /// Attach the taps again that [`Machine::release_taps`] has detached.
    pub(crate) fn hold_taps(&mut self) -> Result<(), RunError> {
        self.each_named_tap(|net, config| {
            if net.backend().is_some() {
                return Ok(());
            }
            let failed = |source| RunError::Tap { id: config.id.to_string(), source };
            let tap = tap(config).map_err(failed)?;
            net.plug(Arc::new(tap), None).map_err(|e| RunError::Io(io::Error::other(e)))
        })
    }

    fn each_named_tap(
        &self,
        act: impl Fn(&mut Net, &NicConfig) -> Result<(), RunError>,
    ) -> Result<(), RunError> {
        for Occupied { config, device, .. } in self.backends.nics.occupied() {
            if matches!(config.tap, TapConfig::Name(_)) {
                act(device.lock().device_mut(), config)?;
            }
        }
        Ok(())
    }

    /// The first slot for NICs that is empty.
    ///
    /// # Errors
    /// When there is none.
    pub fn free_nic_slot(&self) -> Result<usize, PlugError> {
        self.backends.nics.first_free()
    }

    /// The shape of slot `slot` for NICs.
    ///
    /// # Errors
    /// As [`Machine::disk_shape`].
    pub fn nic_shape(&self, slot: usize) -> Result<Shape, PlugError> {
        let start = self.config.nics.get(slot);
        self.shape::<Nics>(slot, start.and_then(|nic| nic.iothread.as_ref()))
    }

    /// Open a NIC's back-end, for [`Machine::plug_nic`].
    ///
    /// # Errors
    /// When the id is taken or the tap device cannot be opened.
    pub fn add_nic_backend(
        &mut self,
        config: NicConfig,
        fds: Vec<OwnedFd>,
    ) -> Result<(), PlugError> {
        self.admits::<Nics>(&config.id)?;
        let tap = if fds.is_empty() { tap(&config)? } else { Tap::from_fds(fds)? };
        self.backends.nics.add(Open { config, backend: Arc::new(tap) });
        Ok(())
    }

    /// Close a NIC's back-end that no device uses.
    ///
    /// # Errors
    /// As [`Machine::remove_disk_backend`].
    pub fn remove_nic_backend(&mut self, name: &str) -> Result<(), PlugError> {
        let removed = self.backends.nics.remove(name)?;
        removed.map(drop).ok_or_else(|| PlugError::NoDevice(name.into()))
    }

    /// Put the NIC `backend` into slot `slot`, as the device `id`. The guest sees its link and
    /// address at once.
    ///
    /// # Errors
    /// As [`Machine::plug_disk`].
    pub fn plug_nic(
        &mut self,
        id: &Id,
        backend: &str,
        slot: usize,
        mac: Option<[u8; 6]>,
    ) -> Result<(), PlugError> {
        self.plug::<Nics>(id, backend, slot, |config| config.mac = mac.or(config.mac))
    }

    /// Connect or disconnect the cable of NIC `id`, or of the NIC whose back-end has that name; the
    /// guest sees it at once.
    ///
    /// # Errors
    /// When no slot holds it.
    pub fn set_link(&mut self, id: &str, up: bool) -> Result<(), PlugError> {
        let bay = &self.backends.nics;
        let slot = bay.find(id).or_else(|| bay.find_backend(id));
        let slot = slot.ok_or_else(|| PlugError::NoDevice(id.into()))?;
        self.change_slot::<Nics, _>(slot, |net| net.set_link(up))?
            .map_err(|source| PlugError::Thread { id: id.into(), source })
    }

    /// Whether a slot holds the NIC `id`.
    pub fn has_nic(&self, id: &str) -> bool {
        self.backends.nics.find(id).is_some()
    }

    /// Announce the NICs `ids`, or all of them, to their networks. If a tap refuses or the guest is
    /// resetting a NIC, only a log line says so: the machine works without.
    pub fn announce(&self, ids: Option<&[String]>) {
        for Occupied { config: NicConfig { id, .. }, device, .. } in self.backends.nics.occupied() {
            if ids.is_some_and(|ids| !ids.iter().any(|one| id == one)) {
                continue;
            }
            let transport = device.try_lock().ok_or(io::ErrorKind::WouldBlock.into());
            if let Err(e) = transport.and_then(|transport| transport.device().announce()) {
                log::warn!("{id}: cannot announce its address: {e}");
            }
        }
    }

    /// The NICs that are in slots, in order, each with the address that the guest sees.
    ///
    /// # Errors
    /// When a NIC is being reset by its guest and does not answer.
    pub fn nics(&self) -> Result<Vec<(NicConfig, [u8; 6])>, RunError> {
        let deadline = Instant::now() + DEVICE_LOCK_LIMIT;
        let each = self.backends.nics.occupied().map(|Occupied { config, device, .. }| {
            let busy = || RunError::Restless(format!("NIC {}", config.id));
            let transport = device.try_lock_until(deadline).ok_or_else(busy)?;
            Ok((config.clone(), transport.device().mac()))
        });
        each.collect()
    }
}
