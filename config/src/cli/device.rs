//! `-device`: the models.
use crate::limits;

use super::draft::{Device, DeviceKind, Draft};
use super::fields::Fields;
use super::problem::did_you_mean;
use super::{disk, net, value};

/// A model that can be had.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) name: &'static str,
    /// Its keys, for the help text.
    pub(super) form: &'static str,
    /// Its id, for the help text: in brackets where one is made up, since nothing ever names it.
    pub(super) id: &'static str,
    make: fn(&mut Fields) -> DeviceKind,
}

/// The models that can be had.
pub(super) static MODELS: &[Model] = &[
    Model {
        name: "virtio-blk-device",
        id: ",id=ID",
        form: ",drive=ID[,serial=TEXT][,iothread=ID][,num-queues=N][,queue-size=N]",
        make: |f| {
            f.require(&["drive"]);
            let drive = f.id("drive").unwrap_or_default();
            DeviceKind::Blk { drive, front: disk::front(f) }
        },
    },
    Model {
        name: "virtio-net-device",
        id: ",id=ID",
        form: ",netdev=ID[,mac=MAC][,iothread=ID][,mq=on|off][,queue-size=N]",
        make: |f| {
            f.require(&["netdev"]);
            let netdev = f.id("netdev").unwrap_or_default();
            DeviceKind::Net { netdev, front: net::front(f) }
        },
    },
    Model {
        name: "virtio-serial-device",
        id: "[,id=ID]",
        form: "[,iothread=ID]",
        make: |f| {
            // StratoVirt takes any number and makes one port.
            let _ = f.number("max_ports", 1..=31u32);
            DeviceKind::SerialBus { iothread: f.id("iothread") }
        },
    },
    Model {
        name: "virtconsole",
        id: ",id=ID",
        form: ",chardev=ID[,nr=0]",
        make: |f| {
            f.require(&["chardev"]);
            let _ = f.number("nr", 0..=0u32);
            DeviceKind::Console { chardev: f.id("chardev").unwrap_or_default() }
        },
    },
    Model {
        name: "virtio-rng-device",
        id: "[,id=ID]",
        form: ",rng=ID[,max-bytes=N,period=MS]",
        make: rng,
    },
];

/// Models of StratoVirt that cannot be had yet, by the beginnings of their names.
const REFUSED: &[(&str, &str)] = &[
    ("vhost-vsock", "virtio-vsock"),
    ("vsock", "virtio-vsock"),
    ("vhost-user-fs", "vhost-user-fs"),
    ("vhost-user-blk", "vhost-user-blk"),
    ("vhost-user-net", "vhost-user-net"),
    ("virtio-balloon", "virtio-balloon"),
    ("virtio-mem", "virtio-mem"),
    ("virtio-pmem", "virtio-pmem"),
    ("virtio-input", "virtio-input"),
    ("virtio-multitouch", "virtio-multitouch"),
    ("virtio-gpu", "virtio-gpu"),
    ("virtio-scsi", "virtio-scsi"),
    ("scsi-", "SCSI"),
    ("virtserialport", "a serial port on virtio-serial other than the console"),
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
pub(super) fn device(draft: &mut Draft, f: &mut Fields) {
    f.require(&["driver"]);
    let Some(driver) = f.text("driver", value::text) else {
        f.abandon();
        return;
    };
    let model = MODELS.iter().find(|model| model.name == driver);
    match model {
        Some(model) if model.id.starts_with(',') => f.require(&["id"]),
        Some(_) => {}
        None => unknown(f, &driver),
    }
    let id = f.id("id").unwrap_or_default();
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

/// What is told of a model that is not built.
fn unknown(f: &mut Fields, driver: &str) {
    let known = || MODELS.iter().map(|model| model.name);
    match REFUSED.iter().find(|(prefix, _)| driver.starts_with(prefix)) {
        Some((_, what)) => f.problem("", format!("{what} is not built yet: leave it out")),
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

/// `max-bytes` each `period` milliseconds, both or neither.
fn rng(f: &mut Fields) -> DeviceKind {
    f.require(&["rng"]);
    let source = f.id("rng").unwrap_or_default();
    let (most, period) =
        (f.number("max-bytes", 1..=u64::MAX), f.number("period", 1..=u64::from(u32::MAX)));
    if f.has("max-bytes") != f.has("period") {
        f.problem("max-bytes", "max-bytes and period (in milliseconds) go together");
    }
    let bps = most.zip(period).and_then(|(most, period)| {
        let bps = most.saturating_mul(1000).checked_div(period)?;
        if !limits::RNG_BPS.contains(&bps) {
            let (least, most) = (limits::RNG_BPS.start(), limits::RNG_BPS.end());
            f.problem("max-bytes", format!("{bps} bytes per second, not in {least}..={most}"));
        }
        Some(bps)
    });
    DeviceKind::Rng { source, bps }
}
