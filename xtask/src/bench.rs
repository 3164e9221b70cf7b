//! Compares this monitor with others, and with other builds of itself: runs the same guests under
//! each of them, in turns, and measures times.
//!
//! The program that the user runs starts itself where the guests run ([`stories::host`] says where,
//! [`measure`] what it does there); that process sends [`Message`]s.
pub mod about;
pub mod builds;
pub mod chart;
pub mod compiled;
pub mod control;
pub mod cpu;
pub mod density;
pub mod domains;
pub mod figures;
pub mod goals;
pub mod guests;
pub mod held;
pub mod interrupt;
pub mod measure;
pub mod monitors;
pub mod options;
pub mod part;
pub mod remus;
pub mod rig;
pub mod run;
pub mod scattered;
pub mod smaps;
pub mod snapshots;
pub mod statistics;

use serde::{Deserialize, Serialize};

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// From exec until the control socket answers.
    Api,
    /// From exec until the guest's first byte on the serial port.
    FirstByte,
    /// From exec until Linux's init runs, without disk and NIC.
    Init,
    /// From exec until Linux's init runs, with disk and NIC.
    InitDevices,
    /// Private memory beyond the guest's RAM.
    Private,
    /// From `query-status` to its answer.
    Status,
    /// From `stop` to its answer.
    Stop,
    /// From `cont` to its answer.
    Cont,
    /// From the request to save a guest of 256 MiB, [`guests::FILL`] of it not zero, until all of
    /// it is on the disk.
    SaveSynced,
    /// The same as a multiple of the time that `dd` takes to write as many bytes and sync them.
    SaveRatio,
    /// How long a guest that runs on is stopped for a save.
    LivePause,
    /// How long Linux is stopped for a save into a directory, while it writes to pages scattered
    /// over its memory ([`scattered`]).
    ScatteredDirectory,
    /// The same into a stream.
    ScatteredStream,
    /// From exec until the first byte of a restored guest of 256 MiB.
    Restore,
    /// The same with 4 GiB.
    RestoreLarge,
    /// `stratoctl list` of 100 domains.
    List,
    /// Many machines at once ([`density`]): from the first exec to the last guest's first byte.
    ManyWall,
    /// CPU time of each monitor, from its exec until the kernel has removed it.
    ManyCpu,
    /// Private memory of each beyond its guest's RAM.
    ManyPrivate,
    /// Proportional share of each beyond its guest's RAM.
    ManyPss,
    /// Guest RAM in use beyond the page that each guest touches.
    ManyGuest,
    /// The same, in this order, of many machines that are restored from one save.
    ClonesWall,
    /// See [`Self::ManyCpu`].
    ClonesCpu,
    /// See [`Self::ManyPrivate`].
    ClonesPrivate,
    /// See [`Self::ManyPss`].
    ClonesPss,
    /// See [`Self::ManyGuest`].
    ClonesGuest,
    /// How long a checkpoint of a protected guest stops it ([`remus`]).
    Pause,
    /// Of that: until vCPUs and devices have stopped.
    PausePark,
    /// Finding out which pages were written.
    PauseHarvest,
    /// Copying them.
    PauseCopy,
    /// Reading the state of devices and vCPUs.
    PauseState,
    /// From the beginning of a checkpoint to that of the next one.
    Period,
    /// Pages in a checkpoint.
    DirtyPages,
    /// Encoding a checkpoint.
    Encode,
    /// Bytes of a checkpoint on the wire, of those of its pages.
    WireShare,
    /// From the beginning of a checkpoint to the release of the output that it covers.
    CommitLag,
    /// From a lone request of a client outside to its answer.
    LoneRequest,
    /// From the death of a primary to the event that says that its guest runs at the backup.
    Failover,
    /// Of that, from the last sign of life to the suspicion.
    FailoverDetect,
    /// Building the machine.
    FailoverApply,
    /// From the decision to the guest's first step.
    FailoverRun,
    /// What the monitor of a backup occupies beyond its guest's RAM.
    BackupMemory,
    /// CPU time of the monitor, its guest's included, for each byte of [`Self::TcpOut`].
    TcpOutCpu,
    /// The same for [`Self::TcpIn`].
    TcpInCpu,
    /// The same for each of [`Self::TcpRoundTrips`].
    TcpRoundTripCpu,
    /// Sequential reads of 1 MiB.
    SeqRead,
    /// Sequential writes of 1 MiB.
    SeqWrite,
    /// Random reads of 4 KiB, one at a time.
    #[serde(rename = "rand_read_1")]
    RandRead1,
    /// Random writes of 4 KiB, one at a time.
    #[serde(rename = "rand_write_1")]
    RandWrite1,
    /// Random reads of 4 KiB, 32 at a time.
    #[serde(rename = "rand_read_32")]
    RandRead32,
    /// TCP from the guest to the host.
    TcpOut,
    /// TCP from the host to the guest.
    TcpIn,
    /// 64 bytes there and back over TCP.
    TcpRoundTrips,
    /// What a protected guest computes.
    Work,
    /// How often it is checkpointed.
    Rate,
}

impl Metric {
    /// A label for people, and the unit.
    #[must_use]
    pub const fn label(self) -> (&'static str, &'static str) {
        match self {
            Self::Api => ("exec to API ready", "ms"),
            Self::FirstByte => ("exec to first byte", "ms"),
            Self::Init => ("exec to init", "ms"),
            Self::InitDevices => ("exec to init, disk and NIC", "ms"),
            Self::Private => ("private memory beyond RAM", "KiB"),
            Self::Status => ("query-status round trip", "us"),
            Self::Stop => ("stop round trip", "us"),
            Self::Cont => ("cont round trip", "us"),
            Self::SaveSynced => ("save of 64 MiB, until on disk", "ms"),
            Self::SaveRatio => ("save / dd", "x"),
            Self::LivePause => ("save while it runs, pause", "ms"),
            Self::ScatteredDirectory => ("pause, into a directory", "ms"),
            Self::ScatteredStream => ("pause, into a stream", "ms"),
            Self::Restore => ("restore 256 MiB, exec to byte", "ms"),
            Self::RestoreLarge => ("restore 4 GiB, exec to byte", "ms"),
            Self::List => ("stratoctl list, 100 domains", "ms"),
            Self::ManyWall => ("machines, first exec to last byte", "ms"),
            Self::ManyCpu => ("machines, CPU of each", "ms"),
            Self::ManyPrivate => ("machines, private memory", "KiB"),
            Self::ManyPss => ("machines, PSS beyond guest's", "KiB"),
            Self::ManyGuest => ("machines, guest's untouched", "KiB"),
            Self::ClonesWall => ("clones, first exec to last byte", "ms"),
            Self::ClonesCpu => ("clones, CPU of each", "ms"),
            Self::ClonesPrivate => ("clones, private memory", "KiB"),
            Self::ClonesPss => ("clones, PSS beyond guest's", "KiB"),
            Self::ClonesGuest => ("clones, guest's untouched", "KiB"),
            Self::Pause => ("pause", "ms"),
            Self::PausePark => ("pause: stopping vCPUs and devices", "ms"),
            Self::PauseHarvest => ("pause: finding changed pages", "ms"),
            Self::PauseCopy => ("pause: copying pages", "ms"),
            Self::PauseState => ("pause: reading the state", "ms"),
            Self::Period => ("period", "ms"),
            Self::DirtyPages => ("pages in a checkpoint", "pages"),
            Self::Encode => ("encoding", "ms"),
            Self::WireShare => ("bytes on the wire, of its pages'", "%"),
            Self::CommitLag => ("commit lag", "ms"),
            Self::LoneRequest => ("lone request", "ms"),
            Self::Failover => ("kill -9 to running", "ms"),
            Self::FailoverDetect => ("failover: until the suspicion", "ms"),
            Self::FailoverApply => ("failover: building the machine", "ms"),
            Self::FailoverRun => ("failover: decision to first step", "ms"),
            Self::BackupMemory => ("backup's memory beyond RAM", "MiB"),
            Self::TcpOutCpu => ("TCP guest to host, CPU", "ns/B"),
            Self::TcpInCpu => ("TCP host to guest, CPU", "ns/B"),
            Self::TcpRoundTripCpu => ("TCP round trip, CPU", "us"),
            Self::SeqRead => ("sequential read, 1 MiB", "MB/s"),
            Self::SeqWrite => ("sequential write, 1 MiB", "MB/s"),
            Self::RandRead1 => ("random read 4 KiB, depth 1", "IOPS"),
            Self::RandWrite1 => ("random write 4 KiB, depth 1", "IOPS"),
            Self::RandRead32 => ("random read 4 KiB, depth 32", "IOPS"),
            Self::TcpOut => ("TCP guest to host", "Gbit/s"),
            Self::TcpIn => ("TCP host to guest", "Gbit/s"),
            Self::TcpRoundTrips => ("TCP round trips of 64 bytes", "1/s"),
            Self::Work => ("work of the guest", "1/s"),
            Self::Rate => ("checkpoints a second", "1/s"),
        }
    }

    /// The figure for the CPU time that this rate costs, and the factor from CPU seconds per
    /// second, divided by this rate, to its unit.
    #[must_use]
    pub const fn cost(self) -> Option<(Self, f64)> {
        match self {
            // Nanoseconds a byte, at Gbit/s.
            Self::TcpOut => Some((Self::TcpOutCpu, 8.0)),
            Self::TcpIn => Some((Self::TcpInCpu, 8.0)),
            // Microseconds a round trip.
            Self::TcpRoundTrips => Some((Self::TcpRoundTripCpu, 1e6)),
            _ => None,
        }
    }

    /// Whether higher is better.
    #[must_use]
    pub const fn more_is_better(self) -> bool {
        self as u8 >= Self::SeqRead as u8
    }
}

/// The guests and places of a measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scenario {
    /// A few instructions, on this machine's own KVM.
    Payload,
    /// Saving and restoring a guest that only reports that it runs.
    Snapshots,
    /// Many domains of `stratoctl`: for this monitor only.
    Domains,
    /// Linux on this machine's own KVM.
    Linux,
    /// Saves of a native Linux while it writes all over its memory.
    Scattered,
    /// Linux in the emulated host.
    Emulated,
    /// Many machines at once.
    Density,
    /// A few instructions, without devices.
    Start,
    /// Linux without devices.
    Boot,
    /// Small reads and writes of Linux, and TCP.
    Io,
    /// Linux that is protected, and writes few pages between two checkpoints.
    RemusFew,
    /// The same with many pages.
    RemusMany,
    /// The same with more than is worth a checkpoint each time: the period adapts.
    RemusAuto,
    /// Linux that unpacks an archive.
    RemusUnpack,
    /// Linux with a database.
    RemusDatabase,
    /// A protected guest on one of two hosts, and a client outside.
    RemusHosts,
    /// The same with a disk, and few pages between two checkpoints at a fixed period.
    RemusHeld,
    /// A guest and its backup on one host, where a fence decides.
    RemusLocal,
}

impl Scenario {
    /// For people.
    #[must_use]
    pub const fn title(self) -> &'static str {
        match self {
            Self::Payload => "A payload of a few instructions",
            Self::Snapshots => "Save and restore",
            Self::Domains => "Many domains",
            Self::Linux => "Linux",
            Self::Scattered => "Save with 2,000 scattered pages",
            Self::Emulated => "Linux in the emulated host",
            Self::Density => "Many machines at once",
            Self::Start => "A payload, without devices",
            Self::Boot => "Linux, without devices",
            Self::Io => "Linux, 4 KiB and TCP",
            Self::RemusFew => "200 pages every 25 ms",
            Self::RemusMany => "2,000 pages every 100 ms",
            Self::RemusAuto => "2,000 pages per 25 ms of work",
            Self::RemusUnpack => "An archive is unpacked",
            Self::RemusDatabase => "A database",
            Self::RemusHosts => "Two hosts",
            Self::RemusHeld => "Two hosts, 200 pages every 25 ms",
            Self::RemusLocal => "One host, with a fence",
        }
    }
}

/// One message of the measuring process.
#[expect(missing_docs, reason = "the fields' names describe them")]
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Message {
    /// How many steps there will be.
    Plan(usize),
    /// A monitor that takes part, and its version.
    Monitor { name: String, version: String },
    /// What is being done now.
    Step(String),
    /// A figure.
    Sample { scenario: Scenario, metric: Metric, monitor: String, value: f64 },
    /// One part of a scenario failed under a monitor in one run.
    Failed { scenario: Scenario, part: String, monitor: String, error: String },
    /// How a monitor answered while something was blocked.
    Held { hold: held::Hold, question: held::Question, answer: held::Answer },
    /// What could not be blocked here, and why.
    NotHeld { hold: held::Hold, error: String },
    /// The measurement has ended; with the reason, if it ended early.
    Done(Option<String>),
}
