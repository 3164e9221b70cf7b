//! What a restored machine may have in other places than the saved one: images, taps, sockets, the
//! kernel for its next reset. What its guest sees stays the same; flags that would change that are
//! refused.
use std::{
    collections::BTreeSet,
    fmt::Display,
    fs::OpenOptions,
    io::{self, Seek, SeekFrom},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use config::{
    Description, Expect, MachineConfig, Tap, device::Differs, incoming::Overrides, types::Id,
};
use machine::SpotCheckError;
use rustix::fs::OFlags;

/// Why a machine cannot be restored as the command line specifies, or with the host's files as they
/// are.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the error messages describe them")]
pub enum OverrideError {
    #[error(transparent)]
    Differs(#[from] Differs),
    #[error(
        "the saved machine has no {what} '{id}'; it has {known}: give -{flag} with one of these"
    )]
    Unknown { what: &'static str, flag: &'static str, id: String, known: String },
    #[error("the saved machine has no {what}: leave {flag} out")]
    None { what: &'static str, flag: &'static str },
    #[error(
        "NIC '{id}' used inherited descriptors: give it a tap with -netdev tap,id={id},ifname=TAP"
    )]
    NoTap { id: String },
    #[error("NIC '{id}' has {saved} queue pairs, but {asked} descriptors were given for it")]
    Descriptors { id: String, saved: u16, asked: usize },
    #[error("disk '{id}': cannot open {}; give its path with -drive \
             id={id},file=PATH", path.display())]
    Disk { id: String, path: PathBuf, source: io::Error },
    #[error("disk '{id}' had {saved} bytes when it was saved; {} has {found}", path.display())]
    DiskSize { id: String, path: PathBuf, saved: u64, found: u64 },
    #[error(transparent)]
    SpotCheck(#[from] SpotCheckError),
}

/// Change `description` as the command line specifies: by `overrides`, and by the disks, NICs and
/// character devices of `flags`.
///
/// # Errors
/// When the command line requests a change that the guest would notice, or names what the saved
/// machine did not have.
pub fn apply(
    description: &mut Description,
    overrides: &Overrides,
    flags: &MachineConfig,
) -> Result<(), OverrideError> {
    let saved = &mut description.config;
    if let Some((cpus, topology)) = overrides.smp
        && (cpus, topology) != (saved.cpus, saved.topology)
    {
        return Err(differs("vCPUs, in this topology,", "-smp", saved.cpus, cpus));
    }
    if let Some(size) = overrides.memory.filter(|size| *size != saved.memory.size) {
        return Err(differs("bytes of memory", "-m", saved.memory.size, size));
    }
    let threads: BTreeSet<_> = flags.iothreads.iter().collect();
    if !threads.is_empty() && threads != saved.iothreads.iter().collect() {
        let list = |ids: &[Id]| {
            let ids: Vec<&str> = ids.iter().map(Id::as_str).collect();
            format!("'{}'", ids.join("', '"))
        };
        let (had, wanted) = (list(&saved.iothreads), list(&flags.iothreads));
        return Err(differs("the I/O threads", "-object iothread", had, wanted));
    }
    for (what, flag, had, wanted) in [
        ("slots for disks", "-machine disk-slots", saved.slots.disks(), overrides.disk_slots),
        ("slots for NICs", "-machine nic-slots", saved.slots.nics(), overrides.nic_slots),
    ] {
        if let Some(wanted) = wanted.filter(|wanted| *wanted != had) {
            return Err(differs(what, flag, had, wanted));
        }
    }
    replace(&mut saved.name, &overrides.name);
    replace(&mut saved.uuid, &overrides.uuid);
    replace(&mut saved.boot.kernel, &overrides.kernel);
    replace(&mut saved.boot.cmdline, &overrides.cmdline);
    if overrides.initrd.is_some() {
        saved.boot.initrd.clone_from(&overrides.initrd);
    }
    replace(&mut saved.memory.shared, &overrides.memory_shared);
    replace(&mut saved.memory.dump, &overrides.memory_dump);
    (saved.memory.prealloc, saved.memory.thp) = (flags.memory.prealloc, flags.memory.thp);
    if flags.memory.path.is_some() {
        saved.memory.path.clone_from(&flags.memory.path);
    }
    match (&mut saved.serial, &flags.serial) {
        (Some(serial), Some(wanted)) => serial.clone_from(wanted),
        (None, Some(_)) => {
            return Err(OverrideError::None { what: "serial port", flag: "-serial" });
        }
        (_, None) => {}
    }
    for wanted in &flags.devices {
        let replaced = saved.devices.iter_mut().find_map(|device| device.replace(wanted));
        let (what, flag) = (wanted.facts().slot(), wanted.facts().flag());
        replaced.ok_or(OverrideError::None { what, flag })??;
    }
    disks(description, flags)?;
    for disk in description.occupied.disks.iter_mut().flatten().filter(|_| overrides.force) {
        // The user vouches for images of the saved sizes.
        (disk.expect, disk.probe) = (Expect::Any, false);
    }
    nics(description, flags)
}

fn disks(saved: &mut Description, flags: &MachineConfig) -> Result<(), OverrideError> {
    let there = saved.occupied.disks.iter_mut().flatten();
    let pairs = pair(there, &flags.disks, |disk| &disk.id);
    for (disk, wanted) in pairs.map_err(|(one, ids)| unknown("disk", "drive", &one.id, &ids))? {
        if disk.readonly != wanted.readonly {
            return Err(differs("a disk with readonly", "-drive", disk.readonly, wanted.readonly));
        }
        // An image that the saved machine wrote to is raw, whatever its guest has written there.
        let moved = disk.path != wanted.path;
        disk.probe = wanted.probe && moved;
        disk.expect = if moved { Expect::Copy } else { Expect::Saved };
        disk.path.clone_from(&wanted.path);
        (disk.direct, disk.aio, disk.discard) = (wanted.direct, wanted.aio, wanted.discard);
        (disk.iops, disk.bps) = (wanted.iops, wanted.bps);
        if disk.id != wanted.id {
            (disk.id, disk.backend) = (wanted.id.clone(), wanted.backend.clone());
        }
    }
    Ok(())
}

fn nics(saved: &mut Description, flags: &MachineConfig) -> Result<(), OverrideError> {
    let mut given = Vec::new();
    let there = saved.occupied.nics.iter_mut().flatten();
    let pairs = pair(there, &flags.nics, |nic| &nic.id);
    for (nic, wanted) in pairs.map_err(|(one, ids)| unknown("NIC", "netdev", &one.id, &ids))? {
        if let Tap::Fds(fds) = &wanted.tap
            && fds.len() != usize::from(nic.queue_pairs.get())
        {
            let (id, asked) = (wanted.id.to_string(), fds.len());
            return Err(OverrideError::Descriptors { id, saved: nic.queue_pairs.get(), asked });
        }
        nic.tap.clone_from(&wanted.tap);
        (nic.pps, nic.bps) = (wanted.pps, wanted.bps);
        if nic.id != wanted.id {
            (nic.id, nic.backend) = (wanted.id.clone(), wanted.backend.clone());
        }
        given.push(wanted.id.clone());
    }
    let mut numbers = saved.occupied.nics.iter().flatten();
    match numbers.find(|nic| matches!(nic.tap, Tap::Fds(_)) && !given.contains(&nic.id)) {
        Some(nic) => Err(OverrideError::NoTap { id: nic.id.to_string() }),
        None => Ok(()),
    }
}

/// Pairs each of `wanted` with the saved one that has its id. If none of the ids is known and there
/// are as many as were saved, they are paired in the order of slots: this is how a template is
/// restored.
///
/// # Errors
/// The first unknown id, and those that are known.
#[expect(clippy::type_complexity, reason = "used twice, here")]
fn pair<'s, 'w, T>(
    saved: impl Iterator<Item = &'s mut T>,
    wanted: &'w [T],
    id: impl Fn(&T) -> &str,
) -> Result<Vec<(&'s mut T, &'w T)>, (&'w T, Vec<String>)> {
    let mut left: Vec<&mut T> = saved.collect();
    let ids: Vec<String> = left.iter().map(|one| id(one).to_owned()).collect();
    let known = |one: &T| ids.iter().any(|known| known == id(one));
    if wanted.len() == left.len() && !wanted.iter().any(known) {
        return Ok(left.into_iter().zip(wanted).collect());
    }
    let mut pairs = Vec::new();
    for one in wanted {
        match left.iter().position(|saved| id(saved) == id(one)) {
            Some(at) => pairs.push((left.remove(at), one)),
            None => return Err((one, ids)),
        }
    }
    Ok(pairs)
}

/// Check that the disks exist, and have the sizes that were saved.
///
/// # Errors
/// The first disk that does not.
pub fn check_disks(saved: &Description) -> Result<(), OverrideError> {
    for (disk, size_then) in saved.occupied.disks.iter().zip(&saved.disk_sizes) {
        let Some(disk) = disk else { continue };
        let (id, path) = (disk.id.to_string(), disk.path.clone());
        match size(&disk.path) {
            Err(source) => return Err(OverrideError::Disk { id, path, source }),
            // Whole sectors, which is the size that the disk reports.
            Ok(found) if found / 512 * 512 != *size_then => {
                return Err(OverrideError::DiskSize { id, path, saved: *size_then, found });
            }
            Ok(_) => {}
        }
    }
    Ok(())
}

fn size(path: &Path) -> io::Result<u64> {
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let mut file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    file.seek(SeekFrom::End(0))
}

fn replace<T: Clone>(saved: &mut T, asked: &Option<T>) {
    if let Some(asked) = asked {
        saved.clone_from(asked);
    }
}

fn differs(
    what: &'static str,
    flag: &'static str,
    saved: impl Display,
    asked: impl Display,
) -> OverrideError {
    Differs { what, flag, saved: saved.to_string(), asked: asked.to_string() }.into()
}

fn unknown(what: &'static str, flag: &'static str, id: &str, known: &[String]) -> OverrideError {
    let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
    OverrideError::Unknown { what, flag, id: id.into(), known }
}
