//! The contents of an epoch as bytes: pages, sections of the machine's state and disk writes, which
//! travel between the [messages](crate::wire) of a connection, in frames of the same form.
//!
//! ```text
//! kind u32  length u32  term u64  epoch u64  body  crc u32
//!
//! 32 Begin    serial u32  pages u64  wall_time u64
//! 33 Pages    (address u64  length u16  bytes)..            4096 bytes, or fewer of LZ4
//! 34 Zeros    (address u64  pages u64)..
//! 35 Delta    (address u64  base u32  length u16  bytes)..  LZ4 of the difference
//! 36 Section  length u8  name  total u32  offset u32  bytes  at most 256 KiB of it
//! 37 Disk     disk u16  op u8  seq u32  offset u64  length u64  data
//! 38 Close    pages u64  zeros u64  sections u32  writes u32  digest u64
//!
//! Begin  (Pages | Zeros | Delta | Section | Disk)..  Close  End(epoch)
//! ```
//! Little-endian. Kinds are those of no other frame; one with bit 31 that is not known is skipped.
//! Between these frames there may be any other message.
//!
//! **Serial.** Each `Begin` of a connection has the next serial number, beginning with 1. While a
//! backup is being filled, one epoch has several rounds, each with a `Begin`; otherwise it has one.
//! A page occurs once in a round.
//!
//! **Delta.** The difference (exclusive or) to what this connection sent last for that page; `base`
//! is the serial number under which it did. So the receiver applies it to the page as it is after
//! all earlier rounds, and need not have that page when the difference arrives: an epoch may be
//! received, and acknowledged, while the one before is still being applied. It must apply epochs in
//! order, each exactly once. What is in guest memory at that time must be what was received: code
//! that writes there (loading a vCPU's state does) has to put it back.
//!
//! A page whose contents are those that were sent last is not sent at all.
//!
//! **Close** has the numbers of what came since the last one, and the digest of the crcs of all
//! those frames, chained to the digest before it, so that no frame can be missing, duplicated or
//! reordered unnoticed. It is computed per connection, as the same epoch is other bytes when it is
//! sent again; the digest in [`Message::End`](crate::Message::End) is the epoch's name on every
//! connection, and is not compared with it.
mod bases;
mod bounds;
mod digest;
mod encoder;
mod frame;
mod held;
mod lz4;
mod reader;
mod refused;
mod rounds;

pub use bounds::Bounds;
pub use digest::chain;
pub use encoder::{Counters, Encoder};
pub use held::{Change, Held};
pub use reader::{Event, Reader, Write};
pub use refused::Refused;

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Most pages that the encoder puts into a frame of `Pages` or `Delta`.
const PAGES: usize = 64;
/// Most ranges that it puts into a frame of `Zeros`.
const RANGES: usize = 1024;
/// Most bytes of a section, or of a disk write, in one frame.
pub const PIECE: usize = 256 << 10;
/// Longest name of a section, in bytes.
pub const LONGEST_NAME: usize = 64;
/// Longest section, in bytes.
pub const LONGEST_SECTION: usize = 16 << 20;
/// What a sender keeps of pages sent earlier, if nothing else is configured: 64 MiB.
pub const CACHE: usize = 64 << 20;

/// One page.
pub type Page = [u8; PAGE];

/// What is done to a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Data is written.
    Write,
    /// The range's contents are no longer needed.
    Discard,
    /// The range becomes zero.
    Zero,
}

impl Operation {
    const ALL: [Self; 3] = [Self::Write, Self::Discard, Self::Zero];
}

/// Apply a difference to a page.
pub fn change(page: &mut [u8; PAGE], difference: &[u8]) {
    page.iter_mut().zip(difference).for_each(|(byte, difference)| *byte ^= difference);
}

/// How much came between two frames of `Close`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Pages with contents, or with a difference.
    pub pages: u64,
    /// Pages that became zero.
    pub zeros: u64,
    /// Complete sections.
    pub sections: u32,
    /// Frames of disk writes.
    pub writes: u32,
}
