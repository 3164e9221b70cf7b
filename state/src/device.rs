//! The saved form of each kind of device, without its configuration. Only a disk may have requests
//! in flight, and only in the state of a machine that was captured without waiting for them.
use serde::{Deserialize, Serialize};

use crate::{
    hex::{Hex, HexArray, HexBytes},
    section::{Saved, Section, SectionError, required},
};

/// The first serial port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "named as in the manuals of the 16550")]
pub struct Serial {
    pub baud_divisor_low: u8,
    pub baud_divisor_high: u8,
    pub interrupt_enable: u8,
    pub interrupt_identification: u8,
    pub line_control: u8,
    pub line_status: u8,
    pub modem_control: u8,
    pub modem_status: u8,
    pub scratch: u8,
    /// Bytes that the guest has not read yet.
    pub input: HexBytes,
}

impl Saved for Serial {
    const KIND: &'static str = "serial-16550";
    const VERSION: u32 = 1;
}

/// The keyboard controller and its keyboard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct I8042 {
    /// Its command byte.
    pub control: u8,
    /// The controller's own answer, not read yet.
    #[serde(deserialize_with = "required")]
    pub answer: Option<u8>,
    /// A command that waits for its parameter.
    #[serde(deserialize_with = "required")]
    pub command: Option<u8>,
    /// The last byte written went to the command port.
    pub last_was_command: bool,
    /// Bytes from the keyboard that the guest has not read yet.
    pub sent: HexBytes,
    /// A command to the keyboard that waits for its parameter.
    #[serde(deserialize_with = "required")]
    pub keyboard_command: Option<u8>,
    /// Whether the keyboard reports keys.
    pub scanning: bool,
}

impl Saved for I8042 {
    const KIND: &'static str = "i8042";
    const VERSION: u32 = 1;
}

/// The real-time clock's registers. The time itself is the host's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cmos {
    /// The register that was selected.
    pub index: u8,
    /// All registers.
    pub ram: HexArray<128>,
}

impl Saved for Cmos {
    const KIND: &'static str = "cmos";
    const VERSION: u32 = 1;
}

/// The ACPI generic event device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Power {
    /// Events that the guest has not read yet, one bit each.
    pub events: u8,
}

impl Saved for Power {
    const KIND: &'static str = "acpi-power";
    const VERSION: u32 = 1;
}

/// The port on which a guest reports that it has crashed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pvpanic {}

impl Saved for Pvpanic {
    const KIND: &'static str = "pvpanic";
    const VERSION: u32 = 1;
}

/// A slot of the virtio-mmio transport: what its driver has written, and its device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtioMmio {
    /// Device type number (virtio 1.3, section 5).
    pub device_type: u32,
    /// The features that the slot has offered since the guest started, whatever it contains now.
    pub device_features: Hex<u64>,
    /// The registers of virtio 1.3, section 4.2.2.
    pub status: u32,
    /// As `status`.
    pub interrupt_status: u32,
    /// As `status`.
    pub config_generation: u32,
    /// As `status`.
    pub device_features_sel: u32,
    /// As `status`.
    pub driver_features_sel: u32,
    /// The features that the driver has accepted.
    pub driver_features: Hex<u64>,
    /// The driver has set a feature bit above 63.
    pub unknown_features: bool,
    /// As `status`.
    pub queue_sel: u32,
    /// The queues as the driver has configured them.
    pub queues: Vec<VirtioQueue>,
    /// The driver has activated the device, which has not been stopped since.
    pub active: bool,
    /// The device's own section.
    pub device: Section,
}

impl Saved for VirtioMmio {
    const KIND: &'static str = "virtio-mmio";
    const VERSION: u32 = 1;
}

/// A queue's registers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtioQueue {
    /// Its size in descriptors.
    pub size: u32,
    /// The driver has made it ready.
    pub ready: bool,
    /// Address of the descriptor table.
    pub descriptors: Hex<u64>,
    /// Address of the available ring.
    pub driver: Hex<u64>,
    /// Address of the used ring.
    pub device: Hex<u64>,
}

/// A disk, or an empty slot for one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Bytes; 0 for an empty slot.
    pub size: u64,
    /// The driver has chosen a write cache.
    pub writeback: bool,
    /// The queues of an active device.
    #[serde(deserialize_with = "required")]
    pub queues: Option<Vec<QueuePosition>>,
    /// Requests that were taken from a queue and not answered, by the index of the queue and of the
    /// first descriptor, in the order in which they were taken: they have to be carried out again, in
    /// this order. An ordinary save leaves none.
    pub in_flight: Vec<(u16, u16)>,
    /// The queues that the driver has broken: it has to reset the device. Absent if there are none,
    /// so that a program that does not know this field can read the states of all other machines.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub needs_reset: Vec<u16>,
    /// The mark by which the image is recognised; `null` for an image that cannot be marked.
    #[serde(deserialize_with = "required")]
    pub mark: Option<Mark>,
    /// SHA-256 of some of the blocks of a block device, see `docs/state-format.md`. Absent for any
    /// other disk, so that a program that does not know this field can read the states of all other
    /// machines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spot_check: Option<HexArray<32>>,
}

impl Saved for Disk {
    const KIND: &'static str = "virtio-blk";
    const VERSION: u32 = 1;
}

/// The identity of an image when its machine was saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mark {
    /// Random bytes, replaced before the first change after a save; `null` where the file system
    /// has no extended attributes.
    #[serde(deserialize_with = "required")]
    pub generation: Option<HexArray<16>>,
    /// Bytes of the image.
    pub size: u64,
    /// The time of its last change, in nanoseconds since 1970, UTC.
    pub mtime_ns: i64,
}

/// How far a queue has been processed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueuePosition {
    /// The queue's index.
    pub index: u16,
    /// Next entry of the available ring.
    pub next_avail: u16,
    /// Next entry of the used ring.
    pub next_used: u16,
}

/// A network interface, or an empty slot for one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nic {
    /// Hardware address.
    pub mac: HexArray<6>,
    /// Whether the link is set up.
    pub link: bool,
    /// Present once a driver uses it.
    #[serde(deserialize_with = "required")]
    pub active: Option<ActiveNic>,
}

impl Saved for Nic {
    const KIND: &'static str = "virtio-net";
    const VERSION: u32 = 1;
}

/// A network interface in use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActiveNic {
    /// Queue pairs that receive.
    pub queue_pairs: u16,
    /// Offloads in force, by their feature bits.
    pub offloads: Hex<u64>,
    /// The driver has broken a ring and has to reset the device.
    pub needs_reset: bool,
    /// Nothing is in flight: both positions of each queue are equal.
    pub queues: Vec<QueuePosition>,
}

/// A console with one port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Console {
    /// Present once a driver uses it.
    #[serde(deserialize_with = "required")]
    pub active: Option<ActiveConsole>,
}

impl Saved for Console {
    const KIND: &'static str = "virtio-console";
    const VERSION: u32 = 1;
}

/// A console in use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActiveConsole {
    /// Position in the receive queue's rings.
    pub receive: u16,
    /// Position in the transmit queue's rings.
    pub transmit: u16,
    /// Bytes of the next transmit chain that have been sent already.
    pub sent: u64,
    /// The driver has broken a ring and has to reset the device.
    pub needs_reset: bool,
}

/// A source of randomness.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rng {
    /// Position in the queue's rings, once a driver uses it.
    #[serde(deserialize_with = "required")]
    pub next_avail: Option<u16>,
    /// The driver has broken the ring and has to reset the device.
    pub needs_reset: bool,
}

impl Saved for Rng {
    const KIND: &'static str = "virtio-rng";
    const VERSION: u32 = 1;
}

/// A memory balloon. Its pages are 4 KiB.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// Pages that the guest is asked to put into it.
    pub target: u32,
    /// Pages in it, as reported by the guest.
    pub actual: u32,
    /// Seconds between two requests for statistics; 0: none.
    pub polling_interval: u32,
    /// Present once a driver uses it.
    #[serde(deserialize_with = "required")]
    pub active: Option<ActiveBalloon>,
}

impl Saved for Balloon {
    const KIND: &'static str = "virtio-balloon";
    const VERSION: u32 = 1;
}

/// A balloon in use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActiveBalloon {
    /// Nothing is in flight: both positions of each queue are equal.
    pub queues: Vec<QueuePosition>,
    /// The driver has broken a ring and has to reset the device.
    pub needs_reset: bool,
}

/// Check that `section` is that of a device, in a known form, including the section nested in it.
///
/// # Errors
/// When it is not.
pub fn check(section: &Section) -> Result<(), SectionError> {
    match section.kind.as_str() {
        Serial::KIND => section.read::<Serial>().map(drop),
        I8042::KIND => section.read::<I8042>().map(drop),
        Cmos::KIND => section.read::<Cmos>().map(drop),
        Power::KIND => section.read::<Power>().map(drop),
        Pvpanic::KIND => section.read::<Pvpanic>().map(drop),
        Disk::KIND => section.read::<Disk>().map(drop),
        Nic::KIND => section.read::<Nic>().map(drop),
        Console::KIND => section.read::<Console>().map(drop),
        Rng::KIND => section.read::<Rng>().map(drop),
        Balloon::KIND => section.read::<Balloon>().map(drop),
        VirtioMmio::KIND => {
            let slot = section.read::<VirtioMmio>()?;
            match slot.device.kind.as_str() {
                // A slot cannot contain another slot.
                VirtioMmio::KIND => Err(unknown(&slot.device.kind)),
                _ => check(&slot.device),
            }
        }
        kind => Err(unknown(kind)),
    }
}

fn unknown(kind: &str) -> SectionError {
    SectionError::Kind { found: kind.into(), expected: "a device" }
}
