//! One request on its way: what the kernel has done of it, and what is left.
use std::{io, sync::Arc};

use vm_memory::GuestMemoryBackend;

use super::{Copied, Op};
use crate::{Memory, virtio::chain::Segment};

/// How often a call is retried at once when the kernel lacks memory or is busy.
pub(super) const RETRY_LIMIT: usize = 1000;

/// A source of zeroes where the host has no better way to write them; aligned for `O_DIRECT`.
#[repr(align(4096))]
struct Zeroes([u8; 64 << 10]);
static ZEROES: Zeroes = Zeroes([0; 64 << 10]);

/// One request's progress. The lists are kept for the next request.
#[derive(Default)]
pub(super) struct Transfer {
    pub(super) op: Op,
    pub(super) offset: u64,
    pub(super) segments: Vec<Segment>,
    pub(super) buffers: Vec<libc::iovec>,
    /// The first buffer that is not finished.
    pub(super) first: usize,
    /// Bytes not transferred yet.
    pub(super) left: u64,
    /// How often the kernel has asked to try again.
    pub(super) tries: usize,
    /// What the buffers of a write are in, if not in guest memory.
    pub(super) copied: Option<Arc<Copied>>,
}

// SAFETY: the pointers are addresses of guest memory, or of the copy that the transfer owns. Only the kernel dereferences them, and for it
// the submitting thread does not matter.
unsafe impl Send for Transfer {}

impl Transfer {
    pub(super) fn prepare(
        &mut self,
        op: Op,
        offset: u64,
        segments: &[Segment],
        memory: &Memory,
    ) -> io::Result<()> {
        self.clear(op, offset);
        for s in segments {
            let slice = memory
                .get_slice(s.addr, s.len as usize)
                .map_err(|_| io::Error::from_raw_os_error(libc::EFAULT))?;
            let iov_base = slice.ptr_guard_mut().as_ptr().cast();
            self.buffers.push(libc::iovec { iov_base, iov_len: slice.len() });
            self.left += u64::from(s.len);
        }
        if op == Op::Read {
            self.segments.extend_from_slice(segments);
        }
        Ok(())
    }

    /// Write from a copy, which is kept until the request has ended.
    pub(super) fn prepare_copied(&mut self, op: Op, offset: u64, copied: Arc<Copied>) {
        self.clear(op, offset);
        let bytes = copied.bytes();
        // Only read, like all buffers of a write.
        let iov_base = bytes.as_ptr().cast_mut().cast();
        self.buffers.push(libc::iovec { iov_base, iov_len: bytes.len() });
        self.left = bytes.len() as u64;
        self.copied = Some(copied);
    }

    fn clear(&mut self, op: Op, offset: u64) {
        (self.op, self.offset, self.first, self.left, self.tries) = (op, offset, 0, 0, 0);
        self.segments.clear();
        self.buffers.clear();
        self.copied = None;
    }

    pub(super) fn buffers(&self) -> &[libc::iovec] {
        self.buffers.get(self.first..).unwrap_or_default()
    }

    pub(super) fn advance(&mut self, bytes: usize) {
        self.offset = self.offset.saturating_add(bytes as u64);
        self.left = self.left.saturating_sub(bytes as u64);
        let mut bytes = bytes;
        while let Some(b) = self.buffers.get_mut(self.first) {
            if bytes < b.iov_len {
                b.iov_base = b.iov_base.cast::<u8>().wrapping_add(bytes).cast();
                b.iov_len -= bytes;
                return;
            }
            bytes -= b.iov_len;
            self.first += 1;
        }
    }

    /// Process the result of a call; `None` when something is left to do.
    pub(super) fn progress(&mut self, said: io::Result<usize>) -> Option<io::Result<()>> {
        match (self.op, said) {
            (Op::Read | Op::Write { .. }, Ok(0)) => Some(Err(cut_short(self.op))),
            (Op::Read | Op::Write { .. }, Ok(n)) => {
                self.advance(n);
                (self.left == 0).then_some(Ok(()))
            }
            (Op::WriteZeroes { len, durable, .. }, Err(e))
                if e.raw_os_error() == Some(libc::EOPNOTSUPP) =>
            {
                self.write_zeroes(len, durable);
                None
            }
            (Op::WriteZeroes { durable: true, .. }, Ok(_)) => {
                self.op = Op::Flush;
                None
            }
            (_, result) => Some(result.map(drop)),
        }
    }

    /// Process a completion from io_uring; `None` when the rest must be submitted.
    pub(super) fn completed(&mut self, said: i32) -> Option<io::Result<()>> {
        let said = match usize::try_from(said) {
            Ok(n) => Ok(n),
            Err(_) if said == -libc::EINTR => return None,
            // Does not occur for a request that may wait, except with some host drivers.
            Err(_) if said == -libc::EAGAIN && self.tries < RETRY_LIMIT => {
                self.tries += 1;
                return None;
            }
            Err(_) => Err(io::Error::from_raw_os_error(said.wrapping_neg())),
        };
        self.progress(said)
    }

    /// Write `len` zeroes from a buffer, where the host has no better way.
    pub(super) fn write_zeroes(&mut self, len: u64, durable: bool) {
        self.op = Op::Write { durable };
        (self.first, self.left) = (0, len);
        self.buffers.clear();
        let mut left = len;
        while left > 0 {
            let iov_len = left.min(ZEROES.0.len() as u64) as usize;
            // Only read, like all buffers of a write.
            let iov_base = ZEROES.0.as_ptr().cast_mut().cast();
            self.buffers.push(libc::iovec { iov_base, iov_len });
            left -= iov_len as u64;
        }
    }

    /// Whether `O_DIRECT` can do it.
    pub(super) fn aligned(&self, memory: u64, offset: u64) -> bool {
        let unaligned = self.buffers().iter().fold(0, |bits, b| {
            bits | (b.iov_base as u64 & (memory - 1)) | (b.iov_len as u64 & (offset - 1))
        });
        (unaligned | (self.offset & (offset - 1))) == 0
    }
}

/// The error for a transfer of no bytes: the file has become shorter than the size reported to the
/// guest.
pub(super) fn cut_short(op: Op) -> io::Error {
    match op {
        Op::Read => io::ErrorKind::UnexpectedEof.into(),
        _ => io::ErrorKind::WriteZero.into(),
    }
}
