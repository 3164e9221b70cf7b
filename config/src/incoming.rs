//! What `-incoming` says: where a saved state is, how its memory becomes the guest's, and what of
//! the machine is to be other than it was saved.
use std::path::PathBuf;

use crate::{
    Topology,
    types::{CpuCount, MemorySize},
};

/// A machine that resumes where a saved one stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Incoming {
    /// Where its state is.
    pub source: Source,
    /// The guest's clock continues as if it had not been stopped since the save.
    pub clock_realtime: bool,
    /// What of the machine is other than it was saved.
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
        /// Directory of the machine's own copies of the disks that the save keeps.
        disks: Option<PathBuf>,
    },
    /// It is sent.
    Stream(StreamSource),
}

/// How saved memory becomes the guest's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mapping {
    /// Copied, and compared with its checksums, before the guest runs.
    Off,
    /// Mapped, and trusted.
    On,
    /// Copied and compared while the guest runs, what it touches first.
    Uffd,
}

/// Where a stream comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamSource {
    /// From the first one to connect to this socket, which is made for it.
    Unix(PathBuf),
    /// From an inherited descriptor.
    Fd(i32),
    /// From the standard output of this shell command.
    Exec(String),
}

/// Single values that replace the saved ones: what is not given is as it was saved.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "named as in the machine's configuration")]
pub struct Overrides {
    pub name: Option<String>,
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
    /// Its disks may be other ones than were saved: the user vouches for them.
    pub force: bool,
}
