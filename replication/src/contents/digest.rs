//! The digest of a sequence of frames.
use sha2::{Digest as _, Sha256};

use crate::identity::Digest;

/// The digest of frames with these checksums, in this order, after those that `previous` covers:
/// the first 64 bits of SHA-256 over both. It finds errors, not forgery: that is the task of the
/// connection.
#[must_use]
pub fn chain(previous: Digest, crcs: impl IntoIterator<Item = u32>) -> Digest {
    let mut chain = Chain::after(previous);
    crcs.into_iter().for_each(|crc| chain.add(crc));
    chain.digest()
}

/// The same, frame by frame.
#[derive(Clone)]
pub struct Chain(Sha256);

impl Chain {
    /// No frame yet after `previous`.
    pub fn after(previous: Digest) -> Self {
        Self(Sha256::new_with_prefix(previous.0.to_le_bytes()))
    }

    /// One more frame, with this checksum.
    pub fn add(&mut self, crc: u32) {
        self.0.update(crc.to_le_bytes());
    }

    /// Of all frames so far.
    pub fn digest(&self) -> Digest {
        let hash = self.0.clone().finalize();
        Digest(hash.first_chunk().map_or(0, |first| u64::from_le_bytes(*first)))
    }
}
