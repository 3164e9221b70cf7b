//! Guest memory that returns to the host while the guest has no use for it.
use vm_memory::GuestAddress;

/// Takes memory of the guest back for the host. Devices call it from their I/O threads; a call
/// takes as long as the host's system calls on that much memory.
///
/// What was taken reads as zero, and the range is noted as written, so that saves have it. A host
/// may be able to take memory in larger units only, and not all of it: what cannot be taken keeps
/// its contents. Ranges are cut to the whole pages of 4 KiB, and to the guest's memory, that lie in
/// them.
pub trait Reclaim: Send + Sync {
    /// The guest does not need what is in `len` bytes from `at` on, and may use them again at any
    /// moment, as with free page reporting (virtio 1.3, 5.5.6.7).
    fn discard(&self, at: GuestAddress, len: u64);

    /// The same, and the guest leaves the range alone until [`Reclaim::release`], as with the pages
    /// in a balloon of which the host must be told first (VIRTIO_BALLOON_F_MUST_TELL_HOST). So
    /// parts that are smaller than the host's unit are collected, and taken when the unit is
    /// complete.
    fn withhold(&self, at: GuestAddress, len: u64);

    /// The guest is about to use `len` bytes from `at` on again.
    fn release(&self, at: GuestAddress, len: u64);

    /// It may use all of its memory again: the device was reset.
    fn release_all(&self);
}
