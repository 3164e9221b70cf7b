//! System calls that the standard library lacks. Where rustix lacks them too (locks of an open file,
//! BLKDISCARD, buffers that are guest memory), they are made here.
// UNSAFETY: the room for a disk's system calls. Each takes a descriptor that a `File` keeps open,
// and memory that lives as long as the call.
#![expect(unsafe_code)]
use std::{fs::File, io, mem, os::fd::AsRawFd};

use rustix::{
    fs::{AtFlags, FallocateFlags, OFlags, StatxFlags, ioctl_blkpbszget, ioctl_blksszget, statx},
    io::retry_on_intr,
};

// linux/fs.h; the libc crate lacks it.
const BLKDISCARD: libc::c_ulong = 0x1277;

/// A system call's return value as a result.
fn check(value: impl Into<i64>) -> io::Result<usize> {
    usize::try_from(value.into()).map_err(|_| io::Error::last_os_error())
}

/// Repeat while a signal interrupts.
fn retry(mut call: impl FnMut() -> i64) -> io::Result<usize> {
    loop {
        match check(call()) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// Turn `O_NONBLOCK` off.
pub fn clear_nonblock(file: &File) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(file)?;
    Ok(rustix::fs::fcntl_setfl(file, flags - OFlags::NONBLOCK)?)
}

/// What kind of file system a file is on, as far as it matters to a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileSystem {
    /// procfs: the kernel makes its files up.
    Proc,
    /// tmpfs: nothing ever waits for a medium.
    Memory,
    /// Any other.
    Other,
}

/// The kind of file system that `file` is on.
pub fn file_system(file: &File) -> FileSystem {
    match rustix::fs::fstatfs(file).map(|found| found.f_type) {
        Ok(libc::PROC_SUPER_MAGIC) => FileSystem::Proc,
        Ok(libc::TMPFS_MAGIC) => FileSystem::Memory,
        _ => FileSystem::Other,
    }
}

/// What to do with the lock on a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lock {
    /// Keep everybody else out.
    Exclusive,
    /// Keep writers out.
    Shared,
    /// Let go.
    Release,
}

/// Lock the whole file without waiting, or let go of it. The lock is the open file's, not the
/// process's.
pub fn lock(file: &File, how: Lock) -> io::Result<()> {
    // SAFETY: all-zero bytes are a valid flock: the whole file, process id 0 as OFD locks ask.
    let mut whole: libc::flock = unsafe { mem::zeroed() };
    let kind = match how {
        Lock::Exclusive => libc::F_WRLCK,
        Lock::Shared => libc::F_RDLCK,
        Lock::Release => libc::F_UNLCK,
    };
    whole.l_type = kind as libc::c_short;
    whole.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: `whole` outlives the call, which only reads it.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &whole) }).map(drop)
}

/// Logical and physical sector size of a block device.
pub fn sector_sizes(file: &File) -> io::Result<(u32, u32)> {
    let (logical, physical) = (ioctl_blksszget(file)?, ioctl_blkpbszget(file)?);
    let sane = |n: u32| if n.is_power_of_two() { n.clamp(512, 65536) } else { 512 };
    Ok((sane(logical), sane(physical)))
}

/// What `O_DIRECT` wants of buffer addresses and of offsets: powers of two.
pub fn direct_alignment(file: &File) -> (u64, u64) {
    let found = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    match found.map(|found| (found.stx_dio_mem_align, found.stx_dio_offset_align)) {
        Ok((memory, offset)) if memory.is_power_of_two() && offset.is_power_of_two() => {
            (memory.into(), offset.into())
        }
        // Linux before 6.1 or a file system that does not say: what suits every disk.
        _ => (4096, 4096),
    }
}

/// Make written data durable.
pub fn fdatasync(file: &File) -> io::Result<()> {
    Ok(retry_on_intr(|| rustix::fs::fdatasync(file))?)
}

/// Change how a range is allocated.
pub fn fallocate(file: &File, mode: i32, offset: u64, len: u64) -> io::Result<()> {
    let mode = FallocateFlags::from_bits_retain(mode.cast_unsigned());
    Ok(retry_on_intr(|| rustix::fs::fallocate(file, mode, offset, len))?)
}

/// Tell a block device that a range is not needed any more.
pub fn discard_device(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let range = [offset, len];
    // SAFETY: BLKDISCARD reads two u64.
    retry(|| unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD, range.as_ptr()) }.into()).map(drop)
}

/// `preadv2` into the front of `to`.
///
/// # Safety
/// The buffers must be writable memory that nobody holds a reference to.
pub unsafe fn read(file: &File, to: &[libc::iovec], at: u64, flags: i32) -> io::Result<usize> {
    let (at, count) = (signed(at)?, count(to));
    // SAFETY: `count` is at most the slice's length; the caller vouches for the buffers.
    retry(|| unsafe { libc::preadv2(file.as_raw_fd(), to.as_ptr(), count, at, flags) } as i64)
}

/// `pwritev2` from the front of `from`.
///
/// # Safety
/// The buffers must be readable memory.
pub unsafe fn write(file: &File, from: &[libc::iovec], at: u64, flags: i32) -> io::Result<usize> {
    let (at, count) = (signed(at)?, count(from));
    // SAFETY: `count` is at most the slice's length; the caller vouches for the buffers.
    retry(|| unsafe { libc::pwritev2(file.as_raw_fd(), from.as_ptr(), count, at, flags) } as i64)
}

/// As many buffers as one call takes (UIO_MAXIOV).
fn count(buffers: &[libc::iovec]) -> libc::c_int {
    buffers.len().min(1024) as libc::c_int
}

fn signed(n: u64) -> io::Result<i64> {
    i64::try_from(n).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}
