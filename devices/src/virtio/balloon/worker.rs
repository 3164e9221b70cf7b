//! The half of a balloon that owns the queues and runs on an I/O thread.
use std::{
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use vm_memory::GuestAddress;

use super::{BALLOON_PAGE, Control, Stats, stats::ENTRY};
use crate::{
    Memory,
    log_limit::log_seldom,
    reclaim::Reclaim,
    virtio::{
        Interrupt,
        chain::{self, Chain},
        ring::{Broken, Popped, Ring},
    },
    worker::Worker,
};

/// Most page numbers read from one request; Linux and the BSDs send 256, Windows 512. Further pages
/// stay with the guest, and a guest that overlaps descriptors cannot occupy the thread.
const MAX_PAGES: usize = 16 << 10;
/// Most runs of adjacent pages that one request puts into the balloon: each takes the host up to
/// four microseconds. Further ones stay with the guest.
const MAX_RUNS: usize = 1 << 10;
/// Most bytes given back for one report; Linux reports 32 blocks of up to 4 MiB. Further ones stay
/// with the guest, so that ranges that overlap cannot occupy the thread.
const MAX_REPORTED: u64 = 1 << 30;
/// Most bytes of statistics that are read.
const MAX_STATS: usize = 64 * ENTRY;
/// Time after which the thread's other workers, and messages to it, get their turn. A queue that
/// has requests is served one even then, so that none waits for the others.
const TURN: Duration = Duration::from_micros(500);

/// The queues of an active balloon.
pub(super) struct Queues {
    pub(super) inflate: Ring,
    pub(super) deflate: Ring,
    pub(super) stats: Option<Ring>,
    pub(super) reporting: Vec<Ring>,
}

impl Queues {
    pub(super) fn each(&self) -> impl Iterator<Item = &Ring> {
        [&self.inflate, &self.deflate].into_iter().chain(&self.stats).chain(&self.reporting)
    }

    pub(super) fn each_mut(&mut self) -> impl Iterator<Item = &mut Ring> {
        let Self { inflate, deflate, stats, reporting } = self;
        [inflate, deflate].into_iter().chain(stats).chain(reporting)
    }
}

/// What a worker is built from.
pub(super) struct WorkerArgs {
    pub(super) id: String,
    pub(super) queues: Queues,
    pub(super) memory: Arc<dyn Reclaim>,
    /// The driver has accepted [`super::F_MUST_TELL_HOST`].
    pub(super) tells_host: bool,
    pub(super) control: Arc<Control>,
    pub(super) interrupt: Interrupt,
}

pub(super) struct BalloonWorker {
    id: String,
    pub(super) queues: Queues,
    memory: Arc<dyn Reclaim>,
    /// The driver notifies the device before it uses a page in the balloon again.
    tells_host: bool,
    control: Arc<Control>,
    interrupt: Interrupt,
    /// Fires when statistics are due.
    timer: OwnedFd,
    /// The timer's interval in seconds.
    interval: u32,
    /// The head of the statistics buffer, which the guest lends until statistics are requested.
    lent: Option<u16>,
    /// The driver has broken a ring and has to reset the device.
    pub(super) broken: bool,
    chain: Chain,
    pages: PageNumbers,
}

/// Buffer for the page numbers of one request.
#[derive(Default)]
struct PageNumbers {
    bytes: Vec<u8>,
    numbers: Vec<u32>,
}

impl PageNumbers {
    /// Read the page numbers of `chain`: every run of adjacent pages, as its start address and its
    /// length in bytes.
    fn runs(&mut self, ram: &Memory, chain: &Chain) -> impl Iterator<Item = (GuestAddress, u64)> {
        let Self { bytes, numbers } = self;
        let wanted = chain::total(chain.readable());
        let wanted = usize::try_from(wanted).unwrap_or(usize::MAX).min(4 * MAX_PAGES);
        bytes.resize(wanted, 0);
        let read = chain::read(ram, chain.readable(), 0, bytes);
        // An incomplete number at the end is ignored.
        let (words, _) = bytes.get(..read).unwrap_or(&[]).as_chunks();
        numbers.clear();
        numbers.extend(words.iter().map(|word| u32::from_le_bytes(*word)));
        numbers.sort_unstable();
        numbers.chunk_by(|a, b| b.wrapping_sub(*a) <= 1).filter_map(|run| {
            let start = u64::from(*run.first()?) * BALLOON_PAGE;
            let end = (u64::from(*run.last()?) + 1) * BALLOON_PAGE;
            Some((GuestAddress(start), end - start))
        })
    }
}

impl BalloonWorker {
    pub(super) fn new(args: WorkerArgs) -> io::Result<Self> {
        let WorkerArgs { id, queues, memory, tells_host, control, interrupt } = args;
        let size = queues.each().map(Ring::size).max().unwrap_or(0);
        Ok(Self {
            id,
            queues,
            memory,
            tells_host,
            control,
            interrupt,
            timer: timerfd_create(
                TimerfdClockId::Monotonic,
                TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
            )?,
            interval: 0,
            lent: None,
            broken: false,
            chain: Chain::with_capacity(size.into()),
            pages: PageNumbers::default(),
        })
    }

    fn work(&mut self) -> Result<(), Broken> {
        let begin = Instant::now();
        self.inflate(begin)?;
        self.deflate(begin)?;
        for queue in 0..self.queues.reporting.len() {
            self.report(queue, begin)?;
        }
        self.take_stats(begin)
    }

    /// Reclaim the pages that the guest puts into the balloon.
    fn inflate(&mut self, begin: Instant) -> Result<(), Broken> {
        let Self { queues, memory, tells_host, chain, pages, interrupt, .. } = self;
        serve(&mut queues.inflate, chain, interrupt, begin, |ram, chain| {
            for (start, len) in pages.runs(ram, chain).take(MAX_RUNS) {
                match tells_host {
                    true => memory.withhold(start, len),
                    false => memory.discard(start, len),
                }
            }
        })
    }

    /// Return pages to the guest. Where a request has more than are read, any may be among them.
    fn deflate(&mut self, begin: Instant) -> Result<(), Broken> {
        let Self { queues, memory, chain, pages, interrupt, .. } = self;
        serve(&mut queues.deflate, chain, interrupt, begin, |ram, chain| {
            match chain::total(chain.readable()) > 4 * MAX_PAGES as u64 {
                true => memory.release_all(),
                false => pages.runs(ram, chain).for_each(|(at, len)| memory.release(at, len)),
            }
        })
    }

    /// Return the ranges that the guest reports as free to the host.
    fn report(&mut self, queue: usize, begin: Instant) -> Result<(), Broken> {
        let Self { queues, memory, chain, interrupt, .. } = self;
        let Some(ring) = queues.reporting.get_mut(queue) else { return Ok(()) };
        serve(ring, chain, interrupt, begin, |_, chain| {
            let mut left = MAX_REPORTED;
            for range in chain.writable() {
                let len = left.min(range.len.into());
                memory.discard(range.addr, len);
                left -= len;
            }
        })
    }

    /// Read statistics, and keep the buffer for the next ones. Buffers that cannot be read go back,
    /// for at most one turn.
    fn take_stats(&mut self, begin: Instant) -> Result<(), Broken> {
        let Some(ring) = &mut self.queues.stats else { return Ok(()) };
        while self.lent.is_none() {
            match ring.pop(&mut self.chain)? {
                Popped::Nothing if ring.listen()? => ring.ignore()?,
                Popped::Nothing => return Ok(()),
                Popped::Malformed => {
                    give_back(ring, self.chain.head(), &self.interrupt)?;
                    if begin.elapsed() > TURN {
                        ring.come_back();
                        break;
                    }
                }
                Popped::Chain => {
                    let mut bytes = [0; MAX_STATS];
                    let read = chain::read(ring.memory(), self.chain.readable(), 0, &mut bytes);
                    self.control.set_stats(Stats::parse(bytes.get(..read).unwrap_or(&[])));
                    self.lent = Some(self.chain.head());
                }
            }
        }
        Ok(())
    }

    /// Return the buffer, so that the guest writes new statistics.
    fn ask_for_stats(&mut self) -> Result<(), Broken> {
        match (&mut self.queues.stats, self.lent.take()) {
            (Some(ring), Some(head)) => give_back(ring, head, &self.interrupt),
            _ => Ok(()),
        }
    }

    /// Set the timer to the interval that the monitor requests.
    fn set_timer(&mut self) {
        let wanted = self.control.polling_interval();
        if wanted == self.interval {
            return;
        }
        // Zero stops it.
        let every = Timespec { tv_sec: wanted.into(), tv_nsec: 0 };
        let times = Itimerspec { it_interval: every, it_value: every };
        match timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &times) {
            Ok(_) => self.interval = wanted,
            Err(e) => log_seldom!(error, "{}: cannot set a timer for statistics: {e}", self.id),
        }
    }

    /// Whether the timer has expired since the last check.
    fn is_due(&mut self) -> bool {
        rustix::io::read(&self.timer, &mut [0; 8]).is_ok()
    }
}

/// Serve requests of one queue, returning each with 0 bytes written, until the turn that began at
/// `begin` is over.
fn serve(
    ring: &mut Ring,
    chain: &mut Chain,
    interrupt: &Interrupt,
    begin: Instant,
    mut each: impl FnMut(&Memory, &Chain),
) -> Result<(), Broken> {
    ring.ignore()?;
    loop {
        match ring.pop(chain)? {
            Popped::Nothing if ring.listen()? => {
                ring.ignore()?;
                continue;
            }
            Popped::Nothing => break,
            Popped::Malformed => {}
            Popped::Chain => each(ring.memory(), chain),
        }
        ring.put_used(0, chain.head(), 0)?;
        ring.publish(1)?;
        if begin.elapsed() > TURN {
            ring.come_back();
            break;
        }
    }
    if ring.wants_interrupt()? {
        interrupt.used(ring.index());
    }
    Ok(())
}

fn give_back(ring: &mut Ring, head: u16, interrupt: &Interrupt) -> Result<(), Broken> {
    ring.put_used(0, head, 0)?;
    ring.publish(1)?;
    if ring.wants_interrupt()? {
        interrupt.used(ring.index());
    }
    Ok(())
}

impl Worker for BalloonWorker {
    fn sources(&self) -> Vec<RawFd> {
        let rings = self.queues.each().map(Ring::fd);
        rings.chain([self.timer.as_raw_fd(), self.control.fd()]).collect()
    }

    /// Whichever descriptor it was, all are read (seven at most), and all queues get their turn.
    fn ready(&mut self, _: usize) {
        self.queues.each().for_each(Ring::drain);
        self.control.drain();
        self.set_timer();
        let due = self.is_due();
        if self.broken {
            return;
        }
        let asked = if due { self.ask_for_stats() } else { Ok(()) };
        if let Err(broken) = asked.and_then(|()| self.work()) {
            self.broken = true;
            broken.report(&self.id, &self.interrupt);
        }
    }

    fn quiesce(&mut self, _: Option<Duration>) -> bool {
        // The worker takes the statistics buffer from the queue again when it resumes.
        if let (Some(ring), Some(_)) = (&mut self.queues.stats, self.lent.take()) {
            ring.unpop(1);
        }
        true
    }
}
