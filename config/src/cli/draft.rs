//! What file and command line have said so far. Names are not yet looked up.
use std::path::PathBuf;

use crate::{Aio, CharBackend, Tap, Topology};

use super::action::Wanted;
use super::problem::{Place, Places, Problems};
use super::process::How;
use super::{Control, Log, Source};

/// Everything said so far.
#[derive(Debug, Default)]
pub(super) struct Draft {
    pub(super) problems: Problems,
    /// Of what is said but once; the devices have their own.
    pub(super) places: Places,

    pub(super) name: Option<String>,
    pub(super) uuid: Option<String>,
    pub(super) smp: Option<(u8, Topology)>,
    pub(super) memory: Option<u64>,
    pub(super) mem_path: Option<PathBuf>,
    pub(super) mem_prealloc: bool,
    pub(super) mem_share: Option<bool>,
    pub(super) dump_guest_core: Option<bool>,
    pub(super) omit_vm_memory: bool,
    pub(super) disk_slots: Option<(Place, usize)>,
    pub(super) nic_slots: Option<(Place, usize)>,

    pub(super) kernel: Option<PathBuf>,
    pub(super) initrd: Option<PathBuf>,
    pub(super) cmdline: Option<String>,

    pub(super) iothreads: Vec<(Place, String)>,
    pub(super) drives: Vec<Drive>,
    pub(super) nets: Vec<Net>,
    pub(super) chardevs: Vec<Chardev>,
    pub(super) rng_sources: Vec<RngSource>,
    pub(super) devices: Vec<Device>,
    /// `-rng`, or `rng` of the file.
    pub(super) rng: Option<(Place, PathBuf, Option<u64>)>,
    pub(super) serial: Option<Serial>,

    pub(super) control: Option<(Place, Control)>,
    /// `-machine none`.
    pub(super) no_machine: bool,
    /// `-mon`: chardev ids.
    pub(super) monitors: Vec<(Place, String)>,
    pub(super) pidfile: Option<PathBuf>,
    pub(super) daemonize: bool,
    pub(super) paused: bool,
    pub(super) actions: Wanted,
    pub(super) log: Option<Log>,
    pub(super) disable_seccomp: bool,
    pub(super) spawn: bool,
    /// `-incoming`.
    pub(super) incoming: Option<(Source, How)>,
}

/// `-drive`: an image, and in the older form the whole disk.
#[derive(Debug)]
pub(super) struct Drive {
    pub(super) place: Place,
    pub(super) id: String,
    pub(super) path: PathBuf,
    pub(super) readonly: bool,
    pub(super) direct: bool,
    pub(super) aio: Aio,
    pub(super) discard: bool,
    /// Its format is not said.
    pub(super) probe: bool,
    pub(super) iops: Option<u64>,
    pub(super) bps: Option<u64>,
    pub(super) front: BlkFront,
}

/// The guest's side of a disk.
#[derive(Debug, Default)]
pub(super) struct BlkFront {
    pub(super) serial: Option<String>,
    pub(super) iothread: Option<String>,
    pub(super) queues: Option<u16>,
    pub(super) queue_size: Option<u16>,
}

/// `-netdev`: a tap, and in the older form the whole NIC.
#[derive(Debug)]
pub(super) struct Net {
    pub(super) place: Place,
    pub(super) id: String,
    pub(super) tap: Tap,
    pub(super) queues: Option<u16>,
    pub(super) pps: Option<u64>,
    pub(super) bps: Option<u64>,
    pub(super) front: NetFront,
}

/// The guest's side of a NIC.
#[derive(Debug, Default)]
pub(super) struct NetFront {
    pub(super) mac: Option<[u8; 6]>,
    pub(super) iothread: Option<String>,
    pub(super) mq: Option<bool>,
    pub(super) queue_size: Option<u16>,
}

/// `-chardev`, and in the older form a whole console.
#[derive(Debug)]
pub(super) struct Chardev {
    pub(super) place: Place,
    pub(super) id: String,
    pub(super) backend: CharBackend,
    /// The older form, `-chardev id=ID,path=PATH`: a console by itself.
    pub(super) console: bool,
}

/// `-object rng-random`.
#[derive(Debug)]
pub(super) struct RngSource {
    pub(super) place: Place,
    pub(super) id: String,
    pub(super) path: PathBuf,
}

/// `-serial`.
#[derive(Debug)]
pub(super) enum Serial {
    Off,
    Backend(Place, CharBackend),
    Chardev(Place, String),
}

/// `-device`.
#[derive(Debug)]
pub(super) struct Device {
    pub(super) place: Place,
    /// Empty when missing: a problem of its own, or one is made up.
    pub(super) id: String,
    pub(super) kind: DeviceKind,
}

/// What a `-device` is and which backend it names (empty when missing).
#[derive(Debug)]
pub(super) enum DeviceKind {
    Blk {
        drive: String,
        front: BlkFront,
    },
    Net {
        netdev: String,
        front: NetFront,
    },
    SerialBus {
        iothread: Option<String>,
    },
    Console {
        chardev: String,
    },
    Rng {
        source: String,
        bps: Option<u64>,
    },
    /// Known and refused; what it names is spoken for.
    Refused {
        backends: Vec<String>,
    },
}
