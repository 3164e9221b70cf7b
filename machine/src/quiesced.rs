//! A machine that is paused as a whole: only then can its state be read and replaced.
use std::{io, ops::Range, sync::Arc};

use config::places::DISK;
use devices::{Memory, state::StateError};
use state::{Section, Sections, chips as saved, cpu};

use crate::{
    Machine, RunError,
    arch::{ChipState, Clock, CpuFeatures, CpuModel, VcpuError, VcpuState, host_ticks},
    dry_restore::restore_devices,
    kvm::KvmError,
    machine::Parked,
    memory::{image, staging::Staging},
    spot_check::SpotChecks,
    vcpu::{self, Answer, Gone},
};

/// The whole state of a machine but its configuration and its memory. Plain data.
#[derive(Clone)]
pub struct MachineState {
    /// The CPU features that its guest relies on.
    pub cpu: CpuModel,
    /// vCPUs, in order.
    pub vcpus: Vec<VcpuState>,
    /// Interrupt controllers and timer.
    pub chips: ChipState,
    /// The guest's paravirtual clock when it was stopped.
    pub clock: Clock,
    /// All devices. Those in slots are identified by the slot's id, others by their own.
    pub devices: Vec<Section>,
}

impl From<MachineState> for Sections {
    fn from(state: MachineState) -> Self {
        let MachineState { cpu, vcpus, chips, clock, devices } = state;
        let Clock { nanoseconds, date } = clock;
        Self {
            cpu: cpu.into(),
            vcpus: vcpus.into_iter().map(cpu::Vcpu::from).collect(),
            chips: chips.into(),
            clock: saved::Clock { nanoseconds, date },
            devices,
        }
    }
}

impl TryFrom<Sections> for MachineState {
    type Error = RestoreError;

    fn try_from(sections: Sections) -> Result<Self, RestoreError> {
        let Sections { cpu, vcpus, chips, clock, devices } = sections;
        let cpu = CpuModel::from(&cpu);
        // Checks that KVM takes that many.
        CpuFeatures::try_from(&cpu)?;
        let vcpu = |(index, vcpu): (usize, cpu::Vcpu)| {
            vcpu.try_into().map_err(|source| RestoreError::VcpuForm { index, source })
        };
        let saved::Clock { nanoseconds, date } = clock;
        Ok(Self {
            cpu,
            vcpus: vcpus.into_iter().enumerate().map(vcpu).collect::<Result<_, _>>()?,
            chips: chips.into(),
            clock: Clock { nanoseconds, date },
            devices,
        })
    }
}

impl Pages {
    /// The ranges, ascending.
    pub fn ranges(&self) -> Vec<Range<u64>> {
        match self {
            Self::Staged(staging) => staging.ranges(),
            Self::InPlace(ranges) => ranges.clone(),
        }
    }

    /// Bytes that are copied aside.
    pub fn copied(&self) -> u64 {
        match self {
            Self::Staged(staging) => staging.bytes(),
            Self::InPlace(_) => 0,
        }
    }
}

/// A machine at one moment: its state, and the memory that belongs to it.
pub struct Epoch {
    /// The whole state but memory.
    pub state: MachineState,
    /// The memory.
    pub pages: Pages,
    /// To be added to the state once they are made.
    pub spot_checks: SpotChecks,
}

/// Memory of an [`Epoch`].
#[derive(Debug)]
pub enum Pages {
    /// Copied aside: the machine may run again.
    Staged(Staging),
    /// Still in guest memory, in these ranges: the machine must stay paused until they have been
    /// copied.
    InPlace(Vec<Range<u64>>),
}

/// Why the state could not be read.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the error messages describe them")]
pub enum SaveError {
    #[error("cannot save device {id}")]
    Device { id: String, source: StateError },
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Gone(#[from] Gone),
    #[error("cannot copy guest memory")]
    Staging(#[source] io::Error),
}

/// Why a state could not be restored.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the error messages describe them")]
pub enum RestoreError {
    #[error("the saved state has {saved} {what}, its configuration {configured}")]
    Count { what: &'static str, saved: usize, configured: usize },
    #[error("cannot restore vCPU {index}")]
    Vcpu { index: usize, source: KvmError },
    #[error("cannot restore vCPU {index}")]
    VcpuForm { index: usize, source: VcpuError },
    #[error(transparent)]
    Cpu(#[from] KvmError),
    #[error("cannot restore {id}")]
    Device { id: String, source: StateError },
    #[error("the saved state has no section for {id}")]
    NoSection { id: String },
    #[error("the saved machine has no device for its section {name:?}")]
    NoDevice { name: String },
    #[error("cannot restore the interrupt controllers and the timer")]
    Chips(#[source] KvmError),
    #[error("cannot restore the guest's clock")]
    Clock(#[source] KvmError),
    #[error(
        "clock=realtime: the saved state, of an older version, does not say when it was saved; \
         leave clock=realtime out, and the guest's clock resumes at the time of the save"
    )]
    NoDate,
    #[error(transparent)]
    Gone(#[from] Gone),
}

/// Proof that all vCPUs are parked and all devices are quiet, with no request in flight.
pub struct Quiesced<'m>(&'m mut Machine);

impl Machine {
    /// Pause everything, as [`Machine::pause`] does, and give access to the state.
    ///
    /// # Errors
    /// As [`Machine::pause`].
    pub fn quiesced(&mut self) -> Result<Quiesced<'_>, RunError> {
        self.pause()?;
        Ok(Quiesced(self))
    }

    /// Query what takes long and does not change, before the machine is stopped to be saved.
    ///
    /// # Errors
    /// When KVM does not report it.
    pub fn prepare_to_save(&mut self) -> Result<(), KvmError> {
        if self.cpu_model.is_none() {
            self.cpu_model = Some(self.find_cpu_model()?);
        }
        Ok(())
    }

    /// The CPU model that its guest relies on, in saved form, once [`Machine::prepare_to_save`] was
    /// called.
    pub fn cpu(&self) -> Option<cpu::Cpu> {
        self.cpu_model.clone().map(cpu::Cpu::from)
    }

    /// As the boot vCPU reports it. Asking KVM for it takes milliseconds on some hosts.
    fn find_cpu_model(&self) -> Result<CpuModel, KvmError> {
        if let Some(seen) = &self.seen {
            return Ok(seen.model());
        }
        let first = self.cpu_ids.first().copied().unwrap_or(0);
        let here = CpuFeatures::supported(&self.kvm)?;
        Ok(here.of_vcpu(&self.kvm, first, &self.config.topology).model())
    }

    /// The spot checks of its block devices, while no request is in flight.
    fn spot_checks(&self, id: u128) -> SpotChecks {
        let each = self.backends.block_devices().enumerate().filter_map(|(slot, device)| {
            let check = device.lock().device().disk()?.spot_check(id)?;
            Some((format!("{DISK}{slot}"), check))
        });
        SpotChecks(each.collect())
    }

    /// Its memory.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Ranges of guest memory that are not zero although they may not have been touched: see
    /// [`image::used`].
    pub fn filled(&self) -> Arc<[Range<u64>]> {
        self.filled.clone()
    }
}

impl Machine {
    /// Read the whole state but memory, while all vCPUs and devices are parked.
    pub(crate) fn read_state(&self) -> Result<MachineState, SaveError> {
        self.answered_state(self.ask_state(Vec::new())?)
    }

    /// Read the state of devices and chips, and ask the vCPUs' threads for theirs, unless these are
    /// the `vcpus` that were asked already.
    pub(crate) fn ask_state(&self, mut vcpus: Vec<AskedVcpu>) -> Result<AskedState, SaveError> {
        // Devices before chips and vCPUs: interrupts that they raised while becoming quiet are in
        // those.
        let devices = self
            .legacy
            .devices()
            .map(|device| (None, device))
            .chain(self.slots.devices().map(|(id, device)| (Some(id), device)))
            .map(|(slot, device)| {
                let device = device.lock();
                let failed = |source| SaveError::Device { id: device.id().into(), source };
                let section = device.save().map_err(failed)?;
                // A slot's section has the slot's id, whichever device is in it.
                let id = slot.map_or_else(|| section.id.clone(), str::to_owned);
                Ok(Section { id, ..section })
            })
            .collect::<Result<_, SaveError>>()?;
        let chips = ChipState::save(&self.vm)?;
        if vcpus.is_empty() {
            vcpus.extend(self.vcpus.iter().map(vcpu::Handle::save));
        }
        Ok(AskedState { devices, chips, vcpus })
    }

    /// The whole state, once the vCPUs' threads have answered.
    pub(crate) fn answered_state(&self, asked: AskedState) -> Result<MachineState, SaveError> {
        let AskedState { devices, chips, vcpus: answers } = asked;
        let mut vcpus = Vec::with_capacity(answers.len());
        for answer in answers {
            let mut state = answer.wait()??;
            if let Some(parked) = &self.parked {
                state.hold_back(parked.ticks);
            }
            vcpus.push(state);
        }
        let clock = match &self.parked {
            Some(parked) => parked.clock,
            None => self.vm.clock()?,
        };
        let cpu = match &self.cpu_model {
            Some(model) => model.clone(),
            None => self.find_cpu_model()?,
        };
        Ok(MachineState { cpu, vcpus, chips, clock, devices })
    }
}

/// A state that is being read.
pub(crate) struct AskedState {
    devices: Vec<Section>,
    chips: ChipState,
    vcpus: Vec<AskedVcpu>,
}

/// The state of a vCPU that its thread reads.
pub(crate) type AskedVcpu = Answer<Result<VcpuState, KvmError>>;

impl Quiesced<'_> {
    /// Read the whole state but memory.
    ///
    /// # Errors
    /// When a device or KVM cannot report its state.
    pub fn save(&self) -> Result<MachineState, SaveError> {
        self.0.read_state()
    }

    /// Capture the machine's current state for the save `id`, and `dirty`, ascending ranges of its
    /// memory. They are copied into `staging` if there is one and they fit; otherwise they stay in
    /// guest memory, and the machine must stay paused until they have been copied. This is the only
    /// step of a save for which the guest has to be paused.
    ///
    /// # Errors
    /// As [`Quiesced::save`]; when memory cannot be copied.
    pub fn capture(
        &self,
        id: u128,
        dirty: Vec<Range<u64>>,
        staging: Option<Staging>,
    ) -> Result<Epoch, SaveError> {
        let pages = match staging {
            Some(mut staging) if Staging::takes(&dirty) => {
                staging.fill(&self.0.memory, &dirty).map_err(SaveError::Staging)?;
                Pages::Staged(staging)
            }
            _ => Pages::InPlace(dirty),
        };
        Ok(Epoch { state: self.save()?, pages, spot_checks: self.0.spot_checks(id) })
    }

    /// Replace the whole state but memory, whose contents must already match `state`. With
    /// `clock_realtime`, kvm-clock continues as if it had not been stopped since the save.
    ///
    /// # Errors
    /// When it does not fit this machine; the machine is then unusable.
    pub fn restore(
        &mut self,
        state: &MachineState,
        clock_realtime: bool,
    ) -> Result<(), RestoreError> {
        let machine = &mut *self.0;
        let count = |what, saved, configured| match saved == configured {
            true => Ok(()),
            false => Err(RestoreError::Count { what, saved, configured }),
        };
        count("vCPUs", state.vcpus.len(), machine.vcpus.len())?;
        if clock_realtime && state.clock.date.is_none() {
            return Err(RestoreError::NoDate);
        }
        state.chips.restore(&machine.vm).map_err(RestoreError::Chips)?;
        // Before the vCPUs: setting their registers makes KVM write the wall clock, the time at
        // which this clock showed 0, into guest memory.
        machine.vm.set_clock(state.clock, clock_realtime).map_err(RestoreError::Clock)?;
        let each = machine.vcpus.iter().zip(state.vcpus.iter().cloned());
        let answers: Vec<_> = each.map(|(vcpu, state)| vcpu.restore(state)).collect();
        for (index, answer) in answers.into_iter().enumerate() {
            answer.wait()?.map_err(|source| RestoreError::Vcpu { index, source })?;
        }
        // Its clocks are stopped from now on, at the values of the save.
        let (ticks, clock) = (host_ticks(), state.clock);
        machine.parked = Some(Parked { ticks, clock, advance: clock_realtime, runs_since: None });
        restore_devices(&machine.legacy, &machine.slots, &state.devices)
    }

    /// The ranges of guest memory that may not be zero, as offsets in the memory file.
    ///
    /// # Errors
    /// When the kernel does not report them.
    pub fn used_memory(&self) -> io::Result<Vec<Range<u64>>> {
        image::used(&self.0.memory, &self.0.filled)
    }
}
