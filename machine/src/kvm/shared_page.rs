//! A page that KVM shares with the monitor.
// UNSAFETY: it is memory that the kernel writes.
#![expect(unsafe_code, reason = "mmap, and atomic access to what it returns")]
use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    ptr::NonNull,
    sync::atomic::{AtomicU8, AtomicU32},
};

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// A mapping of one page of a vCPU's descriptor.
pub struct SharedPage(NonNull<u8>);

// SAFETY: the mapping belongs to the process, and is only accessed atomically.
unsafe impl Send for SharedPage {}
// SAFETY: as above.
unsafe impl Sync for SharedPage {}

impl SharedPage {
    /// Map page `number` of `vcpu`.
    ///
    /// # Errors
    /// When the host refuses the mapping.
    pub fn map(vcpu: &impl AsRawFd, number: u32) -> io::Result<Self> {
        let (fd, offset): (RawFd, _) = (vcpu.as_raw_fd(), i64::from(number) * PAGE as i64);
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new shared mapping at an address of the kernel's choice.
        let at =
            unsafe { libc::mmap(std::ptr::null_mut(), PAGE, access, libc::MAP_SHARED, fd, offset) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(at.cast()).map(Self).ok_or_else(io::Error::last_os_error)
    }

    /// The byte at `OFFSET`, which lies inside the page.
    pub fn byte<const OFFSET: usize>(&self) -> &AtomicU8 {
        const { assert!(OFFSET < PAGE) };
        // SAFETY: inside the page, and the mapping lives as long as `self`.
        unsafe { AtomicU8::from_ptr(self.0.as_ptr().add(OFFSET)) }
    }

    /// The aligned word that `offset` lies in, modulo the size of the page.
    pub fn word(&self, offset: usize) -> &AtomicU32 {
        let aligned = (offset % PAGE) & !3;
        // SAFETY: inside the page and aligned, and the mapping lives as long as `self`.
        unsafe { AtomicU32::from_ptr(self.0.as_ptr().add(aligned).cast()) }
    }
}

impl Drop for SharedPage {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, and no reference is left.
        unsafe { libc::munmap(self.0.as_ptr().cast(), PAGE) };
    }
}
