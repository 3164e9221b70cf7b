//! Why a peer's bytes are refused.
use super::{LONGEST_SECTION, PAGE};
use crate::{
    identity::{Epoch, Term},
    wire::WireError,
};

/// Why a peer's bytes are refused. The connection cannot be used any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// A message is not valid, or the kind is neither known nor optional.
    #[error(transparent)]
    Message(#[from] WireError),
    /// The length is more than a frame of this kind has.
    #[error("a frame of kind {kind} claims {length} bytes")]
    TooLong {
        /// Its kind.
        kind: u32,
        /// What it claims.
        length: u32,
    },
    /// The checksum does not fit.
    #[error("a frame of kind {0} is damaged (checksum)")]
    Checksum(u32),
    /// The body is too short, too long, or has an invalid value.
    #[error("the body of a frame of kind {0} is not valid")]
    Body(u32),
    /// Contents of an epoch before they were asked for, or outside of one.
    #[error("a frame of kind {0} comes outside of an epoch")]
    Outside(u32),
    /// Contents of another term.
    #[error("contents are of {got}, not of {expected}")]
    Term {
        /// The connection's.
        expected: Term,
        /// The frame's.
        got: Term,
    },
    /// An epoch is repeated, missing, or not complete.
    #[error("epoch {} comes where {} should", .got.0, .expected.0)]
    Epoch {
        /// What should come.
        expected: Epoch,
        /// What came.
        got: Epoch,
    },
    /// A `Begin` is repeated or missing.
    #[error("round {got} of the connection comes where {expected} should")]
    Serial {
        /// What should come.
        expected: u32,
        /// What came.
        got: u32,
    },
    /// No such guest memory.
    #[error("{pages} pages at {address:#x} are not guest memory")]
    NotMemory {
        /// The guest-physical address.
        address: u64,
        /// How many.
        pages: u64,
    },
    /// Not the address of a page.
    #[error("{0:#x} is not the address of a page")]
    Unaligned(u64),
    /// A page came before in the same round.
    #[error("page {0:#x} comes twice")]
    Twice(u64),
    /// A difference to something that this connection did not send last.
    #[error("page {address:#x} is a difference to round {base}; its last contents are of {last}")]
    Base {
        /// The page.
        address: u64,
        /// What it is a difference to.
        base: u32,
        /// The round in which the page came last; 0 for none.
        last: u32,
    },
    /// What is packed is not one page.
    #[error("page {0:#x} does not unpack to {PAGE} bytes")]
    Packed(u64),
    /// There are more pages than `Begin` says.
    #[error("there are more pages than the {0} that the round began with")]
    TooMany(u64),
    /// The epoch needs more memory than allowed.
    #[error("the epoch needs more than the {0} bytes that are allowed (max-epoch)")]
    TooMuch(u64),
    /// A section that the machine does not have.
    #[error("a section is of no known name")]
    SectionName,
    /// A section is too long, or its pieces are not in order or not complete.
    #[error("a section is incomplete, repeated, or longer than {LONGEST_SECTION} bytes")]
    Section,
    /// A disk that the machine does not have.
    #[error("there is no disk {0}")]
    NoDisk(u16),
    /// A disk write is repeated or missing.
    #[error("disk write {got} comes where {expected} should")]
    Sequence {
        /// What should come.
        expected: u32,
        /// What came.
        got: u32,
    },
    /// A write outside the disk.
    #[error("{length} bytes at {offset} are outside of disk {disk}")]
    OutsideDisk {
        /// The disk.
        disk: u16,
        /// Where, in bytes.
        offset: u64,
        /// How many.
        length: u64,
    },
    /// Frames are missing, repeated or reordered.
    #[error("parts of the epoch are missing, repeated or reordered")]
    Whole,
}
