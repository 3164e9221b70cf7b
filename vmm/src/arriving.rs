//! The monitor before its machine has arrived (`-incoming`): it serves clients, in the run state
//! `inmigrate`.
//!
//! A machine that a peer sends may take hours, or never arrive, so commands that need a machine are
//! refused meanwhile. A machine that is read from files of this host arrives in a moment, so such
//! commands wait for it and clients do not notice. `cont` and `stop` decide whether the machine
//! runs once it has arrived.
use qmp::{
    Error, Request,
    schema::{
        Cont, Empty, Event, MigrateCancel, MigrationInfo, MigrationStats, MigrationStatus,
        QueryMigrate, QueryReplication, QueryStatus, Quit, ReplicationAnswer, ReplicationFailover,
        ReplicationHeartbeatPath, ReplicationInfo, ReplicationNeed, ReplicationResult, RunState,
        ShutdownCause, StatusInfo, Stop,
    },
    server::{Servers, Ticket},
    table::{Host, Table},
};
use replication::{Command, Input};

use crate::{
    checkpoint::{Arrival, ArrivalStep, Arrived, RestoreError},
    commands,
    replication::{
        changed, handed,
        host::Shared,
        standby::{Tell, ToStandby},
    },
    vmm::Ending,
};

/// A monitor that has no machine yet.
pub struct Arriving {
    pub(crate) servers: Servers,
    arrival: Arrival,
    /// The machine stays stopped when it has arrived.
    paused: bool,
    /// Requests that need the machine wait for it.
    patient: bool,
    waiting: Vec<WaitingRequest>,
    status: MigrationStatus,
    over: Option<Over>,
}

/// A request that waits for the machine.
pub struct WaitingRequest {
    /// The request.
    pub request: Request,
    /// For its reply.
    pub ticket: Ticket,
}

/// How the wait for the machine ends.
pub enum Over {
    /// The machine has arrived.
    Arrived(Box<Arrived>),
    /// The machine will not arrive.
    Failed(RestoreError),
    /// The monitor is to end.
    Ended(Ending),
}

/// What the monitor keeps when the wait is over.
pub struct Handed {
    /// Its servers.
    pub servers: Servers,
    /// The machine is to stay stopped.
    pub paused: bool,
    /// Requests of clients that have waited for the machine.
    pub waiting: Vec<WaitingRequest>,
}

impl Arriving {
    /// A monitor that waits for `arrival`. The machine is `paused` afterwards unless clients say
    /// otherwise; if `patient`, requests that need the machine wait for it.
    pub fn new(servers: Servers, arrival: Arrival, paused: bool, patient: bool) -> Self {
        let (waiting, status, over) = (Vec::new(), MigrationStatus::Setup, None);
        Self { servers, arrival, paused, patient, waiting, status, over }
    }

    /// Commands that are served meanwhile; all others are known, and refused.
    pub(crate) fn table() -> Table<Self> {
        commands::probing(true)
            .on(true, cont)
            .on(true, stop)
            .on(true, quit)
            .on(true, migrate_cancel)
            .on(true, query_migrate)
            .on(true, query_status)
            .on(true, query_replication)
            .on_ticket(true, replication_answer)
            .on_ticket(true, replication_heartbeat_path)
            .on_ticket(true, |this, command, ticket| {
                commands::net::getfd(&mut this.servers, command, ticket)
            })
            .on_ticket(true, |this, command, ticket| {
                commands::net::closefd(&mut this.servers, command, ticket)
            })
            .on(true, replication_failover)
            .listing(&commands::table(), false)
    }

    /// Whether `request` waits for the machine.
    pub(crate) fn holds(&self, table: &Table<Self>, request: &Request) -> bool {
        self.patient && table.when(&request.execute) == Some(false)
    }

    pub(crate) fn hold(&mut self, waiting: WaitingRequest) {
        self.waiting.push(waiting);
    }

    /// The backup that it is.
    fn backup(&self) -> Result<&Shared, Error> {
        let none = || Error::text("this monitor is no backup: start it with -incoming replicate:");
        self.arrival.replica().ok_or_else(none)
    }

    /// Handle what the incoming thread has reported.
    pub(crate) fn follow(&mut self) {
        while let Some(step) = self.arrival.step() {
            match step {
                ArrivalStep::Described => self.set_status(MigrationStatus::Active),
                ArrivalStep::Replica(told) => self.tell(told),
                ArrivalStep::Done(Ok(arrived)) => self.end(Over::Arrived(arrived)),
                ArrivalStep::Done(Err(e)) => self.end(Over::Failed(e)),
            }
        }
    }

    /// End the wait like this, unless it has ended already.
    pub(crate) fn end(&mut self, over: Over) {
        if self.over.is_none() {
            if let Over::Failed(_) | Over::Ended(_) = over {
                self.arrival.cancel();
            }
            self.over = Some(over);
        }
    }

    pub(crate) fn is_over(&self) -> bool {
        self.over.is_some()
    }

    /// How the wait has ended, once it has.
    pub(crate) fn take_end(&mut self) -> Option<Over> {
        self.over.take()
    }

    /// What the monitor keeps after `over`.
    pub(crate) fn finish(mut self, over: &Over) -> Handed {
        self.set_status(match over {
            Over::Arrived(_) => MigrationStatus::Completed,
            Over::Failed(_) | Over::Ended(_) => MigrationStatus::Failed,
        });
        self.arrival.finish();
        Handed { servers: self.servers, paused: self.paused, waiting: self.waiting }
    }

    fn tell(&mut self, told: Tell) {
        match told {
            Tell::Ask(query, lineage) => self.servers.broadcast(&query.event(lineage)),
            Tell::State { previous, told, info } => {
                self.servers.broadcast(&changed(&info, previous, told, None));
            }
        }
    }

    fn set_status(&mut self, status: MigrationStatus) {
        self.status = status;
        self.servers.broadcast(&Event::Migration { status });
    }
}

impl Host for Arriving {
    type When = bool;

    fn admit(&self, name: &str, when: bool) -> Result<(), Error> {
        match when {
            true => Ok(()),
            false => Err(Error::text(format!(
                "{name} is not possible now: the incoming machine has not arrived yet (inmigrate); \
                 query-migrate shows the progress, migrate_cancel and quit end this monitor"
            ))),
        }
    }
}

fn cont(arriving: &mut Arriving, _: Cont) -> Result<Empty, Error> {
    arriving.paused = false;
    Ok(Empty {})
}

fn stop(arriving: &mut Arriving, _: Stop) -> Result<Empty, Error> {
    arriving.paused = true;
    Ok(Empty {})
}

fn quit(arriving: &mut Arriving, _: Quit) -> Result<Empty, Error> {
    let reason = ShutdownCause::HostQmpQuit;
    arriving.end(Over::Ended(Ending { guest: false, reason, status: 0 }));
    Ok(Empty {})
}

/// Without its machine the monitor is unusable, so it ends and reports that.
fn migrate_cancel(arriving: &mut Arriving, _: MigrateCancel) -> Result<Empty, Error> {
    arriving.arrival.cancel();
    Ok(Empty {})
}

fn query_replication(
    arriving: &mut Arriving,
    _: QueryReplication,
) -> Result<ReplicationInfo, Error> {
    Ok(arriving.arrival.replica().map_or_else(Default::default, |r| r.status.lock().clone()))
}

fn replication_answer(
    arriving: &mut Arriving,
    answer: ReplicationAnswer,
    ticket: &Ticket,
) -> Result<Option<Empty>, Error> {
    let connects =
        answer.need == ReplicationNeed::Connect && answer.result == ReplicationResult::Connected;
    let passed = connects.then(|| handed::take(&answer, &mut arriving.servers, ticket));
    if let Some(replica) = arriving.arrival.replica() {
        replica.give(match passed.transpose()? {
            // A primary's, which nobody has asked for.
            Some(descriptors) => ToStandby::Connected(descriptors),
            None => ToStandby::Answer(answer),
        });
    }
    Ok(Some(Empty {}))
}

fn replication_heartbeat_path(
    arriving: &mut Arriving,
    path: ReplicationHeartbeatPath,
    ticket: &Ticket,
) -> Result<Option<Empty>, Error> {
    let socket = handed::datagrams(&path.fd, &mut arriving.servers, ticket)?;
    arriving.backup()?.give(ToStandby::Beside(socket));
    Ok(Some(Empty {}))
}

fn replication_failover(
    arriving: &mut Arriving,
    failover: ReplicationFailover,
) -> Result<Empty, Error> {
    arriving.backup()?.give(ToStandby::Command(match failover.force {
        Some(true) => Input::Forced(Command::Failover),
        _ => Input::Command(Command::Failover),
    }));
    Ok(Empty {})
}

fn query_status(_: &mut Arriving, _: QueryStatus) -> Result<StatusInfo, Error> {
    Ok(StatusInfo::new(RunState::Inmigrate))
}

fn query_migrate(arriving: &mut Arriving, _: QueryMigrate) -> Result<MigrationInfo, Error> {
    use std::sync::atomic::{AtomicU64, Ordering};
    let progress = arriving.arrival.progress();
    let load = |n: &AtomicU64| n.load(Ordering::Relaxed);
    let (total, transferred) = (load(&progress.total), load(&progress.written));
    let ram = (total > 0).then(|| MigrationStats {
        transferred,
        remaining: total.saturating_sub(load(&progress.done)),
        total,
        duplicate: 0,
        normal: transferred / 4096,
        page_size: 4096,
    });
    Ok(MigrationInfo { status: arriving.status, ram, ..Default::default() })
}
