//! Disks and NICs: the back-end (image or tap) and the front-end, or both in one.
use std::collections::{HashMap, HashSet};

use crate::Part;
use crate::types::{Id, NicQueuePairs};
use crate::{DiskConfig, Expect, NicConfig, Tap, separate};

use super::Resolver;
use crate::cli::draft::{BlkFront, DeviceKind, Draft, Drive, Net, NetFront};

impl Resolver {
    pub(crate) fn disks(&mut self, d: &Draft) -> Vec<DiskConfig> {
        let by_id: HashMap<_, _> = d.drives.iter().map(|drive| (&drive.id, drive)).collect();
        let mut named = HashSet::new();
        let mut behind = vec![];
        for device in &d.devices {
            match &device.kind {
                DeviceKind::Blk { drive: Some(drive), front } => match by_id.get(drive) {
                    Some(found) => {
                        if !named.insert(drive) {
                            let rule = "another -device uses this drive";
                            self.problems.add_value(&device.place.key("drive"), drive, rule);
                        }
                        behind.push(self.disk(found, device.id.as_ref(), front));
                        let iothread = behind.last().and_then(|disk| disk.iothread.as_ref());
                        self.check_iothread(d, &device.place, iothread);
                    }
                    None => self.missing(&device.place, "drive", "drive", drive),
                },
                DeviceKind::Refused { backends } => named.extend(backends),
                _ => {}
            }
        }
        // Disks of the file and of the older form first: the root disk stays first.
        let mut disks = vec![];
        let mut claimed = HashSet::new();
        for drive in d.drives.iter().filter(|drive| !named.contains(&drive.id)) {
            if claimed.insert(&drive.id) {
                self.claim_id(&drive.place, &drive.id);
            }
            self.check_iothread(d, &drive.place, drive.front.iothread.as_ref());
            disks.push(self.disk(drive, None, &BlkFront::default()));
        }
        disks.extend(behind);
        disks
    }

    pub(crate) fn nics(&mut self, d: &Draft) -> Vec<NicConfig> {
        let by_id: HashMap<_, _> = d.nets.iter().map(|net| (&net.id, net)).collect();
        let mut named = HashSet::new();
        let mut behind = vec![];
        for device in &d.devices {
            match &device.kind {
                DeviceKind::Net { netdev: Some(netdev), front } => match by_id.get(netdev) {
                    Some(found) => {
                        if !named.insert(netdev) {
                            let rule = "another -device uses this netdev";
                            self.problems.add_value(&device.place.key("netdev"), netdev, rule);
                        }
                        if front.mq == Some(false) && queue_pairs(found).get() > 1 {
                            let pairs = queue_pairs(found);
                            let rule = format!("must be on with {pairs} queues");
                            self.problems.add(&device.place.key("mq"), rule);
                        }
                        behind.push(self.nic(found, device.id.as_ref(), front));
                        let iothread = behind.last().and_then(|nic| nic.iothread.as_ref());
                        self.check_iothread(d, &device.place, iothread);
                    }
                    None => self.missing(&device.place, "netdev", "netdev", netdev),
                },
                DeviceKind::Refused { backends } => named.extend(backends),
                _ => {}
            }
        }
        let mut nics = vec![];
        let mut claimed = HashSet::new();
        for net in d.nets.iter().filter(|net| !named.contains(&net.id)) {
            if claimed.insert(&net.id) {
                self.claim_id(&net.place, &net.id);
            }
            self.check_iothread(d, &net.place, net.front.iothread.as_ref());
            nics.push(self.nic(net, None, &NetFront::default()));
        }
        nics.extend(behind);
        self.check_taps(d);
        nics
    }

    fn disk(&mut self, drive: &Drive, id: Option<&Id>, front: &BlkFront) -> DiskConfig {
        let id = id.unwrap_or(&drive.id);
        self.places.note(Part::Disk(id.to_string()), drive.place.key_of("path_on_host", "file"));
        disk(drive, id, front)
    }

    fn nic(&mut self, net: &Net, id: Option<&Id>, front: &NetFront) -> NicConfig {
        let id = id.unwrap_or(&net.id);
        let key = if matches!(net.tap, Tap::Name(_)) { "host_dev_name" } else { "tap_fd" };
        // A flag names the tap in one of four ways, and is short.
        self.places.note(Part::Nic(id.to_string()), net.place.key_of(key, ""));
        nic(net, id, front)
    }

    /// A tap, or a descriptor, serves only one NIC.
    fn check_taps(&mut self, d: &Draft) {
        let (mut names, mut fds) = (HashSet::new(), HashSet::new());
        for net in &d.nets {
            match &net.tap {
                Tap::Name(name) if !names.insert(name) => {
                    self.problems.add_value(&net.place, name.as_str(), "Tap device already in use");
                }
                Tap::Fds(numbers) => {
                    for fd in numbers.iter().filter(|fd| !fds.insert(**fd)) {
                        let rule = "another queue uses this descriptor";
                        self.problems.add_value(&net.place, &fd.to_string(), rule);
                    }
                }
                Tap::Name(_) => {}
            }
        }
    }
}

fn disk(drive: &Drive, id: &Id, front: &BlkFront) -> DiskConfig {
    let back = &drive.front;
    DiskConfig {
        id: id.clone(),
        path: drive.path.clone(),
        readonly: drive.readonly,
        direct: drive.direct,
        serial: front.serial.clone().or_else(|| back.serial.clone()),
        aio: drive.aio,
        discard: drive.discard,
        iops: drive.iops,
        bps: drive.bps,
        queues: front.queues.or(back.queues).unwrap_or_default(),
        queue_size: front.queue_size.or(back.queue_size).unwrap_or_default(),
        iothread: front.iothread.clone().or_else(|| back.iothread.clone()),
        backend: separate(drive.id.clone(), id),
        probe: drive.probe,
        expect: Expect::default(),
    }
}

fn queue_pairs(net: &Net) -> NicQueuePairs {
    match &net.tap {
        // A wrong tap has no descriptors, and was reported already.
        Tap::Fds(fds) => NicQueuePairs::try_from(fds.len()).unwrap_or_default(),
        Tap::Name(_) => net.queues.unwrap_or_default(),
    }
}

fn nic(net: &Net, id: &Id, front: &NetFront) -> NicConfig {
    let back = &net.front;
    NicConfig {
        id: id.clone(),
        tap: net.tap.clone(),
        mac: front.mac.or(back.mac),
        queue_pairs: queue_pairs(net),
        queue_size: front.queue_size.or(back.queue_size).unwrap_or_default(),
        pps: net.pps,
        bps: net.bps,
        iothread: front.iothread.clone().or_else(|| back.iothread.clone()),
        backend: separate(net.id.clone(), id),
    }
}
