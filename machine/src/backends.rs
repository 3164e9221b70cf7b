//! Disks' and NICs' back-ends: opened, waiting for a slot, or in one.
use std::{
    collections::BTreeMap,
    fs, io,
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    sync::{Arc, Weak, atomic::Ordering},
    time::{Duration, Instant},
};

use config::{
    DiskConfig, NicConfig, Occupancy, Tap as TapConfig, separate,
    slots::SlotCounts,
    types::{DiskIops, PerSecond},
};
use devices::{
    backend::{
        disk::{self, Disk, DiskError, OpenOptions},
        inherited,
        net::tap::{Tap, TapError},
        release,
    },
    virtio::{
        blk::{self, Block, BlockStats},
        net::{self, Net},
    },
};

use crate::{Machine, RunError};

/// How long a device is waited for that its guest may be resetting.
const DEVICE_LOCK_LIMIT: Duration = Duration::from_millis(20);
/// Most back-ends of a kind that wait for a device.
const MAX_WAITING: usize = 16;

/// The kinds of slots, in StratoVirt's words.
const BLOCK: &str = "block";
const NET: &str = "net";

/// Why a back-end or device could not be added or removed.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum PlugError {
    #[error("{0} is already registered.")]
    Duplicate(String),
    #[error("Failed to find device configuration: no back-end '{0}' waits for a device")]
    NoBackend(String),
    #[error("Device {0} not found")]
    NoDevice(String),
    #[error("'{0}' is in use; take its device out first, with device_del")]
    InUse(String),
    #[error("The slot {0} is occupied already.")]
    Occupied(usize),
    #[error("A maximum of {max} {what} replaceable devices are supported: addr is 0 to {}", max - 1)]
    NoSlot { what: &'static str, max: usize },
    #[error(
        "All {max} {what} slots are occupied; take a device out first, with device_del, or start the \
         machine with more: -machine {}=N",
        key(what)
    )]
    Full { what: &'static str, max: usize },
    #[error("This machine has no {what} slots; start it with some: -machine {}=N", key(what))]
    NoSlots { what: &'static str },
    #[error(
        "{MAX_WAITING} back-ends wait for a device already; take some away with blockdev-del or \
         netdev_del"
    )]
    TooManyWait,
    #[error(
        "{} is the image of '{id}' in this machine already; take that away first, with device_del or \
         blockdev-del, or have both read-only",
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

/// A disk in a slot.
pub struct PluggedDisk {
    /// What it was made from.
    pub config: DiskConfig,
    /// Bytes that the guest sees.
    pub size: u64,
    /// What it has done.
    pub stats: Arc<BlockStats>,
}

/// What the driver of a slot has seen since it started, whatever is plugged into it.
pub struct Shape {
    /// Descriptors of each queue.
    pub queue_sizes: Vec<u16>,
    /// The I/O thread by its configured name; `None`: the default one.
    pub iothread: Option<String>,
}

/// What is where.
pub(crate) struct Backends {
    waiting_disks: BTreeMap<String, OpenDisk>,
    waiting_nics: BTreeMap<String, (NicConfig, Tap)>,
    /// One item a slot.
    disks: Vec<Option<DiskConfig>>,
    nics: Vec<Option<NicConfig>>,
    /// What can be told of the disks in the slots, whatever their devices are busy with.
    plugged: Vec<Plugged>,
}

/// What can be told of the disk in a slot without its device, which a vCPU may hold for as long as its
/// storage hangs.
pub(crate) struct Plugged {
    /// What the device has done.
    stats: Arc<BlockStats>,
    /// The device's own, which it has to have alone to give it away.
    image: Weak<Disk>,
}

impl Plugged {
    pub fn of(block: &Block) -> Self {
        let image = block.shared_disk().map_or_else(Weak::new, |disk| Arc::downgrade(&disk));
        Self { stats: block.stats(), image }
    }

    /// Bytes that the guest sees; 0 for an empty slot.
    fn size(&self) -> u64 {
        self.image.upgrade().map_or(0, |disk| disk.size())
    }
}

impl Backends {
    pub fn new(slots: SlotCounts, occupied: &Occupancy, plugged: Vec<Plugged>) -> Self {
        let mut this = Self {
            waiting_disks: BTreeMap::new(),
            waiting_nics: BTreeMap::new(),
            disks: vec![None; slots.disks()],
            nics: vec![None; slots.nics()],
            plugged,
        };
        this.disks.iter_mut().zip(&occupied.disks).for_each(|(to, c)| to.clone_from(c));
        this.nics.iter_mut().zip(&occupied.nics).for_each(|(to, c)| to.clone_from(c));
        this
    }

    pub fn occupancy(&self) -> Occupancy {
        Occupancy { disks: self.disks.clone(), nics: self.nics.clone() }
    }

    /// Disks with requests in flight.
    pub fn busy_disks(&self) -> impl Iterator<Item = &str> {
        let each = self.disks.iter().zip(&self.plugged);
        let busy = each.filter(|(_, of)| of.stats.in_flight.load(Ordering::Relaxed) > 0);
        busy.filter_map(|(disk, _)| Some(disk.as_ref()?.id.as_str()))
    }

    /// The images that this machine has open itself, with the names of their devices.
    fn own_images(&self) -> Vec<(PathBuf, String)> {
        let waiting = self.waiting_disks.values().map(|disk| &disk.config);
        let all = self.disks.iter().flatten().chain(waiting);
        all.map(|config| (config.path.clone(), config.id.clone())).collect()
    }

    /// Which slot holds the disk `id`.
    fn disk_slot(&self, id: &str) -> Option<usize> {
        self.disks.iter().position(|c| c.as_ref().is_some_and(|c| c.id == id))
    }

    /// Which slot holds the NIC `id`, counted from the first NIC slot.
    fn nic_slot(&self, id: &str) -> Option<usize> {
        self.nics.iter().position(|c| c.as_ref().is_some_and(|c| c.id == id))
    }

    /// Whether `name` is that of a device in a slot, or of a back-end. They share one space of
    /// names, so that a name says which of them is meant.
    fn knows(&self, name: &str) -> bool {
        let disks = self.disks.iter().flatten().map(|c| (&*c.id, c.backend()));
        let nics = self.nics.iter().flatten().map(|c| (&*c.id, c.backend()));
        self.waiting_disks.contains_key(name)
            || self.waiting_nics.contains_key(name)
            || disks.chain(nics).any(|(id, backend)| name == id || name == backend)
    }
}

/// The key that says how many slots for `what` there are.
fn key(what: &str) -> &'static str {
    if what == BLOCK { "disk-slots" } else { "nic-slots" }
}

/// How many `places` there are, if any.
fn number_of<C>(what: &'static str, places: &[Option<C>]) -> Result<usize, PlugError> {
    match places.len() {
        0 => Err(PlugError::NoSlots { what }),
        max => Ok(max),
    }
}

/// The first of `places` that nothing is in.
fn first_free<C>(what: &'static str, places: &[Option<C>]) -> Result<usize, PlugError> {
    let max = number_of(what, places)?;
    places.iter().position(Option::is_none).ok_or(PlugError::Full { what, max })
}

/// Descriptors are for everybody: nobody takes all of them.
fn room_for_one(waiting: usize) -> Result<(), PlugError> {
    if waiting < MAX_WAITING { Ok(()) } else { Err(PlugError::TooManyWait) }
}

/// The back-end `id`, if there is a free place for it.
fn take<B, C>(
    id: &str,
    waiting: &mut BTreeMap<String, B>,
    slot: usize,
    what: &'static str,
    places: &[Option<C>],
) -> Result<Option<B>, PlugError> {
    let max = number_of(what, places)?;
    let place = places.get(slot).ok_or(PlugError::NoSlot { what, max })?;
    if !waiting.contains_key(id) {
        return Err(PlugError::NoBackend(id.into()));
    }
    if place.is_some() {
        return Err(PlugError::Occupied(slot));
    }
    Ok(waiting.remove(id))
}

/// A disk whose image is open, and what it was made from. Dropping it closes the image, which can wait
/// for the storage.
#[derive(Debug)]
pub struct OpenDisk {
    config: DiskConfig,
    backend: blk::Backend,
}

impl OpenDisk {
    /// Open the image that `config` names; the machine has `own` ones open, see
    /// [`Machine::own_images`]. Waits for its storage.
    ///
    /// # Errors
    /// When it cannot be opened, or another machine or this one has it.
    pub fn open(config: DiskConfig, own: &[(PathBuf, String)]) -> Result<Self, PlugError> {
        match open(&config) {
            Ok(backend) => Ok(Self { config, backend }),
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

/// Whether both paths lead to the same file.
pub(crate) fn same_file(one: &Path, other: &Path) -> bool {
    let file = |path: &Path| fs::metadata(path).map(|found| (found.dev(), found.ino())).ok();
    one == other || file(one).is_some_and(|found| Some(found) == file(other))
}

/// Open a disk's image.
fn open(config: &DiskConfig) -> Result<blk::Backend, DiskError> {
    Ok(limited(Disk::open(&config.path, &options(config))?, config))
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

/// An open disk, as `config` wants it to be used.
pub(crate) fn limited(disk: Disk, config: &DiskConfig) -> blk::Backend {
    blk::Backend {
        name: Some(config.id.clone()),
        disk: Arc::new(disk),
        serial: config.serial.clone().unwrap_or_default(),
        ops_per_second: config.iops.map(DiskIops::get),
        bytes_per_second: config.bps.map(PerSecond::get),
        expect: expect(config.expect),
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

impl Machine {
    /// Detach the taps that have a name, of a paused machine: they can be attached again by it.
    pub(crate) fn release_taps(&mut self) {
        self.each_named_tap(|net, _| net.unplug().map(drop).map_err(RunError::from)).ok();
    }

    /// Attach those again that [`Machine::release_taps`] has detached.
    pub(crate) fn hold_taps(&mut self) -> Result<(), RunError> {
        self.each_named_tap(|net, config| {
            if net.backend().is_some() {
                return Ok(());
            }
            let failed = |source| RunError::Tap { id: config.id.clone(), source };
            let tap = tap(config).map_err(failed)?;
            net.plug(tap, None).map_err(|e| RunError::Io(io::Error::other(e)))
        })
    }

    fn each_named_tap(
        &self,
        act: impl Fn(&mut Net, &NicConfig) -> Result<(), RunError>,
    ) -> Result<(), RunError> {
        for (slot, config) in self.backends.nics.iter().enumerate() {
            let Some(config) = config else { continue };
            let Some((transport, _)) = self.slots.get(self.nic_index(slot)) else { continue };
            if matches!(config.tap, TapConfig::Name(_))
                && let Some(net) = transport.lock().device::<Net>()
            {
                act(net, config)?;
            }
        }
        Ok(())
    }

    /// Where slot `slot` for NICs is among all slots.
    fn nic_index(&self, slot: usize) -> usize {
        self.config.slots.disks() + slot
    }

    /// Whether a device or back-end has this name.
    fn knows(&self, name: &str) -> bool {
        let mut others = self.config.devices.iter();
        self.backends.knows(name) || others.any(|device| device.facts().id() == name)
    }

    /// The id of a device to come: its back-end's name, or a new one.
    fn check_id(&self, id: &str, backend: &str) -> Result<(), PlugError> {
        match id != backend && self.knows(id) {
            true => Err(PlugError::Duplicate(id.into())),
            false => Ok(()),
        }
    }

    /// The first slot for disks that is empty.
    ///
    /// # Errors
    /// When there is none.
    pub fn free_disk_slot(&self) -> Result<usize, PlugError> {
        first_free(BLOCK, &self.backends.disks)
    }

    /// The first slot for NICs that is empty.
    ///
    /// # Errors
    /// When there is none.
    pub fn free_nic_slot(&self) -> Result<usize, PlugError> {
        first_free(NET, &self.backends.nics)
    }

    /// What slot `slot` for disks is like.
    ///
    /// # Errors
    /// When there is none.
    pub fn disk_shape(&self, slot: usize) -> Result<Shape, PlugError> {
        let max = number_of(BLOCK, &self.backends.disks)?;
        if slot >= max {
            return Err(PlugError::NoSlot { what: BLOCK, max });
        }
        let start = self.config.disks.get(slot);
        Ok(self.shape(slot, start.and_then(|disk| disk.iothread.clone())))
    }

    /// What slot `slot` for NICs is like.
    ///
    /// # Errors
    /// As [`Machine::disk_shape`].
    pub fn nic_shape(&self, slot: usize) -> Result<Shape, PlugError> {
        let max = number_of(NET, &self.backends.nics)?;
        if slot >= max {
            return Err(PlugError::NoSlot { what: NET, max });
        }
        let start = self.config.nics.get(slot);
        Ok(self.shape(self.nic_index(slot), start.and_then(|nic| nic.iothread.clone())))
    }

    fn shape(&self, index: usize, iothread: Option<String>) -> Shape {
        Shape { queue_sizes: self.slots.queue_sizes(index).to_vec(), iothread }
    }

    /// Logical and physical block size in bytes of the disk `backend`, which waits.
    ///
    /// # Errors
    /// When it does not.
    pub fn waiting_disk_blocks(&self, backend: &str) -> Result<(u32, u32), PlugError> {
        let waiting = self.backends.waiting_disks.get(backend);
        let OpenDisk { backend, .. } =
            waiting.ok_or_else(|| PlugError::NoBackend(backend.into()))?;
        Ok((backend.disk.logical_block(), backend.disk.physical_block()))
    }

    /// Whether a disk's back-end of this name can be added.
    ///
    /// # Errors
    /// When the name is taken, or as many wait as may.
    pub fn admits_disk_backend(&self, name: &str) -> Result<(), PlugError> {
        if self.knows(name) {
            return Err(PlugError::Duplicate(name.into()));
        }
        room_for_one(self.backends.waiting_disks.len())
    }

    /// The disks in slots that the guest can write to, each with its id.
    pub fn writable_disks(&self) -> Vec<(String, Arc<Disk>)> {
        let each = self.backends.disks.iter().zip(&self.backends.plugged);
        let writable = each.filter_map(|(config, plugged)| {
            let config = config.as_ref().filter(|config| !config.readonly)?;
            Some((config.id.clone(), plugged.image.upgrade()?))
        });
        writable.collect()
    }

    /// The images that this machine has open itself, for [`OpenDisk::open`].
    pub fn own_images(&self) -> Vec<(PathBuf, String)> {
        self.backends.own_images()
    }

    /// Let go of the disks that no requests are in flight to, for a machine that was stopped for good: on
    /// a thread that may wait for storage. Others keep their locks until the kernel has finished.
    pub fn leave_idle_disks(&mut self) -> impl FnOnce() + Send + use<> {
        let waiting = std::mem::take(&mut self.backends.waiting_disks);
        let busy: Vec<_> = self.backends.busy_disks().collect();
        let mut idle = Vec::new();
        for (slot, config) in self.backends.disks.iter().enumerate() {
            if let (Some(config), Some((transport, _))) = (config, self.slots.get(slot))
                && !busy.contains(&config.id.as_str())
                // A guest that resets a disk waits for it.
                && let Some(mut transport) = transport.try_lock()
            {
                idle.extend(transport.device::<Block>().and_then(|block| block.shared_disk()));
            }
        }
        move || {
            // Closing a file can wait for its storage even where giving up a lock does not.
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
        self.backends.waiting_disks.insert(disk.config.id.clone(), disk);
        Ok(())
    }

    /// Open a NIC's back-end, for [`Machine::plug_nic`].
    ///
    /// # Errors
    /// When the id is taken or the tap device cannot be had.
    pub fn add_nic_backend(
        &mut self,
        config: NicConfig,
        fds: Vec<OwnedFd>,
    ) -> Result<(), PlugError> {
        if self.knows(&config.id) {
            return Err(PlugError::Duplicate(config.id));
        }
        room_for_one(self.backends.waiting_nics.len())?;
        let tap = if fds.is_empty() { tap(&config)? } else { Tap::from_fds(fds)? };
        self.backends.waiting_nics.insert(config.id.clone(), (config, tap));
        Ok(())
    }

    /// Take away a disk's back-end that no device uses: it is to be dropped.
    ///
    /// # Errors
    /// When there is none, or a device uses it.
    pub fn remove_disk_backend(&mut self, name: &str) -> Result<OpenDisk, PlugError> {
        if let Some(disk) = self.backends.waiting_disks.remove(name) {
            return Ok(disk);
        }
        let used = self.backends.disks.iter().flatten().any(|disk| disk.backend() == name);
        Err(if used { PlugError::InUse(name.into()) } else { PlugError::NoBackend(name.into()) })
    }

    /// Close a NIC's back-end that no device uses.
    ///
    /// # Errors
    /// As [`Machine::remove_disk_backend`].
    pub fn remove_nic_backend(&mut self, name: &str) -> Result<(), PlugError> {
        if self.backends.waiting_nics.remove(name).is_some() {
            return Ok(());
        }
        let used = self.backends.nics.iter().flatten().any(|nic| nic.backend() == name);
        Err(if used { PlugError::InUse(name.into()) } else { PlugError::NoDevice(name.into()) })
    }

    /// Put the disk `backend` into slot `slot`, as the device `id`. The guest sees its size at once.
    ///
    /// # Errors
    /// When there is no such back-end or slot, another device has the id, or the device cannot take
    /// the back-end: it then waits on. When the host does not give what the disk needs: the back-end
    /// is closed then.
    pub fn plug_disk(
        &mut self,
        id: &str,
        backend: &str,
        slot: usize,
        serial: Option<String>,
    ) -> Result<(), PlugError> {
        self.check_id(id, backend)?;
        let b = &mut self.backends;
        let mut waiting = take(backend, &mut b.waiting_disks, slot, BLOCK, &b.disks)?;
        let plugged = self.change(slot, |block: &mut Block| {
            let Some(OpenDisk { mut config, backend: mut disk }) = waiting.take() else {
                return Ok(None);
            };
            disk.name = Some(id.to_owned());
            if let Some(serial) = serial {
                disk.serial.clone_from(&serial);
                config.serial = Some(serial);
            }
            (config.id, config.backend) = (id.to_owned(), separate(backend, id));
            block.plug(disk).map(|()| Some((config, Plugged::of(block))))
        });
        let b = &mut self.backends;
        b.waiting_disks.extend(waiting.map(|back| (backend.to_owned(), back)));
        if let Some((config, plugged)) = plugged?.transpose()?.flatten()
            && let (Some(place), Some(known)) = (b.disks.get_mut(slot), b.plugged.get_mut(slot))
        {
            (*place, *known) = (Some(config), plugged);
        }
        Ok(())
    }

    /// Put the NIC `backend` into slot `slot`, as the device `id`. The guest sees link and address
    /// at once.
    ///
    /// # Errors
    /// As [`Machine::plug_disk`].
    pub fn plug_nic(
        &mut self,
        id: &str,
        backend: &str,
        slot: usize,
        mac: Option<[u8; 6]>,
    ) -> Result<(), PlugError> {
        self.check_id(id, backend)?;
        let b = &mut self.backends;
        let mut waiting = take(backend, &mut b.waiting_nics, slot, NET, &b.nics)?;
        let plugged = self.change(self.nic_index(slot), |net: &mut Net| {
            if let Some((_, tap)) = &waiting {
                net.accepts(tap)?;
            }
            let Some((mut config, tap)) = waiting.take() else { return Ok(None) };
            config.mac = mac.or(config.mac);
            (config.id, config.backend) = (id.to_owned(), separate(backend, id));
            net.plug(tap, config.mac).map(|()| Some(config))
        });
        let b = &mut self.backends;
        b.waiting_nics.extend(waiting.map(|back| (backend.to_owned(), back)));
        let config = plugged?.transpose()?.flatten();
        if let Some(place) = b.nics.get_mut(slot) {
            *place = config;
        }
        Ok(())
    }

    /// Take the device `id` out of its slot. Its back-end goes with it if it has the same name, else it
    /// waits again. What is in flight is finished first. A disk that goes is to be dropped.
    ///
    /// # Errors
    /// When no slot holds it, or its storage hangs.
    pub fn unplug(&mut self, id: &str) -> Result<Option<OpenDisk>, PlugError> {
        if let Some(slot) = self.backends.disk_slot(id) {
            let disk = self.change(slot, |block: &mut Block| block.unplug())?.flatten();
            let config = self.backends.disks.get_mut(slot).and_then(Option::take);
            let (Some(disk), Some(mut config)) = (disk, config) else { return Ok(None) };
            let backend = config.backend.take();
            if let Some(backend) = &backend {
                (config.id, config.serial) = (backend.clone(), None);
            }
            let open = OpenDisk { backend: limited(disk, &config), config };
            let Some(backend) = backend else { return Ok(Some(open)) };
            self.backends.waiting_disks.insert(backend, open);
            return Ok(None);
        }
        let Some(slot) = self.backends.nic_slot(id) else {
            return Err(PlugError::NoDevice(id.into()));
        };
        let unplugged =
            self.change(self.nic_index(slot), |net: &mut Net| net.unplug())?.transpose();
        let tap = unplugged.map_err(|source| PlugError::Thread { id: id.into(), source })?;
        let config = self.backends.nics.get_mut(slot).and_then(Option::take);
        if let (Some(tap), Some(mut config)) = (tap.flatten(), config)
            && let Some(backend) = config.backend.take()
        {
            (config.id, config.mac) = (backend.clone(), None);
            self.backends.waiting_nics.insert(backend, (config, tap));
        }
        Ok(None)
    }

    /// Plug the cable of NIC `id`, or of the NIC whose back-end is called so, in or out; the guest
    /// sees it at once.
    ///
    /// # Errors
    /// When no slot holds it.
    pub fn set_link(&mut self, id: &str, up: bool) -> Result<(), PlugError> {
        let behind = |nic: &Option<NicConfig>| nic.as_ref().is_some_and(|nic| nic.backend() == id);
        let slot = self.backends.nic_slot(id);
        let slot = slot.or_else(|| self.backends.nics.iter().position(behind));
        let slot = slot.ok_or_else(|| PlugError::NoDevice(id.into()))?;
        let set = self.change(self.nic_index(slot), |net: &mut Net| net.set_link(up))?.transpose();
        set.map(drop).map_err(|source| PlugError::Thread { id: id.into(), source })
    }

    /// Whether a slot holds the NIC `id`.
    pub fn has_nic(&self, id: &str) -> bool {
        self.backends.nic_slot(id).is_some()
    }

    /// Tell the networks of the NICs `ids`, or of all, where they are now. A tap that does not take
    /// it shows in the log: the machine can do without. So does a NIC that its guest is resetting.
    pub fn announce(&self, ids: Option<&[String]>) {
        for (slot, config) in self.backends.nics.iter().enumerate() {
            let Some(NicConfig { id, .. }) = config else { continue };
            if ids.is_some_and(|ids| !ids.contains(id)) {
                continue;
            }
            let Some((transport, _)) = self.slots.get(self.nic_index(slot)) else { continue };
            let announced = transport.try_lock().ok_or(io::ErrorKind::WouldBlock.into());
            let announced = announced
                .and_then(|mut t| t.device().map_or(Ok(()), |net: &mut Net| net.announce()));
            if let Err(e) = announced {
                log::warn!("{id}: cannot announce its address: {e}");
            }
        }
    }

    /// The image of disk `id`, which is about to be made `size` bytes long. From here on the guest
    /// cannot reach what lies beyond. Until the image is dropped the disk cannot be closed.
    ///
    /// # Errors
    /// When no slot holds it, it is read-only, or its storage hangs.
    pub fn begin_resize(&mut self, id: &str, size: u64) -> Result<Arc<Disk>, PlugError> {
        let slot = self.backends.disk_slot(id).ok_or_else(|| PlugError::NoDevice(id.into()))?;
        let begun = self.change(slot, |block: &mut Block| block.begin_resize(size))?.transpose()?;
        begun.flatten().ok_or_else(|| PlugError::NoDevice(id.into()))
    }

    /// Show the guest the size that disk `id` has now.
    ///
    /// # Errors
    /// When no slot holds it.
    pub fn end_resize(&mut self, id: &str) -> Result<(), PlugError> {
        let slot = self.backends.disk_slot(id).ok_or_else(|| PlugError::NoDevice(id.into()))?;
        // Else its guest is resetting it, and will see the size after that.
        if let Some((transport, _)) = self.slots.get(slot)
            && let Some(mut transport) = transport.try_lock_for(DEVICE_LOCK_LIMIT)
        {
            transport.update(|_: &mut Block| ());
        }
        Ok(())
    }

    /// The NICs that are in slots, in order, each with the address that the guest sees.
    ///
    /// # Errors
    /// When the guest resets one that does not answer.
    pub fn nics(&self) -> Result<Vec<(NicConfig, [u8; 6])>, RunError> {
        let mut nics = Vec::new();
        let deadline = Instant::now() + DEVICE_LOCK_LIMIT;
        for (slot, config) in self.backends.nics.iter().enumerate() {
            if let (Some(config), Some((transport, _))) =
                (config, self.slots.get(self.nic_index(slot)))
            {
                let transport = transport.try_lock_until(deadline);
                let busy = || RunError::Restless(format!("NIC {}", config.id));
                if let Some(net) = transport.ok_or_else(busy)?.device::<Net>() {
                    nics.push((config.clone(), net.mac()));
                }
            }
        }
        Ok(nics)
    }

    /// Disks that wait for a slot.
    pub fn waiting_disks(&self) -> impl Iterator<Item = (&DiskConfig, u64)> {
        let waiting = self.backends.waiting_disks.values();
        waiting.map(|OpenDisk { config, backend }| (config, backend.disk.size()))
    }

    /// The disks that are in slots, in order.
    pub fn disks(&self) -> impl Iterator<Item = PluggedDisk> {
        let each = self.backends.disks.iter().zip(&self.backends.plugged);
        each.filter_map(|(config, plugged)| {
            let (config, stats) = (config.clone()?, plugged.stats.clone());
            Some(PluggedDisk { config, size: plugged.size(), stats })
        })
    }

    /// Bytes of the disks in the slots, 0 for an empty one.
    pub fn disk_sizes(&self) -> Vec<u64> {
        self.backends.plugged.iter().map(Plugged::size).collect()
    }
}
/// How a disk's requests are carried out, in the words of its back-end.
fn aio(aio: config::Aio) -> disk::Aio {
    match aio {
        config::Aio::Auto => disk::Aio::Auto,
        config::Aio::IoUring => disk::Aio::IoUring,
        config::Aio::Off => disk::Aio::Off,
    }
}

/// What the image of a restored disk has to be, in the words of its device.
fn expect(expect: config::Expect) -> blk::Expect {
    match expect {
        config::Expect::Saved => blk::Expect::Saved,
        config::Expect::Copy => blk::Expect::Copy,
        config::Expect::Any => blk::Expect::Any,
    }
}
