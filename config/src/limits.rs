//! What a configuration may ask for, whoever makes it: command line, JSON file, QMP, saved state.
use std::ops::RangeInclusive;

use crate::places::VIRTIO_IRQS;

/// vCPUs of a machine: x2APIC ids would allow more, the MP table and CPU masks of old guests not.
pub const CPUS: RangeInclusive<u8> = 1..=254;
/// Guest RAM when nothing is said, in bytes.
pub const DEFAULT_MEMORY: u64 = 256 << 20;
/// Least guest RAM in bytes.
pub const MIN_MEMORY: u64 = 16 << 20;
/// Most guest RAM in bytes: physical addresses have 52 bits (Intel SDM 3A, 4.1.4), and 1 GiB of
/// them is the hole. What the host has is far less and seen when it is asked for.
pub const MAX_MEMORY: u64 = (1 << 52) - (1 << 30);
/// Guest RAM is a multiple of this many bytes.
pub const MEMORY_UNIT: u64 = 1 << 20;
/// Virtio devices of all kinds, empty slots for disks and NICs included: each has an interrupt.
pub const VIRTIO_SLOTS: usize = VIRTIO_IRQS.len();
/// Slots for disks when nothing is said and no more disks are there: as many as StratoVirt's microVM
/// has. Each one costs a Linux guest almost a millisecond of its boot.
pub const DISK_SLOTS: usize = 4;
/// Slots for NICs when nothing is said and no more NICs are there.
pub const NIC_SLOTS: usize = 2;
/// I/O threads in addition to the default one.
pub const MAX_IOTHREADS: usize = 8;
/// Bytes of a name or an id.
pub const MAX_ID: usize = 255;
/// Bytes of a path (`PATH_MAX`).
pub const MAX_PATH: usize = 4096;
/// Bytes of a Unix socket's path: `sockaddr_un` less the terminator.
pub const MAX_SOCKET_PATH: usize = 107;
/// Bytes of output that a socket replays.
pub const REPLAY: RangeInclusive<u32> = 0..=1 << 20;
/// Bytes of a tap's name: `IFNAMSIZ` less the terminator.
pub const MAX_TAP_NAME: usize = 15;
/// Bytes of a disk's serial number (virtio 1.2, 5.2.6: `VIRTIO_BLK_ID_BYTES`).
pub const MAX_DISK_SERIAL: usize = 20;
/// Queues of a disk.
pub const DISK_QUEUES: RangeInclusive<u16> = 1..=32;
/// Descriptors of a disk's queue, a power of two.
pub const DISK_QUEUE_SIZE: RangeInclusive<u16> = 2..=1024;
/// Queue pairs of a NIC.
pub const NIC_QUEUE_PAIRS: RangeInclusive<u16> = 1..=16;
/// Descriptors of a NIC's queue, a power of two.
pub const NIC_QUEUE_SIZE: RangeInclusive<u16> = 256..=4096;
/// Descriptors of a queue when nothing is said.
pub const DEFAULT_QUEUE_SIZE: u16 = 256;
/// A disk's requests per second, 0 for unlimited.
pub const DISK_IOPS: RangeInclusive<u64> = 0..=1_000_000;
/// virtio-rng's bytes per second.
pub const RNG_BPS: RangeInclusive<u64> = 64..=1_000_000_000;
/// Bytes of a kernel command line, without the terminator.
pub const MAX_CMDLINE: usize = 0xffff;
/// Machine name when nothing is said.
pub const DEFAULT_NAME: &str = "StratoVirt";
/// UUID when nothing is said.
pub const NIL_UUID: &str = "00000000-0000-0000-0000-000000000000";
