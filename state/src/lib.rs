//! The format of a saved machine, independent of the code that runs it: no KVM, no devices. The
//! types here define the contents of a file; `machine`, `devices` and `config` convert to them and
//! from them.
//!
//! ```text
//! frame     the byte format: frames with a length and a checksum each, in a file or a stream
//! section   one part: its kind, its id, its version, and JSON; an older version is upgraded here
//! file      all parts of one machine, in any order
//! config    the configuration that a machine needs before the rest is restored into it
//! cpu       vCPUs, and the CPU features that they offer to the guest
//! chips     interrupt controllers, timer, clock
//! device    the saved form of each kind of device
//! hex       numbers and bytes written in hexadecimal
//!
//! directory      a save in a directory, and the saves that it builds on
//! memory_file    guest memory in a file: blocks, checksums, and a page that names its save
//! backing_chain  memory files layered over each other    kept_disks  disks that a save keeps
//! mark           how an image is recognised              sparse      where a file has data
//! regular_file   opening a file only if it is a regular one
//! ```
//! `docs/state-format.md` describes the format for other programs. All input is treated as hostile:
//! lengths are bounds, unknown fields and unknown parts are errors.
#![forbid(unsafe_code)]

pub mod backing_chain;
pub mod chips;
pub mod config;
pub mod cpu;
pub mod device;
pub mod directory;
pub mod file;
pub mod frame;
pub mod hex;
pub mod kept_disks;
pub mod mark;
pub mod memory_file;
pub mod regular_file;
pub mod section;
pub mod sparse;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

use chips::{Chips, Clock};
pub use config::Config;
use cpu::{Cpu, Vcpu};
pub use file::{FileError, Frames, Sections, State};
pub use section::{Saved, Section, SectionError};

/// Every kind of part, with its current version. The golden files include each.
pub const PARTS: [(&str, u32); 15] = [
    part::<Config>(),
    part::<Cpu>(),
    part::<Vcpu>(),
    part::<Chips>(),
    part::<Clock>(),
    part::<device::Serial>(),
    part::<device::I8042>(),
    part::<device::Cmos>(),
    part::<device::Power>(),
    part::<device::Pvpanic>(),
    part::<device::VirtioMmio>(),
    part::<device::Disk>(),
    part::<device::Nic>(),
    part::<device::Console>(),
    part::<device::Rng>(),
];

const fn part<S: Saved>() -> (&'static str, u32) {
    (S::KIND, S::VERSION)
}
