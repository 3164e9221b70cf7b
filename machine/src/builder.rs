//! From configuration to machine.
use std::{io, sync::Arc, thread};

use devices::{
    Memory,
    backend::{char::CharError, disk::DiskError, net::tap::TapError},
    bus::BusBuilder,
    virtio::{
        VirtioDevice, blk,
        console::Console,
        net,
        rng::{Rng, RngError},
    },
    worker::IoThread,
};

use vm_memory::MmapRegion;

use crate::{
    Machine,
    backends::{self, Backends},
    boot::{self, BootError, Platform},
    config::{Aio, MachineConfig},
    event::{Event, Report, Told},
    io_thread,
    kvm::{
        self, KvmError, Vm, cpuid, entry, state,
        vcpu::{Buses, KvmCpu},
    },
    legacy::{self, Legacy, LegacyError},
    memory::{self, MemoryError},
    slots::{DISKS, NICS, SlotError, Slots},
    vcpu::Handle,
};

/// Descriptors a queue of a slot that waits for hot-plug.
const EMPTY_QUEUE_SIZE: u16 = 256;

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum BuildError {
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Legacy(#[from] LegacyError),
    #[error(transparent)]
    Slot(#[from] SlotError),
    #[error("disk {id}")]
    Disk { id: String, source: DiskError },
    #[error("disk {id}")]
    DiskSettings { id: String, source: blk::SettingsError },
    #[error("NIC {id}")]
    Tap { id: String, source: TapError },
    #[error("NIC {id}")]
    NicSettings { id: String, source: net::PlugError },
    #[error("console {id}")]
    Console { id: String, source: CharError },
    #[error("rng {id}")]
    Rng { id: String, source: RngError },
    #[error("{what} {id} names the I/O thread {iothread}, which does not exist")]
    NoIoThread { what: &'static str, id: String, iothread: String },
    #[error("{count} disks; a machine has at most {DISKS}")]
    TooManyDisks { count: usize },
    #[error("{count} NICs; a machine has at most {NICS}")]
    TooManyNics { count: usize },
    #[error("this topology needs APIC ids above 254: use fewer sockets or powers of two")]
    ApicIds,
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    #[error("cannot make the register window")]
    Window(#[source] io::Error),
}

impl Machine {
    /// Build the machine that `config` describes; it stands still until [`Machine::resume`].
    ///
    /// # Errors
    /// When the host or a file does not give what the configuration asks for.
    pub fn new(config: &MachineConfig, report: Report) -> Result<Self, BuildError> {
        if config.disks.len() > DISKS {
            return Err(BuildError::TooManyDisks { count: config.disks.len() });
        }
        if config.nics.len() > NICS {
            return Err(BuildError::TooManyNics { count: config.nics.len() });
        }
        let apic_ids = (0..config.cpus)
            .map(|i| u8::try_from(cpuid::apic_id(&config.topology, i)).ok().filter(|id| *id < 255))
            .collect::<Option<Vec<u8>>>()
            .ok_or(BuildError::ApicIds)?;

        let kvm = kvm::open()?;
        let max = kvm.get_max_vcpus();
        if usize::from(config.cpus) > max {
            return Err(KvmError::TooManyCpus { cpus: config.cpus, max }.into());
        }
        let memory = memory::allocate(&config.memory)?;
        let extra = usize::from(config.console.is_some()) + usize::from(config.rng.is_some());
        let window = Slots::window(DISKS + NICS + extra).map_err(BuildError::Window)?;
        let vm = Vm::new(&kvm, &memory, &window)?;
        let io_threads = start_threads(&config.iothreads).map_err(BuildError::Thread)?;
        // Beside each other: what the kernel does for vCPUs, and what opens and reads files.
        let (fds, parts) = thread::scope(|scope| {
            let fds = scope.spawn(|| vm.create_vcpus(&kvm, &apic_ids, &config.topology));
            let parts = Parts::new(config, &vm, &memory, window, &io_threads, &apic_ids, &report);
            (fds.join(), parts)
        });
        let fds = fds.map_err(|_| BuildError::Thread(io::Error::other("it has panicked")))??;
        let Parts { legacy, slots, buses, chardevs, boot } = parts?;
        if let Some(first) = fds.first() {
            entry::set(first, &boot.registers)?;
        }
        let msr_list = Arc::new(state::msr_list(&kvm)?);
        let cpu = |fd| KvmCpu::new(fd, buses.clone(), msr_list.clone());
        let vcpus = fds
            .into_iter()
            .map(cpu)
            .enumerate()
            .map(|(index, cpu)| {
                let report = report.clone();
                Handle::spawn(index, cpu, move |index, why| report(Event::Vcpu(index, why)))
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
            buses,
            msr_list,
            memory,
            config: config.clone(),
            apic_ids,
            parked: None,
            chardevs,
            backends: Backends::new(config),
        })
    }
}

/// What is made beside the vCPUs.
struct Parts {
    legacy: Legacy,
    slots: Slots,
    buses: Buses,
    chardevs: Vec<(String, String)>,
    boot: boot::Entry,
}

impl Parts {
    /// The devices, on their buses, and the kernel in guest memory.
    fn new(
        config: &MachineConfig,
        vm: &Vm,
        memory: &Memory,
        window: Arc<MmapRegion>,
        io_threads: &[(String, Arc<io_thread::Handle>)],
        apic_ids: &[u8],
        report: &Report,
    ) -> Result<Self, BuildError> {
        let threads = Threads(io_threads);

        let (mut pio, mut mmio) = (BusBuilder::default(), BusBuilder::default());
        let mut chardevs = Vec::new();
        let default = threads.find("", "", None)?;
        let power = Arc::default();
        let (legacy, serial) = Legacy::new(config, &mut pio, &default, &power, report)?;
        chardevs.extend(serial.map(|name| ("serial0".to_owned(), name)));
        let mut slots =
            Slots::new(window, memory.clone()).map_err(|e| BuildError::Slot(e.into()))?;
        let mut add = |device: Box<dyn VirtioDevice>, thread| {
            slots.add(&mut mmio, device, thread).map_err(BuildError::Slot)
        };
        for slot in 0..DISKS {
            let disk = config.disks.get(slot);
            let thread = threads.find_for("disk", disk.map(|d| (&d.id, &d.iothread)))?;
            add(Box::new(block(slot, disk, report)?), thread)?;
        }
        for slot in 0..NICS {
            let nic = config.nics.get(slot);
            let thread = threads.find_for("NIC", nic.map(|n| (&n.id, &n.iothread)))?;
            add(Box::new(interface(slot, nic)?), thread)?;
        }
        if let Some(console) = &config.console {
            let char = legacy::open(&console.backend, report)
                .map_err(|source| BuildError::Console { id: console.id.clone(), source })?;
            chardevs.push((console.id.clone(), char.name.clone()));
            let thread = threads.find_for("console", Some((&console.id, &console.iothread)))?;
            add(Box::new(Console::new(console.id.clone(), char)), thread)?;
        }
        if let Some(rng) = &config.rng {
            let device = Rng::new(rng.id.clone(), &rng.path, rng.bps)
                .map_err(|source| BuildError::Rng { id: rng.id.clone(), source })?;
            add(Box::new(device), default.clone())?;
        }

        let platform = Platform {
            apic_ids,
            slots: &slots.boot_list(),
            serial: config.serial.is_some(),
            vmgenid: None,
        };
        let boot = boot::load(memory, &config.boot, &platform)?;
        let buses = Buses { pio: pio.freeze(), mmio: mmio.freeze(), power };
        legacy.bind(vm)?;
        slots.bind(vm)?;
        Ok(Self { legacy, slots, buses, chardevs, boot })
    }
}

/// The default I/O thread first, then the configured ones.
fn start_threads(ids: &[String]) -> io::Result<Vec<(String, Arc<io_thread::Handle>)>> {
    std::iter::once(&"io0".to_owned())
        .chain(ids)
        .map(|id| Ok((id.clone(), Arc::new(io_thread::Handle::spawn(id)?))))
        .collect()
}

struct Threads<'a>(&'a [(String, Arc<io_thread::Handle>)]);

impl Threads<'_> {
    fn find_for(
        &self,
        what: &'static str,
        owner: Option<(&String, &Option<String>)>,
    ) -> Result<Arc<dyn IoThread>, BuildError> {
        match owner {
            Some((id, Some(iothread))) => self.find(what, id, Some(iothread)),
            _ => self.find(what, "", None),
        }
    }

    fn find(
        &self,
        what: &'static str,
        id: &str,
        iothread: Option<&str>,
    ) -> Result<Arc<dyn IoThread>, BuildError> {
        let found = match iothread {
            None => self.0.first(),
            Some(name) => self.0.iter().skip(1).find(|(id, _)| id == name),
        };
        found.map(|(_, thread)| thread.clone() as Arc<dyn IoThread>).ok_or_else(|| {
            let iothread = iothread.unwrap_or_default().to_owned();
            BuildError::NoIoThread { what, id: id.into(), iothread }
        })
    }
}

fn block(
    slot: usize,
    disk: Option<&crate::config::DiskConfig>,
    report: &Report,
) -> Result<blk::Block, BuildError> {
    let report = report.clone();
    let told = Told::default();
    let on_error: blk::OnError = Arc::new(move |id, error, write| {
        let Some(told) = told.begin() else { return };
        let error = io::Error::new(error.kind(), error.to_string());
        report(Event::DiskError { id: id.into(), write, error, told });
    });
    let mut settings =
        blk::Settings { queues: 1, queue_size: EMPTY_QUEUE_SIZE, on_error: Some(on_error) };
    let Some(config) = disk else {
        return blk::Block::new(&format!("disk{slot}"), settings, None)
            .map_err(|source| BuildError::DiskSettings { id: format!("disk{slot}"), source });
    };
    settings.queues = config.queues;
    settings.queue_size = config.queue_size;
    let drive = backends::drive(config)
        .map_err(|source| BuildError::Disk { id: config.id.clone(), source })?;
    blk::Block::new(&config.id, settings, Some(drive))
        .map_err(|source| BuildError::DiskSettings { id: config.id.clone(), source })
}

fn interface(slot: usize, nic: Option<&crate::config::NicConfig>) -> Result<net::Net, BuildError> {
    let Some(config) = nic else {
        let id = format!("nic{slot}");
        let settings =
            net::NetSettings { queue_pairs: 1, queue_size: EMPTY_QUEUE_SIZE, ..Default::default() };
        return net::Net::new(id.clone(), settings, None)
            .map_err(|source| BuildError::NicSettings { id, source });
    };
    let id = config.id.clone();
    let tap = backends::tap(config).map_err(|source| BuildError::Tap { id: id.clone(), source })?;
    let settings = net::NetSettings {
        mac: config.mac,
        queue_pairs: config.queue_pairs,
        queue_size: config.queue_size,
        pps: config.pps,
        bps: config.bps,
    };
    net::Net::new(id.clone(), settings, Some(tap))
        .map_err(|source| BuildError::NicSettings { id, source })
}

impl From<Aio> for devices::backend::disk::Aio {
    fn from(aio: Aio) -> Self {
        match aio {
            Aio::Auto => Self::Auto,
            Aio::IoUring => Self::IoUring,
            Aio::Off => Self::Off,
        }
    }
}
