//! Memory that is filled when it is first touched, by a thread that answers its page faults (Linux,
//! Documentation/admin-guide/mm/userfaultfd).
//!
//! KVM and the kernel's own reads and writes fault, too, so a descriptor for user-mode faults only
//! would not do; and an unprivileged process gets only such a one by default.
// UNSAFETY: ioctls that take addresses of guest memory.
#![expect(unsafe_code, reason = "userfaultfd has no safe interface")]
use std::{
    fs::File,
    io::{self, Read},
    ops::Range,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd},
};

use config::MemoryConfig;
use devices::Memory;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MmapRegion, bitmap::AtomicBitmap};

use super::{MemoryError, allocate, image::PAGE_SIZE};

// linux/userfaultfd.h; the libc crate lacks these.
const USERFAULTFD_IOC_NEW: libc::Ioctl = 0xaa00;
const UFFD_API: u64 = 0xaa;
const UFFDIO_API: libc::Ioctl = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
/// Wake the threads that wait for a range.
pub const UFFDIO_WAKE: libc::Ioctl = 0x8010_aa02;
/// Fill pages.
pub const UFFDIO_COPY: libc::Ioctl = 0xc028_aa03;
/// Fill pages with zeros.
pub const UFFDIO_ZEROPAGE: libc::Ioctl = 0xc020_aa04;
const UFFD_EVENT_PAGEFAULT: u8 = 0x12;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct Zeros {
    start: u64,
    len: u64,
    mode: u64,
    filled: i64,
}

/// Why missing memory could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum FaultError {
    /// The kernel has no userfaultfd, or denies it to this process.
    #[error("the host does not allow this program to use userfaultfd: {how}, or use mapped=on")]
    Refused {
        /// How the user can help it.
        how: &'static str,
        /// The host's error.
        source: io::Error,
    },
    /// userfaultfd does not support this memory.
    #[error("userfaultfd does not accept the guest's memory; use mapped=on")]
    Register(#[source] io::Error),
    /// There is not enough memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// Fills missing memory.
pub struct Filler {
    faults: File,
    /// Keeps the mappings alive, and knows their addresses.
    memory: Memory,
}

/// Allocate memory of which `missing`, ascending ranges of whole pages, must be filled; a thread
/// that touches them waits until they are. All else is zero.
///
/// # Errors
/// When the host does not have it.
pub fn allocate_missing(
    config: &MemoryConfig,
    missing: &[Range<u64>],
) -> Result<(Memory, Filler), FaultError> {
    let faults = open()?;
    let mut api = Api { api: UFFD_API, features: 0, ioctls: 0 };
    ioctl(&faults, UFFDIO_API, &mut api)
        .map_err(|source| FaultError::Refused { how: "update the host's kernel", source })?;
    // Preallocated pages would not be missing.
    let memory = allocate(&MemoryConfig { prealloc: false, ..config.clone() })?;
    let filler = Filler { faults, memory: memory.clone() };
    for range in missing {
        filler.each_part(range, |start, len| {
            let mode = UFFDIO_REGISTER_MODE_MISSING;
            let mut register = Register { start, len, mode, ioctls: 0 };
            ioctl(&filler.faults, UFFDIO_REGISTER, &mut register).map_err(FaultError::Register)
        })?;
    }
    Ok((memory, filler))
}

fn open() -> Result<File, FaultError> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // Since Linux 6.1: file permissions decide who may open it.
    let fd = match File::options().read(true).write(true).open("/dev/userfaultfd") {
        // SAFETY: this ioctl takes flags and no pointer.
        Ok(device) => unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) },
        // SAFETY: this call takes flags and no pointer.
        Err(_) => unsafe { libc::syscall(libc::SYS_userfaultfd, flags) }.try_into().unwrap_or(-1),
    };
    if fd < 0 {
        return Err(refused(io::Error::last_os_error()));
    }
    // SAFETY: the descriptor was just made, and has no other owner.
    Ok(unsafe { File::from_raw_fd(fd) })
}

fn refused(source: io::Error) -> FaultError {
    let how = match source.raw_os_error() {
        Some(libc::ENOSYS) => "update the host's kernel, or build it with CONFIG_USERFAULTFD",
        _ => "give this user /dev/userfaultfd, or set sysctl vm.unprivileged_userfaultfd=1",
    };
    FaultError::Refused { how, source }
}

impl Filler {
    /// The next page that a thread waits for, as an offset in guest memory; `None` when no thread
    /// waits.
    ///
    /// # Errors
    /// When the kernel does not report it.
    pub fn fault(&self) -> io::Result<Option<u64>> {
        let mut message = [0; 32];
        loop {
            match (&self.faults).read(&mut message) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            };
            // struct uffd_msg: the kind first, the address at 16.
            let [UFFD_EVENT_PAGEFAULT, ..] = message else { continue };
            let address = message.get(16..).and_then(|rest| rest.first_chunk::<8>());
            let address = u64::from_ne_bytes(*address.ok_or(io::ErrorKind::InvalidData)?);
            let mut base = 0;
            for region in self.memory.iter() {
                let start = host(region);
                if (start..start + region.len()).contains(&address) {
                    return Ok(Some(base + (address - start)));
                }
                base += region.len();
            }
            // The thread that waits there would never continue.
            let text = format!("a page fault at {address:#x}, outside of guest memory");
            return Err(io::Error::other(text));
        }
    }

    /// Copy `bytes`, whole pages, into guest memory at `offset`, and wake the threads that wait for
    /// them. Pages that are there already, or were replaced by a reset, stay as they are.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn fill(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        self.each_part(&(offset..offset.saturating_add(bytes.len() as u64)), |to, len| {
            let len = usize::try_from(len).map_err(io::Error::other)?;
            let part;
            (part, rest) = rest.split_at_checked(len).ok_or(io::ErrorKind::InvalidInput)?;
            self.piecemeal(to, len as u64, |at, len| {
                let from = part.as_ptr() as u64 + (at - to);
                let mut copy = Copy { to: at, from, len, mode: 0, copied: 0 };
                (ioctl(&self.faults, UFFDIO_COPY, &mut copy), copy.copied)
            })
        })
    }

    /// Fill with zeros, which take no memory.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn fill_zeros(&self, range: &Range<u64>) -> io::Result<()> {
        self.each_part(range, |to, len| {
            self.piecemeal(to, len, |start, len| {
                let mut zeros = Zeros { start, len, mode: 0, filled: 0 };
                (ioctl(&self.faults, UFFDIO_ZEROPAGE, &mut zeros), zeros.filled)
            })
        })
    }

    /// Zero `range` of guest memory, whether it was filled or not, and give its pages back to the
    /// host. It need not be filled any more. Where memory was replaced by a reset, only the pages
    /// go.
    ///
    /// # Errors
    /// When the kernel refuses. A thread that touches the range then never continues.
    pub fn discard(&self, range: &Range<u64>) -> io::Result<()> {
        self.each_part(range, |to, len| {
            let mut done = 0;
            while done < len {
                // From here on a thread that touches it waits: the threads that fill memory do so
                // only once.
                drop_pages(to + done, len - done)?;
                done += self.zeros_from(to + done, len - done)?;
            }
            Ok(())
        })
    }

    /// Fill `len` missing bytes at `to` with zeros; returns how many were filled. They are fewer
    /// when another thread has filled the next page.
    fn zeros_from(&self, to: u64, len: u64) -> io::Result<u64> {
        let (mut done, mut step) = (0, len);
        while done < len {
            let mut zeros = Zeros { start: to + done, len: step, mode: 0, filled: 0 };
            match ioctl(&self.faults, UFFDIO_ZEROPAGE, &mut zeros) {
                Ok(()) => done += step,
                Err(_) if zeros.filled > 0 => done += zeros.filled.unsigned_abs(),
                Err(e) => match e.raw_os_error() {
                    Some(libc::EAGAIN) => {}
                    Some(libc::EEXIST) => return Ok(done),
                    // Memory with other advice is another mapping, and a call covers only one.
                    Some(libc::ENOENT) if step > PAGE_SIZE => {
                        step = (step / 2).next_multiple_of(PAGE_SIZE);
                        continue;
                    }
                    // Nothing is missing there: the page never was, or a reset replaced it.
                    Some(libc::ENOENT) => done += PAGE_SIZE,
                    _ => return Err(e),
                },
            }
            step = len - done;
        }
        Ok(done)
    }

    /// Repeat `act`, which returns its result and the count if partial, until `len` bytes at `to`
    /// are there.
    fn piecemeal(
        &self,
        to: u64,
        len: u64,
        act: impl Fn(u64, u64) -> (io::Result<()>, i64),
    ) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            match act(to + done, len - done) {
                (Ok(()), _) => return Ok(()),
                (Err(_), some @ 1..) => done += some.unsigned_abs(),
                (Err(e), _) => match e.raw_os_error() {
                    Some(libc::EAGAIN) => {}
                    Some(libc::EEXIST) => {
                        let mut page = [to + done, PAGE_SIZE];
                        ioctl(&self.faults, UFFDIO_WAKE, &mut page)?;
                        done += PAGE_SIZE;
                    }
                    Some(libc::ENOENT) => return Ok(()),
                    _ => return Err(e),
                },
            }
        }
        Ok(())
    }

    /// Calls `act` with the host addresses and lengths of the parts of `range`.
    fn each_part<E: From<io::Error>>(
        &self,
        range: &Range<u64>,
        mut act: impl FnMut(u64, u64) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut base = 0;
        for region in self.memory.iter() {
            let end = base + region.len();
            let inside = range.start.max(base)..range.end.min(end);
            if inside.start < inside.end {
                act(host(region) + (inside.start - base), inside.end - inside.start)?;
            }
            base = end;
        }
        match range.end > base {
            true => Err(io::Error::from(io::ErrorKind::InvalidInput).into()),
            false => Ok(()),
        }
    }
}

impl From<io::Error> for FaultError {
    fn from(error: io::Error) -> Self {
        Self::Register(error)
    }
}

impl AsFd for Filler {
    /// Readable when a thread waits for a page.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.faults.as_fd()
    }
}

fn host(region: &MmapRegion<AtomicBitmap>) -> u64 {
    region.as_ptr() as u64
}

/// Give the pages of `len` bytes at `address` back to the host.
fn drop_pages(address: u64, len: u64) -> io::Result<()> {
    let len = usize::try_from(len).map_err(io::Error::other)?;
    let address = std::ptr::with_exposed_provenance_mut(usize::try_from(address).unwrap_or(0));
    // SAFETY: only `Filler` calls it, with parts of guest memory that it keeps mapped; the caller
    // wants their contents gone, and guest memory is only accessed as volatile.
    match unsafe { libc::madvise(address, len, libc::MADV_DONTNEED) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn ioctl<T>(fd: &File, request: libc::Ioctl, argument: &mut T) -> io::Result<()> {
    // SAFETY: each request in this file gets the structure that it takes. `Copy` writes to guest
    // memory that `Filler` keeps mapped, and only to missing pages.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;
    use crate::memory::image;

    const MIB: u64 = 1 << 20;

    #[test]
    fn pages_come_when_they_are_touched_on_both_sides_of_the_hole() {
        let high = 3 * 1024 * MIB;
        let config = MemoryConfig {
            prealloc: true,
            ..MemoryConfig::new((high + 4 * MIB).try_into().unwrap())
        };
        let missing = [MIB..2 * MIB, high - MIB..high + MIB];
        let (memory, filler) = match allocate_missing(&config, &missing) {
            Ok(both) => both,
            // Where it is not permitted, the error must say so.
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains("userfaultfd") && text.contains("mapped=on"), "{text}");
                return;
            }
        };
        let mut byte = [1];
        image::read(&memory, 5 * MIB, &mut byte).unwrap();
        assert_eq!(byte, [0], "what is not missing is zero");
        assert_eq!(filler.fault().unwrap(), None);
        for at in [MIB + 5, high - 1, high + MIB / 2] {
            let reader = thread::spawn({
                let memory = memory.clone();
                move || {
                    let mut byte = [0];
                    image::read(&memory, at, &mut byte).unwrap();
                    byte
                }
            });
            poll(&mut [PollFd::new(&filler, PollFlags::IN)], None).unwrap();
            let page = at / PAGE_SIZE * PAGE_SIZE;
            assert_eq!(filler.fault().unwrap(), Some(page));
            // Neighbouring pages are filled, too, and one that is there already does no harm.
            let start = page.saturating_sub(PAGE_SIZE).max(MIB);
            filler.fill(start, &vec![7; 4 * 4096]).unwrap();
            filler.fill(start, &vec![8; 4 * 4096]).unwrap();
            filler.fill_zeros(&(start..start + 6 * 4096)).unwrap();
            assert_eq!(reader.join().unwrap(), [7]);
        }
        image::read(&memory, MIB + 5 * 4096, &mut byte).unwrap();
        assert_eq!(byte, [0], "filled with zeros");
        super::super::clear(&memory, &config).unwrap();
        filler.fill(MIB, &vec![7; 4096]).unwrap();
        image::read(&memory, MIB, &mut byte).unwrap();
        assert_eq!(byte, [0], "what was cleared stays so");
        assert!(filler.fill(high + 4 * MIB, &[0; 4096]).is_err());
    }

    #[test]
    fn a_refusal_names_what_helps() {
        for (errno, how) in
            [(libc::EPERM, "vm.unprivileged_userfaultfd=1"), (libc::ENOSYS, "CONFIG_USERFAULTFD")]
        {
            let text = refused(io::Error::from_raw_os_error(errno)).to_string();
            assert!(text.contains(how) && text.contains("mapped=on"), "{text}");
        }
    }
}
