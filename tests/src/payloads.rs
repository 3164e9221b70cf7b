//! Bare-metal guests of `tests/guest` for programs outside this crate, as ELF files to boot.

/// Reports that it runs, and halts.
pub const HELLO: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/hello.elf"));
/// Uses its disk correctly or incorrectly; with `busy` on its command line, endlessly.
pub const BLK: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/blk.elf"));
/// Keeps the queues of its disks full of WRITE_ZEROES.
pub const FLOOD: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/flood.elf"));
