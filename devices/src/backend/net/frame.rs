// UNSAFETY: readv and writev take raw pointers into guest memory; a slice would claim that the
// guest does not change it meanwhile.
#![expect(unsafe_code)]
//! Guest buffers in the form that the kernel accepts: one list of pieces for one readv or writev.
use std::{io, os::fd::RawFd};

use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion, bitmap::Bitmap};

use crate::{Memory, virtio::chain::Segment};

/// The most guest buffers in one frame: one less than a system call takes (`UIO_MAXIOV` of Linux),
/// because [`Frame::read_from`] adds the spill buffer.
const PIECES: usize = 1023;

/// A piece of guest memory. Only [`Frame::push`] makes one.
#[repr(transparent)]
#[derive(Clone, Copy)]
struct Piece(libc::iovec);

// SAFETY: a plain address and length. What it points to is guest memory, which belongs to no
// thread, and which the frame that holds the piece keeps mapped.
unsafe impl Send for Piece {}

/// A list of guest buffers. It is reused from frame to frame, so that it allocates nothing.
pub struct Frame {
    memory: Memory,
    segments: Vec<Segment>,
    pieces: Vec<Piece>,
    bytes: usize,
}

impl Frame {
    /// An empty list of buffers in `memory`.
    pub fn new(memory: Memory) -> Self {
        let (segments, pieces) = (Vec::with_capacity(PIECES), Vec::with_capacity(PIECES + 1));
        Self { memory, segments, pieces, bytes: 0 }
    }

    /// Remove all buffers.
    pub fn clear(&mut self) {
        self.segments.clear();
        self.pieces.clear();
        self.bytes = 0;
    }

    /// Append buffers: all of them, or none if they are too many or outside guest memory.
    pub fn push(&mut self, more: &[Segment]) -> bool {
        let before = self.pieces.len();
        if before + more.len() > PIECES {
            return false;
        }
        for segment in more {
            let len = segment.len as usize;
            let Ok(slice) = self.memory.get_slice(segment.addr, len) else {
                self.pieces.truncate(before);
                return false;
            };
            let iov_base = slice.ptr_guard_mut().as_ptr().cast();
            self.pieces.push(Piece(libc::iovec { iov_base, iov_len: len }));
        }
        self.segments.extend_from_slice(more);
        self.bytes += more.iter().map(|s| s.len as usize).sum::<usize>();
        true
    }

    /// Remove the first `n` buffers.
    pub fn drop_front(&mut self, n: usize) {
        let n = n.min(self.segments.len());
        let gone = self.segments.drain(..n).map(|s| s.len as usize).sum::<usize>();
        self.pieces.drain(..n.min(self.pieces.len()));
        self.bytes = self.bytes.saturating_sub(gone);
    }

    /// The buffers, in order.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Total length of the buffers.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Make [`Frame::write_to`] leave out the first `n` bytes. Undone by [`Frame::clear`].
    pub fn skip(&mut self, mut n: usize) {
        let mut gone = 0;
        for Piece(piece) in &mut self.pieces {
            if piece.iov_len > n {
                piece.iov_base = piece.iov_base.wrapping_byte_add(n);
                piece.iov_len -= n;
                break;
            }
            n -= piece.iov_len;
            gone += 1;
        }
        self.pieces.drain(..gone);
    }

    /// Fill the buffers, and then `spill`, from `fd` by one readv. The caller that completes the
    /// frame has to call [`Frame::mark_written`].
    ///
    /// # Errors
    /// As readv.
    pub fn read_from(&mut self, fd: RawFd, spill: &mut [u8]) -> io::Result<usize> {
        let (iov_base, iov_len) = (spill.as_mut_ptr().cast(), spill.len());
        self.pieces.push(Piece(libc::iovec { iov_base, iov_len }));
        // SAFETY: the last piece is `spill`, which is borrowed for writing. Each other one lies
        // within a region of `self.memory`, mapped as long as `self` lives; the guest has made it
        // available for writing, and nothing in this process holds a reference into guest memory.
        let n = unsafe { libc::readv(fd, self.pieces.as_ptr().cast(), self.pieces.len() as i32) };
        self.pieces.pop();
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    /// Send the buffers to `fd` by one writev.
    ///
    /// # Errors
    /// As writev.
    pub fn write_to(&self, fd: RawFd) -> io::Result<usize> {
        // SAFETY: as in `read_from`, without the spill buffer, and the kernel only reads.
        let n = unsafe { libc::writev(fd, self.pieces.as_ptr().cast(), self.pieces.len() as i32) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    /// Copy the buffers, which are [`Frame::bytes`] long, to `to`.
    ///
    /// # Errors
    /// When `to` has another length.
    pub fn copy_to(&self, mut to: &mut [u8]) -> io::Result<()> {
        for segment in &self.segments {
            let wrong = io::ErrorKind::InvalidInput;
            let (piece, rest) = to.split_at_mut_checked(segment.len as usize).ok_or(wrong)?;
            self.memory.read_slice(piece, segment.addr).map_err(io::Error::other)?;
            to = rest;
        }
        if to.is_empty() { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }

    /// Mark the first `n` bytes of the buffers dirty: readv has written them without vm-memory's
    /// knowledge.
    pub fn mark_written(&self, n: usize) {
        let mut left = n;
        for segment in &self.segments {
            let len = left.min(segment.len as usize);
            if len == 0 {
                break;
            }
            if let Some((region, at)) = self.memory.to_region_addr(segment.addr) {
                region.bitmap().mark_dirty(vm_memory::Address::raw_value(&at) as usize, len);
            }
            left -= len;
        }
    }
}
