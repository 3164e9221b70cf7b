//! Hot-plug: plugging a back-end into a slot, or unplugging it.
use std::fmt::Display;

use config::{types::Id, value};
use machine::Shape;
use qmp::{Error, schema::*, server::Ticket};
use serde_json::{Map, Value};

use super::{invalid, plug_error};
use crate::{files::Job, vmm::Vmm};

/// Check that the driver exists. It decides what the other members mean, so an unknown driver is
/// reported before them. Its name is matched by part, as StratoVirt does: "virtio-blk-mmio" and
/// others.
pub fn known_driver(arguments: &Map<String, Value>) -> Result<(), Error> {
    match arguments.get("driver").and_then(Value::as_str) {
        Some(driver)
            if driver.starts_with("vhost")
                || !(driver.contains("blk") || driver.contains("net")) =>
        {
            Err(Error::text(format!(
                "Unsupported replaceable device type: '{driver}'; must be virtio-blk-mmio or \
                 virtio-net-mmio"
            )))
        }
        _ => Ok(()),
    }
}

/// Members that have no meaning without firmware or PCI (`bus`, `vectors`, `boot_index`,
/// `multifunction`, `disable-modern`) are accepted: StratoVirt's clients send them to every
/// machine. All others are either applied or refused.
pub fn device_add(vmm: &mut Vmm, command: DeviceAdd) -> Result<Empty, Error> {
    let id = super::id("id", &command.id)?;
    refuse_everywhere(&command)?;
    match command.driver.contains("blk") {
        true => add_disk(vmm, &id, &command),
        false => add_nic(vmm, &id, &command),
    }
}

fn add_disk(vmm: &mut Vmm, id: &Id, command: &DeviceAdd) -> Result<Empty, Error> {
    refuse("netdev", command.netdev.as_ref(), "not available for a disk: leave it out")?;
    refuse("mac", command.mac.as_ref(), "not available for a disk: leave it out")?;
    refuse(
        "mq",
        command.mq,
        "not available for a disk, whose queues are set by num-queues: leave \
                              it out",
    )?;
    let serial = command.serial.as_deref().filter(|s| !s.is_empty()).map(value::disk_serial);
    let serial = serial
        .transpose()
        .map_err(|rule| invalid("serial", command.serial.as_deref().unwrap_or_default(), rule))?;
    let slot = match slot(command)? {
        Some(slot) => slot,
        None => vmm.machine.free_disk_slot().map_err(|e| plug_error(&e))?,
    };
    let shape = vmm.machine.disk_shape(slot).map_err(|e| plug_error(&e))?;
    check_shape(command, &shape, shape.queue_sizes.len())?;
    let backend = command.drive.as_ref().unwrap_or(&command.id);
    let blocks = vmm.machine.waiting_disk_blocks(backend).map_err(|e| plug_error(&e))?;
    for (key, asked, own) in [
        ("logical_block_size", command.logical_block_size, blocks.0),
        ("physical_block_size", command.physical_block_size, blocks.1),
    ] {
        let other = asked.filter(|asked| *asked != own);
        refuse(key, other, format!("must be {own}, as the back-end has it"))?;
    }
    vmm.machine.plug_disk(id, backend, slot, serial).map_err(|e| plug_error(&e))?;
    Ok(Empty {})
}

fn add_nic(vmm: &mut Vmm, id: &Id, command: &DeviceAdd) -> Result<Empty, Error> {
    const NONE: &str = "not available for a NIC: leave it out";
    refuse("drive", command.drive.as_ref(), NONE)?;
    refuse("serial", command.serial.as_ref(), NONE)?;
    refuse("share-rw", command.share_rw, NONE)?;
    refuse("logical_block_size", command.logical_block_size, NONE)?;
    refuse("physical_block_size", command.physical_block_size, NONE)?;
    let mac =
        command.mac.as_deref().map(|mac| value::mac(mac).map_err(|rule| invalid("mac", mac, rule)));
    let mac = mac.transpose()?;
    let slot = match slot(command)? {
        Some(slot) => slot,
        None => vmm.machine.free_nic_slot().map_err(|e| plug_error(&e))?,
    };
    let shape = vmm.machine.nic_shape(slot).map_err(|e| plug_error(&e))?;
    // The control queue is the last one.
    let pairs = shape.queue_sizes.len() / 2;
    check_shape(command, &shape, pairs)?;
    let single = command.mq.filter(|mq| !mq && pairs > 1);
    refuse("mq", single, format!("must be true, this slot has {pairs} queue pairs"))?;
    let backend = command.netdev.as_ref().unwrap_or(&command.id);
    vmm.machine.plug_nic(id, backend, slot, mac).map_err(|e| plug_error(&e))?;
    Ok(Empty {})
}

/// Refuse members that no device supports.
fn refuse_everywhere(command: &DeviceAdd) -> Result<(), Error> {
    let pass_through = "device passthrough is not supported: leave it out";
    refuse("host", command.host.as_ref(), pass_through)?;
    refuse("sysfsdev", command.sysfsdev.as_ref(), pass_through)?;
    let vhost = "vhost-user is not supported: leave it out";
    refuse("chardev", command.chardev.as_ref(), vhost)?;
    let rom = command.romfile.as_ref().filter(|rom| !rom.is_empty());
    refuse("romfile", rom, "there is no firmware that could run it; must be ''")
}

/// The driver keeps using the queues that it found at the start.
fn check_shape(command: &DeviceAdd, shape: &Shape, queues: usize) -> Result<(), Error> {
    let fixed = |own| format!("must be {own}, which this slot has had since the start");
    let other = command.num_queues.filter(|asked| usize::from(*asked) != queues);
    refuse("num-queues", other, fixed(queues))?;
    let size = shape.queue_sizes.first().copied().unwrap_or_default();
    let other = command.queue_size.filter(|asked| *asked != size);
    refuse("queue-size", other, fixed(size.into()))?;
    let allowed = match &shape.iothread {
        Some(own) => format!("must be '{own}', which this slot has had since the start"),
        None => "this slot has been on the common I/O thread since the start: leave it out".into(),
    };
    let other = command.iothread.as_ref().filter(|asked| shape.iothread.as_deref() != Some(asked));
    refuse("iothread", other, allowed)
}

fn refuse(key: &str, value: Option<impl Display>, why: impl Display) -> Result<(), Error> {
    value.map_or(Ok(()), |value| Err(invalid(key, value, why)))
}

/// The event comes before the answer: the guest is not waited for.
pub fn device_del(
    vmm: &mut Vmm,
    command: DeviceDel,
    ticket: &Ticket,
) -> Result<Option<Empty>, Error> {
    let id = command.id;
    vmm.files.check_idle(&id)?;
    if vmm.saving().copies(&id) {
        let why = "it is being copied by a save; try again afterwards, or end the save with \
                   migrate_cancel";
        return Err(Error::text(format!("'{id}' cannot be unplugged now: {why}")));
    }
    let disk = vmm.machine.unplug(&id).map_err(|e| plug_error(&e))?;
    let what = format!("closing '{id}'");
    let done = move |vmm: &mut Vmm| {
        vmm.broadcast(&Event::DeviceDeleted { device: id.clone(), path: id });
        Empty {}
    };
    let Some(disk) = disk else { return Ok(Some(done(vmm))) };
    // After the answer another machine may use the image.
    vmm.with_files(Job::close(what, disk, done), ticket);
    Ok(None)
}

/// The slot: `addr` in decimal or, after 0x, in hexadecimal; or `lun`, which is one less. `None`
/// means the first free slot, if neither is given or the address is on a PCI bus, which has no
/// meaning here.
fn slot(command: &DeviceAdd) -> Result<Option<usize>, Error> {
    let on_pci = command.driver.ends_with("-pci")
        || command.bus.as_ref().is_some_and(|bus| bus.starts_with("pcie."));
    if on_pci {
        refuse("lun", command.lun, "not available for a device on a PCI bus: leave it out")?;
        return Ok(None);
    }
    let lun = command.lun.map(|lun| usize::try_from(lun).unwrap_or(usize::MAX).saturating_add(1));
    let Some(addr) = &command.addr else { return Ok(lun) };
    let parsed = match addr.strip_prefix("0x").or(addr.strip_prefix("0X")) {
        Some(hex) => usize::from_str_radix(hex, 16),
        None => addr.parse(),
    };
    let wrong = |_| Error::text(format!("Invalid addr for device {}: '{addr}'", command.id));
    let slot = parsed.map_err(wrong)?;
    let other = command.lun.filter(|_| lun != Some(slot));
    refuse("lun", other, format!("addr is {addr}, and lun is one less: leave one of them out"))?;
    Ok(Some(slot))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_decimal_hexadecimal_or_a_lun() {
        let slot_of = |addr: Option<&str>, lun| {
            let addr = addr.map(str::to_owned);
            slot(&DeviceAdd { addr, lun, ..DeviceAdd::default() })
        };
        assert_eq!(slot_of(Some("1"), None), Ok(Some(1)));
        assert_eq!(slot_of(Some("0x1"), None), Ok(Some(1)));
        assert_eq!(slot_of(Some("0xa"), Some(9)), Ok(Some(10)));
        assert!(slot_of(Some("0xa"), Some(3)).is_err());
        assert_eq!(slot_of(None, Some(0)), Ok(Some(1)));
        assert_eq!(slot_of(None, None), Ok(None));
        for wrong in ["", "x", "-1", "0x", "1.0", "99999999999999999999"] {
            assert!(slot_of(Some(wrong), None).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_address_on_a_pci_bus_names_no_slot() {
        for (driver, bus) in
            [("virtio-blk-pci", None), ("virtio-blk-pci", Some("pci.0")), ("blk", Some("pcie.1"))]
        {
            let command = DeviceAdd {
                driver: driver.into(),
                bus: bus.map(str::to_owned),
                addr: Some("1.0".into()),
                ..DeviceAdd::default()
            };
            assert_eq!(slot(&command).unwrap(), None, "{command:?}");
            assert!(slot(&DeviceAdd { lun: Some(0), ..command }).is_err());
        }
    }
}
