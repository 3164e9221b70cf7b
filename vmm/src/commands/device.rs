//! Hot-plug: a slot gets its back-end, or loses it.
use qmp::{Error, schema::*};

use super::plug_error;
use crate::vmm::Vmm;

/// StratoVirt's and Kata's members are taken; those that ask for what cannot be are refused.
pub fn device_add(vmm: &mut Vmm, command: DeviceAdd) -> Result<Empty, Error> {
    let slot = slot(&command)?;
    let backend_of = |backend: &Option<String>| backend.clone().unwrap_or(command.id.clone());
    // The driver's name is matched by part, as StratoVirt does it: "virtio-blk-mmio" and others.
    if command.driver.contains("blk") {
        same_id(&command.id, &backend_of(&command.drive), "drive")?;
        let serial = command.serial.clone();
        if serial.as_ref().is_some_and(|s| s.len() > 20) {
            return Err(Error::text("Invalid parameter 'serial': at most 20 bytes"));
        }
        vmm.machine.plug_disk(&command.id, slot, serial).map_err(|e| plug_error(&e))?;
    } else if command.driver.contains("net") {
        same_id(&command.id, &backend_of(&command.netdev), "netdev")?;
        let mac = command.mac.as_deref().map(crate::cli::mac).transpose();
        let mac = mac.map_err(|e| Error::text(format!("Invalid parameter 'mac': {e}")))?;
        vmm.machine.plug_nic(&command.id, slot, mac).map_err(|e| plug_error(&e))?;
    } else {
        return Err(Error::text(format!(
            "Unsupported replaceable device type: '{}'; must be virtio-blk-mmio or virtio-net-mmio",
            command.driver
        )));
    }
    Ok(Empty {})
}

/// The event comes first: there is nothing to wait for from the guest.
pub fn device_del(vmm: &mut Vmm, command: DeviceDel) -> Result<Empty, Error> {
    vmm.machine.unplug(&command.id).map_err(|e| plug_error(&e))?;
    vmm.tell(&Event::DeviceDeleted { device: command.id.clone(), path: command.id });
    Ok(Empty {})
}

fn same_id(id: &str, backend: &str, key: &str) -> Result<(), Error> {
    if id == backend {
        return Ok(());
    }
    Err(Error::text(format!(
        "Invalid parameter '{key}': '{backend}': must be the device's own id, '{id}'"
    )))
}

/// `addr` in decimal or, after 0x, in hexadecimal; or `lun`, one less.
fn slot(command: &DeviceAdd) -> Result<usize, Error> {
    let Some(addr) = &command.addr else {
        return match command.lun {
            Some(lun) => Ok(usize::try_from(lun).unwrap_or(usize::MAX).saturating_add(1)),
            None => Err(Error::text("Parameter 'addr' is missing: the slot, 0 is vda or eth0")),
        };
    };
    let parsed = match addr.strip_prefix("0x").or(addr.strip_prefix("0X")) {
        Some(hex) => usize::from_str_radix(hex, 16),
        None => addr.parse(),
    };
    parsed.map_err(|_| Error::text(format!("Invalid addr for device {}: '{addr}'", command.id)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_decimal_hexadecimal_or_a_lun() {
        let slot_of = |addr: Option<&str>, lun| {
            let addr = addr.map(str::to_owned);
            slot(&DeviceAdd { addr, lun, ..DeviceAdd::default() }).ok()
        };
        assert_eq!(slot_of(Some("1"), None), Some(1));
        assert_eq!(slot_of(Some("0x1"), None), Some(1));
        assert_eq!(slot_of(Some("0xa"), Some(3)), Some(10));
        assert_eq!(slot_of(None, Some(0)), Some(1));
        for wrong in ["", "x", "-1", "0x", "1.0", "99999999999999999999"] {
            assert_eq!(slot_of(Some(wrong), None), None, "{wrong}");
        }
        assert_eq!(slot_of(None, None), None);
    }
}
