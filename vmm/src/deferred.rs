//! Operations that cannot be done at once, because the machine has not come to rest or its kernel
//! has not been read. They are retried until they are done or their time is up, and clients are
//! served meanwhile.
//!
//! ```text
//!   a request                          done: answered
//!   a save's capture -----> tried ------------------->
//!   the guest's end       |       ^
//!             not yet     v       | every RETRY
//!                        deferred -------------------> time is up: refused, or given up
//! ```
//! At most one operation is deferred. Requests that need the machine wait until it is over, in
//! order, but none waits longer than if it were the first. Queries and `quit` are answered at once.
//! Reports of the machine and of the checkpoint thread wait, too.
use std::{
    cell::LazyCell,
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, channel},
    },
    time::{Duration, Instant},
};

use config::actions::Action;
use machine::{ReloadError, Reloaded};
use qmp::{
    Error, Request,
    schema::{Event, ShutdownCause},
    server::Ticket,
    table::Table,
};

use crate::{
    bounds, commands,
    lifecycle::{self, Halt},
    saving::Capturing,
    vmm::{Ending, Refused, Vmm},
};

/// A request, the ticket for its answer, and how long it may be retried.
pub(crate) struct Pending {
    request: Request,
    ticket: Ticket,
    until: Instant,
}

/// The guest cannot run on, and `action` is to be taken.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Halting {
    pub why: Halt,
    /// The guest has caused it.
    pub guest: bool,
    pub reason: ShutdownCause,
    pub action: Action,
    /// Exit status of the process, if it ends.
    pub status: u8,
    /// Until when it may be retried.
    pub until: Instant,
}

/// An operation that is retried.
pub(crate) enum Operation {
    Request(Pending),
    Capture(Capturing),
    Halt(Halting),
}

struct Deferred {
    operation: Operation,
    /// What the operation waits for, as of the last try.
    why: String,
}

/// The deferred operation, and the requests that wait for it.
#[derive(Default)]
pub(crate) struct Deferrals {
    deferred: Option<Deferred>,
    /// Requests that wait, at most one for each client.
    waiting: VecDeque<Pending>,
    reload: Option<Reload>,
    /// How many reads of a kernel have timed out so far.
    read_timeouts: u64,
}

/// A kernel that is read again for a reset.
enum Reload {
    Reading(Reading),
    Read(Box<Reloaded>),
}

/// A kernel that is being read, by another thread.
struct Reading {
    inbox: Receiver<Result<Reloaded, ReloadError>>,
    /// Starts and ends of calls that may wait for storage so far: odd during such a call.
    calls: Arc<AtomicU64>,
    /// The last count of calls, and the last time at which none of them was seen to hang.
    seen: (u64, Instant),
    /// A reset waits for it.
    waited_for: bool,
}

impl Vmm {
    /// Whether an operation is deferred: nothing else may touch the machine then.
    pub(crate) fn is_deferring(&self) -> bool {
        self.deferrals.deferred.is_some()
    }

    /// As [`machine::Machine::rest_timeouts`], counting everything that an operation may wait for.
    pub(crate) fn rest_timeouts(&self) -> u64 {
        self.machine.rest_timeouts().saturating_add(self.deferrals.read_timeouts)
    }

    /// Whether an operation has timed out and has since been neither done nor given up.
    fn is_trying(&self) -> bool {
        let reads = match &self.deferrals.reload {
            Some(Reload::Reading(reading)) => reading.waited_for,
            Some(Reload::Read(_)) => true,
            None => false,
        };
        self.machine.is_trying() || reads
    }

    /// How long until an operation is to be retried, or a request may be carried out.
    pub(crate) fn until_retry(&self) -> Option<Duration> {
        match self.is_deferring() || self.ending().is_some() {
            true => Some(bounds::RETRY),
            false => (!self.deferrals.waiting.is_empty()).then_some(Duration::ZERO),
        }
    }

    /// Carry out a request, or let it wait for its turn.
    pub(crate) fn serve(&mut self, table: &Table<Self>, request: Request, ticket: Ticket) {
        let until = Instant::now() + bounds::REST;
        let pending = Pending { request, ticket, until };
        let queued = self.is_deferring() || !self.deferrals.waiting.is_empty();
        let needs_machine = commands::needs_machine(table, &pending.request.execute);
        if needs_machine && self.ending().is_some() {
            let why = "the monitor is ending: it waits for requests in flight";
            self.answer(&pending, Err(Error::text(why)));
        } else if needs_machine && queued {
            self.deferrals.waiting.push_back(pending);
        } else {
            self.carry_out(table, pending);
        }
    }

    fn carry_out(&mut self, table: &Table<Self>, pending: Pending) {
        let before = self.rest_timeouts();
        self.in_one_piece(|vmm| {
            let result = table.dispatch(vmm, pending.request.clone(), &pending.ticket);
            match result {
                Some(Err(e))
                    if vmm.rest_timeouts() > before
                        && !vmm.is_deferring()
                        && Instant::now() < vmm.tried_until(pending.until) =>
                {
                    let until = vmm.tried_until(pending.until);
                    let pending = Pending { until, ..pending };
                    vmm.defer(Operation::Request(pending), e.to_string());
                }
                Some(result) => vmm.answer(&pending, result),
                None => {}
            }
        });
        // A query leaves alone the operation that others wait for.
        if !self.is_deferring() && self.ending().is_none() && self.is_trying() {
            self.give_up();
        }
    }

    fn answer(&mut self, pending: &Pending, result: Result<serde_json::Value, Error>) {
        self.servers.reply(&pending.ticket, result);
    }

    /// Try `operation` again later; `why` it could not be done.
    pub(crate) fn defer(&mut self, operation: Operation, why: String) {
        self.deferrals.deferred = Some(Deferred { operation, why });
    }

    /// Let the machine run on as if the operation that timed out had not been asked for.
    pub(crate) fn give_up(&mut self) {
        self.machine.give_up();
        // A kernel that is being read may serve the next reset: there is never more than one job.
        self.deferrals.reload = match self.deferrals.reload.take() {
            Some(Reload::Reading(reading)) => {
                Some(Reload::Reading(Reading { waited_for: false, ..reading }))
            }
            Some(Reload::Read(_)) | None => None,
        };
    }

    /// Until when an operation may be retried: later than `until` if the kernel is large and its
    /// storage slow but not hanging.
    fn tried_until(&self, until: Instant) -> Instant {
        match &self.deferrals.reload {
            Some(Reload::Reading(reading)) => until.max(reading.seen.1 + bounds::REST),
            Some(Reload::Read(_)) | None => until,
        }
    }

    /// Retry what was deferred, or else the request that has waited longest.
    pub(crate) fn follow_deferred(&mut self, table: &LazyCell<Table<Self>>) {
        if let Some(Deferred { operation, .. }) = self.deferrals.deferred.take() {
            match operation {
                Operation::Request(pending) => self.carry_out(table, pending),
                Operation::Capture(capturing) => {
                    self.in_one_piece(|vmm| vmm.try_capture(capturing));
                }
                Operation::Halt(halting) => self.in_one_piece(|vmm| vmm.try_halt(halting)),
            }
        } else {
            self.forget_late_kernel();
            if let Some(pending) = self.deferrals.waiting.pop_front() {
                self.carry_out(table, pending);
            }
        }
        while let Some(Deferred { why, .. }) = &self.deferrals.deferred
            && let Some(pending) =
                self.deferrals.waiting.pop_front_if(|pending| pending.until <= Instant::now())
        {
            let desc = format!("{} has to wait: {why}", pending.request.execute);
            self.answer(&pending, Err(Error::text(desc)));
        }
    }

    /// Take the action for a guest that cannot run on.
    pub(crate) fn try_halt(&mut self, halting: Halting) {
        let Halting { why, guest, reason, action, status, until } = halting;
        if action == Action::End {
            return self.end(Ending { guest, reason, status });
        }
        let before = self.rest_timeouts();
        // Real hardware would execute nothing any more.
        let rests = self.machine.pause().map_err(Refused::from);
        let done = rests.and_then(|()| match action {
            Action::Reset => self.apply(lifecycle::Event::Reset),
            Action::End | Action::Stay => Ok(()),
        });
        match (done, action) {
            (Ok(()), Action::Stay) => {
                // QEMU's order with `-action shutdown=pause`. The other two have an event of their
                // own, or none.
                if why == Halt::Shutdown {
                    self.tell_of_guest(Event::Shutdown { guest, reason });
                }
                if let Err(e) = self.apply(lifecycle::Event::Halt(why)) {
                    self.cannot_be_kept(&e);
                }
            }
            (Ok(()), Action::Reset) => self.tell_of_guest(Event::Reset { guest, reason }),
            (Ok(()), Action::End) => {}
            (Err(e), _)
                if self.rest_timeouts() > before && Instant::now() < self.tried_until(until) =>
            {
                let halting = Halting { until: self.tried_until(until), ..halting };
                self.defer(Operation::Halt(halting), Error::generic(&e).to_string());
            }
            (Err(e), _) => self.cannot_be_kept(&e),
        }
    }

    fn cannot_be_kept(&mut self, why: &Refused) {
        log::error!("the machine cannot be halted: {}", Error::generic(why));
        self.end(Ending { guest: false, reason: ShutdownCause::HostError, status: 1 });
    }

    /// The kernel for a reset, which another thread reads, as storage may make it wait.
    ///
    /// # Errors
    /// When it cannot be loaded, or has not been read yet: see [`Vmm::rest_timeouts`].
    pub(crate) fn reload(&mut self) -> Result<Box<Reloaded>, Refused> {
        let mut reading = match self.deferrals.reload.take() {
            Some(Reload::Read(kernel)) => return Ok(kernel),
            Some(Reload::Reading(reading)) => reading,
            None => {
                let (report, inbox) = channel();
                let calls = Arc::<AtomicU64>::default();
                let load = self.machine.reload(calls.clone());
                // A thread that has gone never answers, and is reported as one that hangs.
                let _ = self.storage.run(Box::new(move || drop(report.send(load()))));
                Reading { inbox, calls, seen: (0, Instant::now()), waited_for: false }
            }
        };
        // Most often the kernel is in the host's page cache.
        let limit = if reading.waited_for { Duration::ZERO } else { machine::AT_ONCE };
        match reading.inbox.recv_timeout(limit) {
            Ok(read) => Ok(Box::new(read?)),
            Err(why) => {
                let calls = reading.calls.load(Ordering::Relaxed);
                // Between two calls the thread works on what it has read, which may take long on a
                // busy host. A thread that has gone never answers, and is reported as one that
                // hangs.
                let works = calls != reading.seen.0 || calls.is_multiple_of(2) && calls > 0;
                if works && why == RecvTimeoutError::Timeout {
                    reading.seen = (calls, Instant::now());
                }
                reading.waited_for = true;
                self.deferrals.reload = Some(Reload::Reading(reading));
                self.deferrals.read_timeouts = self.deferrals.read_timeouts.saturating_add(1);
                let boot = &self.machine.config().boot;
                let initrd = boot.initrd.iter().map(|path| format!(" or {}", path.display()));
                let files = boot.kernel.display().to_string() + &initrd.collect::<String>();
                Err(Refused::Reading(files))
            }
        }
    }

    /// Keep what [`Vmm::reload`] gave, for a later try.
    pub(crate) fn keep_reloaded(&mut self, kernel: Box<Reloaded>) {
        self.deferrals.reload = Some(Reload::Read(kernel));
    }

    /// Drop a kernel that was read too late: its files may have changed by the next reset.
    fn forget_late_kernel(&mut self) {
        self.deferrals.reload.take_if(|reload| match reload {
            Reload::Reading(reading) => reading.inbox.try_recv().is_ok(),
            Reload::Read(_) => true,
        });
    }
}
