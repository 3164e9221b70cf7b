//! virtio-net (virtio 1.3, section 5.1).
//!
//! One copy each way: frames are sent by writev from guest buffers to the back-end and received by
//! readv from it into guest buffers, in segments of up to 64 KiB where the driver accepts offloads.
//!
//! A device without a back-end is an empty slot: its link is down until [`Net::plug`].
mod announce;
mod ctrl;
mod pair;
mod rx;
mod saved;
mod stats;
#[cfg(test)]
mod tests;
mod tx;
mod worker;

use std::{io, sync::Arc};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

pub use self::stats::{Counters, NetStats};
use self::worker::{NetWorker, WorkerArgs};
use super::{
    ActivateError, Activation, ActiveQueue, CANNOT_OFFER, F_EVENT_IDX, F_INDIRECT_DESC,
    VirtioDevice, VirtioWorker, ring::Ring,
};
use crate::{
    backend::net::{
        NetBackend, Offloads,
        gated::{Gated, NetKeeper},
    },
    log_limit::log_seldom,
    model::Model,
    random,
    state::StateError,
    worker::WorkerControl,
};

const DEVICE_TYPE: u32 = 1;
const CONTROL_QUEUE_SIZE: u16 = 64;
/// Features that do not depend on the back-end.
const ALWAYS: u64 = F_INDIRECT_DESC
    | F_EVENT_IDX
    | 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_CTRL_VQ;
/// Features that need a back-end with virtio headers.
const WITH_HEADER: u64 = Offloads::ALL.0 & !Offloads::USO.0
    | 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_HOST_UFO
    | 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS;
/// Features that need a back-end that supports UDP segmentation.
const USO: u64 = Offloads::USO.0 | 1 << VIRTIO_NET_F_HOST_USO;

/// The settings of an interface.
#[derive(Debug, Clone, Default)]
pub struct NetSettings {
    /// Hardware address; `None`: a generated, locally administered one.
    pub mac: Option<[u8; 6]>,
    /// Queue pairs, 1 to 16.
    pub queue_pairs: u16,
    /// Descriptors a queue, a power of two, 256 to 4096.
    pub queue_size: u16,
    /// Packets per second in each direction; `None`: unlimited.
    pub pps: Option<u64>,
    /// Bytes per second in each direction; `None`: unlimited.
    pub bps: Option<u64>,
}

/// Why a back-end cannot be plugged into a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PlugError {
    /// The slot has a back-end already.
    #[error("the slot is occupied")]
    Occupied,
    /// The back-end's queues do not match the queue pairs that the driver sees.
    #[error("the tap device has {has} queues, the slot needs {needs}")]
    #[expect(missing_docs, reason = "shown by the message")]
    Queues { has: usize, needs: u16 },
    /// The driver relies on offloads, which need a header.
    #[error("the tap device has no virtio header: open it with IFF_VNET_HDR")]
    NoHeader,
    /// The driver was offered USO by the source machine.
    #[error(
        "the tap device does not support UDP segmentation offload (USO), which the guest was \
         offered: it needs Linux 6.2 or later on the host"
    )]
    NoUso,
    /// The host has no random numbers for a MAC address.
    #[error("the host has no random numbers to generate a MAC address: give one with mac=")]
    NoAddress,
    /// The I/O thread is gone.
    #[error("the device's I/O thread does not accept it")]
    Thread,
}

/// A network interface.
pub struct Net {
    id: String,
    settings: NetSettings,
    mac: [u8; 6],
    link: bool,
    backend: Option<Arc<dyn NetBackend>>,
    /// The back-end behind the gate, if there is one.
    behind: Option<Arc<dyn NetBackend>>,
    /// A back-end will be plugged in before the guest runs, so the driver sees it already.
    awaited: bool,
    features: u64,
    queue_sizes: Vec<u16>,
    stats: Arc<NetStats>,
    worker: VirtioWorker<NetWorker>,
}

impl Net {
    /// An interface on `backend`; with `None`, an empty slot.
    ///
    /// # Errors
    /// When the back-end has another number of queues than `settings` has pairs.
    pub fn new(
        id: impl Into<String>,
        settings: NetSettings,
        backend: Option<Arc<dyn NetBackend>>,
    ) -> Result<Self, PlugError> {
        let pairs = settings.queue_pairs;
        let mut features = ALWAYS;
        if pairs > 1 {
            features |= 1 << VIRTIO_NET_F_MQ;
        }
        // What a tap plugged in later supports is not known yet, but all taps have the header.
        if backend.as_ref().is_none_or(|b| b.has_header()) {
            features |= WITH_HEADER;
        }
        if backend.as_ref().is_some_and(|b| b.has_uso()) {
            features |= USO;
        }
        let mut queue_sizes = vec![settings.queue_size; usize::from(pairs) * 2];
        queue_sizes.push(CONTROL_QUEUE_SIZE);
        let mut net = Self {
            id: id.into(),
            mac: settings.mac.map_or_else(made_up_mac, Ok)?,
            settings,
            link: true,
            backend: None,
            behind: None,
            awaited: false,
            features,
            queue_sizes,
            stats: Arc::default(),
            worker: VirtioWorker::default(),
        };
        if let Some(backend) = backend {
            net.plug(backend, None)?;
        }
        Ok(net)
    }

    /// Whether this back-end can be plugged.
    ///
    /// # Errors
    /// When the slot is occupied or the back-end does not fit.
    pub fn accepts(&self, backend: &dyn NetBackend) -> Result<(), PlugError> {
        if self.backend.is_some() {
            return Err(PlugError::Occupied);
        }
        let needs = self.settings.queue_pairs;
        if backend.queues() != usize::from(needs) {
            return Err(PlugError::Queues { has: backend.queues(), needs });
        }
        if self.features & WITH_HEADER != 0 && !backend.has_header() {
            return Err(PlugError::NoHeader);
        }
        if self.awaited && self.features & USO != 0 && !backend.has_uso() {
            return Err(PlugError::NoUso);
        }
        Ok(())
    }

    /// Another process still has the back-end, which will be plugged in before the guest runs: the
    /// driver sees the slot as if it already had it.
    pub fn await_backend(&mut self) {
        self.awaited = self.backend.is_none();
    }

    /// Put a back-end into an empty slot; `mac` replaces the address that the driver sees.
    ///
    /// # Errors
    /// When it is not acceptable, or the I/O thread is gone.
    pub fn plug(
        &mut self,
        backend: Arc<dyn NetBackend>,
        mac: Option<[u8; 6]>,
    ) -> Result<(), PlugError> {
        self.accepts(&*backend)?;
        self.mac = mac.unwrap_or(self.mac);
        self.set_backend(Some(backend)).map_err(|_| {
            // If the I/O thread has not taken the worker back, the worker has the back-end already.
            let _ = self.set_backend(None);
            PlugError::Thread
        })
    }

    /// Take the back-end away: the slot is empty, and the host's interface is free again once the
    /// back-end is dropped. `None` when the slot was empty.
    ///
    /// # Errors
    /// When the I/O thread is gone.
    pub fn unplug(&mut self) -> io::Result<Option<Arc<dyn NetBackend>>> {
        let backend = self.backend.take();
        self.set_backend(None)?;
        Ok(self.behind.take().or(backend))
    }

    /// Put a new, open gate in front of the back-end, in place of one that is there already; `None`
    /// for an empty slot. Called while the device is paused.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn gate(&mut self) -> io::Result<Option<NetKeeper>> {
        let Some(backend) = self.behind.clone().or_else(|| self.backend.clone()) else {
            return Ok(None);
        };
        let (gated, keeper) = Gated::new(backend.clone())?;
        self.set_backend(Some(Arc::new(gated)))?;
        self.behind = Some(backend);
        Ok(Some(keeper))
    }

    /// Set the link up or down.
    ///
    /// # Errors
    /// When the I/O thread is gone.
    pub fn set_link(&mut self, up: bool) -> io::Result<()> {
        self.link = up;
        self.worker.change(|worker| worker.set_link(up)).map(drop)
    }

    /// Whether the driver sees a link: there is a back-end, and the link is set up.
    pub fn link_up(&self) -> bool {
        self.link && (self.backend.is_some() || self.awaited)
    }

    /// Announce to the host's network that this address is here now; does nothing while the link is
    /// down.
    ///
    /// # Errors
    /// When the host does not accept the frame.
    pub fn announce(&self) -> io::Result<()> {
        match &self.backend {
            Some(backend) if self.link => {
                backend.write_buffer(&announce::frame(self.mac)).map(drop)
            }
            _ => Ok(()),
        }
    }

    /// The hardware address that the driver sees.
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// The back-end, if there is one.
    pub fn backend(&self) -> Option<&dyn NetBackend> {
        self.backend.as_deref()
    }

    /// The counters, which the device keeps updating.
    pub fn stats(&self) -> Arc<NetStats> {
        self.stats.clone()
    }

    fn set_backend(&mut self, backend: Option<Arc<dyn NetBackend>>) -> io::Result<()> {
        (self.backend, self.awaited) = (backend, false);
        let backend = self.backend.clone();
        match self.worker.change(|worker| worker.set_backend(backend))? {
            Some(()) => {}
            None => self.rest(),
        }
        Ok(())
    }

    /// Without a driver: reset the back-end to one queue and no offloads.
    fn rest(&self) {
        let Some(backend) = &self.backend else { return };
        let offloads = backend.set_offloads(Offloads::default());
        if let Err(e) = offloads.and(backend.set_active_queues(1)) {
            log_seldom!(warn, "{}: cannot reset the tap device: {e}", self.id);
        }
    }
}

/// A random, locally administered address.
fn made_up_mac() -> Result<[u8; 6], PlugError> {
    let mut mac: [u8; 6] = random::bytes().map_err(|_| PlugError::NoAddress)?;
    mac[0] = mac[0] & !0x01 | 0x02;
    Ok(mac)
}

impl Model for Net {
    fn id(&self) -> &str {
        &self.id
    }

    fn worker(&mut self) -> Option<&mut dyn WorkerControl> {
        Some(&mut self.worker)
    }

    fn reset(&mut self) {
        self.worker.stop();
        self.rest();
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn offer(&mut self, features: u64) -> Result<(), StateError> {
        let mut known = ALWAYS;
        known |= u64::from(self.settings.queue_pairs > 1) << VIRTIO_NET_F_MQ;
        if self.backend().is_none_or(|b| b.has_header()) {
            known |= WITH_HEADER;
        }
        if self.backend().is_none_or(|b| b.has_uso()) {
            known |= USO;
        }
        if features & !known != 0 {
            return Err(StateError::Invalid(CANNOT_OFFER));
        }
        self.features = features;
        Ok(())
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    /// Section 5.1.4: mac, status, max_virtqueue_pairs.
    fn config(&self) -> Vec<u8> {
        let status = if self.link_up() { VIRTIO_NET_S_LINK_UP as u16 } else { 0 };
        let mut config = self.mac.to_vec();
        config.extend(status.to_le_bytes());
        config.extend(self.settings.queue_pairs.to_le_bytes());
        config
    }

    fn write_config(&mut self, _: u64, _: &[u8]) {
        // No field is writable (section 5.1.4.1).
    }

    fn activate(&mut self, with: Activation) -> Result<(), ActivateError> {
        let has = |feature: u32| with.features & 1 << feature != 0;
        let indirect = with.features & F_INDIRECT_DESC != 0;
        // Section 5.1.2: without MQ there is one pair, and the control queue comes right after.
        let pairs = if has(VIRTIO_NET_F_MQ) { self.settings.queue_pairs } else { 1 };
        let mut queues = with.queues;
        let mut ring = |index: u16| {
            let at = queues.iter().position(|q: &ActiveQueue| q.index == index);
            at.map(|at| Ring::new(queues.swap_remove(at), with.memory.clone(), indirect))
        };
        let mut rings = Vec::new();
        for n in 0..pairs {
            match (ring(2 * n), ring(2 * n + 1)) {
                (Some(rx), Some(tx)) => rings.push((rx, tx)),
                // A driver may leave out pairs that it does not need.
                _ if n > 0 => break,
                (None, _) => return Err(ActivateError::MissingQueue(0)),
                (_, None) => return Err(ActivateError::MissingQueue(1)),
            }
        }
        let control = if has(VIRTIO_NET_F_CTRL_VQ) { ring(2 * pairs) } else { None };
        let worker = NetWorker::new(WorkerArgs {
            id: self.id.clone(),
            backend: self.backend.clone(),
            link: self.link,
            limits: (self.settings.pps, self.settings.bps),
            interrupt: with.interrupt.clone(),
            stats: self.stats.clone(),
            pairs: rings,
            control,
            mergeable: has(VIRTIO_NET_F_MRG_RXBUF),
            negotiated: Offloads(with.features & Offloads::ALL.0),
        });
        let host = |what| move |source| ActivateError::Host { what, source };
        let worker = worker.map_err(host("make the descriptors of a network device"))?;
        self.worker.start(worker, with.interrupt, with.thread)
    }
}
