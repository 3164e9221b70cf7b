//! Back-ends of network devices: the host's end of an interface.
pub mod frame;
pub mod gated;
mod link;
pub mod tap;

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
};

use rustix::event::{EventfdFlags, eventfd};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
};
use vmm_sys_util::epoll::EventSet;

use self::frame::Frame;

/// Bytes of the header in front of each frame (virtio 1.3, section 5.1.6, with `num_buffers`).
pub const HEADER: usize = 12;
/// The longest frame, with its header: the buffer size that a driver with segmentation offloads
/// must provide (virtio 1.3, section 5.1.6.3.1).
pub const FRAME_MAX: usize = 65_562;

/// What the guest accepts from the back-end beyond plain, complete frames: the feature bits
/// `VIRTIO_NET_F_GUEST_*`, which are also the words of the control queue's offload command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offloads(pub u64);

impl Offloads {
    /// Every offload.
    pub const ALL: Self = Self(
        1 << VIRTIO_NET_F_GUEST_CSUM
            | 1 << VIRTIO_NET_F_GUEST_TSO4
            | 1 << VIRTIO_NET_F_GUEST_TSO6
            | 1 << VIRTIO_NET_F_GUEST_ECN
            | 1 << VIRTIO_NET_F_GUEST_UFO
            | Self::USO.0,
    );
    /// UDP segmentation, which needs Linux 6.2 on the host.
    pub const USO: Self = Self(1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6);

    /// Whether it includes the bit `VIRTIO_NET_F_*`.
    pub fn has(self, feature: u32) -> bool {
        self.0 & 1 << feature != 0
    }
}

/// A host's end of a network interface: frames in and out, several queues.
///
/// Frames begin with the [`HEADER`]. Nothing blocks: [`io::ErrorKind::WouldBlock`] says that there
/// is no frame, or no room for one.
pub trait NetBackend: Send + Sync + 'static {
    /// Queues, one for each queue pair of the device.
    fn queues(&self) -> usize;
    /// Readable when queue `queue` has a frame, writable when it takes one.
    fn fd(&self, queue: usize) -> RawFd;
    /// What to wait for, and on which descriptor, after [`NetBackend::write`] has found no room.
    fn room(&self, queue: usize) -> (RawFd, EventSet) {
        (self.fd(queue), EventSet::OUT)
    }
    /// Whether the header is exchanged with the host. Otherwise a header is made up, and offloads
    /// are not possible.
    fn has_header(&self) -> bool;
    /// Whether it supports UDP segmentation offload.
    fn has_uso(&self) -> bool;
    /// Receive one frame into guest memory, and what does not fit there into `spill`.
    ///
    /// # Errors
    /// `WouldBlock`, or the error of the interface.
    fn read(&self, queue: usize, into: &mut Frame, spill: &mut [u8]) -> io::Result<usize>;
    /// Receive one frame into a buffer of this process.
    ///
    /// # Errors
    /// As [`NetBackend::read`].
    fn read_buffer(&self, queue: usize, into: &mut [u8]) -> io::Result<usize>;
    /// Send one frame. `frame` is consumed.
    ///
    /// # Errors
    /// `WouldBlock`, the error of the interface, or `InvalidInput` for an invalid frame.
    fn write(&self, queue: usize, frame: &mut Frame) -> io::Result<usize>;
    /// Send one frame from this process, header included, by the first queue.
    ///
    /// # Errors
    /// As [`NetBackend::write`].
    fn write_buffer(&self, frame: &[u8]) -> io::Result<usize>;
    /// Deliver frames that need these offloads from now on.
    ///
    /// # Errors
    /// When the host refuses; nothing has changed then.
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()>;
    /// Spread received frames over the first `queues` queues.
    ///
    /// # Errors
    /// When the host refuses.
    fn set_active_queues(&self, queues: usize) -> io::Result<()>;
}

/// A null back-end: its device can be restored from a saved state, and never gets a frame.
pub struct NoNetwork {
    queues: usize,
    fd: OwnedFd,
}

impl NoNetwork {
    /// A null back-end with this many queues.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn new(queues: usize) -> io::Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { queues, fd })
    }
}

impl NetBackend for NoNetwork {
    fn queues(&self) -> usize {
        self.queues
    }

    fn fd(&self, _: usize) -> RawFd {
        self.fd.as_raw_fd()
    }

    fn has_header(&self) -> bool {
        true
    }

    fn has_uso(&self) -> bool {
        true
    }

    fn read(&self, _: usize, _: &mut Frame, _: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn read_buffer(&self, _: usize, _: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn write(&self, _: usize, _: &mut Frame) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn write_buffer(&self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn set_offloads(&self, _: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn set_active_queues(&self, _: usize) -> io::Result<()> {
        Ok(())
    }
}
