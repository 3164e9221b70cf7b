//! The first half of every restore: all checks of a saved machine that need no KVM, no host files
//! and none of its memory. A save runs them, too, before it is complete.
use std::sync::Arc;

use config::{Description, types::Id};
use devices::{reclaim::Reclaim, state::StateError};
use state::{Section, Sections};

use crate::{
    BuildError, MachineState, RestoreError,
    backing::Backing,
    builder::{MadeOf, Parts},
    io_thread,
    kinds::NoReclaim,
    legacy::Legacy,
    memory,
    slots::Slots,
};

/// A saved machine, checked device by device. [`Machine::restored`](crate::Machine::restored)
/// builds it.
pub struct Restorable {
    /// Its configuration and devices.
    pub description: Description,
    /// The state to restore.
    pub state: MachineState,
}

/// Build the devices of `description` without back-ends and load the state of each from `sections`.
///
/// # Errors
/// When one cannot be built or refuses its state, or when the parts do not belong together.
pub fn dry_restore(description: Description, sections: Sections) -> Result<Restorable, BuildError> {
    let state = MachineState::try_from(sections)?;
    let (saved, configured) = (state.vcpus.len(), usize::from(description.config.cpus.get()));
    if saved != configured {
        return Err(RestoreError::Count { what: "vCPUs", saved, configured }.into());
    }
    let made_of = MadeOf::from(&description);
    // Queues must lie in guest memory; its contents are not read.
    let memory = memory::addresses(made_of.config.memory.size)?;
    let window = Slots::window(made_of.places).map_err(BuildError::Window)?;
    let thread = Arc::new(io_thread::Handle::without_thread().map_err(BuildError::Thread)?);
    let ids = std::iter::once("io0").chain(made_of.config.iothreads.iter().map(Id::as_str));
    let threads: Vec<_> = ids.map(|id| (id.to_owned(), thread.clone())).collect();
    let backing = Backing::Nothing(&description.disk_sizes);
    let reclaim: Arc<dyn Reclaim> = Arc::new(NoReclaim);
    let parts = Parts::new(&made_of, backing, &memory, &reclaim, window, &threads)?;
    restore_devices(&parts.legacy, &parts.slots, &state.devices)?;
    Ok(Restorable { description, state })
}

/// Restore each device from the section with its id; every section must have its device.
pub(crate) fn restore_devices(
    legacy: &Legacy,
    slots: &Slots,
    sections: &[Section],
) -> Result<(), RestoreError> {
    let legacy = legacy.devices().map(|device| {
        let id = device.lock().id().to_owned();
        (id, device)
    });
    let slots = slots.devices().map(|(id, device)| (id.to_owned(), device));
    let mut left: Vec<&Section> = sections.iter().collect();
    for (id, device) in legacy.chain(slots) {
        let Some(at) = left.iter().position(|section| section.id == id) else {
            return Err(RestoreError::NoSection { id });
        };
        let section = left.swap_remove(at);
        let restored = match refuses(&id) {
            true => Err(StateError::Invalid("refused for a test")),
            false => device.lock().restore(section),
        };
        restored.map_err(|source| RestoreError::Device { id, source })?;
    }
    match left.first() {
        Some(section) => Err(RestoreError::NoDevice { name: section.name() }),
        None => Ok(()),
    }
}

/// Whether a test makes this device refuse every state: a file names it, which may change while the
/// monitor runs. In debug builds only.
fn refuses(id: &str) -> bool {
    let file = || std::env::var_os("STRATOVIRT_TEST_REFUSE");
    cfg!(debug_assertions)
        && file().is_some_and(|file| std::fs::read_to_string(file).is_ok_and(|named| named == id))
}
