//! The configuration that a machine needs before its state can be restored into it: the first frame
//! of a file or stream.
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    device::Mark,
    hex::{Hex, HexArray},
    section::{Saved, SectionError, required},
};

/// 16 bytes, unique to each save.
pub type Id = HexArray<16>;

/// The configuration of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The same in the memory file that belongs to it, and in no other.
    pub id: Id,
    /// Everything but the contents of slots.
    pub machine: Machine,
    /// Every virtio-mmio slot that was described to the guest when it booted, in any order.
    pub slots: Vec<Slot>,
    /// Why the guest cannot resume, if it cannot.
    #[serde(deserialize_with = "required")]
    pub halted: Option<Halted>,
    /// The save that holds the rest of the memory, where this one is incremental.
    #[serde(deserialize_with = "required")]
    pub base: Option<Base>,
}

impl Saved for Config {
    const KIND: &'static str = "config";
    const VERSION: u32 = 2;

    fn upgrade(from: u32, mut value: Value) -> Result<Value, SectionError> {
        if from != 1 {
            let kind = Self::KIND.into();
            return Err(SectionError::Version { kind, found: from, known: Self::VERSION });
        }
        // In that version, saves kept no disks.
        let slots = value.get_mut("slots").and_then(Value::as_array_mut);
        let contents = slots.into_iter().flatten().filter_map(|slot| slot.get_mut("contents"));
        for disk in contents.filter_map(|contents| contents.get_mut("disk")?.as_object_mut()) {
            disk.insert("kept".into(), Value::Null);
        }
        Ok(value)
    }
}

/// Another save, on which an incremental one builds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Base {
    /// Its directory, relative to the directory of the save that builds on it.
    pub path: PathBuf,
    /// Its id.
    pub id: Id,
    /// CRC-32 of its `state` file.
    pub state: Hex<u32>,
}

/// Why a guest cannot resume. The names are those of QMP's run states.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Halted {
    /// It powered off or rebooted.
    Shutdown,
    /// It reported that it has crashed.
    GuestPanicked,
    /// KVM could not run it.
    InternalError,
}

/// A machine without the contents of its slots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// Name shown by `query-name`.
    pub name: String,
    /// UUID shown by `query-uuid`, in the usual 36 characters.
    pub uuid: String,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// The CPU topology that the guest sees.
    pub topology: Topology,
    /// Guest RAM.
    pub memory: Memory,
    /// Files that are loaded when the guest reboots.
    pub boot: Boot,
    /// I/O threads in addition to the default one.
    pub iothreads: Vec<String>,
    /// Back-end of the first serial port; `null`: there is none.
    #[serde(deserialize_with = "required")]
    pub serial: Option<CharBackend>,
}

/// The product equals the number of vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "standard terms")]
pub struct Topology {
    pub sockets: u8,
    pub dies: u8,
    pub clusters: u8,
    pub cores: u8,
    pub threads: u8,
}

/// Guest RAM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// Bytes.
    pub size: u64,
    /// Shared with other processes (MAP_SHARED).
    pub shared: bool,
    /// File, or hugetlbfs directory, that backs guest memory.
    #[serde(deserialize_with = "required")]
    pub path: Option<PathBuf>,
    /// Touch all of it before the guest runs.
    pub prealloc: bool,
    /// Include guest memory in the monitor's core dumps.
    pub dump: bool,
}

/// Files that are loaded when the guest reboots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Boot {
    /// The kernel.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    #[serde(deserialize_with = "required")]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
}

/// A virtio-mmio slot, as described to the guest at boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slot {
    /// Identifies its section: `disk0`, `nic1`, `console`, `rng`, `balloon`. The number is the
    /// `addr` of `device_add`.
    pub id: String,
    /// Address of its registers.
    pub address: Hex<u64>,
    /// Its interrupt number.
    pub interrupt: u32,
    /// Maximum size of each queue.
    pub queue_sizes: Vec<u16>,
    /// Its I/O thread; `null`: the default one.
    #[serde(deserialize_with = "required")]
    pub iothread: Option<String>,
    /// Its contents.
    pub contents: Contents,
}

/// The present contents of a slot. A slot for disks or NICs may be empty.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "named by what they hold")]
pub enum Contents {
    Disk(Option<Disk>),
    Nic(Option<Nic>),
    Console(Console),
    Rng(Rng),
    Balloon(Balloon),
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Id of the device.
    pub id: String,
    /// The back-end's name where it differs from the device's.
    #[serde(deserialize_with = "required")]
    pub backend: Option<String>,
    /// Image file or block device.
    pub path: PathBuf,
    /// Bytes that the guest sees.
    pub size: u64,
    /// Refuse writes.
    pub readonly: bool,
    /// O_DIRECT.
    pub direct: bool,
    /// How requests are carried out.
    pub aio: Aio,
    /// Pass discards on to the host.
    pub discard: bool,
    /// Serial number that the guest sees.
    #[serde(deserialize_with = "required")]
    pub serial: Option<String>,
    /// Requests per second; `null`: unlimited.
    #[serde(deserialize_with = "required")]
    pub iops: Option<u64>,
    /// Bytes per second; `null`: unlimited.
    #[serde(deserialize_with = "required")]
    pub bps: Option<u64>,
    /// The copy of the disk that the save keeps; `null`: the image itself belongs to the save.
    #[serde(deserialize_with = "required")]
    pub kept: Option<KeptDisk>,
}

/// A copy of a disk that a save keeps beside the memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeptDisk {
    /// Name of the file in the save's directory, a raw image.
    pub file: String,
    /// Its mark when it was complete.
    pub mark: Mark,
}

/// How a disk's requests are carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Aio {
    /// io_uring where the host has it, else plain system calls.
    Auto,
    /// io_uring, or an error.
    IoUring,
    /// Plain system calls.
    Off,
}

/// A NIC on a tap device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nic {
    /// Id of the device.
    pub id: String,
    /// The back-end's name where it differs from the device's.
    #[serde(deserialize_with = "required")]
    pub backend: Option<String>,
    /// The tap device.
    pub tap: Tap,
    /// Hardware address; `null`: a generated one, which is in the device's section.
    #[serde(deserialize_with = "required")]
    pub mac: Option<HexArray<6>>,
    /// Packets per second in each direction; `null`: unlimited.
    #[serde(deserialize_with = "required")]
    pub pps: Option<u64>,
    /// Bytes per second in each direction; `null`: unlimited.
    #[serde(deserialize_with = "required")]
    pub bps: Option<u64>,
}

/// A tap device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tap {
    /// By name.
    Name(String),
    /// By descriptors of the process that was saved. Another process has to be given its own.
    Fds(Vec<i32>),
}

/// virtio-console with one port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Console {
    /// Id of its character device.
    pub id: String,
    /// Its back-end.
    pub backend: CharBackend,
}

/// The back-end of a serial port or console.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum CharBackend {
    /// The process's standard input and output.
    Stdio,
    /// A new pseudo-terminal.
    Pty,
    /// A file that output is appended to.
    File(PathBuf),
    /// A Unix socket that the process listens on.
    Socket {
        /// Its path.
        path: PathBuf,
        /// Most bytes of earlier output that each connection is sent first.
        replay: u32,
    },
}

/// virtio-rng.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rng {
    /// Id of the device.
    pub id: String,
    /// Source of randomness.
    pub path: PathBuf,
    /// Bytes per second; `null`: unlimited.
    #[serde(deserialize_with = "required")]
    pub bps: Option<u64>,
}

/// A memory balloon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// Id of the device.
    pub id: String,
    /// The guest deflates it rather than run out of memory.
    pub deflate_on_oom: bool,
    /// The guest reports the pages that it has freed.
    pub free_page_reporting: bool,
}
