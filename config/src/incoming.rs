//! `-incoming`: where a saved state is, how its memory becomes the guest's, and which settings
//! differ from the saved ones.
use std::path::PathBuf;

use crate::{
    Topology,
    types::{CpuCount, Id, MemorySize},
};

/// A machine to restore from a saved state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Incoming {
    /// Where its state is.
    pub source: Source,
    /// The guest's clock continues as if it had not been stopped since the save.
    pub clock_realtime: bool,
    /// Settings that replace the saved ones.
    pub overrides: Overrides,
}

/// Where a saved state is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// In a directory.
    Directory {
        /// The directory.
        path: PathBuf,
        /// How its memory becomes the guest's.
        mapping: Mapping,
        /// Directory for the machine's own copies of the disks in the save.
        disks: Option<PathBuf>,
    },
    /// Received as a stream.
    Stream(StreamSource),
    /// A backup of a replicated machine, which arrives here only by a failover.
    Replica(Replica),
}

/// A backup of a replicated machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replica {
    /// Where the primary connects.
    pub place: Place,
    /// Who decides which side may run the guest.
    pub arbiter: Arbiter,
    /// How its connections are protected.
    pub tls: Tls,
}

/// Where a backup listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A socket at this path, which is created for it.
    Unix(PathBuf),
    /// TCP, at `HOST:PORT`.
    Tcp(String),
}

/// How connections are protected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tls {
    /// By being within this host, and refused otherwise.
    Local,
    /// Not at all.
    Off,
    /// By TLS, with the certificates in this directory.
    Directory(PathBuf),
}

/// Who decides which side of a replicated machine may run the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Arbiter {
    /// The witness of this identity.
    Witness(String),
    /// A fence of this kind.
    Fence(String),
    /// A person.
    None,
}

/// How saved memory becomes the guest's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mapping {
    /// Copied, and checked against its checksums, before the guest runs.
    Off,
    /// Mapped, without a check.
    On,
    /// Copied and checked while the guest runs; pages that it touches come first.
    Uffd,
}

/// Where a stream comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamSource {
    /// From the first client that connects to this socket, which is created for it.
    Unix(PathBuf),
    /// From an inherited descriptor.
    Fd(i32),
    /// From the standard output of this shell command.
    Exec(String),
}

/// Single values that replace the saved ones; values not given stay as saved.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "named as in the machine's configuration")]
pub struct Overrides {
    pub name: Option<Id>,
    pub uuid: Option<String>,
    pub smp: Option<(CpuCount, Topology)>,
    pub memory: Option<MemorySize>,
    pub memory_shared: Option<bool>,
    pub memory_dump: Option<bool>,
    pub kernel: Option<PathBuf>,
    pub initrd: Option<PathBuf>,
    pub cmdline: Option<String>,
    pub disk_slots: Option<usize>,
    pub nic_slots: Option<usize>,
    /// Its disks may differ from the saved ones: the user vouches for them.
    pub force: bool,
}
