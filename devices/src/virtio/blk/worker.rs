//! The half of a block device that owns its queues and runs on an I/O thread.
//!
//! Its speed is limited not by copying but by the guest's exits and this thread's wake-ups for each
//! request. So: chains are taken until none is left, with the driver's notifications off; whether
//! to interrupt is decided once for each batch; and when the driver has lately sent its next
//! request quickly, the thread polls for it briefly before it sleeps (see [`Spin`]), which saves
//! the guest an exit and the thread a wake-up.
use std::{
    os::fd::{AsRawFd, RawFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::{
    redo::Redo,
    report::Reporter,
    request::{self, Request},
    stats::{BlockStats, count},
};
use crate::{
    Memory,
    backend::disk::{Disk, Op, Outcome, SECTOR, Storage},
    log_limit::log_seldom,
    rate_limit::RateLimiter,
    virtio::{
        ActiveQueue, Interrupt,
        chain::{self, Chain, ChainError, Segment},
        spin::Spin,
    },
    worker::{Park, Worker},
};

/// After this thread itself has moved this much data, the driver gets its interrupt, so that it can
/// process what is complete while the rest is copied.
const BATCH_BYTES: u64 = 256 << 10;
/// Time after which the thread's other workers, and messages to it, get their turn.
const TURN: Duration = Duration::from_micros(500);
/// Bytes of a serial number (section 5.2.6).
pub(super) const SERIAL: usize = 20;

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

/// One virtqueue.
pub(super) struct Queue {
    /// Position among the device's queues.
    pub index: u16,
    pub ring: virtio_queue::Queue,
    notify: vmm_sys_util::eventfd::EventFd,
    /// The ring is invalid. It is ignored until the driver resets the device.
    pub broken: bool,
    /// Its next request has to wait until the disk's observers allow it.
    pub held: bool,
    /// Buffers were used since the last decision on an interrupt.
    unsignalled: bool,
}

impl From<ActiveQueue> for Queue {
    fn from(q: ActiveQueue) -> Self {
        let ActiveQueue { index, queue: ring, notify } = q;
        Self { index, ring, notify, broken: false, held: false, unsignalled: false }
    }
}

/// The counter of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Flush,
    Discard,
}

/// What has to be remembered of a request in flight.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ticket {
    pub queue: usize,
    pub head: u16,
    /// Ascending in the order in which requests were taken from the queues.
    pub number: u64,
    /// It was in flight when the device was saved, and is carried out again.
    redone: bool,
    status: GuestAddress,
    kind: Kind,
    bytes: u64,
}

/// The cost of a request to this thread.
#[derive(Default)]
pub(super) struct Cost {
    /// Bytes moved by the thread itself.
    moved: u64,
    /// It may have waited for the medium, for any length of time.
    waited: bool,
}

/// Why a round over the available ring has ended.
enum Round {
    /// Nothing is left.
    Drained,
    /// One batch has been processed.
    More,
    /// A limit, a full engine or a broken ring. Another event will continue it.
    Blocked,
}

/// Event sources of the worker besides the driver.
enum Source {
    Limiter,
    Completion,
    /// An observer of the disk has released held requests.
    Wake,
}

/// The disk in the slot, and its limits and name.
pub(super) struct Media {
    /// The name used in reports.
    pub name: String,
    pub disk: Option<Arc<Disk>>,
    pub serial: [u8; SERIAL],
    pub limiter: Option<RateLimiter>,
}

/// The worker of a block device.
pub(super) struct BlockWorker {
    pub queues: Vec<Queue>,
    pub memory: Memory,
    pub interrupt: Interrupt,
    pub indirect: bool,
    /// `VIRTIO_BLK_F_FLUSH` was negotiated. Without it the driver relies on every write being
    /// durable.
    pub flush: bool,
    pub writeback: Arc<AtomicBool>,
    pub stats: Arc<BlockStats>,
    pub reporter: Reporter,
    /// It was parked with its requests in flight.
    pub kept: bool,
    pub redo: Redo,
    /// Number of the next request.
    next: u64,
    pub storage: Option<Storage<Ticket>>,
    serial: [u8; SERIAL],
    limiter: Option<RateLimiter>,
    throttled: bool,
    pub full: bool,
    pub chain: Chain,
    data: Vec<Segment>,
    spin: Spin,
}

/// What [`BlockWorker::new`] takes.
pub(super) struct WorkerArgs {
    pub queues: Vec<ActiveQueue>,
    pub memory: Memory,
    pub interrupt: Interrupt,
    pub indirect: bool,
    pub flush: bool,
    pub writeback: Arc<AtomicBool>,
    pub stats: Arc<BlockStats>,
    pub reporter: Reporter,
}

impl BlockWorker {
    pub fn new(args: WorkerArgs, media: Media) -> Self {
        let WorkerArgs { queues, memory, interrupt, indirect, flush, writeback, stats, reporter } =
            args;
        let mut worker = Self {
            queues: queues.into_iter().map(Queue::from).collect(),
            memory,
            interrupt,
            indirect,
            flush,
            writeback,
            stats,
            reporter,
            kept: false,
            redo: Redo::default(),
            next: 0,
            storage: None,
            serial: [0; SERIAL],
            limiter: None,
            throttled: false,
            full: false,
            chain: Chain::default(),
            data: Vec::new(),
            spin: Spin::default(),
        };
        worker.insert(media);
        worker
    }

    /// Change the media. Only while the worker is parked.
    pub fn insert(&mut self, media: Media) {
        let Media { name, disk, serial, limiter } = media;
        self.reporter.rename(name);
        let depth = self.queues.iter().map(|q| usize::from(q.ring.size())).sum();
        self.storage = disk.map(|disk| Storage::new(disk, self.memory.clone(), depth));
        (self.serial, self.limiter, self.throttled) = (serial, limiter, false);
        self.queues.iter_mut().for_each(|queue| queue.held = false);
    }

    /// Process queue `index` until it is empty, or the turn is over.
    fn work(&mut self, index: usize) {
        self.work_since(Instant::now(), index);
    }

    /// As `work`, in a turn that began at `begin`.
    fn work_since(&mut self, begin: Instant, index: usize) {
        loop {
            let round = self.round(begin, index);
            if let Some(storage) = &mut self.storage {
                storage.submit();
            }
            self.signal();
            let Some(queue) = self.queues.get_mut(index) else { return };
            match round {
                Round::Blocked => return,
                Round::Drained => {
                    let idle = self.storage.as_ref().is_none_or(|s| s.in_flight() == 0);
                    let more = idle
                        && self.spin.wait(|| chain::pending(&queue.ring, &self.memory) != Some(0))
                        || queue.ring.enable_notification(&self.memory).unwrap_or(false);
                    if !more {
                        return;
                    }
                }
                Round::More => {}
            }
            if begin.elapsed() > TURN {
                // Continue after the other workers.
                let _ = queue.notify.write(1);
                return;
            }
        }
    }

    /// Process one batch of chains of queue `index`.
    fn round(&mut self, begin: Instant, index: usize) -> Round {
        let Some(queue) = self.queues.get_mut(index) else { return Round::Blocked };
        if queue.broken || queue.held || self.throttled || !self.redo.is_over() {
            return Round::Blocked;
        }
        let _ = queue.ring.disable_notification(&self.memory);
        let mut moved = 0;
        for _ in 0..queue.ring.size() {
            if self.storage.as_ref().is_some_and(|s| !s.has_room()) {
                self.full = true;
                return Round::Blocked;
            }
            let Some(queue) = self.queues.get_mut(index) else { return Round::Blocked };
            match self.chain.pop(&mut queue.ring, &self.memory, self.indirect) {
                Ok(false) => return Round::Drained,
                Ok(true) => {
                    let Some(cost) = self.handle(index, false) else {
                        if let Some(queue) = self.queues.get_mut(index) {
                            queue.ring.go_to_previous_position();
                        }
                        return Round::Blocked;
                    };
                    moved += cost.moved;
                    if cost.waited && begin.elapsed() > TURN {
                        break;
                    }
                }
                Err(ChainError::Ring) => {
                    self.give_up(index);
                    return Round::Blocked;
                }
                Err(why) => {
                    self.reporter.invalid(&self.stats, &why);
                    self.used(index, self.chain.head(), 0);
                }
            }
            if moved >= BATCH_BYTES {
                break;
            }
        }
        Round::More
    }

    /// Start the request in `self.chain`, which may be one that is `redone`. `None` when it cannot be
    /// started for now and has to stay where it is: another event will continue with it.
    pub fn handle(&mut self, queue: usize, redone: bool) -> Option<Cost> {
        let head = self.chain.head();
        let Some(status) = request::status(&self.chain) else {
            self.reporter.invalid(&self.stats, &"request without room for a status");
            self.used(queue, head, 0);
            return Some(Cost::default());
        };
        let (request, len) = request::parse(&self.chain, &self.memory, &mut self.data);
        let discards = self.storage.as_ref().is_some_and(|s| s.disk().discard());
        // Ranges are charged as if they were written; one that is ignored costs nothing.
        let charge = match request {
            Request::Discard(_) if !discards => 0,
            Request::Discard(r) | Request::WriteZeroes(r, _) => r.bytes(),
            _ => len,
        };
        if redone && request == Request::Flush && self.redo.started > 0 {
            return None;
        }
        // One that is redone was charged when it was first started.
        if let Some(limiter) = &mut self.limiter
            && !redone
            && !limiter.take(1, charge)
        {
            self.throttled = true;
            return None;
        }
        let number = self.next;
        let answer = |kind, bytes| Ticket { queue, head, number, redone, status, kind, bytes };
        let durable = !self.flush || !self.writeback.load(Ordering::Relaxed);
        let cost = match request {
            Request::Read { sector } => self.carry_out(Op::Read, sector, answer(Kind::Read, len)),
            Request::Write { sector } => {
                self.carry_out(Op::Write { durable }, sector, answer(Kind::Write, len))
            }
            Request::Flush => self.carry_out(Op::Flush, 0, answer(Kind::Flush, 0)),
            Request::Discard(r) => {
                let op = Op::Discard { len: r.bytes() };
                self.carry_out(op, r.sector, answer(Kind::Discard, r.bytes()))
            }
            Request::WriteZeroes(r, unmap) => {
                let op = Op::WriteZeroes { len: r.bytes(), unmap, durable };
                self.carry_out(op, r.sector, answer(Kind::Write, r.bytes()))
            }
            Request::GetId => {
                let n = chain::write(&self.memory, &self.data, 0, &self.serial);
                self.answered(&answer(Kind::Read, n as u64), OK)
            }
            Request::Unsupported => self.answered(&answer(Kind::Read, 0), UNSUPP),
            Request::Malformed => {
                self.reporter.invalid(&self.stats, &"malformed request");
                self.answered(&answer(Kind::Read, 0), IOERR)
            }
        };
        match (&cost, &mut self.limiter) {
            (Some(_), _) => self.next += 1,
            (None, Some(limiter)) if !redone => limiter.give_back(1, charge),
            (None, _) => {}
        }
        cost
    }

    /// Start a request on the disk, if the disk supports it.
    fn carry_out(&mut self, op: Op, sector: u64, ticket: Ticket) -> Option<Cost> {
        let Some(storage) = &mut self.storage else {
            return self.answered(&ticket, IOERR);
        };
        let disk = storage.disk();
        let end = sector.checked_mul(SECTOR).and_then(|at| at.checked_add(ticket.bytes));
        let refused = match op {
            Op::Read | Op::Flush => false,
            // Even if the driver has not negotiated VIRTIO_BLK_F_RO.
            _ => disk.readonly(),
        };
        if refused || end.is_none_or(|end| end > disk.size()) {
            self.reporter
                .invalid(&self.stats, &"request beyond the disk, or a write to a readonly one");
            return self.answered(&ticket, IOERR);
        }
        if ticket.kind == Kind::Discard && !disk.discard() {
            // A discard is a hint that may be ignored. The slot may have offered it before it had
            // this disk, and the guest's kernel would log an error as a fault of the medium.
            count(&self.stats.unmap_operations, 1);
            return self.answered(&ticket, OK);
        }
        if ticket.bytes == 0 && op != Op::Flush {
            return self.answered(&ticket, OK);
        }
        count(&self.stats.in_flight, 1);
        match storage.start(op, sector.wrapping_mul(SECTOR), &self.data, ticket) {
            Outcome::Done(result) => {
                let waited = storage.may_wait(op);
                self.finish(&ticket, result);
                let moved = match op {
                    Op::Read | Op::Write { .. } => ticket.bytes,
                    _ => 0,
                };
                Some(Cost { moved, waited })
            }
            Outcome::Pending => {
                self.redo.started += usize::from(ticket.redone);
                Some(Cost::default())
            }
            Outcome::Delayed => {
                count(&self.stats.in_flight, u64::MAX);
                if let Some(queue) = self.queues.get_mut(ticket.queue) {
                    queue.held = true;
                }
                None
            }
        }
    }

    /// Answer a request that was never started on the disk.
    fn answered(&mut self, ticket: &Ticket, status: u8) -> Option<Cost> {
        self.answer(ticket, status);
        Some(Cost::default())
    }

    fn finish(&mut self, ticket: &Ticket, result: std::io::Result<()>) {
        let s = &self.stats;
        count(&s.in_flight, u64::MAX);
        let (done, bytes, failed) = match ticket.kind {
            Kind::Read => (&s.rd_operations, Some(&s.rd_bytes), &s.failed_rd_operations),
            Kind::Write => (&s.wr_operations, Some(&s.wr_bytes), &s.failed_wr_operations),
            Kind::Flush => (&s.flush_operations, None, &s.failed_flush_operations),
            Kind::Discard => (&s.unmap_operations, None, &s.failed_unmap_operations),
        };
        let status = match result {
            // The host's file system does not support it: no fault of the medium, and nothing that
            // the driver relies on.
            Err(e) if ticket.kind == Kind::Discard && unsupported(&e) => {
                count(done, 1);
                OK
            }
            Ok(()) => {
                count(done, 1);
                if let Some(bytes) = bytes {
                    count(bytes, ticket.bytes);
                }
                OK
            }
            Err(e) => {
                count(failed, 1);
                self.reporter.failed(&e, ticket.kind != Kind::Read);
                IOERR
            }
        };
        self.answer(ticket, status);
    }

    /// Write the status and return the chain.
    fn answer(&mut self, ticket: &Ticket, status: u8) {
        // The chain was validated, so the byte is in guest memory.
        let _ = self.memory.write_obj(status, ticket.status);
        let data = if status == OK && ticket.kind == Kind::Read { ticket.bytes } else { 0 };
        self.used(
            ticket.queue,
            ticket.head,
            u32::try_from(data).map_or(u32::MAX, |n| n.saturating_add(1)),
        );
    }

    pub fn used(&mut self, index: usize, head: u16, len: u32) {
        let Some(queue) = self.queues.get_mut(index) else { return };
        queue.unsignalled = true;
        if queue.ring.add_used(&self.memory, head, len).is_err() {
            self.give_up(index);
        }
    }

    fn give_up(&mut self, index: usize) {
        if let Some(queue) = self.queues.get_mut(index)
            && !std::mem::replace(&mut queue.broken, true)
        {
            self.reporter.invalid(&self.stats, &"broken queue; device needs a reset");
            self.interrupt.needs_reset();
        }
    }

    /// Decide on one interrupt for all buffers used since the last decision.
    pub fn signal(&mut self) {
        let wants = self.queues.iter_mut().filter_map(|queue| {
            let wants = std::mem::take(&mut queue.unsignalled)
                && chain::needs_interrupt(&mut queue.ring, &self.memory);
            wants.then_some(queue.index)
        });
        self.interrupt.used_all(wants);
    }

    /// Return the requests that the disk has finished.
    fn complete(&mut self) {
        while let Some((ticket, result)) = self.storage.as_mut().and_then(Storage::finished) {
            self.redo.started -= usize::from(ticket.redone);
            self.finish(&ticket, result);
        }
        self.signal();
    }

    /// What it waits for besides the driver's notifications.
    fn other_sources(&self) -> impl Iterator<Item = (Source, RawFd)> {
        let limiter = self.limiter.as_ref().map(|l| (Source::Limiter, l.fd()));
        let storage = self.storage.as_ref();
        let completion = storage.and_then(Storage::completion_source);
        let completion = completion.map(|fd| (Source::Completion, fd));
        let wake = storage.map(|s| (Source::Wake, s.wake_source()));
        limiter.into_iter().chain(completion).chain(wake)
    }

    /// Process all queues, in one turn.
    fn work_on_all(&mut self) {
        let begin = Instant::now();
        for index in 0..self.queues.len() {
            match self.queues.get(index) {
                Some(queue) if begin.elapsed() > TURN => drop(queue.notify.write(1)),
                _ => self.work_since(begin, index),
            }
        }
    }
}

impl Worker for BlockWorker {
    fn sources(&self) -> Vec<RawFd> {
        let notify = self.queues.iter().map(|q| q.notify.as_raw_fd());
        notify.chain(self.other_sources().map(|(_, fd)| fd)).collect()
    }

    fn ready(&mut self, index: usize) {
        let redoing = !self.redo.is_over();
        self.serve(index);
        if redoing && self.redo() {
            self.work_on_all();
        }
    }

    fn quiesce(&mut self, limit: Option<Duration>) -> bool {
        self.kept = false;
        self.drain(limit)
    }

    fn park(&mut self, park: Park, limit: Option<Duration>) -> bool {
        match park {
            Park::Drain => self.quiesce(limit),
            Park::Keep => {
                self.kept = true;
                true
            }
        }
    }
}

impl BlockWorker {
    /// Source `index` has fired.
    fn serve(&mut self, index: usize) {
        if let Some(queue) = self.queues.get(index) {
            if queue.notify.read().is_ok() {
                self.spin.woken(Instant::now());
            }
            return self.work(index);
        }
        let source = self.other_sources().nth(index - self.queues.len()).map(|(source, _)| source);
        match source {
            Some(Source::Limiter) => {
                if let Some(limiter) = &mut self.limiter {
                    limiter.replenish();
                }
                self.throttled = false;
                self.work_on_all();
            }
            Some(Source::Completion) => {
                self.complete();
                if std::mem::take(&mut self.full) {
                    self.work_on_all();
                }
            }
            Some(Source::Wake) => {
                if let Some(storage) = &self.storage {
                    storage.woken();
                }
                if self.queues.iter_mut().fold(false, |any, q| std::mem::take(&mut q.held) | any) {
                    self.work_on_all();
                }
            }
            None => {}
        }
    }

    /// Wait for what is in flight; false when it has not ended within `limit`.
    fn drain(&mut self, limit: Option<Duration>) -> bool {
        let begin = Instant::now();
        loop {
            self.complete();
            // What an observer delays stays to be redone.
            self.redo();
            let Some(storage) = self.storage.as_mut().filter(|s| s.in_flight() > 0) else {
                return true;
            };
            let left = limit.map(|limit| limit.saturating_sub(begin.elapsed()));
            if left == Some(Duration::ZERO) || !storage.wait(left) {
                let path = storage.disk().path().display();
                log_seldom!(error, "{path}: the host does not complete requests");
                return limit.is_none();
            }
        }
    }
}

fn unsupported(e: &std::io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY))
}
