//! Why a machine could not be built.
use std::{io, path::PathBuf};

use config::{slots::SlotsError, topology::TopologyError};
use devices::{
    backend::{disk::DiskError, net::tap::TapError},
    virtio::net,
};

use crate::{
    DirtyError, boot::BootError, kvm::KvmError, legacy::LegacyError, machine::RunError,
    memory::MemoryError, quiesced::RestoreError, slots::SlotError,
};

/// Why the machine could not be built.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the error messages describe them")]
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
    #[error("disk {id}: {} is also the image of disk {other}; make both read-only, or give each \
             its own", path.display())]
    SameImage { id: String, other: String, path: PathBuf },
    #[error(
        "disk {id}: {} does not exist; it is the guest's root disk, as there is no initrd: give \
         the path of an image with a root file system",
        path.display()
    )]
    RootDisk { id: String, path: PathBuf },
    #[error("NIC {id}")]
    Tap { id: String, source: TapError },
    #[error("NIC {id}")]
    NicSettings { id: String, source: net::PlugError },
    #[error("{kind} {id}")]
    Device { kind: &'static str, id: String, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("{id}: out of file descriptors")]
    Descriptor { id: String, source: io::Error },
    #[error("{what} {id} names the I/O thread {iothread}, which does not exist")]
    NoIoThread { what: &'static str, id: String, iothread: String },
    #[error(transparent)]
    Slots(#[from] SlotsError),
    #[error(transparent)]
    Topology(#[from] TopologyError),
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    #[error("{0}")]
    Cpu(String),
    #[error("cannot keep what its memory holds")]
    Undo(#[source] io::Error),
    #[error(transparent)]
    Dirty(#[from] DirtyError),
    #[error(transparent)]
    Restore(#[from] RestoreError),
    #[error(transparent)]
    Run(#[from] RunError),
    #[error("cannot create the register window")]
    Window(#[source] io::Error),
    #[error("the host has no random numbers for the generation id")]
    Random(#[source] io::Error),
}
