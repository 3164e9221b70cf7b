//! From configuration to machine.
mod error;

use std::{
    io, iter,
    path::PathBuf,
    sync::{Arc, mpsc},
};

use config::{
    Description, MachineConfig, Occupancy, Thp,
    places::{self, Place},
    slots::{SlotCounts, Wanted},
    topology,
    types::Id,
};
use devices::{
    Memory,
    backend::{char::CharSink, disk::DiskError},
    reclaim::Reclaim,
    threads::ThreadStart,
    virtio::{blk::Block, net::Net},
};

use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::MmapRegion;

pub use self::error::BuildError;
use crate::{
    Machine,
    arch::{Buses, BusesBuilder, CpuFeatures, VcpuFactory, VcpuState, entry},
    backends::{self, Backends},
    backing::Backing,
    balloon::Balloon,
    boot::{Entry, source::Reading},
    dry_restore::Restorable,
    event::{Callbacks, Event},
    fits,
    generation::GenerationId,
    io_thread,
    kinds::{Built, Kept},
    kvm::{
        self, KvmError, Vm,
        opening::{Opened, Opening},
    },
    legacy::{Legacy, Outside},
    memory::{self, dirty_logs::DirtyLogs, origin::Contents, reclaim::Reclaimer},
    preflight::CleanupGuard,
    reload::BootPlan,
    rest::Rest,
    slots::{Handle, Slots},
    undo::Undo,
    vcpu,
};

/// What a saved machine is built from.
pub struct Saved {
    /// Everything but its memory; the devices have been checked to restore from it.
    pub restorable: Restorable,
    /// The KVM that it is to run on.
    pub opening: Opening,
    /// Its memory with its contents.
    pub memory: Contents,
    /// Its kvm-clock continues as if it had not been stopped since the save.
    pub clock_realtime: bool,
    /// Its disks and taps are free. Otherwise another machine still has them: everything else is
    /// built and checked, and [`Machine::hold_backends`] takes them later.
    pub held: bool,
    /// [`Machine::unbuild`] is possible as long as it has not run.
    pub undo: bool,
}

/// How the guest starts.
enum Start {
    Boot,
    Resume(Box<Resume>),
}

/// What a guest that resumes needs.
struct Resume {
    opening: Opening,
    memory: Contents,
    /// The CPU features that the guest has seen.
    seen: CpuFeatures,
    /// The machine takes its disks and taps at once.
    held: bool,
    /// What is written to memory is logged from the beginning.
    logs: bool,
}

impl Machine {
    /// Build the machine that `config` describes; it is paused until [`Machine::resume`].
    ///
    /// # Errors
    /// When the host or a file does not provide what the configuration requires.
    pub fn new(config: &MachineConfig, callbacks: Callbacks) -> Result<Self, BuildError> {
        let guard = CleanupGuard::before(config);
        let (occupied, places) = (Occupancy::at_start(config), places::at_start(config));
        let ingredients = Ingredients { config: config.clone(), occupied, places };
        let built = Self::build(ingredients, Start::Boot, callbacks)?;
        guard.keep();
        Ok(built)
    }

    /// Build a machine from a saved state; it resumes from there with [`Machine::resume`].
    ///
    /// # Errors
    /// As [`Machine::new`]; when the state does not fit the configuration or this host.
    pub fn restored(saved: Saved, callbacks: Callbacks) -> Result<Self, BuildError> {
        let Saved { restorable, opening, memory, clock_realtime, held, undo } = saved;
        let Restorable { description, state } = restorable;
        let seen = CpuFeatures::try_from(&state.cpu)?;
        let undo = undo.then(|| Undo::before(&memory.memory, &state)).transpose();
        let undo = undo.map_err(BuildError::Undo)?;
        let resume = Resume { opening, memory, seen, held, logs: undo.is_some() };
        let start = Start::Resume(Box::new(resume));
        let mut machine = Self::build(description.into(), start, callbacks)?;
        machine.pause_new()?;
        machine.quiesced()?.restore(&state, clock_realtime)?;
        machine.tsc_khz = state.vcpus.first().map(VcpuState::tsc_khz);
        if let Some(undo) = undo {
            machine.built_with(undo)?;
        }
        // Before the guest runs, and after the interrupt controllers have their state.
        machine.legacy.generation_changed();
        Ok(machine)
    }

    fn build(
        ingredients: Ingredients,
        start: Start,
        callbacks: Callbacks,
    ) -> Result<Self, BuildError> {
        let Ingredients { config, occupied, places } = &ingredients;
        SlotCounts::try_from(Wanted::of(config, occupied))?;
        let cpu_ids = topology::cpu_ids(&config.topology, config.cpus)?;

        let boots = matches!(start, Start::Boot);
        let small = boots && is_small(config);
        let (kvm, fd, contents, seen, held, logs) = match start {
            Start::Boot => {
                let kvm = kvm::open()?;
                check_count(&kvm, config.cpus.get())?;
                let memory = match small {
                    true => memory::allocate_for_little(&config.memory)?,
                    false => memory::allocate(&config.memory)?,
                };
                (kvm, None, memory.into(), None, true, false)
            }
            Start::Resume(resume) => {
                let Resume { opening, memory, seen, held, logs } = *resume;
                let opened = opening.finish().map_err(BuildError::Thread)??;
                let Opened { kvm, vm, supported } = opened;
                fits::check_model(&kvm, &supported, config, &seen.model())?;
                check_count(&kvm, config.cpus.get())?;
                (kvm, Some(vm), memory, Some(seen), held, logs)
            }
        };
        let Contents { memory, filled, origin } = contents;
        let reclaimer = Arc::new(Reclaimer::new(&memory, &config.memory, origin));
        let window = Slots::window(places).map_err(BuildError::Window)?;
        let setting = Arc::new(Setting {
            ingredients,
            kvm,
            cpu_ids,
            memory,
            boots,
            held,
            logs,
            seen,
            window,
            reclaimer,
            callbacks,
        });
        // In parallel: this thread has KVM create the virtual machine and its vCPUs, while another
        // one asks KVM for the CPU features, builds the devices and loads the kernel.
        let (to_vcpus, features) = mpsc::channel();
        let (to_devices, created) = mpsc::channel();
        let shared = setting.clone();
        let helpers = &setting.callbacks.helpers;
        let devices = helpers.run(move || shared.devices(to_vcpus, created));
        let vm = setting.virtual_machine(fd, features, to_devices);
        let devices = devices.wait().map_err(BuildError::Thread)?;
        let (vm, fds) = vm?;
        // It has no vCPUs if the other thread has failed.
        let Devices { io_threads, parts, boot } = devices?;
        let setting = Arc::into_inner(setting).ok_or_else(still_shared)?;
        let Setting { ingredients, kvm, cpu_ids, memory, seen, reclaimer, callbacks, .. } = setting;
        let Ingredients { config, occupied, .. } = ingredients;
        let vm = Arc::into_inner(vm).ok_or_else(still_shared)?;
        if small {
            memory::populate(&memory, &config.memory)?;
        }
        let Parts { legacy, slots, buses, chardevs, outputs, disks, nics, balloon } = parts;
        if let (Some(first), Some(boot)) = (fds.first(), boot) {
            entry::set(first, &boot.registers)?;
        }
        let generation = GenerationId::random().map_err(BuildError::Random)?;
        generation.write(&memory)?;
        let vcpu_factory = VcpuFactory::new(&kvm, buses)?;
        let vcpus = fds
            .into_iter()
            .map(|fd| vcpu_factory.make(&vm, fd))
            .enumerate()
            .map(|(index, cpu)| {
                let report = callbacks.report.clone();
                vcpu::Handle::spawn(index, cpu, &callbacks.start, move |index, why| {
                    report(Event::Vcpu(index, why))
                })
            })
            .collect::<io::Result<Vec<_>>>()
            .map_err(BuildError::Thread)?;
        Ok(Self {
            vcpus,
            legacy,
            slots,
            io_threads,
            vm,
            kvm,
            vcpu_factory,
            memory,
            config,
            cpu_ids,
            parked: None,
            running: false,
            rest: Rest::default(),
            chardevs,
            outputs,
            backends: Backends::new(&occupied, disks, nics),
            balloon,
            generation,
            seen,
            cpu_model: None,
            tsc_khz: None,
            filled: filled.into(),
            reclaimer,
            dirty_logs: DirtyLogs::default(),
            logging: false,
            cleared: Vec::new(),
            disks_released: !held,
            undo: None,
        })
    }
}

/// What the parts of a machine are made with; two threads share it.
struct Setting {
    ingredients: Ingredients,
    kvm: Kvm,
    cpu_ids: Vec<u8>,
    memory: Memory,
    /// The guest boots.
    boots: bool,
    /// The machine takes its disks and taps at once.
    held: bool,
    logs: bool,
    /// The CPU features that the guest has seen.
    seen: Option<CpuFeatures>,
    window: Arc<MmapRegion>,
    reclaimer: Arc<Reclaimer>,
    callbacks: Callbacks,
}

/// Everything of a machine that is not KVM's.
struct Devices {
    io_threads: Vec<(String, Arc<io_thread::Handle>)>,
    parts: Parts,
    /// How the boot vCPU starts, if the guest is to boot.
    boot: Option<Entry>,
}

impl Setting {
    /// Create the virtual machine, or complete the empty one `fd`, and create its vCPUs when their
    /// `features` arrive; none if they never do. The virtual machine goes to `to_devices` as soon as
    /// devices can be bound to it.
    fn virtual_machine(
        &self,
        fd: Option<VmFd>,
        features: mpsc::Receiver<CpuFeatures>,
        to_devices: mpsc::Sender<Arc<Vm>>,
    ) -> Result<(Arc<Vm>, Vec<VcpuFd>), KvmError> {
        let fd = fd.map_or_else(|| kvm::create_vm(&self.kvm), Ok)?;
        let vm = Arc::new(Vm::new(&self.kvm, fd, &self.memory, &self.window, self.logs)?);
        // The thread waits for it, or has failed: its result shows that.
        let _ = to_devices.send(vm.clone());
        let topology = &self.ingredients.config.topology;
        let vcpus = match features.recv() {
            Ok(features) => vm.create_vcpus(&self.kvm, &self.cpu_ids, topology, &features)?,
            Err(mpsc::RecvError) => Vec::new(),
        };
        Ok((vm, vcpus))
    }

    /// Build the devices, load the kernel if the guest boots, and bind the devices to the virtual
    /// machine when it is `created`. First, the CPU features go to `to_vcpus`: those that the guest
    /// has seen, or else those of this host, which KVM takes long to report.
    fn devices(
        &self,
        to_vcpus: mpsc::Sender<CpuFeatures>,
        created: mpsc::Receiver<Arc<Vm>>,
    ) -> Result<Devices, BuildError> {
        let Self { kvm, cpu_ids, memory, boots, held, window, reclaimer, callbacks, .. } = self;
        let made_of = self.ingredients.made_of();
        let MadeOf { config, .. } = made_of;
        let features = match &self.seen {
            Some(features) => features.clone(),
            None => CpuFeatures::supported(kvm)?,
        };
        // The thread waits for them, or has failed: its result shows that.
        let _ = to_vcpus.send(features);
        let io_threads =
            start_threads(&config.iothreads, &callbacks.start).map_err(BuildError::Thread)?;
        let backing = Backing::Host { callbacks, held: *held };
        let reclaim: Arc<dyn Reclaim> = reclaimer.clone();
        let parts = Parts::new(&made_of, backing, memory, &reclaim, window.clone(), &io_threads)?;
        let load = || BootPlan::new(config, &parts.slots, cpu_ids).load(memory, Reading::AtStart);
        let boot = boots.then(load).transpose()?;
        if let Ok(vm) = created.recv() {
            parts.legacy.bind(&vm)?;
            parts.slots.bind(&vm)?;
        }
        Ok(Devices { io_threads, parts, boot })
    }
}

/// The other thread drops what it shares before it reports, so this does not happen.
fn still_shared() -> BuildError {
    BuildError::Thread(io::Error::other("another thread has not ended its part"))
}

/// Whether kernel and initrd are each smaller than a huge page, and huge pages are not requested.
fn is_small(config: &MachineConfig) -> bool {
    let MachineConfig { memory, boot, .. } = config;
    let small = |path: &PathBuf| path.metadata().is_ok_and(|f| f.len() < memory::HUGE_PAGE);
    let auto = memory.thp == Thp::Auto && !memory.prealloc;
    auto && small(&boot.kernel) && boot.initrd.as_ref().is_none_or(small)
}

fn check_count(kvm: &Kvm, cpus: u8) -> Result<(), KvmError> {
    let max = kvm.get_max_vcpus();
    if usize::from(cpus) > max { Err(KvmError::TooManyCpus { cpus, max }) } else { Ok(()) }
}

/// All devices, on their buses; not yet connected to KVM.
pub(crate) struct Parts {
    pub legacy: Legacy,
    pub slots: Slots,
    buses: Buses,
    chardevs: Vec<(String, String)>,
    outputs: Vec<CharSink>,
    disks: Vec<Handle<Block>>,
    nics: Vec<Handle<Net>>,
    balloon: Option<Balloon>,
}

/// What a machine is made from.
struct Ingredients {
    config: MachineConfig,
    occupied: Occupancy,
    places: Vec<Place>,
}

impl Ingredients {
    fn made_of(&self) -> MadeOf<'_> {
        let Self { config, occupied, places } = self;
        MadeOf { config, occupied, places }
    }
}

impl From<Description> for Ingredients {
    fn from(description: Description) -> Self {
        let Description { config, occupied, places, .. } = description;
        Self { config, occupied, places }
    }
}

/// The same, borrowed.
#[derive(Clone, Copy)]
pub(crate) struct MadeOf<'a> {
    pub config: &'a MachineConfig,
    /// What is in the slots now.
    pub occupied: &'a Occupancy,
    /// Where the slots are: those for disks, those for NICs, and those of all other devices.
    pub places: &'a [Place],
}

impl<'a> From<&'a Description> for MadeOf<'a> {
    fn from(description: &'a Description) -> Self {
        let Description { config, occupied, places, .. } = description;
        Self { config, occupied, places }
    }
}

/// I/O threads, which run device workers, by id; the first one is the default.
pub(crate) type IoThreads = [(String, Arc<io_thread::Handle>)];

impl Parts {
    /// Build them, with back-ends from `backing`.
    pub(crate) fn new(
        made_of: &MadeOf<'_>,
        backing: Backing<'_>,
        memory: &Memory,
        reclaim: &Arc<dyn Reclaim>,
        window: Arc<MmapRegion>,
        io_threads: &IoThreads,
    ) -> Result<Self, BuildError> {
        let MadeOf { config, occupied, places } = *made_of;
        let threads = Threads(io_threads);

        let mut buses = BusesBuilder::default();
        let (mut chardevs, mut outputs) = (Vec::new(), Vec::new());
        let (mut disks, mut nics, mut balloon) = (Vec::new(), Vec::new(), None);
        let default = threads.find("", "", None)?;
        let (legacy, serial) = Legacy::new(config, &mut buses, default.clone(), backing)?;
        if let Some(Outside { name, sink }) = serial {
            chardevs.push(("serial0".to_owned(), name));
            outputs.push(sink);
        }
        let mut slots = Slots::new(places.to_vec(), window, memory.clone())
            .map_err(|e| BuildError::Slot(e.into()))?;
        for slot in 0..config.slots.disks() {
            let shape = config.disks.get(slot);
            let disk = occupied.disks.get(slot).and_then(Option::as_ref);
            let thread = threads.find_for("disk", shape.map(|d| (&d.id, &d.iothread)))?;
            let block = backing
                .block(slot, shape, disk)
                .map_err(|e| explained(e, slot, config, occupied))?;
            disks.push(slots.add(&mut buses.mmio, Box::new(block), thread)?);
        }
        for slot in 0..config.slots.nics() {
            let shape = config.nics.get(slot);
            let nic = occupied.nics.get(slot).and_then(Option::as_ref);
            let thread = threads.find_for("NIC", shape.map(|n| (&n.id, &n.iothread)))?;
            let net = backing.interface(slot, shape, nic)?;
            nics.push(slots.add(&mut buses.mmio, Box::new(net), thread)?);
        }
        for config in &config.devices {
            let facts = config.facts();
            let thread = threads.find(facts.slot(), facts.id(), facts.iothread())?;
            let Built { device, kept } = backing.device(config, reclaim)?;
            let device = slots.add(&mut buses.mmio, device, thread)?;
            match kept {
                Kept::Nothing => {}
                Kept::Chars(label, Outside { name, sink }) => {
                    chardevs.push((label, name));
                    outputs.push(sink);
                }
                Kept::Balloon(control) => {
                    let ram = made_of.config.memory.size.bytes();
                    balloon = Some(Balloon::new(facts.id(), control, ram, device));
                }
            }
        }

        let buses = buses.freeze();
        Ok(Self { legacy, slots, buses, chardevs, outputs, disks, nics, balloon })
    }
}

/// The default I/O thread first, then the configured ones.
fn start_threads(
    ids: &[Id],
    start: &ThreadStart,
) -> io::Result<Vec<(String, Arc<io_thread::Handle>)>> {
    iter::once("io0")
        .chain(ids.iter().map(Id::as_str))
        .map(|id| Ok((id.to_owned(), Arc::new(io_thread::Handle::spawn(id, start)?))))
        .collect()
}

struct Threads<'a>(&'a IoThreads);

impl Threads<'_> {
    fn find_for(
        &self,
        what: &'static str,
        owner: Option<(&Id, &Option<Id>)>,
    ) -> Result<Arc<io_thread::Handle>, BuildError> {
        match owner {
            Some((id, Some(iothread))) => self.find(what, id, Some(iothread)),
            _ => self.find(what, "", None),
        }
    }

    fn find(
        &self,
        what: &'static str,
        id: &str,
        iothread: Option<&Id>,
    ) -> Result<Arc<io_thread::Handle>, BuildError> {
        let found = match iothread {
            None => self.0.first(),
            Some(name) => self.0.iter().skip(1).find(|(id, _)| *name == *id),
        };
        found.map(|(_, thread)| thread.clone()).ok_or_else(|| {
            let iothread = iothread.map_or_else(String::new, Id::to_string);
            BuildError::NoIoThread { what, id: id.into(), iothread }
        })
    }
}

/// Make `error` about the disk in slot `slot` more specific: the image may already be in use by an
/// earlier disk of this machine, and a missing image may be that of the root disk.
pub(crate) fn explained(
    error: BuildError,
    slot: usize,
    config: &MachineConfig,
    occupied: &Occupancy,
) -> BuildError {
    match error {
        BuildError::Disk { id, source: DiskError::InUse { path, holder } } => {
            let mut before = occupied.disks.iter().take(slot).flatten();
            match before.find(|disk| backends::same_file(&disk.path, &path)) {
                Some(disk) => BuildError::SameImage { id, other: disk.id.to_string(), path },
                None => BuildError::Disk { id, source: DiskError::InUse { path, holder } },
            }
        }
        BuildError::Disk { id, source: DiskError::Missing { path, .. } }
            if slot == 0 && config.boot.initrd.is_none() =>
        {
            BuildError::RootDisk { id, path }
        }
        other => other,
    }
}
