//! What has come in is made into a machine here. Nothing of it runs on the main thread: disks are
//! opened, and storage can hang.
use std::path::Path;

use config::{
    Description, MachineConfig,
    incoming::{Incoming, Mapping, Overrides},
};
use machine::{
    Callbacks, Machine, Memory, Report, RunError, check_cpu, check_spots, check_taps, dry_restore,
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
use crate::{lifecycle::Halt, seccomp::Confinement};

/// A machine that has come in. It is stopped, and has what only one can have.
pub struct Arrived {
    /// The machine.
    pub machine: Machine,
    /// Why its guest cannot run on, if it cannot.
    pub halted: Option<Halt>,
    /// For the source, which may wait to hear that it is here. Dropped after the machine.
    pub answer: Voice,
}

/// How a machine is to come about here.
pub struct Assembly {
    overrides: Overrides,
    flags: MachineConfig,
    clock_realtime: bool,
    report: Report,
    confinement: Confinement,
}

/// All of a saved machine.
struct Parts {
    config: Config,
    /// What `config` is here, with disks that are there.
    description: Description,
    sections: Sections,
    memory: Contents,
    children: Children,
    opening: Opening,
}

impl Assembly {
    /// As `incoming` asks, with the disks, NICs and character devices of `flags` in place of its own. Its
    /// threads are confined by `confinement`.
    pub fn new(
        incoming: &Incoming,
        flags: &MachineConfig,
        report: Report,
        confinement: Confinement,
    ) -> Self {
        let (overrides, clock_realtime) = (incoming.overrides.clone(), incoming.clock_realtime);
        Self { overrides, flags: flags.clone(), clock_realtime, report, confinement }
    }

    /// Change `to` to what is wanted here.
    ///
    /// # Errors
    /// When the guest would notice.
    pub fn apply_overrides(&self, to: &mut Description) -> Result<(), OverrideError> {
        overrides::apply(to, &self.overrides, &self.flags)
    }

    /// The machine that was saved into the directory `path`. Its copies of disks that the save keeps are to
    /// lie in `place`.
    ///
    /// # Errors
    /// The first thing that is wrong.
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
        let (machine, halted) = self.build(parts, true)?;
        Ok(Arrived { machine, halted, answer: Voice::silent() })
    }

    /// Memory for the machine `description` that a peer offers, if it can run here with the disks and taps
    /// that are here. Nothing is taken from the peer, which may have them.
    ///
    /// # Errors
    /// What it lacks here.
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

    /// The machine that a peer has sent. Without `held` the peer still has its disks and taps, and
    /// [`take`] is to follow.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn received(
        &self,
        received: Received,
        opening: Opening,
        held: bool,
    ) -> Result<(Machine, Option<Halt>), RestoreError> {
        let Received { config, sections, memory } = received;
        let mut description = Description::try_from(&config).map_err(DryRunError::from)?;
        self.apply_overrides(&mut description)?;
        overrides::check_disks(&description)?;
        let (memory, children) = (memory.into(), Children::default());
        let parts = Parts { config, description, sections, memory, children, opening };
        self.build(parts, held)
    }

    fn build(&self, parts: Parts, held: bool) -> Result<(Machine, Option<Halt>), RestoreError> {
        let Parts { config, description, sections, memory, children, opening } = parts;
        let restorable = dry_restore(description, sections).map_err(DryRunError::from)?;
        let checked =
            check_spots(&restorable.description, config.id.into(), &restorable.state.devices);
        checked.map_err(OverrideError::from)?;
        let clock_realtime = self.clock_realtime;
        let saved = machine::Saved { restorable, opening, memory, clock_realtime, held };
        let (report, start) = (self.report.clone(), self.confinement.thread_start());
        let machine = Machine::restored(saved, Callbacks { report, start })?;
        children.keep();
        Ok((machine, config.halted.map(Halt::from)))
    }
}

/// Take the disks and taps that the source has let go of.
///
/// # Errors
/// When another process has one.
pub fn take(machine: &mut Machine) -> Result<(), RestoreError> {
    machine.hold_backends().map_err(|e: RunError| RestoreError::Build(e.into()))
}
