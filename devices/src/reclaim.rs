//! Returns guest memory to the host while the guest does not use it.
use vm_memory::GuestAddress;

/// Returns guest memory to the host. Devices call it from their I/O threads; a call takes as long
/// as the host's system calls on that much memory.
///
/// Reclaimed memory reads as zero, and the range is marked dirty, so that saves include it. A host
/// may be able to reclaim memory in larger units only, and not all of it: what cannot be reclaimed
/// keeps its contents. Ranges are narrowed to the whole 4 KiB pages of guest memory that they
/// contain.
pub trait Reclaim: Send + Sync {
    /// The guest does not need the contents of `len` bytes from `at` on, and may use them again at
    /// any moment, as with free page reporting (virtio 1.3, 5.5.6.7).
    fn discard(&self, at: GuestAddress, len: u64);

    /// Like [`Reclaim::discard`], but the guest leaves the range alone until [`Reclaim::release`],
    /// as with pages in a balloon that negotiated VIRTIO_BALLOON_F_MUST_TELL_HOST. So parts smaller
    /// than the host's unit are collected, and reclaimed when the unit is complete.
    fn withhold(&self, at: GuestAddress, len: u64);

    /// The guest is about to use `len` bytes from `at` on again.
    fn release(&self, at: GuestAddress, len: u64);

    /// The guest may use all of its memory again: the device was reset.
    fn release_all(&self);
}
