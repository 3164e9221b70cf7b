//! The half of a console that owns the queues and runs on an I/O thread.
use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    time::{Duration, Instant},
};

use vmm_sys_util::timerfd::TimerFd;

use crate::{
    backend::char::{CharSink, CharSource},
    virtio::{
        Interrupt,
        chain::{self, Chain, total},
        ring::{Broken, Popped, Ring},
    },
    worker::Worker,
};

/// How long output waits for a reader that reads nothing.
pub(super) const STALL_LIMIT: Duration = Duration::from_secs(1);
/// Bytes moved at once.
const CHUNK: usize = 4096;
/// Chunks moved before other workers get their turn.
const TURN: usize = 64;

pub(super) struct ConsoleWorker {
    id: String,
    rx: Ring,
    tx: Ring,
    source: CharSource,
    sink: CharSink,
    interrupt: Interrupt,
    chain: Chain,
    chunk: Box<[u8]>,
    /// Bytes of the next transmit chain that have been sent already.
    sent: u64,
    /// Runs while output is held back.
    stall_timer: TimerFd,
    held_since: Option<Instant>,
    /// The timer has expired: output is dropped until the reader continues.
    stalled: bool,
    /// The driver has broken a ring and has to reset the device.
    broken: bool,
}

/// What [`ConsoleWorker::new`] takes.
pub(super) struct WorkerArgs {
    pub(super) id: String,
    pub(super) rx: Ring,
    pub(super) tx: Ring,
    pub(super) source: CharSource,
    pub(super) sink: CharSink,
    pub(super) interrupt: Interrupt,
}

/// The descriptors that the worker waits on, in the order of [`Worker::sources`].
const RX_NOTIFY: usize = 0;
const TX_NOTIFY: usize = 1;
const SOURCE: usize = 2;
const TIMER: usize = 3;

impl ConsoleWorker {
    /// # Errors
    /// When the process has no descriptor left; the source is returned with the error.
    pub(super) fn new(args: WorkerArgs) -> Result<Self, Box<(io::Error, CharSource)>> {
        let stall_timer = match TimerFd::new() {
            Ok(timer) => timer,
            Err(e) => return Err(Box::new((e.into(), args.source))),
        };
        Ok(Self {
            id: args.id,
            chain: Chain::with_capacity(args.rx.size().max(args.tx.size()).into()),
            rx: args.rx,
            tx: args.tx,
            source: args.source,
            sink: args.sink,
            interrupt: args.interrupt,
            chunk: vec![0; CHUNK].into_boxed_slice(),
            sent: 0,
            stall_timer,
            held_since: None,
            stalled: false,
            broken: false,
        })
    }

    pub(super) fn into_source(self: Box<Self>) -> CharSource {
        self.source
    }

    /// Receive ring, transmit ring, bytes sent of the next chain, and whether a ring is broken.
    pub(super) fn position(&self) -> (&Ring, &Ring, u64, bool) {
        (&self.rx, &self.tx, self.sent, self.broken)
    }

    pub(super) fn set_position(&mut self, rx: u16, tx: u16, sent: u64, broken: bool) {
        self.rx.set_position(rx);
        self.tx.set_position(tx);
        self.sent = sent;
        self.broken = broken;
    }

    /// Pass input on as long as the driver has buffers.
    fn receive(&mut self) -> Result<(), Broken> {
        self.rx.ignore()?;
        for _ in 0..TURN {
            let used = match self.rx.pop(&mut self.chain)? {
                Popped::Nothing => {
                    // Even without a buffer the source still accepts connections and flushes
                    // output.
                    self.source.read(&mut []);
                    if self.rx.listen()? {
                        self.rx.ignore()?;
                        continue;
                    }
                    return self.interrupt(|worker| &mut worker.rx);
                }
                Popped::Malformed => 0,
                Popped::Chain => {
                    let room = usize::try_from(total(self.chain.writable())).unwrap_or(CHUNK);
                    let (room, memory) = (room.min(CHUNK), self.rx.memory());
                    let buffer = self.chunk.get_mut(..room).ok_or(Broken)?;
                    let n = self.source.read(buffer);
                    if n == 0 && room > 0 {
                        self.rx.unpop(1);
                        return self.interrupt(|worker| &mut worker.rx);
                    }
                    let input = buffer.get(..n).ok_or(Broken)?;
                    chain::write(memory, self.chain.writable(), 0, input) as u32
                }
            };
            self.rx.put_used(0, self.chain.head(), used)?;
            self.rx.publish(1)?;
        }
        self.rx.come_back();
        self.interrupt(|worker| &mut worker.rx)
    }

    /// Pass output on as long as the peer takes it.
    fn transmit(&mut self) -> Result<(), Broken> {
        // A client may have connected just before the driver printed.
        self.source.read(&mut []);
        self.tx.ignore()?;
        for _ in 0..TURN {
            match self.tx.pop(&mut self.chain)? {
                Popped::Nothing => {
                    self.hold(false);
                    if self.tx.listen()? {
                        self.tx.ignore()?;
                        continue;
                    }
                    return self.interrupt(|worker| &mut worker.tx);
                }
                Popped::Malformed => {}
                Popped::Chain => match self.send()? {
                    Sent::Whole => {}
                    Sent::Part => {
                        self.tx.unpop(1);
                        continue;
                    }
                    Sent::Nothing => {
                        self.tx.unpop(1);
                        self.hold(true);
                        return self.interrupt(|worker| &mut worker.tx);
                    }
                },
            }
            self.sent = 0;
            self.tx.put_used(0, self.chain.head(), 0)?;
            self.tx.publish(1)?;
        }
        self.tx.come_back();
        self.interrupt(|worker| &mut worker.tx)
    }

    /// Send one piece of the chain.
    fn send(&mut self) -> Result<Sent, Broken> {
        let left = total(self.chain.readable()).saturating_sub(self.sent);
        if left == 0 {
            return Ok(Sent::Whole);
        }
        let room = self.sink.room();
        if room == 0 {
            if !self.stalled {
                return Ok(Sent::Nothing);
            }
            self.sink.drop_bytes(usize::try_from(left).unwrap_or(usize::MAX));
            return Ok(Sent::Whole);
        }
        self.stalled = false;
        self.hold(false);
        let want = room.min(CHUNK).min(usize::try_from(left).unwrap_or(CHUNK));
        let piece = self.chunk.get_mut(..want).ok_or(Broken)?;
        let n = chain::read(self.tx.memory(), self.chain.readable(), self.sent, piece);
        self.sink.send(piece.get(..n).ok_or(Broken)?);
        self.sent = self.sent.saturating_add(n as u64);
        // Nothing can be read where a memory region is missing.
        Ok(if n == 0 || n as u64 == left { Sent::Whole } else { Sent::Part })
    }

    /// Record whether output is held back, and start or stop the timer.
    fn hold(&mut self, holding: bool) {
        if holding != self.held_since.is_some() {
            self.held_since = holding.then(Instant::now);
            // Clearing the timer also clears its readiness, so it is never read.
            let _ = match holding {
                true => self.stall_timer.reset(STALL_LIMIT, None),
                false => self.stall_timer.clear(),
            };
        }
    }

    /// Check the timer: it has fired, or the worker is new on its thread.
    fn look_at_clock(&mut self) -> Result<(), Broken> {
        if self.held_since.is_none_or(|since| since.elapsed() < STALL_LIMIT) {
            return Ok(());
        }
        log::warn!("{}: output is dropped until its reader continues", self.id);
        self.hold(false);
        self.stalled = true;
        self.transmit()
    }

    fn interrupt(&mut self, ring: impl Fn(&mut Self) -> &mut Ring) -> Result<(), Broken> {
        let ring = ring(self);
        let index = ring.index();
        if ring.wants_interrupt()? {
            self.interrupt.used(index);
        }
        Ok(())
    }

    fn run(&mut self, index: usize) -> Result<(), Broken> {
        match index {
            RX_NOTIFY => {
                self.rx.drain();
                self.receive()
            }
            TX_NOTIFY => {
                self.tx.drain();
                self.transmit()
            }
            TIMER => self.look_at_clock(),
            SOURCE => {
                self.receive()?;
                self.transmit()
            }
            _ => Ok(()),
        }
    }
}

enum Sent {
    /// The whole chain has been sent.
    Whole,
    /// A part of it is left.
    Part,
    /// The peer takes nothing now.
    Nothing,
}

impl Worker for ConsoleWorker {
    fn sources(&self) -> Vec<RawFd> {
        vec![self.rx.fd(), self.tx.fd(), self.source.as_raw_fd(), self.stall_timer.as_raw_fd()]
    }

    fn ready(&mut self, index: usize) {
        if !self.broken
            && let Err(broken) = self.run(index)
        {
            self.broken = true;
            broken.report(&self.id, &self.interrupt);
        }
    }

    fn quiesce(&mut self, _: Option<Duration>) -> bool {
        // Nothing is in flight between two calls of `ready`.
        true
    }
}
