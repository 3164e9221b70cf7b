//! `-device`: the models.
use super::draft::{Device, DeviceKind, Draft};
use super::fields::Fields;
use super::kinds::models;
use super::problem::did_you_mean;
use crate::value;

/// Models of StratoVirt that are not supported, by prefix of their names.
const REFUSED: &[(&str, &str)] = &[
    ("vhost-vsock", "virtio-vsock"),
    ("vsock", "virtio-vsock"),
    ("vhost-user-fs", "vhost-user-fs"),
    ("vhost-user-blk", "vhost-user-blk"),
    ("vhost-user-net", "vhost-user-net"),
    ("virtio-balloon-pci", "PCI (use virtio-balloon-device)"),
    ("virtio-mem", "virtio-mem"),
    ("virtio-pmem", "virtio-pmem"),
    ("virtio-input", "virtio-input"),
    ("virtio-multitouch", "virtio-multitouch"),
    ("virtio-gpu", "virtio-gpu"),
    ("virtio-scsi", "virtio-scsi"),
    ("scsi-", "SCSI"),
    ("virtserialport", "a virtio-serial port other than the console"),
    ("virtio-blk-pci", "PCI (use virtio-blk-device)"),
    ("virtio-net-pci", "PCI (use virtio-net-device)"),
    ("virtio-serial-pci", "PCI (use virtio-serial-device)"),
    ("virtio-rng-pci", "PCI (use virtio-rng-device)"),
    ("pcie-root-port", "PCI"),
    ("vfio-pci", "VFIO"),
    ("pvpanic", "choosing pvpanic"),
    ("ramfb", "a display"),
    ("nec-usb-xhci", "USB"),
    ("usb-", "USB"),
];

/// `-device`.
pub(crate) fn device(draft: &mut Draft, f: &mut Fields) {
    f.require(&["driver"]);
    let Some(driver) = f.text("driver", value::text) else {
        f.abandon();
        return;
    };
    let model = models().find(|model| model.name == driver);
    match model {
        Some(model) if model.id.starts_with(',') => f.require(&["id"]),
        Some(_) => {}
        None => unknown(f, &driver),
    }
    let id = f.id("id");
    let kind = match model {
        Some(model) => (model.make)(f),
        None => {
            let backends = ["drive", "netdev", "chardev", "rng"];
            let backends = backends.into_iter().filter_map(|key| f.id(key)).collect();
            f.abandon();
            DeviceKind::Refused { backends }
        }
    };
    draft.devices.push(Device { place: f.place().clone(), id, kind });
}

/// The message for an unknown model.
fn unknown(f: &mut Fields, driver: &str) {
    let known = || models().map(|model| model.name);
    match REFUSED.iter().find(|(prefix, _)| driver.starts_with(prefix)) {
        Some((_, what)) => f.problem("", format!("{what} is not supported: leave it out")),
        None => f.problem(
            "",
            format!(
                "Unknown device type: {driver}!{} allowed: {}",
                did_you_mean(driver, known()).trim_start_matches(';'),
                known().collect::<Vec<_>>().join(", ")
            ),
        ),
    }
}
