//! The half of a network device that owns the queues and runs on an I/O thread.
use std::{
    fmt::Display,
    io,
    os::fd::{AsRawFd, RawFd},
    sync::Arc,
    time::{Duration, Instant},
};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::{
    NetStats,
    ctrl::{Command, Control},
    pair::Pair,
    rx::Rx,
    tx::Tx,
};
use crate::{
    backend::net::{NetBackend, Offloads},
    log_limit::{Limit, log_seldom},
    rate_limit::RateLimiter,
    virtio::{
        Interrupt,
        ring::{Broken, Ring},
        spin::Spin,
    },
    worker::Worker,
};

/// State shared by all queues of a device.
pub(super) struct Shared {
    pub(super) id: String,
    pub(super) backend: Option<Arc<dyn NetBackend>>,
    /// The link is set up.
    pub(super) link: bool,
    pub(super) rx_limit: Option<RateLimiter>,
    pub(super) tx_limit: Option<RateLimiter>,
    pub(super) interrupt: Interrupt,
    pub(super) stats: Arc<NetStats>,
    /// Queue pairs that receive.
    pub(super) active_pairs: u16,
    /// Limits log lines about dropped frames.
    rx_drops: Limit,
    tx_drops: Limit,
    /// Back-end queues that accepted no more, watched for writability.
    writable: Epoll,
    /// All queues of the back-end. Where one could not be added, frames are not looked for.
    readable: Epoll,
}

impl Shared {
    pub(super) fn drop_tx(&self, pair: usize, why: &dyn Display) {
        self.stats.tx.dropped();
        if let Some(left_out) = self.tx_drops.pass(Instant::now()) {
            log::warn!("{}: transmit queue {pair}: frame dropped: {why}{left_out}", self.id);
        }
    }

    pub(super) fn drop_rx(&self, pair: usize, why: &dyn Display) {
        self.stats.rx.dropped();
        if let Some(left_out) = self.rx_drops.pass(Instant::now()) {
            log::warn!("{}: receive queue {pair}: frame dropped: {why}{left_out}", self.id);
        }
    }

    /// Whether the back-end has a frame for `pair`.
    pub(super) fn has_frame(&self, pair: usize) -> bool {
        let mut events = [EpollEvent::default(); 16];
        let n = self.readable.wait(0, &mut events).unwrap_or(0);
        let is_ours =
            |e: &EpollEvent| e.data() == pair as u64 && e.event_set().contains(EventSet::IN);
        events.iter().take(n).any(is_ours)
    }

    /// Run the transmit queue of `pair` again when the back-end accepts frames. False when that is
    /// impossible: the frame is then lost.
    pub(super) fn wait_writable(&self, pair: usize) -> bool {
        let Some(backend) = &self.backend else { return false };
        let (fd, room) = backend.room(pair);
        let event = EpollEvent::new(room | EventSet::ONE_SHOT, pair as u64);
        let waits = self
            .writable
            .ctl(ControlOperation::Modify, fd, event)
            .or_else(|_| self.writable.ctl(ControlOperation::Add, fd, event));
        if let Err(e) = &waits {
            self.drop_tx(pair, e);
        }
        waits.is_ok()
    }
}

/// What a descriptor that the worker waits on is for.
#[derive(Debug, Clone, Copy)]
enum Source {
    RxNotify(usize),
    TxNotify(usize),
    Backend(usize),
    Writable,
    RxTimer,
    TxTimer,
    Control,
}

pub(super) struct NetWorker {
    shared: Shared,
    pairs: Vec<Pair>,
    control: Option<Control>,
    /// Offloads that the driver has negotiated, and those in force.
    negotiated: Offloads,
    offloads: Offloads,
    sources: Vec<Source>,
    /// The driver has broken a ring and has to reset the device.
    broken: bool,
}

/// The arguments of [`NetWorker::new`]: what a device knows when its driver is ready.
pub(super) struct WorkerArgs {
    pub(super) id: String,
    pub(super) backend: Option<Arc<dyn NetBackend>>,
    pub(super) link: bool,
    pub(super) limits: (Option<u64>, Option<u64>),
    pub(super) interrupt: Interrupt,
    pub(super) stats: Arc<NetStats>,
    /// Receive and transmit ring of each pair.
    pub(super) pairs: Vec<(Ring, Ring)>,
    pub(super) control: Option<Ring>,
    pub(super) mergeable: bool,
    pub(super) negotiated: Offloads,
}

impl NetWorker {
    pub(super) fn new(args: WorkerArgs) -> io::Result<Self> {
        let limiter = || {
            let (pps, bps) = args.limits;
            (pps.is_some() || bps.is_some()).then(|| RateLimiter::new(pps, bps)).transpose()
        };
        let shared = Shared {
            id: args.id,
            backend: None,
            link: args.link,
            rx_limit: limiter()?,
            tx_limit: limiter()?,
            interrupt: args.interrupt,
            stats: args.stats,
            active_pairs: 1,
            rx_drops: Limit::new(),
            tx_drops: Limit::new(),
            writable: Epoll::new()?,
            readable: Epoll::new()?,
        };
        let pair = |(rx, tx)| Pair {
            rx: Rx::new(rx, args.mergeable),
            tx: Tx::new(tx),
            spin: Spin::default(),
        };
        let mut worker = Self {
            shared,
            pairs: args.pairs.into_iter().map(pair).collect(),
            control: args.control.map(Control::new),
            negotiated: args.negotiated,
            offloads: args.negotiated,
            sources: Vec::new(),
            broken: false,
        };
        worker.set_backend(args.backend);
        Ok(worker)
    }

    /// Replace or remove the back-end. Only while the worker is off its thread.
    pub(super) fn set_backend(&mut self, backend: Option<Arc<dyn NetBackend>>) {
        for pair in &mut self.pairs {
            pair.rx.forget();
            pair.tx.forget();
        }
        self.watch(|| ControlOperation::Delete);
        self.shared.backend = backend;
        self.watch(|| ControlOperation::Add);
        self.apply();
        let mut sources = vec![Source::Writable];
        for n in 0..self.pairs.len() {
            sources.extend([Source::RxNotify(n), Source::TxNotify(n)]);
            if self.shared.backend.as_ref().is_some_and(|b| n < b.queues()) {
                sources.push(Source::Backend(n));
            }
        }
        if self.shared.rx_limit.is_some() {
            sources.push(Source::RxTimer);
        }
        if self.shared.tx_limit.is_some() {
            sources.push(Source::TxTimer);
        }
        if self.control.is_some() {
            sources.push(Source::Control);
        }
        self.sources = sources;
    }

    /// Begin or end to watch the back-end's queues for frames.
    fn watch(&self, operation: fn() -> ControlOperation) {
        let Some(backend) = &self.shared.backend else { return };
        for n in 0..backend.queues() {
            let event = EpollEvent::new(EventSet::IN, n as u64);
            let _ = self.shared.readable.ctl(operation(), backend.fd(n), event);
        }
    }

    /// Look this long for the next answer.
    #[cfg(test)]
    pub(super) fn look_for(&mut self, window: Duration) {
        self.pairs.iter_mut().for_each(|pair| pair.spin = Spin::with_window(window));
    }

    /// As a notification of the first transmit queue.
    #[cfg(test)]
    pub(super) fn ready_to_send(&mut self) {
        self.run_tx(0).unwrap();
    }

    pub(super) fn set_link(&mut self, up: bool) {
        self.shared.link = up;
    }

    pub(super) fn active_pairs(&self) -> u16 {
        self.shared.active_pairs
    }

    pub(super) fn offloads(&self) -> Offloads {
        self.offloads
    }

    pub(super) fn broken(&self) -> bool {
        self.broken
    }

    /// Every ring, in the order of their indexes.
    pub(super) fn rings(&self) -> impl Iterator<Item = &Ring> {
        let pairs = self.pairs.iter().flat_map(|p| [&p.rx.ring, &p.tx.ring]);
        pairs.chain(self.control.as_ref().map(|c| &c.ring))
    }

    /// As [`NetWorker::rings`].
    pub(super) fn rings_mut(&mut self) -> impl Iterator<Item = &mut Ring> {
        let pairs = self.pairs.iter_mut().flat_map(|p| [&mut p.rx.ring, &mut p.tx.ring]);
        pairs.chain(self.control.as_mut().map(|c| &mut c.ring))
    }

    /// Whether a saved state is valid for [`NetWorker::restore`].
    pub(super) fn accepts(&self, pairs: u16, offloads: u64) -> bool {
        (1..=self.pairs.len()).contains(&usize::from(pairs)) && offloads & !self.negotiated.0 == 0
    }

    pub(super) fn restore(&mut self, pairs: u16, offloads: u64, broken: bool) {
        self.shared.active_pairs = pairs;
        self.offloads = Offloads(offloads);
        self.broken = broken;
        for pair in &mut self.pairs {
            pair.rx.forget();
        }
        self.apply();
    }

    /// Apply the driver's settings to the back-end.
    fn apply(&self) {
        let Some(backend) = &self.shared.backend else { return };
        let offloads = backend.set_offloads(self.offloads);
        let pairs = backend.set_active_queues(self.shared.active_pairs.into());
        if let Err(e) = offloads.and(pairs) {
            log_seldom!(
                error,
                "{}: cannot set offloads and queues of the back-end: {e}",
                self.shared.id
            );
        }
    }

    fn run_rx(&mut self, n: usize) -> Result<(), Broken> {
        // An inactive queue has nothing to read, and reports that as an error.
        let Some(pair) = self.pairs.get_mut(n).filter(|_| n < self.shared.active_pairs.into())
        else {
            return Ok(());
        };
        pair.receive(n, &mut self.shared)
    }

    fn run_tx(&mut self, n: usize) -> Result<(), Broken> {
        let Some(pair) = self.pairs.get_mut(n) else { return Ok(()) };
        let stop = pair.tx.run(n, &mut self.shared)?;
        pair.send(n, &mut self.shared, stop)
    }

    fn run_control(&mut self) -> Result<(), Broken> {
        let Some(control) = &mut self.control else { return Ok(()) };
        let pairs = self.shared.active_pairs;
        let more = control.run(|command| match (command, &self.shared.backend) {
            (Command::Pairs(n), backend) if (1..=self.pairs.len()).contains(&n.into()) => {
                let set = backend.as_ref().map_or(Ok(()), |b| b.set_active_queues(n.into()));
                if set.is_ok() {
                    self.shared.active_pairs = n;
                }
                set.is_ok()
            }
            (Command::Offloads(bits), backend) if bits & !self.negotiated.0 == 0 => {
                let set = backend.as_ref().map_or(Ok(()), |b| b.set_offloads(Offloads(bits)));
                if set.is_ok() {
                    self.offloads = Offloads(bits);
                }
                set.is_ok()
            }
            _ => false,
        })?;
        if control.ring.wants_interrupt()? {
            self.shared.interrupt.used(control.ring.index());
        }
        if more {
            control.ring.come_back();
        }
        // Frames may have arrived on a queue before it became active.
        for n in pairs..self.shared.active_pairs {
            self.run_rx(n.into())?;
        }
        Ok(())
    }

    fn run_writable(&mut self) -> Result<(), Broken> {
        let mut events = [EpollEvent::default(); 16];
        let n = self.shared.writable.wait(0, &mut events).unwrap_or(0);
        for event in events.iter().take(n) {
            let n = usize::try_from(event.data()).unwrap_or(usize::MAX);
            let Some(pair) = self.pairs.get_mut(n) else { continue };
            let stop = pair.tx.run_writable(n, &mut self.shared)?;
            pair.send(n, &mut self.shared, stop)?;
        }
        Ok(())
    }

    fn each(&mut self, run: impl Fn(&mut Self, usize) -> Result<(), Broken>) -> Result<(), Broken> {
        (0..self.pairs.len()).try_for_each(|n| run(self, n))
    }

    /// Clear the readiness of `source`, whether or not anything will process it.
    fn drain(&mut self, source: Source) {
        match source {
            Source::RxNotify(n) => self.pairs.get(n).into_iter().for_each(|p| p.rx.ring.drain()),
            Source::TxNotify(n) => self.pairs.get(n).into_iter().for_each(|p| p.tx.ring.drain()),
            Source::Control => self.control.iter().for_each(|c| c.ring.drain()),
            Source::RxTimer => self.shared.rx_limit.iter_mut().for_each(RateLimiter::replenish),
            Source::TxTimer => self.shared.tx_limit.iter_mut().for_each(RateLimiter::replenish),
            Source::Backend(n) => {
                self.pairs.get_mut(n).into_iter().for_each(|p| p.spin.woken(Instant::now()));
            }
            Source::Writable => {}
        }
    }

    fn run(&mut self, source: Source) -> Result<(), Broken> {
        match source {
            Source::RxNotify(n) | Source::Backend(n) => self.run_rx(n),
            Source::TxNotify(n) => self.run_tx(n),
            Source::Writable => self.run_writable(),
            Source::RxTimer => self.each(Self::run_rx),
            Source::TxTimer => self.each(Self::run_tx),
            Source::Control => self.run_control(),
        }
    }

    fn fd(&self, source: Source) -> RawFd {
        let limiter = |l: &Option<RateLimiter>| l.as_ref().map_or(-1, RateLimiter::fd);
        match source {
            Source::RxNotify(n) => self.pairs.get(n).map_or(-1, |p| p.rx.ring.fd()),
            Source::TxNotify(n) => self.pairs.get(n).map_or(-1, |p| p.tx.ring.fd()),
            Source::Backend(n) => self.shared.backend.as_ref().map_or(-1, |b| b.fd(n)),
            Source::Writable => self.shared.writable.as_raw_fd(),
            Source::RxTimer => limiter(&self.shared.rx_limit),
            Source::TxTimer => limiter(&self.shared.tx_limit),
            Source::Control => self.control.as_ref().map_or(-1, |c| c.ring.fd()),
        }
    }
}

impl Worker for NetWorker {
    fn sources(&self) -> Vec<RawFd> {
        self.sources.iter().map(|s| self.fd(*s)).collect()
    }

    fn ready(&mut self, index: usize) {
        let Some(source) = self.sources.get(index).copied() else { return };
        self.drain(source);
        if !self.broken
            && let Err(broken) = self.run(source)
        {
            self.broken = true;
            broken.report(&self.shared.id, &self.shared.interrupt);
        }
    }

    fn quiesce(&mut self, _: Option<Duration>) -> bool {
        for pair in &mut self.pairs {
            pair.rx.give_back();
        }
        true
    }
}
