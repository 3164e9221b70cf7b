//! What a machine has to be made of before its state can be restored into it: the first thing in a
//! file or stream.
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    device::Mark,
    hex::{Hex, HexArray},
    section::{Saved, SectionError, required},
};

/// 16 bytes that no other save has.
pub type Id = HexArray<16>;

/// What a machine has to be made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The same in the memory that belongs to it, and in no other.
    pub id: Id,
    /// Everything but what is in slots.
    pub machine: Machine,
    /// Every virtio-mmio slot that the guest has been told of when it booted. Their order means
    /// nothing.
    pub slots: Vec<Slot>,
    /// Why the guest cannot run on, if it cannot.
    #[serde(deserialize_with = "required")]
    pub halted: Option<Halted>,
    /// The save that has the rest of the memory, where this one holds changes only.
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
        // Saves kept no disks.
        let slots = value.get_mut("slots").and_then(Value::as_array_mut);
        let contents = slots.into_iter().flatten().filter_map(|slot| slot.get_mut("contents"));
        for disk in contents.filter_map(|contents| contents.get_mut("disk")?.as_object_mut()) {
            disk.insert("kept".into(), Value::Null);
        }
        Ok(value)
    }
}

/// Another save, on which one builds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Base {
    /// Its directory, seen from the directory of the one that builds on it.
    pub path: PathBuf,
    /// Its id.
    pub id: Id,
    /// CRC-32 of its `state` file.
    pub state: Hex<u32>,
}

/// Why a guest cannot run on. The names are those of QMP's run states.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Halted {
    /// It powered off or rebooted.
    Shutdown,
    /// It said that it has crashed.
    GuestPanicked,
    /// KVM could not run it.
    InternalError,
}

/// A machine without its slots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// Name shown by `query-name`.
    pub name: String,
    /// UUID shown by `query-uuid`, in the usual 36 characters.
    pub uuid: String,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// How the vCPUs are shown.
    pub topology: Topology,
    /// Guest RAM.
    pub memory: Memory,
    /// What is loaded when the guest reboots.
    pub boot: Boot,
    /// I/O threads beside the default one.
    pub iothreads: Vec<String>,
    /// Where the first serial port leads; `null`: there is none.
    #[serde(deserialize_with = "required")]
    pub serial: Option<CharBackend>,
}

/// The product equals the number of vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the field's own words")]
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
    /// Shareable with other processes.
    pub shared: bool,
    /// File, or directory of a hugetlbfs, behind guest memory.
    #[serde(deserialize_with = "required")]
    pub path: Option<PathBuf>,
    /// Touch all of it before the guest runs.
    pub prealloc: bool,
    /// Part of the monitor's core dumps.
    pub dump: bool,
}

/// What is loaded when the guest reboots.
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

/// A virtio-mmio slot, as the guest was told of it when it booted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slot {
    /// By which its section is known: `disk0`, `nic1`, `console`, `rng`, `balloon`. The number is the `addr` of
    /// `device_add`.
    pub id: String,
    /// Address of its registers.
    pub address: Hex<u64>,
    /// Number of its interrupt.
    pub interrupt: u32,
    /// Most descriptors of each queue.
    pub queue_sizes: Vec<u16>,
    /// Which I/O thread; `null`: the default one.
    #[serde(deserialize_with = "required")]
    pub iothread: Option<String>,
    /// What is in it.
    pub contents: Contents,
}

/// What is in a slot now. A slot for disks or NICs may be empty.
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
    /// The back-end's name where it is not the device's.
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
    /// Pass discards on.
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
    /// The copy of it that the save keeps; `null`: the image itself belongs to the save.
    #[serde(deserialize_with = "required")]
    pub kept: Option<KeptDisk>,
}

/// A disk that a save keeps beside the memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeptDisk {
    /// Name of the file in the save's directory: a raw image.
    pub file: String,
    /// What it was like when it was complete.
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
    /// The back-end's name where it is not the device's.
    #[serde(deserialize_with = "required")]
    pub backend: Option<String>,
    /// Where its frames go.
    pub tap: Tap,
    /// Hardware address; `null`: one that was made up, which is in the device's section.
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
    /// Descriptors of the process that was saved. Another one has to be given others.
    Fds(Vec<i32>),
}

/// virtio-console with one port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Console {
    /// Id of its character device.
    pub id: String,
    /// Where it leads.
    pub backend: CharBackend,
}

/// Where characters go to and come from.
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
        /// Where.
        path: PathBuf,
        /// Bytes of output that each connection is sent first.
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
    /// The guest takes pages out of it rather than run out of memory.
    pub deflate_on_oom: bool,
    /// The guest reports the pages that it has freed.
    pub free_page_reporting: bool,
}
