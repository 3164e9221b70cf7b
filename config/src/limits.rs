//! Limits of a configuration, whichever source it has: command line, JSON file, QMP, saved state.
use std::ops::RangeInclusive;

use crate::{places::VIRTIO_IRQS, types::Id};

/// Virtio devices of all kinds, including empty slots for disks and NICs: each has an interrupt.
pub const VIRTIO_SLOTS: usize = VIRTIO_IRQS.len();
/// Default number of slots for disks, unless there are more disks: as many as StratoVirt's microVM
/// has. Each one costs a Linux guest almost a millisecond of its boot.
pub const DISK_SLOTS: usize = 4;
/// Default number of slots for NICs, unless there are more NICs.
pub const NIC_SLOTS: usize = 2;
/// I/O threads in addition to the default one.
pub const MAX_IOTHREADS: usize = 8;
/// Bytes of a path (`PATH_MAX`).
pub const MAX_PATH: usize = 4096;
/// Bytes of a Unix socket's path: `sockaddr_un` less the terminator.
pub const MAX_SOCKET_PATH: usize = 107;
/// Bytes of output that a socket replays.
pub const REPLAY: RangeInclusive<u32> = 0..=1 << 20;
/// Bytes of a disk's serial number (virtio 1.2, 5.2.6: `VIRTIO_BLK_ID_BYTES`).
pub const MAX_DISK_SERIAL: usize = 20;
/// Bytes of a kernel command line, without the terminator.
pub const MAX_CMDLINE: usize = 0xffff;
/// Default machine name.
pub const DEFAULT_NAME: Id = Id::fixed("StratoVirt");
/// Default UUID.
pub const NIL_UUID: &str = "00000000-0000-0000-0000-000000000000";
