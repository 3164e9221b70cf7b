//! What each kind of device keeps beside its configuration. Nothing is in flight in a saved device.
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
    /// What it has to say itself.
    #[serde(deserialize_with = "required")]
    pub answer: Option<u8>,
    /// A command that waits for its argument.
    #[serde(deserialize_with = "required")]
    pub command: Option<u8>,
    /// The last byte written went to the command port.
    pub last_was_command: bool,
    /// Bytes of the keyboard that the guest has not read yet.
    pub sent: HexBytes,
    /// A command to the keyboard that waits for its argument.
    #[serde(deserialize_with = "required")]
    pub keyboard_command: Option<u8>,
    /// The keyboard reports keys.
    pub scanning: bool,
}

impl Saved for I8042 {
    const KIND: &'static str = "i8042";
    const VERSION: u32 = 1;
}

/// The real-time clock's registers. The time is the host's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cmos {
    /// The register that was selected.
    pub index: u8,
    /// All of them.
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
    /// Events that the guest has not read yet, a bit each.
    pub events: u8,
}

impl Saved for Power {
    const KIND: &'static str = "acpi-power";
    const VERSION: u32 = 1;
}

/// The port by which a guest says that it has crashed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pvpanic {}

impl Saved for Pvpanic {
    const KIND: &'static str = "pvpanic";
    const VERSION: u32 = 1;
}

/// A slot of the virtio-mmio transport: what its driver has written, and the device behind it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtioMmio {
    /// Device type number (virtio 1.3, section 5).
    pub device_type: u32,
    /// What the slot has offered since the guest started, whatever is in it now.
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
    /// What the driver has taken.
    pub driver_features: Hex<u64>,
    /// It has set a bit above 63.
    pub unknown_features: bool,
    /// As `status`.
    pub queue_sel: u32,
    /// As the driver has set them.
    pub queues: Vec<VirtioQueue>,
    /// The driver has begun to use the device, which has not stopped since.
    pub active: bool,
    /// The device's own part.
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
    /// Descriptors.
    pub size: u32,
    /// The driver uses it.
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
    /// The driver wants a write cache.
    pub writeback: bool,
    /// Of an active device.
    #[serde(deserialize_with = "required")]
    pub queues: Option<Vec<QueuePosition>>,
    /// Requests that were taken from a queue and not answered, by the index of the queue and of the
    /// first descriptor: to be done again. A save leaves none.
    pub in_flight: Vec<(u16, u16)>,
    /// By which the image is known again; `null` for one that cannot be marked.
    #[serde(deserialize_with = "required")]
    pub mark: Option<Mark>,
    /// SHA-256 of some of the blocks of a block device, see `docs/state-format.md`. There for nothing
    /// else, so that a program that does not know it reads the states of all other machines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spot_check: Option<HexArray<32>>,
}

impl Saved for Disk {
    const KIND: &'static str = "virtio-blk";
    const VERSION: u32 = 1;
}

/// What an image was like when its machine was saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mark {
    /// Random bytes, replaced with the first change after a save; `null` where the file system keeps no
    /// extended attributes.
    #[serde(deserialize_with = "required")]
    pub generation: Option<HexArray<16>>,
    /// Bytes of the image.
    pub size: u64,
    /// Its last change, in nanoseconds since 1970, UTC.
    pub mtime_ns: i64,
}

/// How far a queue has been served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueuePosition {
    /// Which queue of the device.
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
    /// The cable is in.
    pub link: bool,
    /// Once a driver uses it.
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
    /// Nothing is in flight: both positions of a queue are the same.
    pub queues: Vec<QueuePosition>,
}

/// A console with one port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Console {
    /// Once a driver uses it.
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
    /// Next entry of the receive queue's rings.
    pub receive: u16,
    /// Next entry of the transmit queue's rings.
    pub transmit: u16,
    /// Bytes of the next chain to transmit that are out already.
    pub sent: u64,
    /// The driver has broken a ring and has to reset the device.
    pub needs_reset: bool,
}

/// A source of randomness.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rng {
    /// Next entry of the queue's rings, once a driver uses it.
    #[serde(deserialize_with = "required")]
    pub next_avail: Option<u16>,
    /// The driver has broken the ring and has to reset the device.
    pub needs_reset: bool,
}

impl Saved for Rng {
    const KIND: &'static str = "virtio-rng";
    const VERSION: u32 = 1;
}

/// A memory balloon. Its pages are of 4 KiB.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// Pages that the guest is asked to put into it.
    pub target: u32,
    /// Pages in it, as the guest says.
    pub actual: u32,
    /// Seconds between two statistics that the guest is asked for; 0: none.
    pub polling_interval: u32,
    /// Once a driver uses it.
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
    /// Nothing is in flight: both positions of a queue are the same.
    pub queues: Vec<QueuePosition>,
    /// The driver has broken a ring and has to reset the device.
    pub needs_reset: bool,
}

/// Whether `section` is that of a device, in a form that is known here, down to what is in it.
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
                // There is nothing behind a slot that has a slot behind it.
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
