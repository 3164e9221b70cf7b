//! The saved form of a machine's configuration, and the conversion back, which checks a
//! configuration's limits.
use std::{
    fmt,
    path::{Path, PathBuf},
};

use state::{
    config as saved,
    directory::{self, DirectoryError},
    hex::{Hex, HexArray},
    kept_disks::{self, KeptDiskError},
};

use crate::{
    Aio, BootConfig, CharBackend, DeviceConfig, DiskConfig, Expect, MachineConfig, MemoryConfig,
    NicConfig, Occupancy, Tap, Thp, Topology, limits,
    places::{DISK, NIC, Place, VIRTIO_IRQS, VIRTIO_MMIO, VIRTIO_MMIO_STEP, VirtioSlot},
    slots::{SlotCounts, SlotsError, Wanted},
    types::{CpuCount, DiskIops, Id, MemorySize, MemorySizeError, PerSecond, Rate, ValueError},
};

/// The configuration of a saved machine. Everything in it is within its limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// Without the disks and NICs from the start: their slots, as the guest has seen them, are in
    /// `places`.
    pub config: MachineConfig,
    /// The contents of its slots.
    pub occupied: Occupancy,
    /// Sizes in bytes of the disks in the slots; 0 for an empty slot.
    pub disk_sizes: Vec<u64>,
    /// Its slots, as its guest has seen them, in the builder's order: disks, NICs, all other
    /// devices.
    pub places: Vec<Place>,
}

/// Why a saved state does not describe a valid machine.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the error messages describe them")]
pub enum DescriptionError {
    #[error("{what} {value}, {source}")]
    Limit { what: &'static str, value: String, source: ValueError },
    #[error("{vcpus} vCPUs, {product} in their topology")]
    Topology { vcpus: CpuCount, product: u64 },
    #[error("{0} I/O threads, at most {max} are allowed", max = limits::MAX_IOTHREADS)]
    IoThreads(usize),
    #[error("bytes of memory: {0}")]
    Memory(#[from] MemorySizeError),
    #[error("slot {id}: {what}")]
    Slot { id: String, what: String },
    #[error(transparent)]
    Slots(#[from] SlotsError),
}

/// Why the save in a directory cannot be restored.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the error messages describe them")]
pub enum CheckError {
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    #[error("{} cannot be restored", path.display())]
    Description { path: PathBuf, source: DescriptionError },
    #[error(transparent)]
    Disk(#[from] KeptDiskError),
}

/// Check the save in `directory`, and those that it builds on, against their checksums.
///
/// # Errors
/// The first mismatch or failure.
pub fn check(directory: &Path) -> Result<(), CheckError> {
    let path = directory.join(directory::STATE);
    let (mut state, _) = directory::read(&path)?;
    Description::try_from(&state.config)
        .map_err(|source| CheckError::Description { path, source })?;
    let memory = directory::memory(directory, &mut state)?;
    kept_disks::check(directory, &state.config)?;
    let verified = memory.open().and_then(|contents| contents.verify(|_, _| Ok(())));
    Ok(verified.map_err(DirectoryError::from)?)
}

impl Description {
    /// The saved form, of the save `id`. `halted` says why the guest cannot run any more.
    pub fn saved(self, id: u128, halted: Option<saved::Halted>) -> saved::Config {
        let Self { config, occupied: Occupancy { disks, nics }, disk_sizes, places } = self;
        let disks = disks.into_iter().zip(disk_sizes).enumerate().map(|(slot, (disk, size))| {
            let iothread = config.disks.get(slot).and_then(|d| d.iothread.clone());
            (iothread, saved::Contents::Disk(disk.map(|disk| save_disk(disk, size))))
        });
        let nics = nics.into_iter().enumerate().map(|(slot, nic)| {
            let iothread = config.nics.get(slot).and_then(|n| n.iothread.clone());
            (iothread, saved::Contents::Nic(nic.map(save_nic)))
        });
        let others = config.devices.iter().map(|device| {
            let facts = device.facts();
            (facts.iothread().cloned(), facts.saved())
        });
        // In the builder's order.
        let contents = disks.chain(nics).chain(others);
        let slots = places.into_iter().zip(contents).map(|(place, (iothread, contents))| {
            let Place { id, at, queue_sizes } = place;
            saved::Slot {
                id,
                address: Hex(at.address.into()),
                interrupt: at.irq,
                queue_sizes: queue_sizes.unwrap_or_default(),
                iothread: iothread.map(String::from),
                contents,
            }
        });
        let slots = slots.collect();
        let machine = save_machine(&config);
        saved::Config { id: id.into(), machine, slots, halted, base: None }
    }
}

impl TryFrom<&saved::Config> for Description {
    type Error = DescriptionError;

    fn try_from(from: &saved::Config) -> Result<Self, DescriptionError> {
        let mut config = restore_machine(&from.machine)?;
        let mut numbered = Vec::new();
        for slot in &from.slots {
            numbered.push((order(slot)?, slot));
        }
        numbered.sort_by_key(|(order, _)| *order);
        check_places(&numbered)?;
        let (mut disks, mut nics, mut disk_sizes) = (Vec::new(), Vec::new(), Vec::new());
        for (_, slot) in &numbered {
            match &slot.contents {
                saved::Contents::Disk(disk) => {
                    let shape = disk_shape(slot)?;
                    disk_sizes.push(disk.as_ref().map_or(0, |disk| disk.size));
                    disks.push(disk.as_ref().map(|disk| restore_disk(disk, &shape)).transpose()?);
                    config.disks.push(shape);
                }
                saved::Contents::Nic(nic) => {
                    let shape = nic_shape(slot)?;
                    nics.push(nic.as_ref().map(|nic| restore_nic(nic, &shape)).transpose()?);
                    config.nics.push(shape);
                }
                other => {
                    let iothread = iothread(slot)?;
                    config.devices.extend(DeviceConfig::restored(other, iothread.as_ref())?);
                }
            }
        }
        let wanted = Wanted {
            disk_slots: Some(disks.len()),
            nic_slots: Some(nics.len()),
            disks: disks.len(),
            nics: nics.len(),
            others: config.devices.iter().map(|device| device.facts().slot()).collect(),
        };
        config.slots = SlotCounts::try_from(wanted)?;
        let places = numbered.iter().map(|(_, slot)| place(slot)).collect::<Result<_, _>>()?;
        Ok(Self { config, occupied: Occupancy { disks, nics }, disk_sizes, places })
    }
}

/// A slot's position in the builder's order.
fn order(slot: &saved::Slot) -> Result<(u8, usize), DescriptionError> {
    let number = |prefix: &str| {
        let number = slot.id.strip_prefix(prefix)?.parse().ok()?;
        (slot.id == format!("{prefix}{number}")).then_some(number)
    };
    let order = match &slot.contents {
        saved::Contents::Disk(_) => number(DISK).map(|n| (0, n)),
        saved::Contents::Nic(_) => number(NIC).map(|n| (1, n)),
        other => DeviceConfig::restored(other, None)?
            .filter(|device| device.facts().slot() == slot.id)
            .map(|device| (2 + device.order(), 0)),
    };
    order.ok_or_else(|| failed(slot, "this kind of slot cannot hold its contents".into()))
}

/// Check that each slot exists once, none is missing, and no two are at one address.
fn check_places(slots: &[((u8, usize), &saved::Slot)]) -> Result<(), DescriptionError> {
    let mut before: Option<(u8, usize)> = None;
    for (order @ (kind, number), slot) in slots {
        let expected = match before {
            Some((same, last)) if same == *kind => last + 1,
            _ => 0,
        };
        if *number != expected {
            return Err(failed(slot, "it is duplicated, or the one before it is missing".into()));
        }
        before = Some(*order);
    }
    for (index, (_, slot)) in slots.iter().enumerate() {
        let mut others = slots.iter().take(index);
        let shared = others
            .find(|(_, other)| other.address == slot.address || other.interrupt == slot.interrupt);
        if let Some((_, other)) = shared {
            return Err(failed(
                slot,
                format!("its address or interrupt is also that of {}", other.id),
            ));
        }
    }
    Ok(())
}

fn place(slot: &saved::Slot) -> Result<Place, DescriptionError> {
    let Hex(address) = slot.address;
    let end = VIRTIO_MMIO + VIRTIO_IRQS.len() as u64 * VIRTIO_MMIO_STEP;
    let inside = (VIRTIO_MMIO..end).contains(&address) && address.is_multiple_of(VIRTIO_MMIO_STEP);
    if !inside || !VIRTIO_IRQS.contains(&slot.interrupt) {
        let what = format!("no slot is at address {address:#x} with interrupt {}", slot.interrupt);
        return Err(failed(slot, what));
    }
    let address = u32::try_from(address).map_err(|_| failed(slot, "address".into()))?;
    let at = VirtioSlot { address, irq: slot.interrupt };
    let queue_sizes = Some(slot.queue_sizes.clone());
    Ok(Place { id: slot.id.clone(), at, queue_sizes })
}

/// The queues of a slot for disks, as those of a disk that was there at the start.
fn disk_shape(slot: &saved::Slot) -> Result<DiskConfig, DescriptionError> {
    let (queues, queue_size) = same_size(slot, &slot.queue_sizes)?;
    let queues = checked("queues of a disk", queues)?;
    let queue_size = checked("queue size of a disk", queue_size)?;
    Ok(DiskConfig {
        id: checked("slot", slot.id.clone())?,
        path: PathBuf::new(),
        readonly: false,
        direct: false,
        serial: None,
        aio: Aio::Auto,
        discard: false,
        iops: None,
        bps: None,
        queues,
        queue_size,
        iothread: iothread(slot)?,
        backend: None,
        probe: false,
        expect: Expect::Saved,
    })
}

/// The queues of a slot for NICs: two for each pair, and one for control.
fn nic_shape(slot: &saved::Slot) -> Result<NicConfig, DescriptionError> {
    let data = slot.queue_sizes.split_last().map_or(&[][..], |(_, data)| data);
    let (queues, queue_size) = same_size(slot, data)?;
    if !queues.is_multiple_of(2) {
        return Err(failed(slot, format!("{} queues", slot.queue_sizes.len())));
    }
    let queue_pairs = checked("queue pairs of a NIC", queues / 2)?;
    let queue_size = checked("queue size of a NIC", queue_size)?;
    Ok(NicConfig {
        id: checked("slot", slot.id.clone())?,
        tap: Tap::Fds(Vec::new()),
        mac: None,
        queue_pairs,
        queue_size,
        pps: None,
        bps: None,
        iothread: iothread(slot)?,
        backend: None,
    })
}

fn iothread(slot: &saved::Slot) -> Result<Option<Id>, DescriptionError> {
    slot.iothread.clone().map(|id| checked("I/O thread", id)).transpose()
}

/// The number of queues, and their size, which must be the same for all.
fn same_size(slot: &saved::Slot, sizes: &[u16]) -> Result<(u16, u16), DescriptionError> {
    let count = u16::try_from(sizes.len()).ok();
    match (sizes.first(), count) {
        (Some(size), Some(count)) if sizes.iter().all(|other| other == size) => Ok((count, *size)),
        _ => Err(failed(slot, format!("queues of {:.99?} descriptors", slot.queue_sizes))),
    }
}

fn failed(slot: &saved::Slot, what: String) -> DescriptionError {
    DescriptionError::Slot { id: slot.id.clone(), what }
}

/// Convert `value` to the type that checks it.
pub(crate) fn checked<V, T>(what: &'static str, value: V) -> Result<T, DescriptionError>
where
    V: Clone + fmt::Display,
    T: TryFrom<V, Error = ValueError>,
{
    let limit = |source| DescriptionError::Limit { what, value: format!("{value:.99}"), source };
    T::try_from(value.clone()).map_err(limit)
}

/// Convert `rate`, a limit per second; `None` means unlimited.
fn rate<const MIN: u64, const MAX: u64>(
    what: &'static str,
    rate: Option<u64>,
) -> Result<Option<Rate<MIN, MAX>>, DescriptionError> {
    let value = rate.unwrap_or(0);
    let limit = |source| DescriptionError::Limit { what, value: value.to_string(), source };
    Rate::or_unlimited(value).map_err(limit)
}

fn save_machine(config: &MachineConfig) -> saved::Machine {
    let Topology { sockets, dies, clusters, cores, threads } = config.topology;
    let MemoryConfig { size, shared, path, prealloc, dump, thp: _ } = config.memory.clone();
    let BootConfig { kernel, initrd, cmdline } = config.boot.clone();
    saved::Machine {
        name: config.name.clone().into(),
        uuid: config.uuid.clone(),
        vcpus: config.cpus.get(),
        topology: saved::Topology { sockets, dies, clusters, cores, threads },
        memory: saved::Memory { size: size.bytes(), shared, path, prealloc, dump },
        boot: saved::Boot { kernel, initrd, cmdline },
        iothreads: config.iothreads.iter().cloned().map(String::from).collect(),
        serial: config.serial.clone().map(save_char),
    }
}

/// The machine, without its slots yet.
fn restore_machine(from: &saved::Machine) -> Result<MachineConfig, DescriptionError> {
    let cpus = checked("vCPUs", from.vcpus)?;
    let saved::Topology { sockets, dies, clusters, cores, threads } = from.topology;
    let product: u64 = [sockets, dies, clusters, cores, threads].map(u64::from).iter().product();
    if product != u64::from(from.vcpus) {
        return Err(DescriptionError::Topology { vcpus: cpus, product });
    }
    if from.iothreads.len() > limits::MAX_IOTHREADS {
        return Err(DescriptionError::IoThreads(from.iothreads.len()));
    }
    let saved::Memory { size, shared, path, prealloc, dump } = from.memory.clone();
    let size = MemorySize::try_from(size)?;
    let saved::Boot { kernel, initrd, cmdline } = from.boot.clone();
    let iothreads = from.iothreads.iter().map(|id| checked("I/O thread", id.clone()));
    let none = Wanted { disk_slots: Some(0), nic_slots: Some(0), ..Wanted::default() };
    Ok(MachineConfig {
        name: checked("name", from.name.clone())?,
        uuid: from.uuid.clone(),
        cpus,
        topology: Topology { sockets, dies, clusters, cores, threads },
        memory: MemoryConfig { size, shared, path, prealloc, dump, thp: Thp::default() },
        boot: BootConfig { kernel, initrd, cmdline },
        slots: SlotCounts::try_from(none)?,
        iothreads: iothreads.collect::<Result<_, _>>()?,
        serial: from.serial.clone().map(restore_char),
        disks: Vec::new(),
        nics: Vec::new(),
        devices: Vec::new(),
    })
}

fn save_disk(disk: DiskConfig, size: u64) -> saved::Disk {
    let DiskConfig { id, path, readonly, direct, serial, aio, discard, iops, bps, .. } = disk;
    let aio = match aio {
        Aio::Auto => saved::Aio::Auto,
        Aio::IoUring => saved::Aio::IoUring,
        Aio::Off => saved::Aio::Off,
    };
    let (id, backend, kept) = (id.into(), disk.backend.map(String::from), None);
    let (iops, bps) = (iops.map(DiskIops::get), bps.map(PerSecond::get));
    saved::Disk { id, backend, path, size, readonly, direct, aio, discard, serial, iops, bps, kept }
}

/// `disk` with the queues of its slot.
fn restore_disk(disk: &saved::Disk, shape: &DiskConfig) -> Result<DiskConfig, DescriptionError> {
    let saved::Disk { id, backend, path, readonly, direct, discard, serial, iops, bps, .. } =
        disk.clone();
    let aio = match disk.aio {
        saved::Aio::Auto => Aio::Auto,
        saved::Aio::IoUring => Aio::IoUring,
        saved::Aio::Off => Aio::Off,
    };
    let (queues, queue_size, iothread) = (shape.queues, shape.queue_size, shape.iothread.clone());
    let id = checked("disk", id)?;
    let backend = backend.map(|name| checked("disk", name)).transpose()?;
    let iops = rate("requests per second of a disk", iops)?;
    let bps = rate("bytes per second of a disk", bps)?;
    Ok(DiskConfig {
        id,
        path,
        readonly,
        direct,
        serial,
        aio,
        discard,
        iops,
        bps,
        queues,
        queue_size,
        iothread,
        backend,
        // The guest may have written a header that looks like another format.
        probe: false,
        expect: Expect::Saved,
    })
}

fn save_nic(nic: NicConfig) -> saved::Nic {
    let NicConfig { id, tap, mac, pps, bps, backend, .. } = nic;
    let tap = match tap {
        Tap::Name(name) => saved::Tap::Name(name.into()),
        Tap::Fds(numbers) => saved::Tap::Fds(numbers),
    };
    let (pps, bps) = (pps.map(PerSecond::get), bps.map(PerSecond::get));
    let backend = backend.map(String::from);
    saved::Nic { id: id.into(), backend, tap, mac: mac.map(HexArray), pps, bps }
}

/// `nic` with the queues of its slot.
fn restore_nic(nic: &saved::Nic, shape: &NicConfig) -> Result<NicConfig, DescriptionError> {
    let saved::Nic { id, backend, tap, mac, pps, bps } = nic.clone();
    let tap = match tap {
        saved::Tap::Name(name) => Tap::Name(checked("tap", name)?),
        saved::Tap::Fds(numbers) => Tap::Fds(numbers),
    };
    let mac = mac.map(|mac| mac.0);
    let id = checked("NIC", id)?;
    let backend = backend.map(|name| checked("NIC", name)).transpose()?;
    let pps = rate("packets per second of a NIC", pps)?;
    let bps = rate("bytes per second of a NIC", bps)?;
    Ok(NicConfig { id, tap, mac, pps, bps, backend, ..shape.clone() })
}

pub(crate) fn save_char(backend: CharBackend) -> saved::CharBackend {
    match backend {
        CharBackend::Stdio => saved::CharBackend::Stdio,
        CharBackend::Pty => saved::CharBackend::Pty,
        CharBackend::File(path) => saved::CharBackend::File(path),
        CharBackend::Socket { path, replay } => saved::CharBackend::Socket { path, replay },
    }
}

pub(crate) fn restore_char(backend: saved::CharBackend) -> CharBackend {
    match backend {
        saved::CharBackend::Stdio => CharBackend::Stdio,
        saved::CharBackend::Pty => CharBackend::Pty,
        saved::CharBackend::File(path) => CharBackend::File(path),
        saved::CharBackend::Socket { path, replay } => CharBackend::Socket { path, replay },
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// A machine that uses every field.
    fn everything() -> saved::Config {
        let mut config = state::testing::config(7);
        config.machine.iothreads = vec!["t".into()];
        config.machine.serial = Some(saved::CharBackend::File("log".into()));
        let slot = |id: &str, address: u64, interrupt: u32, queue_sizes: Value, contents: Value| {
            let slot = json!({
                "id": id, "address": format!("{address:#x}"), "interrupt": interrupt,
                "queue_sizes": queue_sizes, "iothread": null, "contents": contents,
            });
            serde_json::from_value::<saved::Slot>(slot).unwrap()
        };
        let disk = json!({
            "id": "root", "backend": "back", "path": "image", "size": 4096, "readonly": true,
            "direct": true, "aio": "io-uring", "discard": true, "serial": "s", "iops": 1, "bps": 2,
            "kept": null,
        });
        let nic = json!({
            "id": "eth", "backend": null, "tap": {"fds": [3, 4]}, "mac": "525400000001", "pps": 3,
            "bps": 4,
        });
        let socket = json!({"socket": {"path": "p", "replay": 9}});
        // Not at this program's usual addresses.
        config.slots = vec![
            slot("disk0", 0xf010_3000, 23, json!([256, 256]), json!({"disk": disk})),
            slot("disk1", 0xf010_1000, 6, json!([64]), json!({"disk": null})),
            slot("nic0", 0xf010_2000, 7, json!([512, 512, 512, 512, 64]), json!({"nic": nic})),
            slot("nic1", 0xf010_0000, 5, json!([256, 256, 64]), json!({"nic": null})),
            slot(
                "console",
                0xf010_4000,
                10,
                json!([64, 64]),
                json!({"console": {"id": "c", "backend": socket}}),
            ),
            slot(
                "rng",
                0xf010_5000,
                11,
                json!([256]),
                json!({"rng": {"id": "r", "path": "/dev/urandom", "bps": 64}}),
            ),
        ];
        config.slots[0].iothread = Some("t".into());
        config
    }

    #[test]
    fn what_was_saved_is_described_and_saved_again_as_it_was() {
        let config = everything();
        let description = Description::try_from(&config).unwrap();
        assert_eq!(description.disk_sizes, [4096, 0]);
        assert_eq!(description.clone().saved(7, None), config);
        let mut other = config;
        other.slots.reverse();
        assert_eq!(Description::try_from(&other).unwrap(), description, "order means nothing");
    }

    #[test]
    fn slots_that_no_machine_has_are_refused_by_name() {
        type Change = fn(&mut saved::Config);
        let change: [(&str, Change); 17] = [
            ("disk1: its address or interrupt", |c| c.slots[1].interrupt = 23),
            ("disk1: its address or interrupt", |c| c.slots[1].address = c.slots[0].address),
            ("disk1: no slot is at address 0xf0101001", |c| c.slots[1].address.0 += 1),
            ("disk1: no slot is at address 0xf0112000", |c| c.slots[1].address.0 = 0xf011_2000),
            ("with interrupt 9", |c| c.slots[1].interrupt = 9),
            ("disk1: it is duplicated, or", |c| drop(c.slots.remove(0))),
            ("disk0: it is duplicated, or", |c| c.slots[1].id = "disk0".into()),
            ("nic: this kind of slot", |c| c.slots[1].id = "nic".into()),
            ("disk01: this kind of slot", |c| c.slots[1].id = "disk01".into()),
            ("queue size of a disk 4096", |c| c.slots[1].queue_sizes = vec![4096]),
            ("queue size of a disk 100, not a power", |c| c.slots[1].queue_sizes = vec![100]),
            ("vCPUs 0, not in 1..=254", |c| c.machine.vcpus = 0),
            ("bytes of memory: 1048576 bytes", |c| c.machine.memory.size = 1 << 20),
            ("I/O thread , must not be empty", |c| c.machine.iothreads[0].clear()),
            ("tap a/b, not an interface name", |c| {
                let saved::Contents::Nic(Some(nic)) = &mut c.slots[2].contents else { panic!() };
                nic.tap = saved::Tap::Name("a/b".into());
            }),
            ("disk , must not be empty", |c| {
                let saved::Contents::Disk(Some(disk)) = &mut c.slots[0].contents else { panic!() };
                disk.id.clear();
            }),
            ("nic1: queues of [256, 512, 64]", |c| c.slots[3].queue_sizes[1] = 512),
        ];
        for (says, change) in change {
            let mut config = everything();
            change(&mut config);
            let error = Description::try_from(&config).unwrap_err().to_string();
            assert!(error.contains(says), "{says}: {error}");
        }
    }
}
