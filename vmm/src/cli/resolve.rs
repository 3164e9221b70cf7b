//! The draft to the machine: names are looked up, agreement between parts is checked.
//!
//! A `-drive` or `-netdev` that no `-device` names is a device by itself, as in the first
//! StratoVirt; one that is named is the back-end of that device, as in the second.
use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::path::{Path, PathBuf};

use machine::config::{
    BootConfig, CharBackend, ConsoleConfig, DiskConfig, MachineConfig, MemoryConfig, NicConfig,
    RngConfig, Tap, Topology, limits,
};

use super::draft::{BlkFront, DeviceKind, Draft, Drive, Net, NetFront, Serial};
use super::problem::{Place, Problems};
use super::{Invocation, Log};

/// The invocation, or everything that was wrong up to here and now.
pub(super) fn resolve(draft: Draft) -> Result<Invocation, Problems> {
    let mut r = Resolver { problems: draft.problems.clone(), ..Default::default() };
    r.check_ids(&draft);
    let disks = r.disks(&draft);
    let nics = r.nics(&draft);
    let console = r.console(&draft);
    let serial = r.serial(&draft);
    let rng = r.rng(&draft);
    let control = r.control(&draft);
    r.check_daemon(&draft, serial.as_ref(), console.as_ref());
    for chardev in draft.chardevs.iter().filter(|c| !c.console && !r.used.contains(&c.id)) {
        r.warnings.push(format!("{}: used by nothing", chardev.place));
    }
    if draft.kernel.is_none() {
        r.problems.add_line(
            "kernel file is required for microvm machine type, which is not provided: give -kernel \
             FILE, or boot-source.kernel_image_path in the file of -config",
        );
    }
    if !r.problems.is_empty() {
        return Err(r.problems);
    }
    let (cpus, topology) = draft.smp.unwrap_or((1, ONE_CPU));
    let machine = MachineConfig {
        name: draft.name.unwrap_or_else(|| limits::DEFAULT_NAME.to_owned()),
        uuid: draft.uuid.unwrap_or_else(|| limits::NIL_UUID.to_owned()),
        cpus,
        topology,
        memory: MemoryConfig {
            size: draft.memory.unwrap_or(limits::DEFAULT_MEMORY),
            shared: draft.mem_share.unwrap_or(false),
            path: draft.mem_path,
            prealloc: draft.mem_prealloc,
            dump: draft.dump_guest_core.unwrap_or(true) && !draft.omit_vm_memory,
        },
        boot: BootConfig {
            kernel: draft.kernel.unwrap_or_default(),
            initrd: draft.initrd,
            cmdline: draft.cmdline.unwrap_or_default(),
        },
        iothreads: draft.iothreads.into_iter().map(|(_, id)| id).collect(),
        serial,
        disks,
        nics,
        console,
        rng,
    };
    Ok(Invocation {
        machine,
        control,
        pidfile: draft.pidfile,
        daemonize: draft.daemonize,
        paused: draft.paused,
        log: draft.log.unwrap_or(Log::Off),
        disable_seccomp: draft.disable_seccomp,
        warnings: r.warnings,
    })
}

const ONE_CPU: Topology = Topology { sockets: 1, dies: 1, clusters: 1, cores: 1, threads: 1 };

#[derive(Default)]
struct Resolver {
    problems: Problems,
    warnings: Vec<String>,
    /// Chardevs that something leads to.
    used: HashSet<String>,
    /// Ids of the devices.
    devices: HashSet<String>,
}

impl Resolver {
    /// Each kind of thing has names of its own; I/O threads and sources of randomness share theirs.
    fn check_ids(&mut self, d: &Draft) {
        self.unique("drive", d.drives.iter().map(|x| (&x.place, &x.id)));
        self.unique("netdev", d.nets.iter().map(|x| (&x.place, &x.id)));
        self.unique("chardev", d.chardevs.iter().map(|x| (&x.place, &x.id)));
        let objects = d.rng_sources.iter().map(|x| (&x.place, &x.id));
        let objects = d.iothreads.iter().map(|(place, id)| (place, id)).chain(objects);
        self.unique("object", objects);
        let named = d.devices.iter().filter(|x| !x.id.is_empty()).map(|x| (&x.place, &x.id));
        self.unique("device", named.clone());
        self.devices = named.map(|(_, id)| id.clone()).collect();
        if let Some((place, _)) = d.iothreads.get(limits::MAX_IOTHREADS) {
            let (n, most) = (d.iothreads.len(), limits::MAX_IOTHREADS);
            self.problems.add(place, format!("{n} I/O threads, at most {most} are allowed"));
        }
    }

    fn unique<'a, T: Eq + Hash + std::fmt::Display + ?Sized + 'a>(
        &mut self,
        kind: &str,
        ids: impl Iterator<Item = (&'a Place, &'a T)>,
    ) {
        let mut seen = HashSet::new();
        for (place, id) in ids {
            if !seen.insert(id) {
                self.problems
                    .add(place, format!("Input id '{id}' for {kind} repeat: each has its own"));
            }
        }
    }

    /// A device without a `-device` has its back-end's id, which must be no other device's.
    fn claim_id(&mut self, place: &Place, id: &str) {
        if !self.devices.insert(id.to_owned()) {
            let rule = format!("Input id '{id}' for device repeat: another device has it");
            self.problems.add(place, rule);
        }
    }

    fn missing(&mut self, place: &Place, key: &str, kind: &str, id: &str) {
        if !id.is_empty() {
            self.problems.add_value(&place.key(key), id, format!("no -{kind} has this id"));
        }
    }

    fn check_iothread(&mut self, d: &Draft, place: &Place, id: Option<&str>) {
        if let Some(id) = id.filter(|id| !d.iothreads.iter().any(|(_, known)| known == id)) {
            let known: Vec<_> = d.iothreads.iter().map(|(_, id)| id.as_str()).collect();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            let rule = format!("no I/O thread has this id; there are: {known}");
            self.problems.add_value(&place.key("iothread"), id, rule);
        }
    }

    fn disks(&mut self, d: &Draft) -> Vec<DiskConfig> {
        let by_id: HashMap<_, _> = d.drives.iter().map(|drive| (&drive.id, drive)).collect();
        let mut named = HashSet::new();
        let mut behind = vec![];
        for device in &d.devices {
            match &device.kind {
                DeviceKind::Blk { drive, front } => match by_id.get(drive) {
                    Some(found) => {
                        if !named.insert(drive) {
                            let rule = "another -device has this drive";
                            self.problems.add_value(&device.place.key("drive"), drive, rule);
                        }
                        behind.push(disk(found, &device.id, front));
                        let iothread = behind.last().and_then(|disk| disk.iothread.as_deref());
                        self.check_iothread(d, &device.place, iothread);
                    }
                    None => self.missing(&device.place, "drive", "drive", drive),
                },
                DeviceKind::Refused { backends } => named.extend(backends),
                _ => {}
            }
        }
        // The file's disks and those of the older form first: the root disk stays the first.
        let mut disks = vec![];
        for drive in d.drives.iter().filter(|drive| !named.contains(&drive.id)) {
            self.claim_id(&drive.place, &drive.id);
            self.check_iothread(d, &drive.place, drive.front.iothread.as_deref());
            disks.push(disk(drive, &drive.id, &BlkFront::default()));
        }
        disks.extend(behind);
        if disks.len() > limits::MAX_DISKS {
            let (n, most) = (disks.len(), limits::MAX_DISKS);
            self.problems
                .add_line(format!("{n} disks (-drive, drive), at most {most} are allowed"));
        }
        disks
    }

    fn nics(&mut self, d: &Draft) -> Vec<NicConfig> {
        let by_id: HashMap<_, _> = d.nets.iter().map(|net| (&net.id, net)).collect();
        let mut named = HashSet::new();
        let mut behind = vec![];
        for device in &d.devices {
            match &device.kind {
                DeviceKind::Net { netdev, front } => match by_id.get(netdev) {
                    Some(found) => {
                        if !named.insert(netdev) {
                            let rule = "another -device has this netdev";
                            self.problems.add_value(&device.place.key("netdev"), netdev, rule);
                        }
                        if front.mq == Some(false) && queue_pairs(found) > 1 {
                            let pairs = queue_pairs(found);
                            let rule = format!("must be on with {pairs} queues");
                            self.problems.add(&device.place.key("mq"), rule);
                        }
                        behind.push(nic(found, &device.id, front));
                        let iothread = behind.last().and_then(|nic| nic.iothread.as_deref());
                        self.check_iothread(d, &device.place, iothread);
                    }
                    None => self.missing(&device.place, "netdev", "netdev", netdev),
                },
                DeviceKind::Refused { backends } => named.extend(backends),
                _ => {}
            }
        }
        let mut nics = vec![];
        for net in d.nets.iter().filter(|net| !named.contains(&net.id)) {
            self.claim_id(&net.place, &net.id);
            self.check_iothread(d, &net.place, net.front.iothread.as_deref());
            nics.push(nic(net, &net.id, &NetFront::default()));
        }
        nics.extend(behind);
        if nics.len() > limits::MAX_NICS {
            let (n, most) = (nics.len(), limits::MAX_NICS);
            self.problems.add_line(format!("{n} NICs (-netdev, net), at most {most} are allowed"));
        }
        self.check_taps(d);
        nics
    }

    /// A tap, and a descriptor, serves one NIC.
    fn check_taps(&mut self, d: &Draft) {
        let (mut names, mut fds) = (HashSet::new(), HashSet::new());
        for net in &d.nets {
            match &net.tap {
                Tap::Name(name) if !names.insert(name) => {
                    self.problems.add_value(&net.place, name, "Tap device already in use");
                }
                Tap::Fds(numbers) => {
                    for fd in numbers.iter().filter(|fd| !fds.insert(**fd)) {
                        let rule = "this descriptor is another queue's";
                        self.problems.add_value(&net.place, &fd.to_string(), rule);
                    }
                }
                Tap::Name(_) => {}
            }
        }
    }

    /// Where a chardev leads; it is spoken for from now on.
    fn chardev(&mut self, d: &Draft, place: &Place, id: &str) -> Option<CharBackend> {
        let Some(chardev) = d.chardevs.iter().find(|chardev| chardev.id == id) else {
            self.missing(place, "chardev", "chardev", id);
            return None;
        };
        if !self.used.insert(id.to_owned()) {
            self.problems.add_value(&place.key("chardev"), id, "in use by something else");
        }
        Some(chardev.backend.clone())
    }

    fn console(&mut self, d: &Draft) -> Option<ConsoleConfig> {
        let mut buses = vec![];
        let mut consoles: Vec<(&Place, ConsoleConfig)> = vec![];
        for device in &d.devices {
            match &device.kind {
                DeviceKind::SerialBus { iothread } => {
                    self.check_iothread(d, &device.place, iothread.as_deref());
                    buses.push((&device.place, iothread.clone()));
                }
                DeviceKind::Console { chardev } => {
                    if let Some(backend) = self.chardev(d, &device.place, chardev) {
                        let console =
                            ConsoleConfig { id: chardev.clone(), backend, iothread: None };
                        consoles.push((&device.place, console));
                    }
                    if !d.devices.iter().any(|x| matches!(x.kind, DeviceKind::SerialBus { .. })) {
                        let rule = "needs a -device virtio-serial-device,id=ID";
                        self.problems.add(&device.place, rule);
                    }
                }
                DeviceKind::Refused { backends } => self.used.extend(backends.iter().cloned()),
                _ => {}
            }
        }
        if let (true, [(place, _), ..]) = (consoles.is_empty(), buses.as_slice()) {
            self.warnings.push(format!("{place}: no -device virtconsole, so no console"));
        }
        if let [_, (place, _), ..] = buses.as_slice() {
            self.problems.add(place, "there can be one virtio-serial-device");
        }
        if let ([(_, iothread), ..], [(_, console), ..]) = (&*buses, &mut *consoles) {
            console.iothread.clone_from(iothread);
        }
        // Spoken for by -serial or -mon: not a console by itself.
        let elsewhere: Vec<&String> = d
            .monitors
            .iter()
            .map(|(_, id)| id)
            .chain(d.serial.iter().filter_map(|serial| match serial {
                Serial::Chardev(_, id) => Some(id),
                _ => None,
            }))
            .collect();
        for chardev in d.chardevs.iter().filter(|c| c.console && !elsewhere.contains(&&c.id)) {
            if self.used.insert(chardev.id.clone()) {
                let (id, backend) = (chardev.id.clone(), chardev.backend.clone());
                consoles.push((&chardev.place, ConsoleConfig { id, backend, iothread: None }));
            }
        }
        if let [_, (place, _), ..] = consoles.as_slice() {
            self.problems.add(place, "there can be one virtio-console");
        }
        consoles.into_iter().next().map(|(_, console)| console)
    }

    fn serial(&mut self, d: &Draft) -> Option<CharBackend> {
        match d.serial.as_ref()? {
            Serial::Off => None,
            Serial::Backend(_, backend) => Some(backend.clone()),
            Serial::Chardev(place, id) => self.chardev(d, place, id),
        }
    }

    fn rng(&mut self, d: &Draft) -> Option<RngConfig> {
        let mut rngs = vec![];
        for device in &d.devices {
            let DeviceKind::Rng { source, bps } = &device.kind else { continue };
            match d.rng_sources.iter().find(|known| known.id == *source) {
                Some(found) => {
                    let (id, path) = (device.id.clone(), found.path.clone());
                    rngs.push((Some(&device.place), RngConfig { id, path, bps: *bps }));
                }
                None => self.missing(&device.place, "rng", "object rng-random", source),
            }
        }
        if let Some((path, bps)) = &d.rng {
            let mut id = "rng0".to_owned();
            while self.devices.contains(&id) {
                id.push('0');
            }
            rngs.push((None, RngConfig { id, path: path.clone(), bps: *bps }));
        }
        if let [_, _, ..] = rngs.as_slice() {
            let rule = "there can be one virtio-rng (-device virtio-rng-device, -rng, rng)";
            match rngs.iter().find_map(|(place, _)| *place) {
                Some(place) => self.problems.add(place, rule),
                None => self.problems.add_line(rule),
            }
        }
        rngs.into_iter().next().map(|(_, rng)| rng)
    }

    /// All control sockets, and no path twice among them and the other sockets.
    fn control(&mut self, d: &Draft) -> Vec<PathBuf> {
        let mut control: Vec<(&Place, PathBuf)> = vec![];
        control.extend(d.control.iter().map(|(place, path)| (place, path.clone())));
        for (place, id) in &d.monitors {
            match self.chardev(d, place, id) {
                Some(CharBackend::Socket(path)) => control.push((place, path)),
                Some(_) => {
                    let rule = "must be a -chardev socket";
                    self.problems.add_value(&place.key("chardev"), id, rule);
                }
                None => {}
            }
        }
        let mut taken: HashSet<&Path> = HashSet::new();
        let chardevs = d.chardevs.iter().map(|chardev| (&chardev.place, &chardev.backend));
        let serial = d.serial.iter().filter_map(|serial| match serial {
            Serial::Backend(place, backend) => Some((place, backend)),
            _ => None,
        });
        let others = chardevs.chain(serial).filter_map(|(place, backend)| match backend {
            CharBackend::Socket(path) => Some((place, path)),
            _ => None,
        });
        for (place, path) in d.control.iter().map(|(place, path)| (place, path)).chain(others) {
            if !taken.insert(path) {
                let rule = "another socket has this path";
                self.problems.add_value(place, &path.to_string_lossy(), rule);
            }
        }
        control.into_iter().map(|(_, path)| path).collect()
    }

    /// One thing can have the standard streams, and nothing of a process in the background.
    fn check_daemon(
        &mut self,
        d: &Draft,
        serial: Option<&CharBackend>,
        console: Option<&ConsoleConfig>,
    ) {
        let on_serial = serial == Some(&CharBackend::Stdio);
        let on_console = console.is_some_and(|console| console.backend == CharBackend::Stdio);
        if on_serial && on_console {
            self.problems.add_line("-serial and the console both want stdio: one can have it");
        }
        if d.daemonize && on_serial {
            self.problems.add_line(
                "Serial with stdio and daemonize can't be set together: use -serial pty, file or \
                 socket, or leave -daemonize out",
            );
        }
        if d.daemonize && on_console {
            self.problems.add_line(
                "Console with stdio and daemonize can't be set together: use -chardev pty, file or \
                 socket, or leave -daemonize out",
            );
        }
    }
}

fn disk(drive: &Drive, id: &str, front: &BlkFront) -> DiskConfig {
    let back = &drive.front;
    DiskConfig {
        id: id.to_owned(),
        path: drive.path.clone(),
        readonly: drive.readonly,
        direct: drive.direct,
        serial: front.serial.clone().or_else(|| back.serial.clone()),
        aio: drive.aio,
        discard: drive.discard,
        iops: drive.iops,
        bps: drive.bps,
        queues: front.queues.or(back.queues).unwrap_or(1),
        queue_size: front.queue_size.or(back.queue_size).unwrap_or(limits::DEFAULT_QUEUE_SIZE),
        iothread: front.iothread.clone().or_else(|| back.iothread.clone()),
    }
}

fn queue_pairs(net: &Net) -> u16 {
    match &net.tap {
        // At most 16, checked where they were read.
        Tap::Fds(fds) => u16::try_from(fds.len()).unwrap_or(u16::MAX).max(1),
        Tap::Name(_) => net.queues.unwrap_or(1),
    }
}

fn nic(net: &Net, id: &str, front: &NetFront) -> NicConfig {
    let back = &net.front;
    NicConfig {
        id: id.to_owned(),
        tap: net.tap.clone(),
        mac: front.mac.or(back.mac),
        queue_pairs: queue_pairs(net),
        queue_size: front.queue_size.or(back.queue_size).unwrap_or(limits::DEFAULT_QUEUE_SIZE),
        pps: net.pps,
        bps: net.bps,
        iothread: front.iothread.clone().or_else(|| back.iothread.clone()),
    }
}
