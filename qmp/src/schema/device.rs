//! Devices in front of a back-end.
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Plug a device in. Which members mean something depends on the driver.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct DeviceAdd {
    /// Unique id.
    pub id: String,
    /// Model.
    pub driver: String,
    /// Slot: hexadecimal with `0x`, else decimal; the first free one if absent. On a PCI bus, which a
    /// microVM has not (a driver that ends in `-pci`, a bus that begins with `pcie.`), it says nothing:
    /// the first free slot is taken.
    pub addr: Option<String>,
    /// Slot less one, in place of `addr`.
    pub lun: Option<u32>,
    /// Bus it sits on.
    pub bus: Option<String>,
    /// Whether it shares its slot.
    pub multifunction: Option<bool>,
    /// Expansion ROM: empty.
    pub romfile: Option<String>,
    /// Node name of a disk's back-end; the id if absent.
    pub drive: Option<String>,
    /// Whether others may write to the back-end.
    pub share_rw: Option<bool>,
    /// Serial number of a disk, up to 20 bytes.
    pub serial: Option<String>,
    /// Sector size shown to the guest, bytes: only that of the back-end.
    #[serde(rename = "logical_block_size")]
    pub logical_block_size: Option<u32>,
    /// Sector size of the medium shown to the guest, bytes: only that of the back-end.
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
    /// Whether to hide the modern interface. It says nothing: there is no other one.
    pub disable_modern: Option<bool>,
    /// I/O thread: only the one that the slot has.
    pub iothread: Option<String>,
    /// Queues: as many as the slot has.
    pub num_queues: Option<u16>,
    /// Descriptors a queue: as many as the slot has.
    pub queue_size: Option<u16>,
    /// Host device to pass through; refused.
    pub host: Option<String>,
    /// The same by its path in sysfs; refused.
    pub sysfsdev: Option<String>,
}

/// Unplug a device; `DEVICE_DELETED` tells when it is gone. Its back-end goes with it if it has the
/// device's id, else it waits for another device or for its own removal.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DeviceDel {
    /// Its id.
    pub id: String,
}
