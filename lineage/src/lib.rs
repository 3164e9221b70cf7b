//! What a replicated guest keeps on disk, on both sides, so that a power cut at any moment leaves
//! images that hold one moment of the guest, and words that say whether it may start from them.
//!
//! - [`Sidecar`]: a small file beside each image with the word ([`replication::Mark`]) of the term
//!   that the image is part of. [`Images`] reads those of one guest together.
//! - [`JournalFile`]: the backup's journal, one for all images of a guest. An epoch is durable there
//!   before a byte of it reaches an image; [`replication::Journal`] keeps the order.
//! - [`pieces`]: which parts of two images differ.
//!
//! Everything here may wait for storage, which may hang: it belongs on a thread that may, too.
#![forbid(unsafe_code)]

mod frame;
mod images;
mod journal;
mod medium;
pub mod pieces;
mod ring;
mod sidecar;

pub use frame::{Change, LONGEST_DATA};
pub use images::{Images, ImagesError, Permission};
pub use journal::{JournalError, JournalFile, Place, TRIM_AFTER, TRIM_BYTES};
pub use medium::{Image, Medium};
pub use replication::{Bond, Epoch, Incarnation, Lineage, Mark, Pair, Side, Term};
pub use sidecar::{ARBITER_LIMIT, Entry, Sidecar, SidecarError};
