//! The main thread's part of a primary: it stops the guest for each epoch.
mod of_guest;
mod stopping;

use std::{
    collections::VecDeque,
    path::PathBuf,
    sync::{
        Arc,
        mpsc::{Receiver, TryRecvError, channel},
    },
    time::{Duration, Instant},
};

use config::incoming::Arbiter;
use lineage::{Images, Mark};
use machine::{Gates, Markers};
use parking_lot::Mutex;
use qmp::{
    Error,
    schema::{
        Event, FailoverTimes, ReplicationAnswer, ReplicationBlackhole, ReplicationEpochs,
        ReplicationHeartbeatPath, ReplicationInfo, ReplicationNeed, ReplicationResult,
        ReplicationSide, ReplicationStart, ReplicationStatus, ShutdownCause,
    },
    server::Ticket,
};
use replication::{
    Command, Epoch, Exit, Identity, Incarnation, Input, Lineage, Primary, Rules, Term,
};
use transport::Security;

use self::stopping::Capture;
use super::{
    Promotion,
    beside::Key,
    copier,
    disks::{Disks, named},
    handed,
    history::History,
    offer::{Host, Offer},
    protector::{Manner, Order, Orders, Protector, Report, Task, Way},
    questions::{Query, changed, parse_uuid},
    settings,
    throttle::Throttle,
};
use crate::{
    bounds,
    checkpoint::job::new_id,
    durations::microseconds,
    vmm::{Ending, Vmm},
    wake::Wake,
};

/// Commands that would change the machine itself, or need the thread that replicates it.
const CHANGES: &[&str] = &[
    "block_resize",
    "blockdev-add",
    "blockdev-del",
    "device_add",
    "device_del",
    "migrate",
    "netdev_add",
    "netdev_del",
];
/// Exit status of a primary whose guest runs elsewhere.
const FENCED: u8 = 3;

/// What this process knows of the replication of its machine.
pub(crate) struct Replication {
    /// The domain, once it was protected here or came here by a failover.
    lineage: Option<Lineage>,
    /// The first term that was not used yet.
    term: Term,
    protection: Option<Protection>,
    last: ReplicationInfo,
    /// What the epochs of all protections here have cost.
    history: Arc<Mutex<History>>,
}

impl Default for Replication {
    fn default() -> Self {
        Self {
            lineage: None,
            term: Term(1),
            protection: None,
            last: ReplicationInfo::default(),
            history: Arc::default(),
        }
    }
}

/// What the sidecars of the disks say.
pub(crate) struct Bound {
    lineage: Lineage,
    /// The first term that may be used.
    term: Term,
}

impl Bound {
    /// Read the sidecars of `images`. Waits for storage.
    ///
    /// # Errors
    /// When one cannot be read, or they belong to different guests.
    pub fn read(images: &[PathBuf]) -> Result<Option<Self>, Error> {
        let images = Images::read(images.iter().map(PathBuf::as_path));
        let images = images.map_err(|e| Error::generic(&e))?;
        Ok(images.entry().map(|entry| {
            let term = match entry.mark {
                Mark::Free { term } | Mark::Running { term, .. } => term,
                // The guest was started against the word.
                Mark::Protected(bond) | Mark::Fencing(bond) => bond.term.next(),
                Mark::Fenced { term } | Mark::Outdated { term } | Mark::Inconsistent { term } => {
                    term.next()
                }
            };
            Self { lineage: entry.lineage, term }
        }))
    }
}

/// A protection, or an ownership of a term.
struct Protection {
    orders: Orders,
    reports: Receiver<Report>,
    status: Arc<Mutex<ReplicationInfo>>,
    /// The disks, and the thread that reads them.
    disks: Option<copier::Handle>,
    manner: Manner,
    markers: Option<Markers>,
    /// Events that the guest has caused are held, each with the epoch that covers it, once there is
    /// one.
    holds: bool,
    events: VecDeque<(Option<Epoch>, Event)>,
    query: Option<Query>,
    /// The agent was asked for a connection.
    connecting: bool,
    /// The guest is not to run.
    parked: bool,
    /// An epoch is sent out of its memory, so that it must not run.
    copying: bool,
    /// It was stopped for that, and not by a client.
    stopped: bool,
    /// It has not stopped yet, or does not run again yet.
    restless: bool,
    capture: Option<Capture>,
    throttle: Throttle,
    /// The backup was asked to leave the guest alone, as the monitor ends.
    parting: bool,
}

impl Vmm {
    /// The images whose sidecars say which guest this is, if that is not known yet.
    pub(crate) fn unread_sidecars(&self) -> Option<Vec<PathBuf>> {
        let disks = self.machine.writable_disks();
        let unread = self.replication.lineage.is_none() && !disks.is_empty();
        unread.then(|| disks.iter().map(|(_, disk)| disk.path().to_owned()).collect())
    }

    /// Protect the machine, of whose disks the sidecars were read ([`Vmm::unread_sidecars`]).
    /// Connections to its backup are protected by `security`.
    ///
    /// # Errors
    /// When that is not possible; nothing has changed then.
    pub(crate) fn protect(
        &mut self,
        start: &ReplicationStart,
        bound: Option<Bound>,
        security: Security,
    ) -> Result<(), Error> {
        let (settings, arbiter) = settings::of_primary(start)?;
        let manner = settings::manner(start)?;
        let peer = start.uri.as_deref().map(|uri| match uri.split_once(':') {
            Some(("unix", path)) if !path.is_empty() => Ok(PathBuf::from(path)),
            Some(("tcp", _)) => Err(Error::text(format!(
                "Invalid parameter 'uri': '{uri}': the monitor opens no TCP connections: leave it \
                 out, and answer REPLICATION_NEEDS with a connected socket"
            ))),
            _ => Err(Error::text(format!("Invalid parameter 'uri': '{uri}': must be unix:SOCKET"))),
        });
        let way = Way { peer: peer.transpose()?, security };
        if let (Some(bound), None) = (bound, self.replication.lineage) {
            let named = start.lineage.as_deref().map(|text| parse_uuid("lineage", text));
            if let Some(named) = named.transpose()?.filter(|named| *named != bound.lineage.0) {
                return Err(Error::text(format!(
                    "Invalid parameter 'lineage': '{}': the disks belong to lineage {}",
                    Lineage(named),
                    bound.lineage
                )));
            }
            (self.replication.lineage, self.replication.term) = (Some(bound.lineage), bound.term);
        }
        let lineage = match (&start.lineage, self.replication.lineage) {
            (Some(text), Some(known)) if known.to_string() != *text => {
                return Err(Error::text(format!(
                    "Invalid parameter 'lineage': '{text}': this machine's is {known}"
                )));
            }
            (_, Some(known)) => known,
            (Some(text), None) => Lineage(parse_uuid("lineage", text)?),
            (None, None) => Lineage(random()?),
        };
        if self.machine.config().memory.shared {
            return Err(Error::text(
                "a machine whose memory other processes can map cannot be protected: no checkpoint has \
                 what they write: start it without mem-share",
            ));
        }
        let device =
            || self.machine.writable_disks().into_iter().find(|(_, disk)| disk.is_device());
        if let Some((id, _)) = device().filter(|_| manner.disks) {
            return Err(Error::text(format!(
                "a machine with a block device as its disk cannot be protected: it has '{id}', and \
                 the mark that keeps both hosts from starting the guest needs a file system"
            )));
        }
        if self.saving().is_busy() {
            return Err(Error::text(
                "a save is under way or tracks changes for the next one: wait for its end, or save \
                 without 'track'",
            ));
        }
        if let Some(protection) = &mut self.replication.protection {
            if protection.status.lock().state != ReplicationStatus::Degraded {
                return Err(Error::text(
                    "the machine is protected already: replication-stop ends that",
                ));
            }
            let settles = protection.query.is_some_and(|query| query.settles());
            if settles || protection.parked {
                return Err(Error::text(
                    "the witness has not confirmed yet that the guest runs here: query-replication \
                     shows what is waited for",
                ));
            }
            if manner.blackhole.is_some() {
                return Err(Error::text(
                    "'blackhole' is not possible while the machine has no backup after a failure: \
                     use replication-stop first",
                ));
            }
            if manner.disks != protection.manner.disks {
                return Err(Error::text(
                    "Invalid parameter 'disks': it cannot be changed while the machine has no backup \
                     after a failure: use replication-stop first",
                ));
            }
            if let Some(disks) = &protection.disks {
                disks.ask(copier::Work::Arbiter(named(&arbiter)));
            }
            protection.manner = manner;
            protection.orders.give(Order::Again { settings, arbiter, way, manner });
            return Ok(());
        }
        let incarnation = Incarnation(random()?);
        let me = Identity { lineage, incarnation };
        let primary = Primary::new(me, self.replication.term, settings, Rules::ALL);
        self.begin_protection(primary, settings.timeout, way, Some(arbiter), manner)
    }

    /// Continue as the owner of a term that was won by a failover.
    ///
    /// # Errors
    /// When the host has no descriptor to give.
    pub fn promoted(&mut self, promotion: Promotion) -> Result<(), Error> {
        let Promotion { me, term, promoted, settings, disks, epoch, times, decided, .. } =
            promotion;
        let run_us = microseconds(decided.elapsed());
        let times = FailoverTimes { run_us, ..times };
        (self.replication.lineage, self.replication.term) = (Some(me.lineage), term);
        self.replication.last.last_failover = Some(times);
        let (primary, outputs) = Primary::owner(me, term, promoted, settings, Rules::ALL);
        let way = Way { peer: None, security: Security::Plain(false) };
        let manner = Manner { disks, ..Manner::default() };
        self.begin_protection(primary, settings.timeout, way, None, manner)?;
        for output in outputs {
            if let replication::Output::Ask { nonce, question } = output {
                self.replication_asks(Query { nonce, question });
            }
        }
        self.broadcast(&Event::ReplicationFailover { term: term.0, epoch: epoch.0, times });
        Ok(())
    }

    /// Begin to protect the machine if there is an `arbiter`, else only to own its term.
    fn begin_protection(
        &mut self,
        mut primary: Primary,
        timeout: Duration,
        way: Way,
        arbiter: Option<Arbiter>,
        manner: Manner,
    ) -> Result<(), Error> {
        let me = primary.me();
        manner.set_rhythm(&mut primary);
        let failed = |e: std::io::Error| Error::generic(&e);
        self.machine.prepare_to_save().map_err(|e| Error::generic(&e))?;
        let config = self.machine.description(random()?, None);
        let wake = Wake::new().map_err(failed)?;
        let (to, orders) = channel();
        let (reports, inbox) = channel();
        // What the thread has not shown yet must not look as if there were no protection.
        let state = match arbiter {
            Some(_) => ReplicationStatus::Connecting,
            None => ReplicationStatus::Degraded,
        };
        let tsc = self.machine.tsc().map_err(|e| Error::generic(&e))?;
        let named = arbiter.as_ref().map(named);
        let (starts, cpu) = (arbiter.is_some(), self.machine.cpu());
        let host = Host::of(arbiter.unwrap_or(Arbiter::None), tsc, cpu);
        let status = Arc::new(Mutex::new(ReplicationInfo {
            state,
            role: Some(ReplicationSide::Primary),
            lineage: Some(me.lineage.to_string()),
            incarnation: Some(me.incarnation.to_string()),
            last_failover: self.replication.last.last_failover,
            ..Default::default()
        }));
        let to_it = Orders { to, wake };
        let (disks, of_thread) = match manner.blackhole {
            // No checkpoint takes what is logged.
            Some(ReplicationBlackhole::Harvest) => (None, None),
            _ if !manner.disks => (None, None),
            _ => self.disks_thread(me.lineage, named, &to_it)?.unzip(),
        };
        let (heartbeat, key) = (manner.heartbeat, Some(Key::new().map_err(failed)?));
        let task = Task {
            primary,
            offer: Offer { timeout, heartbeat, key, disks: manner.disks, host, config },
            way,
            disks: of_thread,
            memory: self.machine.memory().clone(),
            manner,
            start: starts,
            orders,
            wake: to_it.wake.clone(),
            status: status.clone(),
            history: self.replication.history.clone(),
        };
        let notify = self.saving().thread().notify();
        let report = move |report| {
            // If the main thread no longer receives, the process is ending.
            let _ = reports.send(report);
            notify();
        };
        let run = Box::new(move || Protector::new(task, report).run());
        self.saving().thread().run(run).map_err(|e| Error::generic(&e))?;
        self.replication.lineage = Some(me.lineage);
        self.replication.protection = Some(Protection {
            orders: to_it,
            reports: inbox,
            status,
            disks,
            manner,
            markers: None,
            holds: false,
            events: VecDeque::new(),
            query: None,
            connecting: false,
            parked: false,
            copying: false,
            stopped: false,
            restless: false,
            capture: None,
            throttle: Throttle::default(),
            parting: false,
        });
        Ok(())
    }

    /// Have another thread read the disks, if there are any: two handles of it.
    fn disks_thread(
        &self,
        lineage: Lineage,
        arbiter: Option<String>,
        orders: &Orders,
    ) -> Result<Option<(copier::Handle, copier::Handle)>, Error> {
        let disks = self.machine.writable_disks();
        if disks.is_empty() {
            return Ok(None);
        }
        let disks = Arc::new(Disks::new(disks));
        let (handle, run) = copier::new(disks, lineage, arbiter, orders.clone());
        self.storage.run(Box::new(run)).map_err(|e| Error::generic(&e))?;
        Ok(Some((handle.clone(), handle)))
    }

    /// Give the thread a client's command.
    ///
    /// # Errors
    /// When the machine is not protected.
    pub(crate) fn replication_command(
        &mut self,
        command: Command,
        force: bool,
    ) -> Result<(), Error> {
        let protection = self.protection()?;
        if command == Command::Failover && protection.manner.blackhole.is_some() {
            return Err(Error::text("there is no backup: the machine is replicated into nothing"));
        }
        protection.orders.give(Order::Command(match force {
            true => Input::Forced(command),
            false => Input::Command(command),
        }));
        Ok(())
    }

    /// The monitor ends for `reason`: the guest is to run nowhere afterwards, unless this host is to
    /// blame.
    pub(crate) fn leave_protection(&mut self, reason: ShutdownCause) {
        if let Some(protection) = &mut self.replication.protection
            && reason != ShutdownCause::HostError
        {
            protection.capture = None;
            protection.parting = true;
            protection.orders.give(Order::Command(Input::Command(Command::Quit)));
        }
    }

    /// Whether no backup will continue the guest, or that cannot be known in time.
    pub(crate) fn has_left_protection(&self) -> bool {
        let Some(protection) = self.replication.protection.as_ref().filter(|p| p.parting) else {
            return true;
        };
        let state = protection.status.lock().state;
        // This side cannot say any more where the guest runs.
        let over = state == ReplicationStatus::Fenced;
        let late = self.ends_since().elapsed() >= bounds::PARTING;
        if late || over {
            log::warn!("ended without an answer ({state:?}): the backup may continue the guest");
        }
        late || over
    }

    /// Take an agent's answer.
    ///
    /// # Errors
    /// When it is malformed. One that nobody waits for is dropped.
    pub(crate) fn replication_answer(
        &mut self,
        answer: &ReplicationAnswer,
        ticket: &Ticket,
    ) -> Result<(), Error> {
        let passed = handed::take(answer, &mut self.servers, ticket);
        let Some(protection) = &mut self.replication.protection else { return Ok(()) };
        if answer.need == ReplicationNeed::Connect {
            if !std::mem::take(&mut protection.connecting)
                || answer.result != ReplicationResult::Connected
            {
                return Ok(());
            }
            let descriptors = passed?;
            protection.orders.give(Order::Connected(descriptors));
            return Ok(());
        }
        if let Some(query) = protection.query
            && let Some(given) = query.answer(answer)?
        {
            protection.query = None;
            let Query { nonce, question } = query;
            protection.orders.give(Order::Answered { nonce, question, answer: given });
        }
        Ok(())
    }

    /// Take an agent's socket for signs of life on a second path.
    ///
    /// # Errors
    /// When the machine is not protected, or this is no such socket.
    pub(crate) fn replication_heartbeat_path(
        &mut self,
        path: &ReplicationHeartbeatPath,
        ticket: &Ticket,
    ) -> Result<(), Error> {
        let socket = handed::datagrams(&path.fd, &mut self.servers, ticket)?;
        let protection = self.protection()?;
        if !socket.is_connected {
            let desc = "Invalid parameter 'fd': must be connected to the backup's socket";
            return Err(Error::text(desc));
        }
        protection.orders.give(Order::Beside(socket));
        Ok(())
    }

    /// The protection.
    fn protection(&self) -> Result<&Protection, Error> {
        let none =
            || Error::text("the machine is not protected: start that with replication-start");
        self.replication.protection.as_ref().ok_or_else(none)
    }

    /// The state of replication.
    pub(crate) fn replication_info(&self) -> ReplicationInfo {
        let last = &self.replication.last;
        match &self.replication.protection {
            Some(protection) => {
                let shown = protection.status.lock().clone();
                let ReplicationInfo { epoch, pause_us, dirty_pages, .. } = *last;
                ReplicationInfo { epoch, pause_us, dirty_pages, ..shown }
            }
            None => last.clone(),
        }
    }

    /// The checkpoints after number `after`.
    pub(crate) fn replication_epochs(&self, after: u64) -> ReplicationEpochs {
        self.replication.history.lock().show(after)
    }

    /// Why the command `name` is not possible now, if replication forbids it.
    pub(crate) fn replication_forbids(&self, name: &str) -> Option<&'static str> {
        self.replication.protection.as_ref()?;
        match name {
            "cont" if self.replication.protection.as_ref().is_some_and(|p| p.copying) => Some(
                "more memory has changed than can be copied aside; it runs again when that is sent",
            ),
            "cont" if self.is_fenced() => {
                Some("the guest may run at its backup; query-replication shows what is waited for")
            }
            _ if CHANGES.contains(&name) => Some(
                "the machine is replicated, and its backup would not follow; use replication-stop first",
            ),
            _ => None,
        }
    }

    /// Whether the guest must not run, as it may run elsewhere.
    pub(crate) fn is_fenced(&self) -> bool {
        self.replication.protection.as_ref().is_some_and(|protection| protection.parked)
    }

    /// Handle what the thread has reported.
    pub(crate) fn follow_replication(&mut self) {
        let ends = self.ending().is_some();
        while (ends || !self.is_deferring())
            && let Some(report) = self.next_report()
        {
            match report {
                Report::Log => {
                    let logged = self.machine.log_dirty(true);
                    self.give(logged.map(|()| Order::Logging(self.machine.filled())));
                }
                Report::Harvest => {
                    let changed = self.machine.dirty_memory();
                    self.give(changed.map(Order::Changed));
                }
                Report::Unlog => {
                    if let Err(e) = self.machine.log_dirty(false) {
                        log::warn!("{}", Error::generic(&e));
                    }
                }
                Report::Capture { epoch, shut, left, staging, most } => {
                    let asked = Instant::now();
                    self.wait_to_capture(Capture { epoch, shut, left, staging, most, asked });
                }
                Report::Copied => {
                    if let Some(protection) = &mut self.replication.protection {
                        protection.copying = false;
                    }
                }
                Report::Released(through) => self.released(through),
                Report::Park(park) => self.park(park),
                Report::Throttle(percent) => self.throttle(percent),
                Report::Ask(query) => self.replication_asks(query),
                Report::Connect => self.ask_for_connection(),
                Report::Tell { event, previous, state, term, reason } => {
                    let info = ReplicationInfo { state, term, ..self.replication_info() };
                    self.broadcast(&changed(&info, previous, event, reason.as_deref()));
                }
                Report::Over(exit, gates) => self.protection_over(exit, gates),
            }
        }
        self.follow_parking();
        self.follow_throttle();
        self.try_epoch();
    }

    fn next_report(&mut self) -> Option<Report> {
        match self.replication.protection.as_ref()?.reports.try_recv() {
            Ok(report) => Some(report),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => {
                log::error!("replication: its thread has ended");
                Some(Report::Over(Some(Exit::Nothing), None))
            }
        }
    }

    fn give(&self, order: Result<Order, machine::DirtyError>) {
        let order = order.unwrap_or_else(|e| Order::Failed(Error::generic(&e).to_string()));
        if let Some(protection) = &self.replication.protection {
            protection.orders.give(order);
        }
    }

    fn replication_asks(&mut self, query: Query) {
        let Some(lineage) = self.replication.lineage else { return };
        if let Some(protection) = &mut self.replication.protection {
            protection.query = Some(query);
        }
        self.broadcast(&query.event(lineage));
    }

    fn ask_for_connection(&mut self) {
        let Some(lineage) = self.replication.lineage else { return };
        if let Some(protection) = &mut self.replication.protection {
            protection.connecting = true;
        }
        self.broadcast(&Event::ReplicationNeeds {
            nonce: 0,
            need: ReplicationNeed::Connect,
            lineage: lineage.to_string(),
            term: None,
            word: None,
            side: None,
            incarnation: None,
            winner: None,
            to: None,
            yielded_to: None,
        });
    }

    fn protection_over(&mut self, exit: Option<Exit>, gates: Option<Gates>) {
        let info = self.replication_info();
        self.replication.term = Term(info.term);
        self.replication.last = ReplicationInfo { held_bytes: 0, oldest_us: 0, ..info };
        if matches!(exit, None | Some(Exit::Done)) {
            self.released(None);
        }
        let was = self.replication.protection.take();
        if let Err(e) = self.machine.log_dirty(false) {
            log::warn!("{}", Error::generic(&e));
        }
        match exit {
            // No more epochs are captured, so that they stay open.
            None | Some(Exit::Done) => drop(gates),
            // The guest may run elsewhere, and what this one does is never seen.
            Some(Exit::Fenced | Exit::Nothing | Exit::Refused(_)) => std::mem::forget(gates),
        }
        let status = match exit {
            None => {
                if was.is_some_and(|was| was.parked) {
                    log::warn!("replication has ended; the guest is stopped: cont lets it run");
                }
                return;
            }
            Some(Exit::Fenced) => FENCED,
            Some(Exit::Done) => 0,
            Some(Exit::Nothing | Exit::Refused(_)) => 1,
        };
        self.end(Ending { guest: false, reason: ShutdownCause::HostQmpQuit, status });
    }
}

fn random() -> Result<u128, Error> {
    new_id().map_err(|e| Error::generic(&e))
}
