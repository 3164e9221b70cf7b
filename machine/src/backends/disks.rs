//! Disks in their bay.
use std::{
    error::Error,
    fs, mem,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Weak, atomic::Ordering},
};

use config::{
    DiskConfig, separate,
    types::{DiskIops, Id, PerSecond},
};
use devices::{
    backend::{
        disk::{self, Disk, DiskError, OpenOptions},
        release,
    },
    virtio::blk::{self, Block, BlockStats},
};

use lineage::Images;

use super::{
    Backends, PlugError, Shape,
    bay::{Bay, Kind, Occupied, Open},
};
use crate::{
    Machine,
    slots::{DEVICE_LOCK_LIMIT, Handle},
};

/// The kind.
pub(super) struct Disks;

/// A disk in a slot.
pub struct PluggedDisk {
    /// Its configuration.
    pub config: DiskConfig,
    /// Bytes that the guest sees.
    pub size: u64,
    /// Its I/O statistics.
    pub stats: Arc<BlockStats>,
}

/// What can be reported of the disk in a slot without its device, which a vCPU may lock for as long
/// as its storage hangs.
pub(super) struct DiskStatus {
    /// The device's I/O statistics.
    stats: Arc<BlockStats>,
    /// The device's open image.
    image: Weak<Disk>,
}

impl DiskStatus {
    /// Bytes that the guest sees; 0 for an empty slot.
    fn size(&self) -> u64 {
        self.image.upgrade().map_or(0, |disk| disk.size())
    }

    /// Whether requests are in flight.
    fn is_busy(&self) -> bool {
        self.stats.in_flight.load(Ordering::Relaxed) > 0
    }
}

impl Kind for Disks {
    type Config = DiskConfig;
    type Backend = blk::Backend;
    type Device = Block;
    type Status = DiskStatus;

    const NAME: &'static str = super::BLOCK;

    fn bay(backends: &Backends) -> &Bay<Self> {
        &backends.disks
    }

    fn bay_mut(backends: &mut Backends) -> &mut Bay<Self> {
        &mut backends.disks
    }

    fn id(config: &DiskConfig) -> &str {
        &config.id
    }

    fn backend_name(config: &DiskConfig) -> &str {
        config.backend()
    }

    fn rename(config: &mut DiskConfig, id: Id) {
        let backend = mem::replace(&mut config.id, id);
        config.backend = separate(backend, &config.id);
    }

    fn detach(config: &mut DiskConfig) -> bool {
        let Some(name) = config.backend.take() else { return false };
        (config.id, config.serial) = (name, None);
        true
    }

    fn refit(backend: blk::Backend, config: &DiskConfig) -> blk::Backend {
        limited(backend.disk, config)
    }

    fn status(device: &Block) -> DiskStatus {
        let image = device.shared_disk().map_or_else(Weak::new, |disk| Arc::downgrade(&disk));
        DiskStatus { stats: device.stats(), image }
    }

    fn accepts(_: &Block, _: &blk::Backend) -> Result<(), PlugError> {
        Ok(())
    }

    fn plug(
        device: &mut Block,
        config: &DiskConfig,
        backend: blk::Backend,
    ) -> Result<(), PlugError> {
        Ok(device.plug(Self::refit(backend, config))?)
    }

    fn unplug(device: &mut Block, _: &str) -> Result<Option<blk::Backend>, PlugError> {
        Ok(device.unplug())
    }
}

/// A disk whose image is open, and its configuration. Dropping it closes the image, which may wait
/// for the storage.
#[derive(Debug)]
pub struct OpenDisk {
    config: DiskConfig,
    backend: blk::Backend,
}

/// Open the image that `config` names, for a guest that is to use it at once. One that belongs to a
/// guest protected on two hosts may have its sidecar's word against it.
///
/// # Errors
/// As [`Disk::open`]; when that word does not allow it, or cannot be read.
pub(crate) fn open(config: &DiskConfig) -> Result<Disk, DiskError> {
    // First, as the word is changed only under the image's lock.
    let disk = Disk::open(&config.path, &options(config))?;
    if !config.readonly {
        let images = Images::read([&*config.path]);
        let allowed = images.and_then(|images| images.check());
        allowed.map_err(|e| DiskError::Replicated(with_causes(&e)))?;
    }
    Ok(disk)
}

fn with_causes(error: &dyn Error) -> String {
    let (mut text, mut cause) = (error.to_string(), error.source());
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

impl OpenDisk {
    /// Open the image that `config` names; `own` lists those that the machine has open, see
    /// [`Machine::own_images`]. Waits for its storage.
    ///
    /// # Errors
    /// When it cannot be opened, or is in use by another machine or this one.
    pub fn open(config: DiskConfig, own: &[(PathBuf, String)]) -> Result<Self, PlugError> {
        match self::open(&config) {
            Ok(disk) => Ok(Self { backend: limited(Arc::new(disk), &config), config }),
            Err(error @ DiskError::InUse { .. }) => {
                let own = own.iter().find(|(path, _)| same_file(path, &config.path));
                Err(match own {
                    Some((_, id)) => PlugError::OwnImage { path: config.path, id: id.clone() },
                    None => error.into(),
                })
            }
            Err(error) => Err(error.into()),
        }
    }
}

impl From<Open<Disks>> for OpenDisk {
    fn from(Open { config, backend }: Open<Disks>) -> Self {
        Self { config, backend }
    }
}

impl From<OpenDisk> for Open<Disks> {
    fn from(OpenDisk { config, backend }: OpenDisk) -> Self {
        Self { config, backend }
    }
}

/// Whether both paths lead to the same file.
pub(crate) fn same_file(one: &Path, other: &Path) -> bool {
    let file = |path: &Path| fs::metadata(path).map(|found| (found.dev(), found.ino())).ok();
    one == other || file(one).is_some_and(|found| Some(found) == file(other))
}

/// How a disk's image is opened.
pub(crate) fn options(config: &DiskConfig) -> OpenOptions {
    OpenOptions {
        readonly: config.readonly,
        direct: config.direct,
        discard: config.discard,
        aio: aio(config.aio),
        probe: config.probe,
    }
}

/// An open disk with the limits of `config`.
pub(crate) fn limited(disk: Arc<Disk>, config: &DiskConfig) -> blk::Backend {
    blk::Backend {
        name: Some(config.id.to_string()),
        disk,
        serial: config.serial.clone().unwrap_or_default(),
        ops_per_second: config.iops.map(DiskIops::get),
        bytes_per_second: config.bps.map(PerSecond::get),
        expect: expect(config.expect),
    }
}

/// The back-end's value for how a disk's requests are carried out.
fn aio(aio: config::Aio) -> disk::Aio {
    match aio {
        config::Aio::Auto => disk::Aio::Auto,
        config::Aio::IoUring => disk::Aio::IoUring,
        config::Aio::Off => disk::Aio::Off,
    }
}

/// The device's value for what the image of a restored disk has to be.
fn expect(expect: config::Expect) -> blk::Expect {
    match expect {
        config::Expect::Saved => blk::Expect::Saved,
        config::Expect::Copy => blk::Expect::Copy,
        config::Expect::Any => blk::Expect::Any,
    }
}

impl Backends {
    /// Disks with requests in flight.
    pub fn busy_disks(&self) -> impl Iterator<Item = &str> {
        let busy = self.disks.occupied().filter(|disk| disk.status.is_busy());
        busy.map(|disk| disk.config.id.as_str())
    }

    /// The devices of all slots for disks.
    pub fn block_devices(&self) -> impl Iterator<Item = &Handle<Block>> {
        self.disks.devices()
    }
}

impl Machine {
    /// The first slot for disks that is empty.
    ///
    /// # Errors
    /// When there is none.
    pub fn free_disk_slot(&self) -> Result<usize, PlugError> {
        self.backends.disks.first_free()
    }

    /// The shape of slot `slot` for disks.
    ///
    /// # Errors
    /// When there is none.
    pub fn disk_shape(&self, slot: usize) -> Result<Shape, PlugError> {
        let start = self.config.disks.get(slot);
        self.shape::<Disks>(slot, start.and_then(|disk| disk.iothread.as_ref()))
    }

    /// Logical and physical block size in bytes of the waiting disk `backend`.
    ///
    /// # Errors
    /// When no such disk waits.
    pub fn waiting_disk_blocks(&self, backend: &str) -> Result<(u32, u32), PlugError> {
        let waiting = self.backends.disks.waiting().get(backend);
        let disk = &waiting.ok_or_else(|| PlugError::NoBackend(backend.into()))?.backend.disk;
        Ok((disk.logical_block(), disk.physical_block()))
    }

    /// Check that a disk's back-end of this name can be added.
    ///
    /// # Errors
    /// When the name is taken, or too many back-ends wait.
    pub fn admits_disk_backend(&self, name: &str) -> Result<(), PlugError> {
        self.admits::<Disks>(name)
    }

    /// The disks in slots that the guest can write to, each with its id.
    pub fn writable_disks(&self) -> Vec<(String, Arc<Disk>)> {
        let writable = self.backends.disks.occupied().filter(|disk| !disk.config.readonly);
        writable
            .filter_map(|Occupied { config, status, .. }| {
                Some((config.id.to_string(), status.image.upgrade()?))
            })
            .collect()
    }

    /// The images that this machine has open itself, with the names of their devices, for
    /// [`OpenDisk::open`].
    pub fn own_images(&self) -> Vec<(PathBuf, String)> {
        let bay = &self.backends.disks;
        let waiting = bay.waiting().values().map(|disk| &disk.config);
        let all = bay.occupied().map(|disk| disk.config).chain(waiting);
        all.map(|config| (config.path.clone(), config.id.to_string())).collect()
    }

    /// Release the disks that have no requests in flight, for a machine that was stopped for good;
    /// to be called on a thread that may wait for storage. Others keep their locks until the kernel
    /// has finished.
    pub fn leave_idle_disks(&mut self) -> impl FnOnce() + Send + use<> {
        let waiting = self.backends.disks.take_waiting();
        let mut idle = Vec::new();
        for Occupied { status, device, .. } in self.backends.disks.occupied() {
            if !status.is_busy()
                // A vCPU that resets a disk holds its lock.
                && let Some(transport) = device.try_lock()
            {
                idle.extend(transport.device().shared_disk());
            }
        }
        move || {
            // Closing a file can wait for its storage even where releasing a lock does not.
            idle.iter().for_each(|disk| disk.release());
            for disk in idle {
                let _ = release::give_up(&disk.descriptors().collect::<Vec<_>>());
                // Its device may still use it.
                std::mem::forget(disk);
            }
            drop(waiting);
        }
    }

    /// Add a disk's back-end, for [`Machine::plug_disk`].
    ///
    /// # Errors
    /// As [`Machine::admits_disk_backend`]; the disk comes back, to be closed where that may wait.
    pub fn add_disk_backend(&mut self, disk: OpenDisk) -> Result<(), Box<(PlugError, OpenDisk)>> {
        if let Err(why) = self.admits_disk_backend(&disk.config.id) {
            return Err(Box::new((why, disk)));
        }
        self.backends.disks.add(disk.into());
        Ok(())
    }

    /// Remove a disk's back-end that no device uses; the caller drops it.
    ///
    /// # Errors
    /// When there is none, or a device uses it.
    pub fn remove_disk_backend(&mut self, name: &str) -> Result<OpenDisk, PlugError> {
        let removed = self.backends.disks.remove(name)?;
        removed.map(OpenDisk::from).ok_or_else(|| PlugError::NoBackend(name.into()))
    }

    /// Put the disk `backend` into slot `slot`, as the device `id`. The guest sees its size at
    /// once.
    ///
    /// # Errors
    /// When there is no such back-end or slot, another device has the id, or the device cannot use
    /// the back-end: it then still waits. When the host lacks a resource that the disk needs: the
    /// back-end is then closed.
    pub fn plug_disk(
        &mut self,
        id: &Id,
        backend: &str,
        slot: usize,
        serial: Option<String>,
    ) -> Result<(), PlugError> {
        self.plug::<Disks>(id, backend, slot, |config| {
            config.serial = serial.or(config.serial.take());
        })
    }

    /// The image of disk `id`, which is about to be resized to `size` bytes. From here on the guest
    /// cannot access anything beyond. Until the image is dropped the disk cannot be closed.
    ///
    /// # Errors
    /// When no slot holds it, it is read-only, or its storage hangs.
    pub fn begin_resize(&mut self, id: &str, size: u64) -> Result<Arc<Disk>, PlugError> {
        let missing = || PlugError::NoDevice(id.into());
        let slot = self.backends.disks.find(id).ok_or_else(missing)?;
        self.change_slot::<Disks, _>(slot, |block| block.begin_resize(size))??.ok_or_else(missing)
    }

    /// Show the guest the current size of disk `id`.
    ///
    /// # Errors
    /// When no slot holds it.
    pub fn end_resize(&mut self, id: &str) -> Result<(), PlugError> {
        let bay = &self.backends.disks;
        let slot = bay.find(id).ok_or_else(|| PlugError::NoDevice(id.into()))?;
        // If the lock is not free, the guest is resetting the disk and sees the size after that.
        if let Some(mut transport) = bay.locate(slot)?.1.try_lock_for(DEVICE_LOCK_LIMIT) {
            transport.update(|_| ());
        }
        Ok(())
    }

    /// Disks that wait for a slot.
    pub fn waiting_disks(&self) -> impl Iterator<Item = (&DiskConfig, u64)> {
        let waiting = self.backends.disks.waiting().values();
        waiting.map(|Open { config, backend }| (config, backend.disk.size()))
    }

    /// The disks that are in slots, in order.
    pub fn disks(&self) -> impl Iterator<Item = PluggedDisk> {
        self.backends.disks.occupied().map(|Occupied { config, status, .. }| {
            let (config, stats) = (config.clone(), status.stats.clone());
            PluggedDisk { config, size: status.size(), stats }
        })
    }

    /// Sizes in bytes of the disks in the slots, 0 for an empty one.
    pub fn disk_sizes(&self) -> Vec<u64> {
        self.backends.disks.statuses().map(DiskStatus::size).collect()
    }
}
