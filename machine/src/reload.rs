//! Loading the kernel again for a reset, on a thread that may wait for its files.
//!
//! The kernel is loaded into separate memory, which no guest sees; the main thread then copies what
//! was written, while the machine is paused.
use std::{
    io,
    ops::Range,
    sync::{Arc, atomic::AtomicU64},
};

use config::{BootConfig, MachineConfig, places::VirtioSlot};
use devices::Memory;
use vm_memory::GuestAddress;

use crate::{
    Machine,
    boot::{self, BootError, Entry, Platform, source::Reading},
    layout,
    memory::{self, MemoryError, image},
    slots::Slots,
};

/// Bytes copied at a time.
const CHUNK: usize = 1 << 20;

/// What a kernel needs to know of its machine, and where its files are.
#[derive(Debug, Clone)]
pub(crate) struct BootPlan {
    boot: BootConfig,
    cpu_ids: Vec<u8>,
    slots: Vec<VirtioSlot>,
    serial: bool,
}

impl BootPlan {
    /// For the machine that `config` describes, with these slots and vCPUs.
    pub(crate) fn new(config: &MachineConfig, slots: &Slots, cpu_ids: &[u8]) -> Self {
        Self {
            boot: config.boot.clone(),
            cpu_ids: cpu_ids.to_vec(),
            slots: slots.boot_list(),
            serial: config.serial.is_some(),
        }
    }

    /// Load the kernel into guest memory, and the boot data that describe this machine.
    pub(crate) fn load(&self, memory: &Memory, reading: Reading<'_>) -> Result<Entry, BootError> {
        let platform = Platform {
            cpu_ids: &self.cpu_ids,
            slots: &self.slots,
            serial: self.serial,
            vmgenid: Some(GuestAddress(layout::GENERATION_ID)),
        };
        boot::load_reading(memory, &self.boot, &platform, reading)
    }
}

/// Why a kernel could not be loaded again.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// Its files have changed or cannot be read.
    #[error("cannot reload the kernel")]
    Boot(#[from] BootError),
    /// The host has no memory to load it into.
    #[error("cannot reload the kernel: there is no room for it")]
    Memory(#[from] MemoryError),
    /// The host does not report which pages were written.
    #[error("cannot reload the kernel: the host does not report its location (/proc/self/pagemap)")]
    Used(#[source] io::Error),
}

/// A loaded kernel, for [`Machine::reset`].
pub struct Reloaded {
    pub(crate) entry: Entry,
    memory: Memory,
    used: Vec<Range<u64>>,
}

impl Reloaded {
    /// Copy it into `memory`, which has the same size and is zero.
    pub(crate) fn copy_to(&self, memory: &Memory) -> io::Result<()> {
        let mut buffer = vec![0; CHUNK];
        for range in &self.used {
            for at in range.clone().step_by(CHUNK) {
                let left = usize::try_from(range.end - at).unwrap_or(CHUNK);
                let (piece, _) = buffer.split_at_mut(left.min(CHUNK));
                image::read(&self.memory, at, piece)?;
                image::write(memory, at, piece)?;
            }
        }
        Ok(())
    }
}

impl Machine {
    /// Load the kernel again, on a thread that may wait for storage: the machine may run meanwhile
    /// and is not touched. `read` counts the starts and ends of calls that may wait: it is odd
    /// during one.
    pub fn reload(
        &self,
        read: Arc<AtomicU64>,
    ) -> impl FnOnce() -> Result<Reloaded, ReloadError> + Send + use<> {
        let plan = BootPlan::new(&self.config, &self.slots, &self.cpu_ids);
        let size = self.config.memory.size;
        move || {
            let memory = memory::addresses(size)?;
            let entry = plan.load(&memory, Reading::Counted(&read))?;
            let used = image::used(&memory, &[]).map_err(ReloadError::Used)?;
            Ok(Reloaded { entry, memory, used })
        }
    }
}
