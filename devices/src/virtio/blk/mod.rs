//! The block device (virtio 1.3, section 5.2).
//!
//! A device may be an empty slot: it exists from boot with a capacity of 0, and a disk can be
//! inserted and removed later. The driver negotiates features only once, so an empty slot offers
//! what most disks support. A disk without discard support ignores discards, which violates nothing
//! that a driver may rely on; a read-only disk fails writes with an error.
mod redo;
mod report;
mod request;
mod saved;
mod stats;
#[cfg(test)]
mod tests;
mod worker;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};

pub use self::{report::OnError, stats::BlockStats};
use self::{
    report::Reporter,
    worker::{BlockWorker, Media, SERIAL, WorkerArgs},
};
use super::{
    ActivateError, Activation, CANNOT_OFFER, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1,
    VirtioDevice, VirtioWorker,
};
use crate::{
    backend::disk::{Disk, DiskError, SECTOR},
    model::Model,
    rate_limit::RateLimiter,
    state::StateError,
    worker::WorkerControl,
};

const DEVICE_TYPE: u32 = 2;

/// Offset of `writeback`, the only field of the configuration space that the driver may write.
const WRITEBACK: u64 = 32;

/// Guest-visible settings of a device. Fixed for the lifetime of the machine.
#[derive(Clone)]
pub struct Settings {
    /// Queues, 1 to 32.
    pub queues: u16,
    /// Descriptors a queue, a power of two, 2 to 1024.
    pub queue_size: u16,
    /// Called for requests that the host could not carry out, at a limited rate.
    pub on_error: Option<OnError>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { queues: 1, queue_size: 256, on_error: None }
    }
}

/// A disk for a slot, and its settings.
#[derive(Debug)]
pub struct Backend {
    /// The name used in reports; `None`: the slot's.
    pub name: Option<String>,
    /// The image or host device. While it is in a slot, the device's worker shares it.
    pub disk: Arc<Disk>,
    /// Serial number; the guest sees its first 20 bytes.
    pub serial: String,
    /// Requests per second; `None` or 0 for no limit.
    pub ops_per_second: Option<u64>,
    /// Bytes read and written per second; `None` or 0 for no limit.
    pub bytes_per_second: Option<u64>,
    /// Which disk is accepted when a saved state is restored.
    pub expect: Expect,
}

/// Which disk a restored device may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Expect {
    /// The disk that was saved.
    #[default]
    Saved,
    /// A copy of the saved disk, or the same disk in another place.
    Copy,
    /// Any disk of the saved size: the user guarantees its contents.
    Any,
}

impl From<Disk> for Backend {
    fn from(disk: Disk) -> Self {
        Self {
            name: None,
            disk: Arc::new(disk),
            serial: String::new(),
            ops_per_second: None,
            bytes_per_second: None,
            expect: Expect::default(),
        }
    }
}

/// Why a disk cannot be plugged in.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// The slot has a disk already.
    #[error("{0} already has a disk; unplug it first")]
    Occupied(String),
    /// The host refused something.
    #[error("cannot plug a disk into {id}")]
    Host {
        /// The device.
        id: String,
        /// Why.
        source: io::Error,
    },
}

/// A virtio block device.
pub struct Block {
    id: String,
    settings: Settings,
    sizes: Vec<u16>,
    backend: Option<Backend>,
    features: u64,
    writeback: Arc<AtomicBool>,
    stats: Arc<BlockStats>,
    worker: VirtioWorker<BlockWorker>,
}

impl Block {
    /// A device with a disk, or an empty slot.
    pub fn new(id: impl Into<String>, settings: Settings, backend: Option<Backend>) -> Self {
        Self {
            id: id.into(),
            sizes: vec![settings.queue_size; settings.queues.into()],
            features: offered(&settings, backend.as_ref().map(|b| &*b.disk)),
            settings,
            backend,
            writeback: Arc::new(AtomicBool::new(true)),
            stats: Arc::default(),
            worker: VirtioWorker::default(),
        }
    }

    /// Put a disk into an empty slot. The transport must then show the new configuration.
    ///
    /// # Errors
    /// When the slot is not empty, or the host refuses to watch the disk.
    pub fn plug(&mut self, backend: Backend) -> Result<(), PlugError> {
        if self.backend.is_some() {
            return Err(PlugError::Occupied(self.id.clone()));
        }
        self.stats.reset();
        self.backend = Some(backend);
        let shown = self.show_worker();
        shown.map_err(|source| {
            self.backend = None;
            // If the I/O thread has not taken the worker back, the worker has the disk already.
            let _ = self.show_worker();
            PlugError::Host { id: self.id.clone(), source }
        })
    }

    /// Take the disk out, after requests in flight are complete; later requests fail. The transport
    /// must then show the new configuration. `None` when the slot is empty.
    pub fn unplug(&mut self) -> Option<Backend> {
        let backend = self.backend.take()?;
        if let Err(e) = self.show_worker() {
            log::error!("{}: {e}", self.id);
        }
        Some(backend)
    }

    /// Return the image, for the caller to make it `bytes` long by [`Disk::resize`], which can wait
    /// for its storage. Until then the guest cannot access anything beyond that size. `None` for an
    /// empty slot.
    ///
    /// # Errors
    /// As [`Disk::begin_resize`].
    pub fn begin_resize(&mut self, bytes: u64) -> Result<Option<Arc<Disk>>, DiskError> {
        let Some(Backend { disk, .. }) = &self.backend else { return Ok(None) };
        disk.begin_resize(bytes)?;
        Ok(Some(disk.clone()))
    }

    /// The disk, unless the slot is empty.
    pub fn disk(&self) -> Option<&Disk> {
        self.backend.as_ref().map(|b| &*b.disk)
    }

    /// As [`Block::disk`], as a shared reference.
    pub fn shared_disk(&self) -> Option<Arc<Disk>> {
        self.backend.as_ref().map(|b| b.disk.clone())
    }

    /// Bytes that the guest sees; 0 for an empty slot.
    pub fn capacity(&self) -> u64 {
        self.backend.as_ref().map_or(0, |b| b.disk.size())
    }

    /// The device's counters.
    pub fn stats(&self) -> Arc<BlockStats> {
        self.stats.clone()
    }

    fn media(&self) -> io::Result<Media> {
        let Some(backend) = &self.backend else {
            let name = self.id.clone();
            return Ok(Media { name, disk: None, serial: [0; SERIAL], limiter: None });
        };
        let name = backend.name.as_deref().unwrap_or(&self.id).to_owned();
        let (ops, bytes) = (backend.ops_per_second, backend.bytes_per_second);
        let limited = [ops, bytes].into_iter().any(|n| n.is_some_and(|n| n > 0));
        let limiter = limited.then(|| RateLimiter::new(ops, bytes)).transpose()?;
        let mut serial = [0; SERIAL];
        serial.iter_mut().zip(backend.serial.bytes()).for_each(|(to, from)| *to = from);
        Ok(Media { name, disk: Some(backend.disk.clone()), serial, limiter })
    }

    /// Pass the present contents of the slot to the worker, if there is one.
    fn show_worker(&mut self) -> io::Result<()> {
        let media = self.media()?;
        self.worker.change(|worker| worker.insert(media)).map(drop)
    }
}

fn offered(settings: &Settings, disk: Option<&Disk>) -> u64 {
    let readonly = disk.is_some_and(Disk::readonly);
    let discard = disk.is_none_or(Disk::discard);
    let mut features = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX;
    for (bit, offer) in [
        (VIRTIO_BLK_F_SEG_MAX, true),
        (VIRTIO_BLK_F_BLK_SIZE, true),
        (VIRTIO_BLK_F_TOPOLOGY, true),
        (VIRTIO_BLK_F_FLUSH, true),
        (VIRTIO_BLK_F_CONFIG_WCE, true),
        (VIRTIO_BLK_F_RO, readonly),
        (VIRTIO_BLK_F_MQ, settings.queues > 1),
        (VIRTIO_BLK_F_DISCARD, discard && !readonly),
        (VIRTIO_BLK_F_WRITE_ZEROES, !readonly),
    ] {
        features |= u64::from(offer) << bit;
    }
    features
}

/// The features that a slot with these settings may offer, whatever disk it has when the guest
/// starts.
fn known(settings: &Settings) -> u64 {
    offered(settings, None) | 1 << VIRTIO_BLK_F_RO
}

impl Model for Block {
    fn id(&self) -> &str {
        &self.id
    }

    fn worker(&mut self) -> Option<&mut dyn WorkerControl> {
        Some(&mut self.worker)
    }

    fn reset(&mut self) {
        // Requests in flight are completed first.
        self.worker.stop();
        self.writeback.store(true, Ordering::Relaxed);
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn offer(&mut self, features: u64) -> Result<(), StateError> {
        if features & !known(&self.settings) != 0 {
            return Err(StateError::Invalid(CANNOT_OFFER));
        }
        self.features = features;
        Ok(())
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn config(&self) -> Vec<u8> {
        let disk = self.disk();
        let logical = disk.map_or(SECTOR as u32, Disk::logical_block);
        let physical = disk.map_or(4096, Disk::physical_block);
        let exponent = physical.ilog2().saturating_sub(logical.ilog2()) as u8;
        let in_blocks = |bytes: u32| u16::try_from(bytes / logical).unwrap_or(u16::MAX);
        let ranges = request::MAX_RANGE;
        let alignment = logical / SECTOR as u32;
        let unmap = disk.is_none_or(Disk::discard);
        // Section 5.2.4, field by field; size_max and geometry are not offered.
        [
            &(disk.map_or(0, Disk::size) / SECTOR).to_le_bytes()[..],
            &0u32.to_le_bytes(),
            // A chain needs two more descriptors: header and status.
            &u32::from(self.settings.queue_size.saturating_sub(2).max(1)).to_le_bytes(),
            &0u32.to_le_bytes(),
            &logical.to_le_bytes(),
            &[exponent, 0],
            &in_blocks(physical).to_le_bytes(),
            &0u32.to_le_bytes(),
            &[self.writeback.load(Ordering::Relaxed).into(), 0],
            &self.settings.queues.to_le_bytes(),
            &ranges.to_le_bytes(),
            &1u32.to_le_bytes(),
            &alignment.to_le_bytes(),
            &ranges.to_le_bytes(),
            &1u32.to_le_bytes(),
            &[unmap.into(), 0, 0, 0],
        ]
        .concat()
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let at = WRITEBACK.checked_sub(offset).and_then(|at| usize::try_from(at).ok());
        if let Some(value) = at.and_then(|at| data.get(at)) {
            self.writeback.store(value & 1 != 0, Ordering::Relaxed);
        }
    }

    fn activate(&mut self, with: Activation) -> Result<(), ActivateError> {
        if with.queues.is_empty() {
            return Err(ActivateError::MissingQueue(0));
        }
        let flush = with.features & 1 << VIRTIO_BLK_F_FLUSH != 0;
        // Section 5.2.5.2: a driver that cannot flush starts without a write cache. The choice that
        // a driver made before a save is restored after this.
        if !flush {
            self.writeback.store(false, Ordering::Relaxed);
        }
        let host = |what| move |source| ActivateError::Host { what, source };
        let media = self.media().map_err(host("make a timer for the disk's limits"))?;
        let args = WorkerArgs {
            queues: with.queues,
            memory: with.memory,
            interrupt: with.interrupt.clone(),
            indirect: with.features & F_INDIRECT_DESC != 0,
            flush,
            writeback: self.writeback.clone(),
            stats: self.stats.clone(),
            reporter: Reporter::new(self.settings.on_error.clone()),
        };
        let worker = BlockWorker::new(args, media);
        self.worker.start(worker, with.interrupt, with.thread)
    }
}
