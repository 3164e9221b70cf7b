//! The main thread's loop: QMP clients, signals and what the machine reports.
use std::{
    ffi::c_int,
    io,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    time::Duration,
};

use mio::{Events, Interest, Poll, Token, Waker};
use qmp::schema::ShutdownCause;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook_mio::v1_0::Signals;

use crate::{
    commands,
    vmm::{Ending, Vmm},
};

/// The signals that end the monitor.
pub const ENDING: [c_int; 4] = [SIGTERM, SIGINT, SIGHUP, SIGQUIT];

/// One of them has come.
static CAME: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

const WAKE: Token = Token(0);
const SIGNALS: Token = Token(1);
/// Each QMP server has this many tokens, the first one at the server's own index.
const SERVER_TOKENS: usize = 1 << 32;

/// The poll and what is always registered with it.
pub struct EventLoop {
    poll: Poll,
    signals: Signals,
    reports: Receiver<machine::Event>,
    sender: Sender<machine::Event>,
    waker: Arc<Waker>,
}

impl EventLoop {
    /// A loop that already notices signals and collects reports.
    ///
    /// # Errors
    /// When the host refuses the descriptors.
    pub fn new() -> io::Result<Self> {
        let poll = Poll::new()?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKE)?);
        for signal in ENDING {
            signal_hook::flag::register(signal, CAME.clone())?;
        }
        let mut signals = Signals::new(ENDING)?;
        poll.registry().register(&mut signals, SIGNALS, Interest::READABLE)?;
        let (sender, reports) = channel();
        Ok(Self { poll, signals, reports, sender, waker })
    }

    /// Whether a signal that ends the monitor has come already, for those who have just begun to
    /// listen to signals themselves.
    pub fn has_been_told_to_end() -> bool {
        CAME.load(Ordering::Relaxed)
    }

    /// Where the machine reports to.
    pub fn report(&self) -> machine::Report {
        let (sender, waker) = (self.sender.clone(), self.waker.clone());
        Arc::new(move |event| {
            // Both fail only when the loop has ended, and then nobody wants to know.
            let _ = sender.send(event);
            let _ = waker.wake();
        })
    }

    /// What makes the loop look around, from any thread.
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

    /// First token of QMP server `index`.
    pub fn server_token(index: usize) -> Token {
        Token((index + 1) * SERVER_TOKENS)
    }

    /// Run until the VM ends; how it ended.
    ///
    /// # Errors
    /// When the host refuses to wait for events.
    pub fn run(&mut self, vmm: &mut Vmm) -> io::Result<Ending> {
        let table = commands::table();
        let mut events = Events::with_capacity(64);
        loop {
            let more = vmm.servers.iter().any(|s| s.has_work());
            let at_most = if more { Some(Duration::ZERO) } else { vmm.until_due() };
            match self.poll.poll(&mut events, at_most) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            }
            for event in &events {
                if event.token().0 >= SERVER_TOKENS {
                    let index = event.token().0 / SERVER_TOKENS - 1;
                    vmm.servers.get_mut(index).map(|server| server.ready(event));
                }
            }
            for signal in self.signals.pending() {
                log::info!("ended by signal {signal}");
                let reason = ShutdownCause::HostSignal;
                vmm.end(Ending { guest: false, reason, status: 0 });
            }
            while let Ok(event) = self.reports.try_recv() {
                vmm.machine_event(event);
            }
            vmm.in_one_piece(Vmm::follow_save);
            vmm.in_one_piece(Vmm::follow_files);
            vmm.follow_announcements();
            for index in 0..vmm.servers.len() {
                vmm.asked_by = index;
                while vmm.ending().is_none()
                    && let Some((request, ticket)) =
                        vmm.servers.get_mut(index).and_then(|s| s.next_request())
                {
                    vmm.in_one_piece(|vmm| {
                        let result = table.dispatch(vmm, request, &ticket);
                        if let (Some(result), Some(server)) = (result, vmm.servers.get_mut(index)) {
                            server.reply(&ticket, result);
                        }
                    });
                }
            }
            if let Some(ending) = vmm.ending() {
                return Ok(ending);
            }
        }
    }
}
