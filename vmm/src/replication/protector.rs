//! The thread of a primary: it has the connection, moves pages, releases output, and drives
//! [`Primary`].
mod copy;
mod epochs;
mod link;
mod tracking;

use std::{
    collections::VecDeque,
    io,
    ops::Range,
    path::PathBuf,
    sync::{
        Arc,
        mpsc::{Receiver, Sender},
    },
    time::{Duration, Instant},
};

use config::incoming::Arbiter;
use machine::{
    Gates, Memory, Taken,
    memory::staging::{self, Staging},
};
use parking_lot::Mutex;
use qmp::schema::{ReplicationBlackhole, ReplicationInfo, ReplicationStatus};
use replication::{
    Answer, Command, Connection as Number, Digest, Epoch, Event, Exit, Frame, Input, Mark, Output,
    Primary, Question, Settings, Term, Why,
    pace::{Faults, Pace},
    primary::State,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use state::config::Halted;
use transport::{Descriptors, Link, Security};

use self::copy::DiskCopy;
use super::{
    beside::{Beside, Socket},
    copier,
    history::{History, Pause},
    offer::Offer,
    outgoing::{Outgoing, Staged},
    outside::Outside,
    process::Watched,
    questions::show,
    rounds::Rounds,
    settings::MOST_HELD,
};
use tracking::Tracked;

use crate::{
    durations::{microseconds, nanoseconds},
    wake::Wake,
};

/// Bytes that may wait in a connection before more are encoded.
const HIGH_WATER: usize = 1 << 20;
/// As many may wait beyond that of signs of life, for a peer that does not read.
const MOST_QUEUED: usize = HIGH_WATER + (64 << 10);

/// What the thread needs of the main thread.
pub enum Report {
    /// Log what changes in memory from now on, and answer with [`Order::Logging`].
    Log,
    /// Answer with [`Order::Changed`].
    Harvest,
    /// Log no longer.
    Unlog,
    /// Steps 1 to 4 of an epoch; answer with [`Order::Captured`].
    Capture {
        /// Its number.
        epoch: Epoch,
        /// Output is held from its end on.
        shut: bool,
        /// What has changed before, and was not sent.
        left: Vec<Range<u64>>,
        /// Room for copies of memory.
        staging: Staging,
        /// Most bytes that are copied. With more, the guest stays stopped until
        /// [`Report::Copied`].
        most: u64,
    },
    /// An epoch that was too large to be copied is no longer needed.
    Copied,
    /// Stop the guest, or let it run again.
    Park(bool),
    /// Keep its vCPUs out of it for so many percent of the time.
    Throttle(u8),
    /// Ask the agent.
    Ask(super::Query),
    /// Ask the agent for a connection.
    Connect,
    /// The state has changed, or something is to be told.
    Tell {
        /// What.
        event: Event,
        /// The state before.
        previous: ReplicationStatus,
        /// The state now, and its term.
        state: ReplicationStatus,
        /// See there.
        term: u64,
        /// What the backup has said of an offer that it refuses.
        reason: Option<String>,
    },
    /// What the guest has caused up to this epoch may be told outside; or everything, and nothing is
    /// held any more.
    Released(Option<Epoch>),
    /// It is over. The gates have to outlive the last epoch that is being captured.
    Over(Option<Exit>, Option<Gates>),
}

/// What the main thread answers, or wants.
pub enum Order {
    /// To [`Report::Log`]: ranges that may hold data although the guest has not touched them.
    Logging(Arc<[Range<u64>]>),
    /// To [`Report::Harvest`].
    Changed(Vec<Range<u64>>),
    /// To [`Report::Capture`].
    Captured {
        /// Its number.
        epoch: Epoch,
        /// The state, and copies of what has changed in memory.
        taken: Box<Taken>,
        /// How long that has stopped the guest.
        pause: Pause,
        /// What is known of the outside, but for output of devices; and why the guest cannot run
        /// on, if it cannot.
        outside: Box<(Outside, Option<Halted>)>,
        /// The gates, if they have just been made.
        gates: Option<Gates>,
    },
    /// The main thread cannot do its part: the protection ends.
    Failed(String),
    /// To [`Report::Ask`].
    Answered {
        /// Of the question.
        nonce: u64,
        /// The question.
        question: Question,
        /// The answer.
        answer: Answer,
    },
    /// To [`Report::Connect`].
    Connected(Descriptors),
    /// The second path.
    Beside(Socket),
    /// Of a client.
    Command(Input),
    /// Of the thread that reads the disks, for the copy with this number.
    Copied(u64, copier::Told),
    /// Of the same: this word is in the sidecars.
    Marked(Mark),
    /// Protect the guest again.
    Again {
        /// From now on.
        settings: Settings,
        /// Who decides.
        arbiter: Arbiter,
        /// Where the backup is.
        way: Way,
        /// How.
        manner: Manner,
    },
}

/// The way to the backup.
pub struct Way {
    /// Where it listens; `None`: the agent connects.
    pub peer: Option<PathBuf>,
    /// How connections to it are protected.
    pub security: Security,
}

/// What a new thread is given.
pub struct Task {
    /// The state machine.
    pub primary: Primary,
    /// The offer.
    pub offer: Offer,
    /// The way to the backup.
    pub way: Way,
    /// The thread that reads the disks, if there are any.
    pub disks: Option<copier::Handle>,
    /// The machine's memory.
    pub memory: Memory,
    /// How it is protected.
    pub manner: Manner,
    /// Protect at once.
    pub start: bool,
    /// From the main thread.
    pub orders: Receiver<Order>,
    /// Woken by it.
    pub wake: Wake,
    /// What it shows to clients.
    pub status: Arc<Mutex<ReplicationInfo>>,
    /// What its epochs cost.
    pub history: Arc<Mutex<History>>,
}

/// How a machine is protected.
#[derive(Debug, Clone, Copy)]
pub struct Manner {
    /// Contents are packed.
    pub compress: bool,
    /// Output is held.
    pub hold: bool,
    /// What the guest writes to its disks is sent.
    pub disks: bool,
    /// Time from one sign of life to the next, if that is not a tenth of the time-out.
    pub heartbeat: Option<Duration>,
    /// There is no backup: what would be sent is dropped.
    pub blackhole: Option<ReplicationBlackhole>,
    /// The period is adapted to the guest, and no longer than this.
    pub longest: Option<Duration>,
    /// The guest never runs longer than a period beyond its last epoch.
    pub strict: bool,
    /// Most bytes of memory that are copied aside.
    pub max_staging: u64,
    /// Most bytes of output that are held, before the guest is stopped.
    pub max_held: u64,
}

impl Manner {
    /// Give a primary the rhythm of epochs and signs of life that is wanted.
    pub fn set_rhythm(&self, primary: &mut Primary) {
        primary.pace(self.longest.map(Pace::new), self.strict);
        primary.set_heartbeat(self.heartbeat);
    }
}

impl Default for Manner {
    fn default() -> Self {
        Self {
            compress: true,
            hold: true,
            disks: true,
            heartbeat: None,
            blackhole: None,
            longest: None,
            strict: false,
            max_staging: staging::MAX_BYTES,
            max_held: MOST_HELD,
        }
    }
}

/// The thread.
pub struct Protector<R> {
    task: Task,
    report: R,
    began: Instant,
    connection: Option<(Number, Link)>,
    /// The process at its other end, if that is on this host.
    backup: Option<Watched>,
    /// A new one, which takes its place if it is wanted.
    offered: Option<(Number, Link)>,
    /// What takes its place where nothing is sent: bytes dropped so far.
    blackhole: Option<(Number, u64)>,
    /// The `End` of epochs that go there and are still being encoded.
    ends: VecDeque<Frame>,
    /// Bytes that the last epoch has copied.
    copied: u64,
    /// What has changed in memory since the last epoch, as far as that was asked while none could
    /// begin; and whether it is being asked.
    grown: Vec<Range<u64>>,
    growing: bool,
    /// An epoch that is to be captured after that.
    postponed: Option<(Epoch, bool)>,
    /// The epoch for which memory is only asked what has changed.
    harvesting: Option<Epoch>,
    /// The second path.
    beside: Beside,
    /// Connections so far.
    connections: u64,
    reader: Incoming,
    /// Why the backup refuses the offer.
    reason: Option<String>,
    outgoing: Outgoing,
    /// Epochs that are not acknowledged, oldest first.
    staged: VecDeque<Arc<Staged>>,
    last_digest: Digest,
    /// Buffers of epochs that were.
    spare: Vec<Staging>,
    first_copy: Option<FirstCopy>,
    tracked: Option<Tracked>,
    /// What the backup lacks, if it has the rest: it is copied next.
    warm: Option<Tracked>,
    disk_copy: DiskCopy,
    /// Reports that the main thread has not answered yet, and how many of them, the first ones,
    /// belong to a protection that has ended.
    asked: u32,
    late: u32,
    /// The term in which changes of memory were lost, or could not be read: the backup can follow
    /// only from the next one on.
    broken: Option<Term>,
    gates: Option<Gates>,
    faults: Faults,
    inputs: VecDeque<Input>,
    told: ReplicationStatus,
    over: Option<Option<Exit>>,
}

/// The copy of memory and disks before the first epoch of a term.
struct FirstCopy {
    epoch: Epoch,
    shut: bool,
    rounds: Rounds,
    /// What has to be sent besides what the log says next.
    left: Vec<Range<u64>>,
    /// The backup has everything else.
    warm: bool,
}

/// Messages of the backup.
#[derive(Default)]
struct Incoming(Vec<u8>);

impl<R: Fn(Report)> Protector<R> {
    /// A thread that reports by `report`.
    pub fn new(task: Task, report: R) -> Self {
        let outgoing = Outgoing::new(task.memory.clone(), task.manner.compress);
        let mut beside = Beside::new(task.primary.me().incarnation);
        beside.set_key(task.offer.key.clone());
        let mut inputs = VecDeque::new();
        if task.start {
            inputs.push_back(Input::Command(Command::Start));
        }
        Self {
            task,
            report,
            began: Instant::now(),
            connection: None,
            backup: None,
            offered: None,
            blackhole: None,
            ends: VecDeque::new(),
            copied: 0,
            grown: Vec::new(),
            growing: false,
            postponed: None,
            harvesting: None,
            beside,
            connections: 0,
            reader: Incoming::default(),
            reason: None,
            outgoing,
            staged: VecDeque::new(),
            last_digest: Digest::default(),
            spare: Vec::new(),
            first_copy: None,
            tracked: None,
            warm: None,
            disk_copy: DiskCopy::default(),
            asked: 0,
            late: 0,
            broken: None,
            gates: None,
            faults: Faults::default(),
            inputs,
            told: ReplicationStatus::Off,
            over: None,
        }
    }

    /// Run until the guest is not protected any more, and this process not its owner by a term.
    pub fn run(mut self) {
        let exit = loop {
            self.take_inputs();
            self.pump();
            self.show();
            if let Some(exit) = self.over.take() {
                break exit;
            }
            if let Err(e) = self.wait() {
                log::error!("replication: cannot wait for events: {e}");
                break Some(Exit::Nothing);
            }
            self.take_orders();
            self.look_for_output();
            self.read();
            self.look_for_backup();
            if self.beside.receive(&self.task.primary.status()) {
                self.inputs.push_back(Input::HeardBeside);
            }
            self.look_at_tracked();
            self.inputs.push_back(Input::Tick);
        };
        if let Some(gates) = &mut self.gates {
            match exit {
                None | Some(Exit::Done) => gates.open(),
                // What it has held was never seen, and must not be.
                Some(Exit::Fenced | Exit::Nothing | Exit::Refused(_)) => gates.discard(),
            }
        }
        drop(self.connection.take());
        (self.report)(Report::Over(exit, self.gates.take()));
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    fn wait(&mut self) -> io::Result<()> {
        let due = [self.task.primary.deadline(), self.looks_at()];
        let due = due.into_iter().flatten().map(|at| at.saturating_sub(self.now()));
        let handshake = self.connection.as_ref().and_then(|(_, connection)| connection.deadline());
        let handshake = handshake.map(|at| at.saturating_duration_since(Instant::now()));
        // A connection that has enough says when it takes more.
        let takes = match &self.connection {
            Some((_, connection)) => connection.queued() < HIGH_WATER,
            None => self.blackhole.is_some(),
        };
        let left = match (takes && !self.outgoing.is_empty()) || !self.inputs.is_empty() {
            true => Some(Duration::ZERO),
            false => due.chain(handshake).min(),
        };
        let left = left.map(Timespec::try_from).transpose().map_err(io::Error::other)?;
        let mut fds = vec![PollFd::new(&self.task.wake, PollFlags::IN)];
        if let Some((_, connection)) = &self.connection {
            fds.extend(connection.interest());
        }
        fds.extend(self.backup.as_ref().and_then(Watched::interest));
        fds.extend(self.beside.interest());
        match poll(&mut fds, left.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {
                self.task.wake.clear();
                Ok(())
            }
            Err(e) => Err(e.into()),
        }
    }

    fn take_inputs(&mut self) {
        while let Some(input) = self.inputs.pop_front() {
            for output in self.task.primary.step(self.now(), input) {
                self.carry_out(output);
            }
        }
        if (self.told, self.status()) == (ReplicationStatus::Arming, ReplicationStatus::Protected) {
            self.tell(Event::State(Why::Paired));
        }
        if self.task.primary.state() == State::Off && self.over.is_none() {
            self.over = Some(None);
        }
    }

    fn carry_out(&mut self, output: Output) {
        match output {
            Output::Send(number, frame) => self.send(number, &frame),
            Output::Dial => self.dial(),
            Output::Close(number) => {
                self.offered.take_if(|(new, _)| *new == number);
                if self.current() == Some(number) {
                    self.disconnect();
                }
            }
            Output::Ask { nonce, question } => {
                (self.report)(Report::Ask(super::Query { nonce, question }));
            }
            Output::Mark(mark) => match &self.task.disks {
                Some(disks) if self.task.manner.blackhole.is_none() => {
                    disks.ask(copier::Work::Mark(mark));
                }
                // The disks belong to nobody else.
                _ => self.inputs.push_back(Input::Marked(mark)),
            },
            Output::Sync { base } => self.begin_copy(base.is_some()),
            Output::Track { since } => self.track(since),
            Output::Untrack => self.untrack(),
            Output::Throttle(percent) => (self.report)(Report::Throttle(percent)),
            Output::BeatBeside => self.beside.send(self.task.primary.term()),
            Output::Harvest => {
                if !std::mem::replace(&mut self.growing, true) {
                    self.ask(Report::Harvest);
                }
            }
            Output::Capture { epoch, shut } => self.capture(epoch, shut && self.task.manner.hold),
            Output::ReleaseThrough(epoch) => self.release(epoch),
            Output::OpenGates => self.open_gates(),
            Output::CloseTaps => self.gates.iter_mut().for_each(Gates::discard_frames),
            Output::Park => (self.report)(Report::Park(true)),
            Output::Unpark => (self.report)(Report::Park(false)),
            Output::Tell(event) => self.tell(event),
            Output::Exit(exit) => self.over = Some(Some(exit)),
            // A backup's.
            Output::Hold(_)
            | Output::DropAfter(_)
            | Output::Prepare(_)
            | Output::Unprepare
            | Output::Fill { .. }
            | Output::Run { .. } => {}
        }
    }

    fn tell(&mut self, event: Event) {
        let state = self.status();
        let previous = std::mem::replace(&mut self.told, state);
        self.show();
        let term = self.task.primary.term().0;
        let reason = match event {
            Event::Refused(_) => self.reason.take(),
            _ => None,
        };
        (self.report)(Report::Tell { event, previous, state, term, reason });
    }

    fn status(&self) -> ReplicationStatus {
        match self.task.primary.state() {
            State::Off => ReplicationStatus::Off,
            State::Connecting => ReplicationStatus::Connecting,
            State::Syncing => ReplicationStatus::Syncing,
            State::Protected if self.blackhole.is_some() => ReplicationStatus::Blackhole,
            State::Protected if self.task.primary.is_protected() => ReplicationStatus::Protected,
            State::Protected => ReplicationStatus::Arming,
            State::Stalled => ReplicationStatus::Stalled,
            State::Degraded => ReplicationStatus::Degraded,
            State::Fenced => ReplicationStatus::Fenced,
            State::HandingOver(_) => ReplicationStatus::HandingOver,
            State::Over => ReplicationStatus::Over,
        }
    }

    /// Show clients how it stands.
    fn show(&self) {
        let held = self.gates.as_ref().map(Gates::backlog).unwrap_or_default();
        let mut shown = self.task.status.lock();
        shown.state = self.status();
        show(&mut shown, &self.task.primary.status());
        shown.second_path_beats = self.beside.heard();
        shown.fault_ns = nanoseconds(self.faults.each());
        shown.held_bytes = held.bytes as u64;
        shown.oldest_us = microseconds(held.oldest);
        let syncs = self.task.primary.state() == State::Syncing;
        shown.sync = syncs.then(|| self.outgoing.rounds());
        shown.staged_bytes = self.staged_bytes();
        shown.wire_bytes = match (&self.connection, &self.blackhole) {
            (Some((_, link)), _) => link.written(),
            (None, Some((_, dropped))) => *dropped,
            (None, None) => 0,
        };
    }
}

/// Sends orders to the thread.
#[derive(Clone)]
pub struct Orders {
    /// To it.
    pub to: Sender<Order>,
    /// Wakes it.
    pub wake: Wake,
}

impl Orders {
    /// Give it an order. One that has ended has said so.
    pub fn give(&self, order: Order) {
        let _ = self.to.send(order);
        self.wake.wake();
    }
}
