//! The form of a saved machine, apart from whatever runs it: no KVM, no devices. The types here are
//! what is in a file; `machine`, `devices` and `config` convert to them and from them.
//!
//! ```text
//! frame     the bytes: frames with a length and a checksum each, in a file or a stream
//! section   one part: its kind, its id, its version, and JSON; an older version is upgraded here
//! file      all parts of one machine, in whatever order they came
//! config    what a machine has to be made of before the rest is restored into it
//! cpu       vCPUs, and what their CPU promised to the guest
//! chips     interrupt controllers, timer, clock
//! device    what each kind of device keeps
//! hex       numbers and bytes that people read in hexadecimal
//!
//! directory      a save as it lies in a directory, and those that it builds on
//! memory_file    guest memory in a file: blocks, checksums, and the page that says whose it is
//! backing_chain  several of those, one over the other     kept_disks    disks that a save keeps
//! mark           what an image is known by                sparse        where a file has data
//! regular_file   opening one in whose place something else may have got
//! ```
//! `docs/state-format.md` describes the same for other programs. Whatever is read is treated as
//! hostile: lengths are bounds, unknown fields and unknown parts are errors.
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

/// Every kind of part that there is, with its present version. A golden file has each.
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
