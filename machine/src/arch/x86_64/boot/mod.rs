//! Boot: loads a kernel and its boot data into guest memory, and determines its entry point.
//!
//! | kernel file | entered by |
//! |---|---|
//! | ELF with a note of owner `Linux` (or Xen's guest-OS note saying so) | 64-bit Linux boot protocol |
//! | other ELF with Xen's `PHYS32_ENTRY` note, 64 or 32-bit | PVH |
//! | other 64-bit ELF | 64-bit Linux boot protocol |
//! | bzImage | 64-bit Linux boot protocol |
//! | flat `vmlinux.bin` | 64-bit Linux boot protocol, or PVH where its first instructions are that |
//!
//! Linux has both entries; the 64-bit one is preferred because it skips the guest's 32-bit start-up
//! code, and because every kernel has it, whatever its `CONFIG_PVH`.
//!
//! References: Linux `Documentation/arch/x86/boot.rst` ("the boot protocol" in this module), Xen
//! `docs/misc/pvh.pandoc` with `arch-x86/hvm/start_info.h` ("PVH").
use std::path::{Path, PathBuf};

use config::{BootConfig, cmdline::CmdlineError, places::VirtioSlot};
use devices::Memory;
use thiserror::Error;
use vm_memory::GuestAddress;

mod acpi;
mod bzimage;
mod cmdline;
mod elf;
mod flat;
mod linux;
mod mptable;
mod pvh;
mod registers;

pub use acpi::AcpiError;
pub use bzimage::BzImageError;
pub use elf::ElfError;
pub use registers::{Registers, Segment};

use crate::boot::{
    InitrdError, SourceError, initrd,
    ram::Ram,
    source::{Reading, Source},
};

/// The hardware to describe to the guest.
#[derive(Debug, Clone, Copy)]
pub struct Platform<'a> {
    /// APIC ids of the vCPUs, the boot vCPU's first. At most 254, none above 254.
    pub cpu_ids: &'a [u8],
    /// virtio-mmio slots, filled or not.
    pub slots: &'a [VirtioSlot],
    /// Whether there is a first serial port.
    pub serial: bool,
    /// Address of the 16 bytes of the generation id, if there is one.
    pub vmgenid: Option<GuestAddress>,
}

/// An APIC id for the IOAPIC: one that no processor has.
fn ioapic_id(apic_ids: &[u8]) -> u8 {
    apic_ids.iter().max().map_or(0, |id| id.saturating_add(1))
}

/// How the kernel is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// 64-bit mode, identity-mapped, `rsi` at the zero page.
    Linux64,
    /// 32-bit protected mode, no paging, `ebx` at the start info.
    Pvh,
}

/// A machine that is ready to run its kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// How the kernel is entered.
    pub protocol: Protocol,
    /// Initial registers of the boot vCPU.
    pub registers: Registers,
    /// The command line as the guest sees it.
    pub cmdline: String,
    /// Whether the guest was given ACPI tables.
    pub acpi: bool,
}

/// Why a machine cannot boot.
#[derive(Debug, Error)]
pub enum BootError {
    /// The kernel file.
    #[error("cannot boot the kernel {}", path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// Why it cannot be booted.
        source: KernelError,
    },
    /// The initrd file.
    #[error("cannot load the initrd {}", path.display())]
    Initrd {
        /// The file.
        path: PathBuf,
        /// Why it cannot be loaded.
        source: InitrdError,
    },
    /// The kernel command line.
    #[error("cannot use the kernel command line")]
    Cmdline(#[from] CmdlineError),
    /// The ACPI tables.
    #[error("cannot create the ACPI tables")]
    Acpi(#[from] AcpiError),
    /// The first megabyte is not all there, or the memory has too many pieces.
    #[error(
        "cannot write the boot tables at {address:#x}: guest RAM must begin at 0 and hold at least 16 MiB"
    )]
    Tables {
        /// The address.
        address: u64,
        /// The error of guest memory.
        source: vm_memory::GuestMemoryError,
    },
}

/// Why a kernel file cannot be booted.
#[derive(Debug, Error)]
pub enum KernelError {
    /// The file cannot be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Not a kernel.
    #[error(
        "it is {what}; a kernel is an x86-64 ELF vmlinux, a bzImage or a flat vmlinux.bin{hint}"
    )]
    NotAKernel {
        /// What it looks like.
        what: String,
        /// What to do about it; may be empty.
        hint: &'static str,
    },
    /// An ELF file that is inconsistent or cannot be loaded.
    #[error(transparent)]
    Elf(#[from] ElfError),
    /// A bzImage that is inconsistent or too old.
    #[error(transparent)]
    BzImage(#[from] BzImageError),
    /// A part of the kernel lies outside of the RAM for it.
    #[error(
        "{part} needs {start:#x} to {end:#x}, but the RAM for kernels is {:#x} to {:#x}: {hint}",
        ram.start,
        ram.end
    )]
    DoesNotFit {
        /// Which part.
        part: String,
        /// Its first byte.
        start: u64,
        /// The byte after it.
        end: u64,
        /// The RAM for kernels.
        ram: std::ops::Range<u64>,
        /// What to do about it.
        hint: &'static str,
    },
}

/// A kernel in guest memory, without its boot data yet.
pub(crate) struct Loaded {
    protocol: Protocol,
    entry: u64,
    /// It is known to be Linux.
    linux: bool,
    /// Everything that the kernel occupies before it reads the memory map.
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// Longest command line that it accepts, without the terminator.
    cmdline_max: usize,
    /// Last byte an initrd may have.
    pub(crate) initrd_max: u64,
    /// Header for the zero page, if the file has one.
    header: Option<linux_loader::loader::bootparam::setup_header>,
    /// Uncompressed image in guest memory that can be searched.
    image: Vec<std::ops::Range<u64>>,
}

/// Load kernel, initrd, command line, ACPI or MP tables and boot parameters into `memory`.
///
/// `memory` must be zero, as it is when new; before a reset, drop its pages (`madvise`,
/// `fallocate`). Zeros that a kernel expects are not written: that would only touch pages.
///
/// # Errors
/// When a file cannot be read, has the wrong format or does not fit. Memory may then be partly
/// written.
pub fn load(memory: &Memory, boot: &BootConfig, platform: &Platform) -> Result<Entry, BootError> {
    load_reading(memory, boot, platform, Reading::AtStart)
}

/// As [`load`], and its files are read as `reading` says.
///
/// # Errors
/// As [`load`].
pub(crate) fn load_reading(
    memory: &Memory,
    boot: &BootConfig,
    platform: &Platform,
    reading: Reading<'_>,
) -> Result<Entry, BootError> {
    let ram = Ram::of(memory);
    let loaded = load_kernel(memory, &ram, &boot.kernel, reading)?;
    let discovery = cmdline::discover(&boot.cmdline, platform.slots, || {
        cmdline::kernel_words(memory, &loaded.image)
    });
    let cmdline = cmdline::check(discovery.cmdline, loaded.linux, loaded.cmdline_max)?;
    let initrd = match &boot.initrd {
        None => None,
        Some(path) => {
            Some(initrd::load(memory, &ram, path, &loaded, reading).map_err(initrd_error(path))?)
        }
    };
    mptable::write(memory, platform.cpu_ids)?;
    let rsdp = match discovery.acpi {
        None => None,
        Some(slots) => Some(acpi::write(memory, &Platform { slots: &slots, ..*platform })?),
    };
    cmdline::write(memory, &cmdline)?;
    let map = ram.map();
    let registers = match loaded.protocol {
        Protocol::Linux64 => {
            linux::write(memory, &loaded, &cmdline, initrd.as_ref(), rsdp, &map)?;
            registers::linux64(memory, loaded.entry)?
        }
        Protocol::Pvh => {
            pvh::write(memory, initrd.as_ref(), rsdp, &map)?;
            registers::pvh(memory, loaded.entry)?
        }
    };
    Ok(Entry { protocol: loaded.protocol, registers, cmdline, acpi: rsdp.is_some() })
}

/// All errors of the files of `boot` and its command line, found by loading them into `memory`,
/// which no guest uses.
pub(crate) fn preflight(memory: &Memory, boot: &BootConfig) -> Vec<BootError> {
    let ram = Ram::of(memory);
    let reading = Reading::AtStart;
    let kernel = load_kernel(memory, &ram, &boot.kernel, reading);
    let initrd = boot.initrd.as_deref().and_then(|path| {
        let read = match &kernel {
            Ok(loaded) => initrd::load(memory, &ram, path, loaded, reading).map(drop),
            Err(_) => initrd::open(path, reading).map(drop),
        };
        read.map_err(initrd_error(path)).err()
    });
    let cmdline = kernel.as_ref().ok().and_then(|loaded| {
        let discovery = cmdline::discover(&boot.cmdline, &[], || None);
        cmdline::check(discovery.cmdline, loaded.linux, loaded.cmdline_max).err()
    });
    kernel.err().into_iter().chain(initrd).chain(cmdline.map(BootError::from)).collect()
}

fn initrd_error(path: &Path) -> impl FnOnce(InitrdError) -> BootError {
    move |source| BootError::Initrd { path: path.into(), source }
}

fn load_kernel(
    memory: &Memory,
    ram: &Ram,
    path: &Path,
    reading: Reading<'_>,
) -> Result<Loaded, BootError> {
    let load = || {
        let file = Source::open(path, reading)?;
        let head = file.head()?;
        if elf::is(&head) {
            elf::load(memory, ram, &file, &head)
        } else if bzimage::is(&head) {
            bzimage::load(memory, ram, &file, &head)
        } else {
            flat::load(memory, ram, &file, &head)
        }
    };
    load().map_err(|source| BootError::Kernel { path: path.into(), source })
}

#[cfg(test)]
mod tests;
