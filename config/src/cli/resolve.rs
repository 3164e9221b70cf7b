//! Converts the draft to the machine: names are resolved, and the parts checked for consistency.
//!
//! A `-drive` or `-netdev` that no `-device` names is a device by itself, as in the first
//! StratoVirt; one that is named is the back-end of that device, as in the second.
use std::{collections::HashSet, iter};

use crate::slots::{SlotCounts, SlotsError, Wanted};
use crate::{BootConfig, DeviceConfig, MachineConfig, MemoryConfig, Topology, limits};

use super::draft::{DeviceKind, Draft};
use super::kinds::{Devices, KINDS};
use super::problem::{Place, Places, Problems};
use super::process::How;
use super::{Invocation, Log};
use crate::incoming::{Incoming, Overrides};
use crate::types::{CpuCount, Id};

mod chars;
mod virtio;

/// The invocation, or all problems found so far and here.
pub(crate) fn resolve(draft: Draft) -> Result<Invocation, Problems> {
    let (problems, places) = (draft.problems.clone(), draft.places.clone());
    let mut r = Resolver { problems, places, ..Default::default() };
    r.check_ids(&draft);
    let mut devices = Devices::default();
    KINDS.iter().for_each(|kind| (kind.resolve)(&mut r, &draft, &mut devices));
    let Devices { disks, nics, others } = devices;
    let serial = r.serial(&draft);
    let control = r.control(&draft);
    let console = others.iter().find_map(|device| device.facts().chars());
    r.check_daemon(&draft, serial.as_ref(), console);
    for chardev in draft.chardevs.iter().filter(|c| !c.console && !r.used.contains(&c.id)) {
        r.warnings.push(format!("{}: not used", chardev.place));
    }
    if serial.is_none() && console.is_none() && draft.incoming.is_none() && !draft.no_machine {
        r.warnings.push(
            "no serial port and no console: the guest's output is not shown; use -serial stdio \
             (serial.stdio in the file)"
                .into(),
        );
    }
    if draft.kernel.is_none() && draft.incoming.is_none() && !draft.no_machine {
        r.problems.add_line(
            "kernel file is required for microvm machine type, which is not provided: give -kernel \
             FILE, or boot-source.kernel_image_path in the file of -config",
        );
    }
    let wanted = Wanted {
        disk_slots: draft.disk_slots.as_ref().map(|(_, count)| *count),
        nic_slots: draft.nic_slots.as_ref().map(|(_, count)| *count),
        disks: disks.len(),
        nics: nics.len(),
        others: others.iter().map(|device| device.facts().slot()).collect(),
    };
    let (disk_slots, nic_slots) = (wanted.disk_slots, wanted.nic_slots);
    let slots = r.slots(&draft, wanted);
    let Some(slots) = slots.filter(|_| r.problems.is_empty()) else { return Err(r.problems) };
    let dump = match draft.omit_vm_memory {
        true => Some(false),
        false => draft.dump_guest_core,
    };
    let incoming = draft.incoming.map(|(source, How { clock_realtime, force })| Incoming {
        source,
        clock_realtime,
        overrides: Overrides {
            force,
            name: draft.name.clone(),
            uuid: draft.uuid.clone(),
            smp: draft.smp,
            memory: draft.memory,
            memory_shared: draft.mem_share,
            memory_dump: dump,
            kernel: draft.kernel.clone(),
            initrd: draft.initrd.clone(),
            cmdline: draft.cmdline.clone(),
            disk_slots,
            nic_slots,
        },
    });
    let (cpus, topology) = draft.smp.unwrap_or((CpuCount::MIN, ONE_CPU));
    let machine = MachineConfig {
        name: draft.name.unwrap_or(limits::DEFAULT_NAME),
        uuid: draft.uuid.unwrap_or_else(|| limits::NIL_UUID.to_owned()),
        cpus,
        topology,
        memory: MemoryConfig {
            size: draft.memory.unwrap_or_default(),
            shared: draft.mem_share.unwrap_or(false),
            path: draft.mem_path,
            prealloc: draft.mem_prealloc,
            dump: dump.unwrap_or(true),
            thp: draft.thp.unwrap_or_default(),
        },
        boot: BootConfig {
            kernel: draft.kernel.unwrap_or_default(),
            initrd: draft.initrd,
            cmdline: draft.cmdline.unwrap_or_default(),
        },
        slots,
        iothreads: draft.iothreads.into_iter().map(|(_, id)| id).collect(),
        serial,
        disks,
        nics,
        devices: others,
    };
    Ok(Invocation {
        machine,
        control,
        no_machine: draft.no_machine,
        pidfile: draft.pidfile,
        paused: draft.paused,
        actions: draft.actions.resolve(),
        log: draft.log.unwrap_or(Log::Off),
        disable_seccomp: draft.disable_seccomp,
        spawn: draft.spawn,
        incoming,
        warnings: r.warnings,
        places: r.places,
    })
}

const ONE_CPU: Topology = Topology { sockets: 1, dies: 1, clusters: 1, cores: 1, threads: 1 };

#[derive(Default)]
pub(crate) struct Resolver {
    pub(crate) problems: Problems,
    places: Places,
    pub(crate) warnings: Vec<String>,
    /// Chardevs that are used.
    pub(crate) used: HashSet<Id>,
    /// Ids of the devices.
    devices: HashSet<Id>,
}

impl Resolver {
    /// Each kind of object has its own namespace; I/O threads and sources of randomness share one.
    fn check_ids(&mut self, d: &Draft) {
        self.unique("drive", d.drives.iter().map(|x| (&x.place, &x.id)));
        self.unique("netdev", d.nets.iter().map(|x| (&x.place, &x.id)));
        self.unique("chardev", d.chardevs.iter().map(|x| (&x.place, &x.id)));
        let objects = d.rng_sources.iter().map(|x| (&x.place, &x.id));
        let objects = d.iothreads.iter().map(|(place, id)| (place, id)).chain(objects);
        self.unique("object", objects);
        let named = d.devices.iter().filter_map(|x| Some((&x.place, x.id.as_ref()?)));
        self.unique("device", named.clone());
        self.devices = named.map(|(_, id)| id.clone()).collect();
        if let Some((place, _)) = d.iothreads.get(limits::MAX_IOTHREADS) {
            let (n, most) = (d.iothreads.len(), limits::MAX_IOTHREADS);
            self.problems.add(place, format!("{n} I/O threads, at most {most} are allowed"));
        }
    }

    fn unique<'a>(&mut self, kind: &str, ids: impl Iterator<Item = (&'a Place, &'a Id)>) {
        let mut seen = HashSet::new();
        for (place, id) in ids {
            if !seen.insert(id) {
                self.problems
                    .add(place, format!("Input id '{id}' for {kind} repeat: ids must be unique"));
            }
        }
    }

    /// A device without a `-device` has its back-end's id, which no other device may have.
    fn claim_id(&mut self, place: &Place, id: &Id) {
        if !self.devices.insert(id.clone()) {
            let rule = format!("Input id '{id}' for device repeat: another device has it");
            self.problems.add(place, rule);
        }
    }

    /// An id that no device has: `word`, with zeros appended if needed.
    pub(crate) fn fresh_id(&self, word: &Id) -> Id {
        let longer = |id: &Id| format!("{id}0").parse().ok();
        let mut ids = iter::successors(Some(word.clone()), longer);
        // There is one: a machine has fewer slots than an id has bytes.
        ids.find(|id| !self.devices.contains(id)).unwrap_or_else(|| word.clone())
    }

    pub(crate) fn missing(&mut self, place: &Place, key: &str, kind: &str, id: &str) {
        self.problems.add_value(&place.key(key), id, format!("no -{kind} has this id"));
    }

    pub(crate) fn check_iothread(&mut self, d: &Draft, place: &Place, id: Option<&Id>) {
        if let Some(id) = id.filter(|id| !d.iothreads.iter().any(|(_, known)| known == *id)) {
            let known: Vec<&str> = d.iothreads.iter().map(|(_, id)| &**id).collect();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            let rule = format!("no I/O thread has this id; there are: {known}");
            self.problems.add_value(&place.key("iothread"), id, rule);
        }
    }

    /// Slots for the devices and for hot-plug; a restored machine has those it was saved with.
    fn slots(&mut self, d: &Draft, wanted: Wanted) -> Option<SlotCounts> {
        let error = match SlotCounts::try_from(wanted) {
            Ok(slots) => return Some(slots),
            Err(error) => error,
        };
        let place = match error {
            SlotsError::Disks { .. } => d.disk_slots.as_ref(),
            SlotsError::Nics { .. } => d.nic_slots.as_ref(),
            SlotsError::NoRoom(_) => d.disk_slots.as_ref().or(d.nic_slots.as_ref()),
        };
        match place {
            Some((place, _)) => self.problems.add(place, error),
            None => self.problems.add_line(error),
        }
        None
    }

    /// The devices of one kind that one flag or section defines completely.
    pub(crate) fn whole(&self, d: &Draft, is: fn(&DeviceConfig) -> bool) -> Vec<Found> {
        let models = d.devices.iter().filter_map(|device| match &device.kind {
            DeviceKind::Whole(whole) => Some((&device.place, whole, device.id.as_ref())),
            _ => None,
        });
        let said = d.whole.iter().map(|(place, device)| (place, device, None));
        let all = models.chain(said).filter(|(_, device, _)| is(device));
        let found = all.map(|(place, device, id)| {
            let mut device = device.clone();
            device.set_id(id.cloned().unwrap_or_else(|| self.fresh_id(device.facts().id())));
            Found { place: place.clone(), said: place.clone(), device }
        });
        found.collect()
    }

    /// The first of `found`; more than one breaks `rule`.
    pub(crate) fn only_one(&mut self, found: Vec<Found>, rule: &str) -> Option<DeviceConfig> {
        if let [_, second, ..] = found.as_slice() {
            self.problems.add(&second.place, rule);
        }
        let Found { said, device, .. } = found.into_iter().next()?;
        self.places.note(device.part(), said);
        Some(device)
    }
}

/// A device found in the draft.
pub(crate) struct Found {
    /// Where it was requested.
    pub(crate) place: Place,
    /// Where the setting is that may turn out to be unavailable.
    pub(crate) said: Place,
    pub(crate) device: DeviceConfig,
}
