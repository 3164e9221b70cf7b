//! Builds a machine from what was received or read. None of this runs on the main thread: disks are
//! opened, and storage can hang.
use std::path::Path;

use config::{
    Description, Expect, MachineConfig,
    incoming::{Incoming, Mapping, Overrides},
};
use machine::{
    Callbacks, Helpers, Machine, Memory, Report, RunError, check_cpu, check_spots, check_taps,
    dry_restore,
    kvm::opening::Opening,
    memory::{self, origin::Contents},
};
use state::{Config, Sections, cpu::Cpu};

use super::{
    OverrideError, Progress, RestoreError, backing_memory,
    children::{Children, Wanted},
    dialogue::Voice,
    dry_run::DryRunError,
    load::load,
    overrides,
    receive::Received,
};
use crate::{lifecycle::Halt, replication::Promotion, seccomp::Confinement};

/// A machine that has arrived. It is stopped, and owns its disks and taps.
pub struct Arrived {
    /// The machine.
    pub machine: Machine,
    /// Why its guest cannot continue, if it cannot.
    pub halted: Option<Halt>,
    /// For answers to the source, which may wait for one. Dropped after the machine.
    pub answer: Voice,
    /// The failover by which it has arrived, if it is replicated.
    pub promotion: Option<Box<Promotion>>,
}

/// How an incoming machine is to be built here.
pub struct Assembly {
    overrides: Overrides,
    flags: MachineConfig,
    clock_realtime: bool,
    report: Report,
    confinement: Confinement,
    helpers: Helpers,
}

/// When a machine takes its disks and taps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taking {
    /// When it is built.
    AtOnce,
    /// By a call of [`take`]: a peer still has them.
    Later,
    /// As `Later`, or the machine is dropped, and its memory put back as it was.
    OrNot,
}

/// All parts of a saved machine.
struct Parts {
    config: Config,
    /// The description made from `config`, with disks that exist here.
    description: Description,
    sections: Sections,
    memory: Contents,
    children: Children,
    opening: Opening,
}

impl Assembly {
    /// An assembly as `incoming` specifies, with the disks, NICs and character devices of `flags`
    /// in place of the machine's own. The machine's threads are confined by `confinement`, and
    /// `helpers` help to build it.
    pub fn new(
        incoming: &Incoming,
        flags: &MachineConfig,
        report: Report,
        confinement: Confinement,
        helpers: Helpers,
    ) -> Self {
        let (overrides, clock_realtime) = (incoming.overrides.clone(), incoming.clock_realtime);
        Self { overrides, flags: flags.clone(), clock_realtime, report, confinement, helpers }
    }

    /// Begin to open KVM for it.
    pub fn open_kvm(&self) -> Opening {
        Opening::begin(&self.helpers)
    }

    /// Apply the overrides of the command line to `to`.
    ///
    /// # Errors
    /// When the guest would notice.
    pub fn apply_overrides(&self, to: &mut Description) -> Result<(), OverrideError> {
        overrides::apply(to, &self.overrides, &self.flags)
    }

    /// Build the machine that was saved into the directory `path`. Copies of disks that the save
    /// keeps are made in `place`.
    ///
    /// # Errors
    /// The first error found.
    pub fn saved_into(
        &self,
        path: &Path,
        mapping: Mapping,
        place: Option<&Path>,
        opening: Opening,
        progress: &Progress,
    ) -> Result<Arrived, RestoreError> {
        let loaded = load(path)?;
        let mut description = loaded.description;
        self.apply_overrides(&mut description)?;
        let given = |id: &str| self.flags.disks.iter().any(|disk| disk.id == id);
        let wanted = Wanted { save: path, place, given: &given, force: self.overrides.force };
        let (config, sections) = (loaded.state.config, loaded.state.sections);
        let children = Children::make(&config, &mut description, &wanted, progress)?;
        overrides::check_disks(&description)?;
        let wanted = &description.config.memory;
        let memory = backing_memory::memory(
            loaded.memory,
            wanted,
            mapping,
            &self.report,
            &self.confinement,
        )?;
        let parts = Parts { config, description, sections, memory, children, opening };
        let (machine, halted) = self.build(parts, Taking::AtOnce)?;
        Ok(Arrived { machine, halted, answer: Voice::silent(), promotion: None })
    }

    /// Allocate memory for the machine `description` that a peer offers, if it can run here with
    /// the disks and taps of this host. No disk or tap is taken yet, as the peer may still hold
    /// them.
    ///
    /// # Errors
    /// What this host lacks for it.
    pub fn make_room(
        &self,
        description: &Description,
        cpu: Option<&Cpu>,
    ) -> Result<Memory, RestoreError> {
        overrides::check_disks(description)?;
        check_taps(description)?;
        if let Some(cpu) = cpu {
            check_cpu(description, cpu)?;
        }
        Ok(memory::allocate(&description.config.memory)?)
    }

    /// Build the machine that a peer has sent.
    ///
    /// # Errors
    /// The first error found.
    pub fn received(
        &self,
        received: Received,
        opening: Opening,
        taking: Taking,
    ) -> Result<(Machine, Option<Halt>), RestoreError> {
        let mut description = Description::try_from(&received.config).map_err(DryRunError::from)?;
        self.apply_overrides(&mut description)?;
        self.build_received(received, description, opening, taking)
    }

    /// As [`Assembly::received`], from an epoch of a primary that still runs. The images of its disks
    /// here are at that epoch.
    ///
    /// # Errors
    /// The first error found.
    pub fn replica(
        &self,
        received: Received,
        opening: Opening,
    ) -> Result<(Machine, Option<Halt>), RestoreError> {
        let mut description = Description::try_from(&received.config).map_err(DryRunError::from)?;
        self.apply_overrides(&mut description)?;
        for disk in description.occupied.disks.iter_mut().flatten() {
            (disk.expect, disk.probe) = (Expect::Any, false);
        }
        self.build_received(received, description, opening, Taking::OrNot)
    }

    fn build_received(
        &self,
        received: Received,
        description: Description,
        opening: Opening,
        taking: Taking,
    ) -> Result<(Machine, Option<Halt>), RestoreError> {
        let Received { config, sections, memory } = received;
        overrides::check_disks(&description)?;
        let (memory, children) = (memory.into(), Children::default());
        let parts = Parts { config, description, sections, memory, children, opening };
        self.build(parts, taking)
    }

    fn build(&self, parts: Parts, taking: Taking) -> Result<(Machine, Option<Halt>), RestoreError> {
        let Parts { config, description, sections, memory, children, opening } = parts;
        let restorable = dry_restore(description, sections).map_err(DryRunError::from)?;
        let checked =
            check_spots(&restorable.description, config.id.into(), &restorable.state.devices);
        checked.map_err(OverrideError::from)?;
        let clock_realtime = self.clock_realtime;
        let (held, undo) = (taking == Taking::AtOnce, taking == Taking::OrNot);
        let saved = machine::Saved { restorable, opening, memory, clock_realtime, held, undo };
        let (report, start) = (self.report.clone(), self.confinement.thread_start());
        let helpers = self.helpers.clone();
        let machine = Machine::restored(saved, Callbacks { report, start, helpers })?;
        children.keep();
        Ok((machine, config.halted.map(Halt::from)))
    }
}

/// Take the disks and taps that the source has released.
///
/// # Errors
/// When another process has one.
pub fn take(machine: &mut Machine) -> Result<(), RestoreError> {
    machine.hold_backends().map_err(|e: RunError| RestoreError::Build(e.into()))
}
