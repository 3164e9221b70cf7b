//! Front-end devices.
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Plug a device in. The driver determines which members are used.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct DeviceAdd {
    /// Unique id.
    pub id: String,
    /// Model.
    pub driver: String,
    /// Slot: hexadecimal with `0x`, else decimal; the first free one if absent. Ignored for a PCI
    /// bus, which a microVM does not have (a driver that ends in `-pci`, a bus that begins with
    /// `pcie.`): the first free slot is then used.
    pub addr: Option<String>,
    /// Slot minus one, instead of `addr`.
    pub lun: Option<u32>,
    /// Its bus.
    pub bus: Option<String>,
    /// Whether it shares its slot.
    pub multifunction: Option<bool>,
    /// Expansion ROM: only the empty string.
    pub romfile: Option<String>,
    /// Node name of a disk's back-end; the id if absent.
    pub drive: Option<String>,
    /// Whether others may write to the back-end.
    pub share_rw: Option<bool>,
    /// Serial number of a disk, up to 20 bytes.
    pub serial: Option<String>,
    /// Sector size shown to the guest, bytes: must be that of the back-end.
    #[serde(rename = "logical_block_size")]
    pub logical_block_size: Option<u32>,
    /// Sector size of the medium shown to the guest, bytes: must be that of the back-end.
    #[serde(rename = "physical_block_size")]
    pub physical_block_size: Option<u32>,
    /// Place in the boot order.
    #[serde(rename = "boot_index")]
    pub boot_index: Option<u8>,
    /// Id of a NIC's back-end; the device's id if absent.
    pub netdev: Option<String>,
    /// MAC address of a NIC.
    pub mac: Option<String>,
    /// Whether a NIC has several queue pairs.
    pub mq: Option<bool>,
    /// Interrupt vectors.
    pub vectors: Option<u32>,
    /// Character device of a vhost-user device; refused.
    pub chardev: Option<String>,
    /// Whether to hide the modern interface. Ignored: there is no other one.
    pub disable_modern: Option<bool>,
    /// I/O thread: must be that of the slot.
    pub iothread: Option<String>,
    /// Queues: must be as many as the slot has.
    pub num_queues: Option<u16>,
    /// Descriptors per queue: must be as many as the slot has.
    pub queue_size: Option<u16>,
    /// Host device to pass through; refused.
    pub host: Option<String>,
    /// The same by its path in sysfs; refused.
    pub sysfsdev: Option<String>,
}

/// Unplug a device; `DEVICE_DELETED` is sent when it is gone. Its back-end goes with it if it has
/// the device's id; otherwise it waits for another device or for its own removal.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DeviceDel {
    /// Its id.
    pub id: String,
}
