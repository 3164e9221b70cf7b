//! Carries out disk requests, directly between guest memory and the host.
//!
//! ```text
//!   start ---> data is in the page cache, or takes none: done before `start` returns
//!        \---> has to wait for the medium: io_uring ---> `finished`
//!         \--> has to wait, but there is no io_uring: waits in `start`
//! ```
//!
//! Most requests of a disk in the page cache end in `start`: one system call, no thread hop, and no
//! slot. A buffered write also completes there, as it only has to reach the page cache, and file
//! systems without `RWF_NOWAIT` for writes (ext4) would send each through a kernel worker.
// UNSAFETY: the kernel reads and writes guest memory here by address, and after the call that asks
// for it has returned. The engine owns what that needs: the memory (kept mapped until nothing is
// in flight, see `Drop`), the buffer lists and the descriptors.
#![expect(unsafe_code)]
#[cfg(test)]
mod tests;
mod transfer;

use std::{
    io, mem,
    os::fd::{AsRawFd, RawFd},
    sync::Arc,
    time::Duration,
};

use io_uring::{IoUring, opcode, squeue, types};
use vm_memory::{GuestMemoryBackend, bitmap::Bitmap};

use self::transfer::{RETRY_LIMIT, Transfer, cut_short};
use super::{Copied, Disk, sys};
use crate::{
    Memory,
    log_limit::log_seldom,
    virtio::chain::{self, Segment},
};

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
/// Largest submission ring. Deeper queues are processed in turns.
const RING: usize = 256;
/// Once this many bytes are in flight, nothing more is started. A pause or reset of the device
/// waits for them, and a guest could have hundreds of requests of the largest size.
const BYTES: u64 = 64 << 20;
/// A read or write of at least this many bytes goes to io_uring even if it would not wait, because
/// this thread serves other queues too.
const LARGE: u64 = 4 << 20;

/// An operation at an offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Op {
    /// Fill the segments.
    Read,
    /// Store the segments; on the medium before it ends, if durable.
    #[expect(missing_docs, reason = "said above")]
    Write { durable: bool },
    /// Everything written so far is on the medium before it ends.
    #[default]
    Flush,
    /// `len` bytes are no longer needed.
    #[expect(missing_docs, reason = "said above")]
    Discard { len: u64 },
    /// `len` bytes shall read as zeroes, and may be deallocated if `unmap`.
    #[expect(missing_docs, reason = "said above")]
    WriteZeroes { len: u64, unmap: bool, durable: bool },
}

impl Op {
    /// How many bytes it covers.
    pub fn bytes(self, segments: &[Segment]) -> u64 {
        match self {
            Self::Read | Self::Write { .. } => chain::total(segments),
            Self::Flush => 0,
            Self::Discard { len } | Self::WriteZeroes { len, .. } => len,
        }
    }
}

struct Slot<T> {
    transfer: Transfer,
    tag: Option<T>,
    /// Its length in bytes when it was started.
    bytes: u64,
}

/// Requests on one disk and one guest memory. `T` is the caller's tag for a request.
pub struct Engine<T> {
    disk: Arc<Disk>,
    memory: Memory,
    ring: Option<IoUring>,
    slots: Vec<Slot<T>>,
    free: Vec<usize>,
    limit: usize,
    in_flight: usize,
    bytes_in_flight: u64,
    /// There are submissions that the kernel has not accepted yet.
    queued: bool,
    scratch: Transfer,
    read_nowait: bool,
    write_nowait: bool,
}

impl<T> Engine<T> {
    /// An engine for about `depth` requests at a time.
    pub fn new(disk: Arc<Disk>, memory: Memory, depth: usize) -> Self {
        let entries = depth.clamp(1, RING).next_power_of_two() as u32;
        let ring = disk.io_uring.then(|| IoUring::new(entries)).and_then(|ring| {
            ring.inspect_err(|e| log_seldom!(warn, "{}: no io_uring: {e}", disk.path.display()))
                .ok()
        });
        // One completion at most for each slot, so the completion ring never overflows.
        let limit = ring.as_ref().map_or(0, |r| r.params().cq_entries() as usize);
        Self {
            disk,
            memory,
            ring,
            slots: Vec::new(),
            free: Vec::new(),
            limit,
            in_flight: 0,
            bytes_in_flight: 0,
            queued: false,
            scratch: Transfer::default(),
            read_nowait: true,
            write_nowait: true,
        }
    }

    /// The disk.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// Guest memory.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Readable when [`Engine::finished`] has something to return; `None` when nothing is ever
    /// pending.
    pub fn source(&self) -> Option<RawFd> {
        self.ring.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Whether another request may be started now.
    pub fn has_room(&self) -> bool {
        self.ring.is_none() || self.in_flight < self.limit && self.bytes_in_flight < BYTES
    }

    /// Requests that are pending.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// The tags of the requests that are pending, in no particular order.
    pub fn pending(&self) -> impl Iterator<Item = &T> {
        self.slots.iter().filter_map(|slot| slot.tag.as_ref())
    }

    /// Carry out a request at `offset` bytes. Call only if [`Engine::has_room`]; the caller has
    /// checked the range against the disk's size. `None`: the request is pending, is passed to the
    /// kernel by [`Engine::submit`], and will be returned by [`Engine::finished`].
    pub fn start(
        &mut self,
        op: Op,
        offset: u64,
        segments: &[Segment],
        tag: T,
    ) -> Option<(T, io::Result<()>)> {
        let mut transfer = mem::take(&mut self.scratch);
        let prepared = transfer.prepare(op, offset, segments, &self.memory);
        self.begin(transfer, prepared, tag)
    }

    /// As [`Engine::start`] for a write of `copied`.
    pub fn start_copied(
        &mut self,
        op: Op,
        offset: u64,
        copied: Arc<Copied>,
        tag: T,
    ) -> Option<(T, io::Result<()>)> {
        let mut transfer = mem::take(&mut self.scratch);
        transfer.prepare_copied(op, offset, copied);
        self.begin(transfer, Ok(()), tag)
    }

    fn begin(
        &mut self,
        mut transfer: Transfer,
        prepared: io::Result<()>,
        tag: T,
    ) -> Option<(T, io::Result<()>)> {
        let now = match prepared {
            Ok(()) => self.try_now(&mut transfer),
            Err(e) => Some(Err(e)),
        };
        match now {
            Some(result) => {
                self.landed(&mut transfer);
                self.scratch = transfer;
                Some((tag, result))
            }
            None => {
                self.launch(transfer, tag);
                None
            }
        }
    }

    /// Hand pending requests to the kernel.
    pub fn submit(&mut self) {
        self.enter(0, None);
    }

    /// The next pending request that has ended.
    pub fn finished(&mut self) -> Option<(T, io::Result<()>)> {
        loop {
            let next = self.ring.as_mut()?.completion().next();
            let Some(entry) = next else {
                self.submit();
                return None;
            };
            let Ok(index) = usize::try_from(entry.user_data()) else { continue };
            let Some(slot) = self.slots.get_mut(index) else { continue };
            let mut transfer = mem::take(&mut slot.transfer);
            let result = transfer.completed(entry.result());
            let Some(result) = result else {
                self.push(index, transfer);
                continue;
            };
            self.landed(&mut transfer);
            let slot = self.slots.get_mut(index);
            let tag = slot.and_then(|slot| {
                slot.transfer = transfer;
                self.bytes_in_flight = self.bytes_in_flight.saturating_sub(slot.bytes);
                slot.tag.take()
            });
            self.free.push(index);
            self.in_flight = self.in_flight.saturating_sub(1);
            if let Some(tag) = tag {
                return Some((tag, result));
            }
        }
    }

    /// Wait until [`Engine::finished`] has something to return, for `patience` at most; false when
    /// that does not happen.
    pub fn wait(&mut self, patience: Option<Duration>) -> bool {
        self.in_flight > 0 && self.enter(1, patience)
    }

    /// Do as much as possible without waiting for the medium, or everything when there is no other
    /// way. `None` when the rest has to go through the ring.
    fn try_now(&mut self, t: &mut Transfer) -> Option<io::Result<()>> {
        loop {
            let file = &self.disk.file;
            let said = match t.op {
                Op::Read | Op::Write { .. } => return self.transfer_now(t),
                // io_uring has had it only since Linux 6.12.
                Op::Discard { len } if self.disk.device => sys::discard_device(file, t.offset, len),
                _ if self.ring.is_some() => return None,
                Op::Flush => sys::fdatasync(file),
                Op::Discard { len } => sys::fallocate(file, PUNCH, t.offset, len),
                Op::WriteZeroes { len, unmap, .. } => {
                    sys::fallocate(file, self.zero_mode(unmap), t.offset, len)
                }
            };
            if let Some(result) = t.progress(said.map(|()| 0)) {
                return Some(result);
            }
        }
    }

    /// Whether [`Engine::start`] may have waited for the medium to carry `op` out.
    pub fn may_wait(&self, op: Op) -> bool {
        // A write to the page cache waits when too much of it is dirty.
        self.ring.is_none() || op != Op::Read
    }

    fn transfer_now(&mut self, t: &mut Transfer) -> Option<io::Result<()>> {
        if self.ring.is_some() && t.left > LARGE {
            return None;
        }
        let ring = self.ring.is_some() && !self.disk.in_memory;
        while t.left > 0 {
            let (file, direct) = self.disk.file_for(t);
            if ring && direct {
                return None;
            }
            let (result, nowait) = match t.op {
                // A durable write waits for the medium.
                Op::Write { durable: true } if ring => return None,
                Op::Write { durable } => {
                    let nowait = ring && self.write_nowait;
                    let flags = if nowait { libc::RWF_NOWAIT } else { write_flags(durable) };
                    // SAFETY: the buffers lie in guest memory, which `self.memory` keeps mapped, or
                    // in the copy that `t` owns.
                    (unsafe { sys::write(file, t.buffers(), t.offset, flags) }, nowait)
                }
                _ if ring && !self.read_nowait => return None,
                _ => {
                    let flags = if ring { libc::RWF_NOWAIT } else { 0 };
                    // SAFETY: as above; no Rust reference to guest memory exists.
                    (unsafe { sys::read(file, t.buffers(), t.offset, flags) }, ring)
                }
            };
            match result {
                Ok(0) => return Some(Err(cut_short(t.op))),
                Ok(n) => t.advance(n),
                Err(e) => match e.raw_os_error() {
                    Some(libc::EAGAIN) if nowait => return None,
                    Some(libc::EOPNOTSUPP) if nowait && t.op == Op::Read => {
                        self.read_nowait = false;
                    }
                    Some(libc::EOPNOTSUPP) if nowait => self.write_nowait = false,
                    _ => return Some(Err(e)),
                },
            }
        }
        Some(Ok(()))
    }

    fn launch(&mut self, transfer: Transfer, tag: T) {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { transfer: Transfer::default(), tag: None, bytes: 0 });
            self.slots.len() - 1
        });
        if let Some(slot) = self.slots.get_mut(index) {
            slot.tag = Some(tag);
            slot.bytes = match transfer.op {
                // The worst case: the zeroes are all written out.
                Op::WriteZeroes { len, .. } => len,
                _ => transfer.left,
            };
            self.bytes_in_flight = self.bytes_in_flight.saturating_add(slot.bytes);
            // The slot's old lists become the scratch, so that neither has to grow twice.
            self.scratch = mem::take(&mut slot.transfer);
        }
        self.in_flight += 1;
        self.push(index, transfer);
    }

    /// Queue the rest of a request. Its lists stay where they are until the kernel has ended it.
    fn push(&mut self, index: usize, transfer: Transfer) {
        let entry = self.entry(&transfer).user_data(index as u64);
        if let Some(slot) = self.slots.get_mut(index) {
            slot.transfer = transfer;
        }
        while let Some(ring) = &mut self.ring {
            // SAFETY: the buffer list is in the slot (moving the slot does not move the list's
            // elements), the buffers in guest memory or in the slot's copy, and the descriptor in
            // the disk. All of them live until the request has ended: `Drop` waits for it.
            if unsafe { ring.submission().push(&entry) }.is_ok() {
                self.queued = true;
                return;
            }
            if !self.enter(0, None) {
                log_seldom!(error, "{}: io_uring accepts no requests", self.disk.path.display());
                return;
            }
        }
    }

    fn entry(&self, t: &Transfer) -> squeue::Entry {
        let buffered = types::Fd(self.disk.file.as_raw_fd());
        let fallocate =
            |len, mode| opcode::Fallocate::new(buffered, len).offset(t.offset).mode(mode).build();
        let fd = || types::Fd(self.disk.file_for(t).0.as_raw_fd());
        let buffers = t.buffers();
        let count = buffers.len().min(1024) as u32;
        match t.op {
            Op::Read => opcode::Readv::new(fd(), buffers.as_ptr(), count).offset(t.offset).build(),
            Op::Write { durable } => opcode::Writev::new(fd(), buffers.as_ptr(), count)
                .offset(t.offset)
                .rw_flags(write_flags(durable))
                .build(),
            Op::Flush => opcode::Fsync::new(buffered).flags(types::FsyncFlags::DATASYNC).build(),
            Op::Discard { len } => fallocate(len, PUNCH),
            Op::WriteZeroes { len, unmap, .. } => fallocate(len, self.zero_mode(unmap)),
        }
    }

    fn zero_mode(&self, unmap: bool) -> i32 {
        if unmap && self.disk.discard { PUNCH } else { ZERO }
    }

    /// Mark the guest memory that the kernel wrote without vm-memory's knowledge as dirty. Also
    /// after an error, as a part of the data may have arrived.
    fn landed(&self, t: &mut Transfer) {
        t.copied = None;
        if t.op == Op::Read {
            for s in &t.segments {
                if let Ok(slice) = self.memory.get_slice(s.addr, s.len as usize) {
                    slice.bitmap().mark_dirty(0, slice.len());
                }
            }
        }
    }

    /// Submit what is queued, and wait for `want` completions; false when the kernel refuses, or
    /// they do not arrive within `patience`.
    fn enter(&mut self, want: usize, patience: Option<Duration>) -> bool {
        let Some(ring) = self.ring.as_mut().filter(|_| self.queued || want > 0) else {
            return true;
        };
        // Linux before 5.11 has no timeout for this wait.
        let patience = patience.filter(|_| ring.params().is_feature_ext_arg());
        let time = patience.map(types::Timespec::from);
        for _ in 0..RETRY_LIMIT {
            let entered = match &time {
                None => ring.submit_and_wait(want),
                Some(time) => {
                    let args = types::SubmitArgs::new().timespec(time);
                    ring.submitter().submit_with_args(want, &args)
                }
            };
            match entered {
                // The kernel stops at a request that it refuses, without waiting.
                Ok(_) if !ring.submission().is_empty() => {}
                Ok(_) => {
                    self.queued = false;
                    return true;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.raw_os_error() == Some(libc::ETIME) => return false,
                // Not enough memory for requests just now.
                Err(_) => std::thread::yield_now(),
            }
        }
        false
    }
}

impl<T> Drop for Engine<T> {
    fn drop(&mut self) {
        // The owner has waited already.
        if self.in_flight > 0 {
            // Better to leak the memory than to let the kernel write to memory that has been
            // reused.
            log_seldom!(error, "{}: requests were never completed", self.disk.path.display());
            mem::forget((self.memory.clone(), mem::take(&mut self.slots)));
        }
    }
}

impl Disk {
    /// The descriptor for a transfer, and whether it bypasses the page cache.
    fn file_for(&self, t: &Transfer) -> (&std::fs::File, bool) {
        match &self.direct {
            Some(d) if t.aligned(d.memory_align, d.offset_align) => (&d.file, true),
            _ => (&self.file, false),
        }
    }
}

fn write_flags(durable: bool) -> i32 {
    if durable { libc::RWF_DSYNC } else { 0 }
}

/// Whether the host lets this process use io_uring.
pub fn probe() -> io::Result<()> {
    let mut ring = IoUring::new(2)?;
    // SAFETY: a request that touches nothing.
    let pushed = unsafe { ring.submission().push(&opcode::Nop::new().build()) };
    pushed.map_err(io::Error::other)?;
    ring.submit_and_wait(1).map(drop)
}
