//! The main thread's event loop: QMP clients, signals and reports of the machine. The tables of
//! commands are made at the first request: most clones of a save never get one.
use std::{
    cell::LazyCell,
    ffi::c_int,
    io,
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    time::{Duration, Instant},
};

use machine::memory::own;
use mio::{Events, Poll, Token, Waker};
use qmp::{schema::ShutdownCause, server::Servers};
use signal_hook_mio::v1_0::Signals;

use crate::{
    arriving::{Arriving, Handed, Over, WaitingRequest},
    commands, signals,
    vmm::{Ending, Vmm},
};

const WAKE: Token = Token(0);
const SIGNALS: Token = Token(1);
/// When a machine has run for this long, the memory that only its start needed is given back: not
/// earlier, because that would delay the guest's first steps and the starts of other machines.
const STARTED: Duration = Duration::from_secs(1);

/// The poll and what is always registered with it.
pub struct EventLoop {
    poll: Poll,
    signals: Signals,
    reports: Receiver<machine::Event>,
    sender: Sender<machine::Event>,
    waker: Arc<Waker>,
}

impl EventLoop {
    /// A loop that is registered for signals and reports.
    ///
    /// # Errors
    /// When the host refuses the descriptors.
    pub fn new() -> io::Result<Self> {
        let poll = Poll::new()?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKE)?);
        let signals = signals::ending(poll.registry(), SIGNALS)?;
        let (sender, reports) = channel();
        Ok(Self { poll, signals, reports, sender, waker })
    }

    /// The function by which the machine reports events.
    pub fn report(&self) -> machine::Report {
        let (sender, waker) = (self.sender.clone(), self.waker.clone());
        Arc::new(move |event| {
            // Both fail only when the loop has ended, and then the event is of no use.
            let _ = sender.send(event);
            let _ = waker.wake();
        })
    }

    /// A function that wakes the loop, from any thread.
    pub fn notify(&self) -> Arc<dyn Fn() + Send + Sync> {
        let waker = self.waker.clone();
        Arc::new(move || {
            // As above.
            let _ = waker.wake();
        })
    }

    /// What a QMP server registers with.
    pub fn registry(&self) -> &mio::Registry {
        self.poll.registry()
    }

    /// Serve clients until the machine has arrived, or has failed to.
    ///
    /// # Errors
    /// When the host refuses to wait for events.
    pub fn wait_for_machine(&mut self, mut arriving: Arriving) -> io::Result<(Handed, Over)> {
        let table: LazyCell<_> = LazyCell::new(Arriving::table);
        let mut events = Events::with_capacity(64);
        loop {
            let more = arriving.servers.has_work();
            if let Some(signal) =
                self.turn(&mut events, &mut arriving.servers, more.then_some(Duration::ZERO))?
            {
                log::info!("ended by signal {signal}");
                let reason = ShutdownCause::HostSignal;
                arriving.end(Over::Ended(Ending { guest: false, reason, status: 0 }));
            }
            arriving.follow();
            while !arriving.is_over()
                && let Some((request, ticket)) = arriving.servers.next_request()
            {
                if arriving.holds(&table, &request) {
                    arriving.hold(WaitingRequest { request, ticket });
                    continue;
                }
                if let Some(result) = table.dispatch(&mut arriving, request, &ticket) {
                    arriving.servers.reply(&ticket, result);
                }
            }
            if let Some(over) = arriving.take_end() {
                return Ok((arriving.finish(&over), over));
            }
        }
    }

    /// Wait for an event, at most for `at_most`, and read what clients have sent. Gives the signal
    /// that came, if one did.
    fn turn(
        &mut self,
        events: &mut Events,
        servers: &mut Servers,
        at_most: Option<Duration>,
    ) -> io::Result<Option<c_int>> {
        match self.poll.poll(events, at_most) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => events.clear(),
            Err(e) => return Err(e),
        }
        for event in &*events {
            servers.ready(event);
        }
        Ok(self.signals.pending().next())
    }

    /// Answer the requests that came before there was a machine.
    pub fn answer(&mut self, vmm: &mut Vmm, waiting: Vec<WaitingRequest>) {
        let table: LazyCell<_> = LazyCell::new(commands::table);
        for WaitingRequest { request, ticket } in waiting {
            vmm.serve(&table, request, ticket);
        }
    }

    /// Run until the VM ends; how it ended.
    ///
    /// # Errors
    /// When the host refuses to wait for events.
    pub fn run(&mut self, vmm: &mut Vmm) -> io::Result<Ending> {
        let table: LazyCell<_> = LazyCell::new(commands::table);
        let mut events = Events::with_capacity(64);
        let mut starts_until = Some(Instant::now() + STARTED);
        loop {
            let more = vmm.servers.has_work();
            let started = starts_until.map(|end| end.saturating_duration_since(Instant::now()));
            if started.is_some_and(|left| left.is_zero()) {
                own::forget_start();
                starts_until = None;
            }
            let due = vmm.until_due().into_iter().chain(started).min();
            let at_most = if more { Some(Duration::ZERO) } else { due };
            if let Some(signal) = self.turn(&mut events, &mut vmm.servers, at_most)? {
                log::info!("ended by signal {signal}");
                let reason = ShutdownCause::HostSignal;
                vmm.end(Ending { guest: false, reason, status: 0 });
            }
            while let Ok(event) = self.reports.try_recv() {
                vmm.machine_event(event);
            }
            if vmm.ending().is_none() {
                vmm.follow_deferred(&table);
                vmm.in_one_piece(Vmm::follow_save);
                vmm.follow_announcements();
                vmm.follow_balloon();
            }
            vmm.follow_replication();
            vmm.in_one_piece(Vmm::follow_files);
            while (vmm.ending().is_none() || vmm.winds_up)
                && let Some((request, ticket)) = vmm.servers.next_request()
            {
                vmm.serve(&table, request, ticket);
            }
            if let Some(ending) = vmm.ending()
                && vmm.is_ready_to_end()
            {
                return Ok(ending);
            }
        }
    }
}
