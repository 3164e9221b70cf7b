//! The saved form of a machine's configuration, and the conversion back, which checks a
//! configuration's limits.
mod slots;
#[cfg(test)]
mod tests;

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

use self::slots::{check_places, disk_shape, iothread, nic_shape, order, place};
use crate::{
    Aio, BootConfig, CharBackend, DeviceConfig, DiskConfig, Expect, MachineConfig, MemoryConfig,
    NicConfig, Occupancy, Tap, Thp, Topology, limits,
    places::Place,
    slots::{SlotCounts, SlotsError, Wanted},
    types::{CpuCount, DiskIops, MemorySize, MemorySizeError, PerSecond, Rate, ValueError},
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
