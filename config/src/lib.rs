//! What a machine is to be: [`MachineConfig`], and the three ways to one, each checked where it
//! comes in. Data only: no KVM, no devices, nothing of the host but the file that is read.
//!
//! ```text
//! cli       the command line and the JSON file
//! device    what there is one of: console, source of randomness, balloon
//! saved     the saved form, and the way back
//! types     values that cannot be wrong        value     what a word may be otherwise
//! limits    how much and how long everything else may be
//! slots     how many slots for virtio devices there are    places    where each one is
//! topology  sockets, cores, threads and their APIC ids     cmdline   what a kernel can be told
//! incoming  what a restored machine comes from and what is replaced in it
//! actions   what follows the guest's own end
//! ```
#![forbid(unsafe_code)]
use std::path::PathBuf;

pub mod actions;
pub mod cli;
pub mod cmdline;
pub mod device;
pub mod incoming;
pub mod limits;
pub mod places;
pub mod saved;
pub mod slots;
pub mod topology;
pub mod types;
pub mod value;

pub use device::{BalloonConfig, ConsoleConfig, DeviceConfig, RngConfig};
pub use saved::{Description, DescriptionError};
use slots::SlotCounts;
pub use topology::Topology;
use types::{
    CpuCount, DiskIops, DiskQueueSize, DiskQueues, MemorySize, NicQueuePairs, NicQueueSize,
    PerSecond, TapName,
};

/// What of a configuration an error is about.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(
    missing_docs,
    reason = "the configuration's own words; disks and NICs by their ids, other devices by their slots"
)]
pub enum Part {
    Kernel,
    Initrd,
    Cmdline,
    Cpus,
    MemorySize,
    MemoryPath,
    Disk(String),
    Nic(String),
    Serial,
    Device(&'static str),
}

/// One virtual machine. Limits are checked where it is made; the builder trusts nothing that
/// could hurt it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineConfig {
    /// Name shown by `query-name`.
    pub name: String,
    /// UUID shown by `query-uuid`, in the usual 36 characters; all zero when not given.
    pub uuid: String,
    /// Number of vCPUs.
    pub cpus: CpuCount,
    /// How the vCPUs are shown.
    pub topology: Topology,
    /// Guest RAM.
    pub memory: MemoryConfig,
    /// What to boot.
    pub boot: BootConfig,
    /// Slots for disks and NICs, those for hot-plug included.
    pub slots: SlotCounts,
    /// I/O thread ids, in addition to the default one.
    pub iothreads: Vec<String>,
    /// Where the first serial port leads; `None`: nowhere.
    pub serial: Option<CharBackend>,
    /// Disks present at start.
    pub disks: Vec<DiskConfig>,
    /// NICs present at start.
    pub nics: Vec<NicConfig>,
    /// All other devices, one of a kind, in the order of their slots.
    pub devices: Vec<DeviceConfig>,
}

impl MachineConfig {
    /// The console, if there is one.
    pub fn console(&self) -> Option<&ConsoleConfig> {
        self.devices.iter().find_map(|device| match device {
            DeviceConfig::Console(console) => Some(console),
            _ => None,
        })
    }

    /// The source of randomness, if there is one.
    pub fn rng(&self) -> Option<&RngConfig> {
        self.devices.iter().find_map(|device| match device {
            DeviceConfig::Rng(rng) => Some(rng),
            _ => None,
        })
    }

    /// Where the serial port and other devices with characters lead.
    pub fn chars(&self) -> impl Iterator<Item = &CharBackend> {
        self.serial.iter().chain(self.devices.iter().filter_map(|device| device.facts().chars()))
    }
}

/// What is in the slots for disks and NICs, by slot. At the start what the configuration lists;
/// later what hot-plug has made of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Occupancy {
    /// Disks; slots from the end of the list on are empty.
    pub disks: Vec<Option<DiskConfig>>,
    /// NICs, likewise.
    pub nics: Vec<Option<NicConfig>>,
}

impl Occupancy {
    /// That of a machine that starts.
    pub fn at_start(config: &MachineConfig) -> Self {
        Self {
            disks: config.disks.iter().cloned().map(Some).collect(),
            nics: config.nics.iter().cloned().map(Some).collect(),
        }
    }
}

/// Guest RAM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryConfig {
    /// How much.
    pub size: MemorySize,
    /// Shareable with other processes (memfd) rather than anonymous.
    pub shared: bool,
    /// File, or directory of a hugetlbfs, behind guest memory.
    pub path: Option<PathBuf>,
    /// Touch all of it before the guest runs.
    pub prealloc: bool,
    /// Part of the monitor's core dumps.
    pub dump: bool,
    /// Whether it comes in transparent huge pages. Not part of a saved state: it is the host's affair.
    pub thp: Thp,
}

/// Whether guest memory without a file of its own comes in transparent huge pages of the host, of 2 MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Thp {
    /// But for the first 2 MiB, and for what is loaded of an image that is smaller than one.
    #[default]
    Auto,
    /// All of it but the first 2 MiB.
    On,
    /// None of it: least memory for a guest that uses little of it.
    Off,
}

/// What to boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootConfig {
    /// ELF vmlinux, bzImage or flat vmlinux.bin.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Command line, untouched.
    pub cmdline: String,
}

/// A raw disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskConfig {
    /// Id for `device_del`, unique among all devices.
    pub id: String,
    /// Image file or block device.
    pub path: PathBuf,
    /// Refuse writes.
    pub readonly: bool,
    /// O_DIRECT.
    pub direct: bool,
    /// Up to 20 bytes, shown by the guest's `/sys/block/*/serial`.
    pub serial: Option<String>,
    /// How requests are carried out.
    pub aio: Aio,
    /// Pass discards on.
    pub discard: bool,
    /// Requests per second; `None`: unlimited.
    pub iops: Option<DiskIops>,
    /// Bytes per second; `None`: unlimited.
    pub bps: Option<PerSecond>,
    /// Queues.
    pub queues: DiskQueues,
    /// Descriptors a queue.
    pub queue_size: DiskQueueSize,
    /// Which I/O thread; `None`: the default one.
    pub iothread: Option<String>,
    /// The back-end's name when it is not the device's id: it then outlives the device.
    pub backend: Option<String>,
    /// Refuse an image that begins like one of another format, as nobody has said that it is raw.
    /// Not kept in a saved state: its guest may have written such a beginning.
    pub probe: bool,
    /// What the image has to be, when a saved state is restored.
    pub expect: Expect,
}

impl DiskConfig {
    /// Name of the back-end.
    pub fn backend(&self) -> &str {
        self.backend.as_deref().unwrap_or(&self.id)
    }
}

/// What the image of a restored disk has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Expect {
    /// The one that was saved.
    #[default]
    Saved,
    /// A copy of it, or itself in another place.
    Copy,
    /// Any of the saved size: the user vouches for it.
    Any,
}

/// The name of a back-end where it is not that of its device, for `backend` of a disk or NIC.
pub fn separate(backend: &str, device: &str) -> Option<String> {
    (backend != device).then(|| backend.to_owned())
}

/// How a disk's requests are carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Aio {
    /// io_uring where the host has it, else plain system calls.
    Auto,
    /// io_uring, or an error.
    IoUring,
    /// Plain system calls on the I/O thread.
    Off,
}

/// A NIC on a tap device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NicConfig {
    /// Id for `device_del`, unique among all devices.
    pub id: String,
    /// Where its frames go.
    pub tap: Tap,
    /// Six bytes; `None`: a random one, locally administered.
    pub mac: Option<[u8; 6]>,
    /// Queue pairs.
    pub queue_pairs: NicQueuePairs,
    /// Descriptors a queue.
    pub queue_size: NicQueueSize,
    /// Packets per second in each direction; `None`: unlimited.
    pub pps: Option<PerSecond>,
    /// Bytes per second in each direction; `None`: unlimited.
    pub bps: Option<PerSecond>,
    /// Which I/O thread; `None`: the default one.
    pub iothread: Option<String>,
    /// The back-end's name when it is not the device's id: it then outlives the device.
    pub backend: Option<String>,
}

impl NicConfig {
    /// Name of the back-end.
    pub fn backend(&self) -> &str {
        self.backend.as_deref().unwrap_or(&self.id)
    }
}

/// A tap device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tap {
    /// An existing one, by name.
    Name(TapName),
    /// Inherited or received descriptors, one for each queue pair.
    Fds(Vec<i32>),
}

/// Where characters go to and come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CharBackend {
    /// This process's standard input and output.
    Stdio,
    /// A new pseudo-terminal, named in the log and by `query-chardev`.
    Pty,
    /// A file, created if missing, appended to. Output only.
    File(PathBuf),
    /// A Unix socket that this process listens on; one connection at a time.
    Socket {
        /// Where.
        path: PathBuf,
        /// Each connection gets the last this many bytes of output first, up to 1 MiB.
        replay: u32,
    },
}
