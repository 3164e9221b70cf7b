//! All reasons why a machine cannot be built: a build ends at the first thing that this host
//! refuses, and the user wants to know all of them. Checked only after a failure, so it costs a
//! good start nothing.
use std::{
    fs::{self, File},
    path::PathBuf,
    sync::Arc,
};

use config::{CharBackend, MachineConfig, MemoryConfig, NicConfig, Occupancy, Part, Tap};

use devices::reclaim::Reclaim;

use crate::{
    backing::Backing,
    boot::{self, BootError},
    builder::{self, BuildError},
    event::{Callbacks, Report},
    kinds::NoReclaim,
    kvm::KvmError,
    legacy::LegacyError,
    memory::{self, MemoryError},
};

impl BuildError {
    /// The part of the configuration that it is about; `None` when of no single part.
    pub fn part(&self) -> Option<Part> {
        Some(match self {
            Self::Boot(BootError::Kernel { .. }) => Part::Kernel,
            Self::Boot(BootError::Initrd { .. }) => Part::Initrd,
            Self::Boot(BootError::Cmdline(_)) => Part::Cmdline,
            Self::Kvm(KvmError::TooManyCpus { .. }) | Self::Topology(_) => Part::Cpus,
            Self::Memory(MemoryError::TooMuch { .. } | MemoryError::Map { .. }) => Part::MemorySize,
            Self::Memory(
                MemoryError::Open { .. }
                | MemoryError::Kind { .. }
                | MemoryError::Contents { .. }
                | MemoryError::Grow { .. },
            ) => Part::MemoryPath,
            Self::Disk { id, .. } | Self::SameImage { id, .. } | Self::RootDisk { id, .. } => {
                Part::Disk(id.clone())
            }
            Self::Tap { id, .. } | Self::NicSettings { id, .. } => Part::Nic(id.clone()),
            Self::Legacy(LegacyError::Char(_)) => Part::Serial,
            Self::Device { kind, .. } => Part::Device(kind),
            _ => return None,
        })
    }
}

/// Every error that keeps `config` from becoming a machine, once [`crate::Machine::new`] has failed
/// with `first`, which is included. Each part is tried separately and released again.
pub fn preflight(config: &MachineConfig, first: BuildError) -> Vec<BuildError> {
    let _guard = CleanupGuard::before(config);
    let callbacks = Callbacks::from(Arc::new(|_| {}) as Report);
    let backing = Backing::Host { callbacks: &callbacks, held: true };
    let mut faults = Vec::new();
    if let Ok(memory) = memory::scratch(config.memory.size) {
        faults.extend(boot::preflight(&memory, &config.boot).into_iter().map(BuildError::from));
    }
    // What preallocation would have found is known from `first`.
    let memory = MemoryConfig { prealloc: false, ..config.memory.clone() };
    faults.extend(memory::allocate(&memory).err().map(BuildError::from));
    let occupied = Occupancy::at_start(config);
    for (slot, disk) in config.disks.iter().enumerate() {
        let error = backing.block(slot, Some(disk), Some(disk)).err();
        faults.extend(error.map(|e| builder::explained(e, slot, config, &occupied)));
    }
    let (part, mut first) = (first.part(), Some(first));
    let untouched = untouched(config, part.as_ref());
    for (slot, nic) in config.nics.iter().enumerate() {
        if matches!(nic.tap, Tap::Name(_)) || untouched.contains(nic) {
            faults.extend(backing.interface(slot, Some(nic), Some(nic)).err());
        } else if part == Some(Part::Nic(nic.id.to_string())) {
            faults.extend(first.take());
        }
    }
    if let Some(Err(error)) = config.serial.as_ref().map(|serial| backing.char(serial)) {
        faults.push(LegacyError::from(error).into());
    }
    let reclaim: Arc<dyn Reclaim> = Arc::new(NoReclaim);
    faults.extend(config.devices.iter().filter_map(|d| backing.device(d, &reclaim).err()));

    // Keep `first` as it was reported: a later try may have failed differently.
    if let Some(first) = first {
        match faults.iter_mut().find(|fault| part.is_some() && fault.part() == part) {
            Some(again) => *again = first,
            None => faults.insert(0, first),
        }
    }
    faults
}

/// The NICs whose inherited descriptors are still open after a build that failed at `part`: a build
/// takes them over NIC by NIC, after the disks.
fn untouched<'a>(config: &'a MachineConfig, part: Option<&Part>) -> &'a [NicConfig] {
    let failed = |nic: &NicConfig| part == Some(&Part::Nic(nic.id.to_string()));
    match part {
        Some(Part::Cpus | Part::MemorySize | Part::MemoryPath | Part::Serial | Part::Disk(_)) => {
            &config.nics
        }
        Some(Part::Nic(_)) => config.nics.split(failed).nth(1).unwrap_or_default(),
        _ => &[],
    }
}

/// Files that a build creates and that did not exist before; on drop, those still empty are
/// removed.
pub(crate) struct CleanupGuard(Vec<PathBuf>);

impl CleanupGuard {
    pub fn before(config: &MachineConfig) -> Self {
        let files = config.chars().filter_map(|backend| match backend {
            CharBackend::File(path) => Some(path),
            _ => None,
        });
        let files = files.chain(&config.memory.path);
        Self(files.filter(|path| fs::symlink_metadata(path).is_err()).cloned().collect())
    }

    pub fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for CleanupGuard {
    fn drop(&mut self) {
        for path in &self.0 {
            // A file that another program has put there in the meantime stays.
            let regular = fs::symlink_metadata(path).is_ok_and(|found| found.is_file());
            if regular && File::open(path).is_ok_and(|file| memory::is_zero(&file).unwrap_or(false))
            {
                let _ = fs::remove_file(path);
            }
        }
    }
}

#[cfg(test)]
mod tests;
