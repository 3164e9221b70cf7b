//! What file and command line have given so far. Names are not resolved yet.
use std::path::PathBuf;

use crate::{Aio, CharBackend, DeviceConfig, Tap, Thp, Topology};

use super::action::Wanted;
use super::problem::{Place, Places, Problems};
use super::process::How;
use super::{Control, Log};
use crate::incoming::Source;
use crate::types::{
    CpuCount, DiskIops, DiskQueueSize, DiskQueues, Id, MemorySize, NicQueuePairs, NicQueueSize,
    PerSecond, RngBps,
};

/// All settings so far.
#[derive(Debug, Default)]
pub(crate) struct Draft {
    pub(crate) problems: Problems,
    /// Places of settings that occur once; each device has its own.
    pub(crate) places: Places,

    pub(crate) name: Option<Id>,
    pub(crate) uuid: Option<String>,
    pub(crate) smp: Option<(CpuCount, Topology)>,
    pub(crate) memory: Option<MemorySize>,
    pub(crate) mem_path: Option<PathBuf>,
    pub(crate) mem_prealloc: bool,
    pub(crate) mem_share: Option<bool>,
    pub(crate) thp: Option<Thp>,
    pub(crate) dump_guest_core: Option<bool>,
    pub(crate) omit_vm_memory: bool,
    pub(crate) disk_slots: Option<(Place, usize)>,
    pub(crate) nic_slots: Option<(Place, usize)>,

    pub(crate) kernel: Option<PathBuf>,
    pub(crate) initrd: Option<PathBuf>,
    pub(crate) cmdline: Option<String>,

    pub(crate) iothreads: Vec<(Place, Id)>,
    pub(crate) drives: Vec<Drive>,
    pub(crate) nets: Vec<Net>,
    pub(crate) chardevs: Vec<Chardev>,
    pub(crate) rng_sources: Vec<RngSource>,
    pub(crate) devices: Vec<Device>,
    /// Devices that one flag or section defines completely; their ids are generated.
    pub(crate) whole: Vec<(Place, DeviceConfig)>,
    pub(crate) serial: Option<Serial>,

    pub(crate) control: Option<(Place, Control)>,
    /// `-machine none`.
    pub(crate) no_machine: bool,
    /// `-mon`: chardev ids.
    pub(crate) monitors: Vec<(Place, Id)>,
    pub(crate) pidfile: Option<PathBuf>,
    pub(crate) daemonize: bool,
    pub(crate) paused: bool,
    pub(crate) actions: Wanted,
    pub(crate) log: Option<Log>,
    pub(crate) disable_seccomp: bool,
    pub(crate) spawn: bool,
    /// `-incoming`.
    pub(crate) incoming: Option<(Source, How)>,
}

impl Draft {
    /// Add `device`, replacing one of its kind from the file.
    pub(crate) fn say(&mut self, place: Place, device: DeviceConfig) {
        self.whole.retain(|(_, other)| other.part() != device.part());
        self.whole.push((place, device));
    }
}

/// `-drive`: an image, and in the older form the whole disk.
#[derive(Debug)]
pub(crate) struct Drive {
    pub(crate) place: Place,
    pub(crate) id: Id,
    pub(crate) path: PathBuf,
    pub(crate) readonly: bool,
    pub(crate) direct: bool,
    pub(crate) aio: Aio,
    pub(crate) discard: bool,
    /// Its format is not given.
    pub(crate) probe: bool,
    pub(crate) iops: Option<DiskIops>,
    pub(crate) bps: Option<PerSecond>,
    pub(crate) front: BlkFront,
}

/// The front-end of a disk.
#[derive(Debug, Default)]
pub(crate) struct BlkFront {
    pub(crate) serial: Option<String>,
    pub(crate) iothread: Option<Id>,
    pub(crate) queues: Option<DiskQueues>,
    pub(crate) queue_size: Option<DiskQueueSize>,
}

/// `-netdev`: a tap, and in the older form the whole NIC.
#[derive(Debug)]
pub(crate) struct Net {
    pub(crate) place: Place,
    pub(crate) id: Id,
    pub(crate) tap: Tap,
    pub(crate) queues: Option<NicQueuePairs>,
    pub(crate) pps: Option<PerSecond>,
    pub(crate) bps: Option<PerSecond>,
    pub(crate) front: NetFront,
}

/// The front-end of a NIC.
#[derive(Debug, Default)]
pub(crate) struct NetFront {
    pub(crate) mac: Option<[u8; 6]>,
    pub(crate) iothread: Option<Id>,
    pub(crate) mq: Option<bool>,
    pub(crate) queue_size: Option<NicQueueSize>,
}

/// `-chardev`, and in the older form a whole console.
#[derive(Debug)]
pub(crate) struct Chardev {
    pub(crate) place: Place,
    pub(crate) id: Id,
    pub(crate) backend: CharBackend,
    /// The older form, `-chardev id=ID,path=PATH`, which is a console by itself.
    pub(crate) console: bool,
}

/// `-object rng-random`.
#[derive(Debug)]
pub(crate) struct RngSource {
    pub(crate) place: Place,
    pub(crate) id: Id,
    pub(crate) path: PathBuf,
}

/// `-serial`.
#[derive(Debug)]
pub(crate) enum Serial {
    Off,
    Backend(Place, CharBackend),
    Chardev(Place, Id),
}

/// `-device`.
#[derive(Debug)]
pub(crate) struct Device {
    pub(crate) place: Place,
    /// When missing, it is reported or generated.
    pub(crate) id: Option<Id>,
    pub(crate) kind: DeviceKind,
}

/// The kind of a `-device` and the back-end that it names; a missing name was reported.
#[derive(Debug)]
pub(crate) enum DeviceKind {
    Blk {
        drive: Option<Id>,
        front: BlkFront,
    },
    Net {
        netdev: Option<Id>,
        front: NetFront,
    },
    SerialBus {
        iothread: Option<Id>,
    },
    Console {
        chardev: Option<Id>,
    },
    Rng {
        source: Option<Id>,
        bps: Option<RngBps>,
    },
    /// One that names no back-end.
    Whole(DeviceConfig),
    /// Known and refused; the back-end that it names counts as used.
    Refused {
        backends: Vec<Id>,
    },
}
