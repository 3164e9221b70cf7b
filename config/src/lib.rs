//! The configuration of a machine: [`MachineConfig`], and the three sources of one, each checked at
//! its entry. Data only: no KVM, no devices, and of the host only the file that is read.
//!
//! ```text
//! cli       the command line and the JSON file
//! device    devices of one per machine: console, source of randomness, balloon
//! saved     the saved form, and the conversion back
//! types     values that are valid by construction    value     parsing of single words
//! limits    all other limits
//! slots     how many slots for virtio devices there are    places    where each one is
//! topology  sockets, cores, threads and their APIC ids     cmdline   what a kernel accepts
//! incoming  the source of a restored machine and its overrides
//! actions   reactions to the guest's power-off, reboot or crash
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
    CpuCount, DiskIops, DiskQueueSize, DiskQueues, Id, MemorySize, NicQueuePairs, NicQueueSize,
    PerSecond, TapName,
};

/// The part of a configuration that an error is about.
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

/// One virtual machine. Limits are checked where it is made; the builder checks again whatever
/// could harm it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineConfig {
    /// Name shown by `query-name`.
    pub name: Id,
    /// UUID shown by `query-uuid`, in the usual 36 characters; all zero when not given.
    pub uuid: String,
    /// Number of vCPUs.
    pub cpus: CpuCount,
    /// The topology that the guest sees.
    pub topology: Topology,
    /// Guest RAM.
    pub memory: MemoryConfig,
    /// What to boot.
    pub boot: BootConfig,
    /// Slots for disks and NICs, those for hot-plug included.
    pub slots: SlotCounts,
    /// I/O thread ids, in addition to the default one.
    pub iothreads: Vec<Id>,
    /// Back-end of the first serial port; `None`: no back-end.
    pub serial: Option<CharBackend>,
    /// Disks present at start.
    pub disks: Vec<DiskConfig>,
    /// NICs present at start.
    pub nics: Vec<NicConfig>,
    /// All other devices, at most one of each kind, in the order of their slots.
    pub devices: Vec<DeviceConfig>,
}

impl MachineConfig {
    /// Back-ends of the serial port and of other character devices.
    pub fn chars(&self) -> impl Iterator<Item = &CharBackend> {
        self.serial.iter().chain(self.devices.iter().filter_map(|device| device.facts().chars()))
    }
}

/// The contents of the slots for disks and NICs, by slot: at the start as the configuration lists
/// them, later as changed by hot-plug.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Occupancy {
    /// Disks; slots beyond the end of the list are empty.
    pub disks: Vec<Option<DiskConfig>>,
    /// NICs, likewise.
    pub nics: Vec<Option<NicConfig>>,
}

impl Occupancy {
    /// The contents when a machine starts.
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
    /// Shared with other processes (memfd) rather than anonymous.
    pub shared: bool,
    /// File, or directory of a hugetlbfs, behind guest memory.
    pub path: Option<PathBuf>,
    /// Touch all of it before the guest runs.
    pub prealloc: bool,
    /// Included in the monitor's core dumps.
    pub dump: bool,
    /// Whether it uses transparent huge pages. Not part of a saved state: it is up to the host.
    pub thp: Thp,
}

impl MemoryConfig {
    /// `size` bytes, and all else as it is when nothing else is asked for.
    pub fn new(size: MemorySize) -> Self {
        Self { size, shared: false, path: None, prealloc: false, dump: true, thp: Thp::default() }
    }
}

/// Whether guest memory without its own file uses transparent huge pages of the host, of 2 MiB.
///
/// `Auto` is the default because it is best or close to it for both ends. Linux, which touches its
/// memory all over, takes 15 % less time to its init with huge pages, and a quarter less to fill its
/// memory, for some 6 MiB more of the host's. A guest of a few instructions would have megabytes
/// zeroed that it never fills: with small pages, a hundred of them start 10 % faster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Thp {
    /// Except for the first 2 MiB, and for loading a kernel that is smaller than a huge page.
    #[default]
    Auto,
    /// All of it but the first 2 MiB.
    On,
    /// None: least memory use for a guest that touches little of it.
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
    pub id: Id,
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
    /// Pass discards to the host.
    pub discard: bool,
    /// Requests per second; `None`: unlimited.
    pub iops: Option<DiskIops>,
    /// Bytes per second; `None`: unlimited.
    pub bps: Option<PerSecond>,
    /// Queues.
    pub queues: DiskQueues,
    /// Descriptors per queue.
    pub queue_size: DiskQueueSize,
    /// Which I/O thread; `None`: the default one.
    pub iothread: Option<Id>,
    /// The back-end's name when it is not the device's id: it then outlives the device.
    pub backend: Option<Id>,
    /// Refuse an image that looks like another format, because raw was not stated explicitly. Not
    /// kept in a saved state: the guest may have written such a header.
    pub probe: bool,
    /// Required identity of the image when a saved state is restored.
    pub expect: Expect,
}

impl DiskConfig {
    /// Name of the back-end.
    pub fn backend(&self) -> &str {
        self.backend.as_deref().unwrap_or(&self.id)
    }
}

/// Required identity of the image of a restored disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Expect {
    /// The image that was saved.
    #[default]
    Saved,
    /// A copy of it, or the image itself at another path.
    Copy,
    /// Any image of the saved size: the user vouches for it.
    Any,
}

/// The back-end's name if it differs from that of its device, for `backend` of a disk or NIC.
pub fn separate(backend: Id, device: &Id) -> Option<Id> {
    (backend != *device).then_some(backend)
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
    pub id: Id,
    /// The tap that carries its frames.
    pub tap: Tap,
    /// Six bytes; `None`: a random one, locally administered.
    pub mac: Option<[u8; 6]>,
    /// Queue pairs.
    pub queue_pairs: NicQueuePairs,
    /// Descriptors per queue.
    pub queue_size: NicQueueSize,
    /// Packets per second in each direction; `None`: unlimited.
    pub pps: Option<PerSecond>,
    /// Bytes per second in each direction; `None`: unlimited.
    pub bps: Option<PerSecond>,
    /// Which I/O thread; `None`: the default one.
    pub iothread: Option<Id>,
    /// The back-end's name when it is not the device's id: it then outlives the device.
    pub backend: Option<Id>,
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

/// A character back-end.
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
        /// Its path.
        path: PathBuf,
        /// How many bytes of past output each new connection gets first, up to 1 MiB.
        replay: u32,
    },
}
