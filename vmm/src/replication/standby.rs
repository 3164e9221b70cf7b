//! The thread of a backup: it has the connections, fills memory, and drives [`Backup`].
mod images;
mod peers;
mod promotion;

use std::{
    collections::VecDeque,
    io,
    os::fd::OwnedFd,
    sync::{Arc, mpsc::Receiver},
    time::{Duration, Instant},
};

use config::{Description, incoming::Arbiter};
use machine::{Memory, Moment, Tsc};
use parking_lot::Mutex;
use qmp::schema::{FailoverTimes, ReplicationAnswer, ReplicationInfo, ReplicationStatus};
use replication::{
    Answer, Backup, Command, Connection as Number, Epoch, Event as Told, Exit, Identity,
    Incarnation, Input, Lineage, Mark, Message, Output, Settings, Term, Why, backup::State,
    contents::Reader, wire,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use state::{Config, cpu::Cpu};
use transport::{Descriptors, Link, MOST_AT_ONCE, Security};

use self::images::Kept;
use super::{
    beside::{Beside, Key, Socket},
    keeper::{Keeper, Wanted, Work},
    outside::Outside,
    process::{self, Process, Watched},
    questions::{Query, show},
    received::Received as Arriving,
};
use crate::{
    checkpoint::{ReceiveError, Received},
    wake::Wake,
};

/// Most bytes of an epoch that is kept aside, unless the guest has more memory.
const LONGEST_EPOCH: u64 = 512 << 20;
/// Connections at a time: the one in use, one that may take its place, and those that have to show
/// first that they come from a primary.
const PEERS: usize = 4;
/// How long they may take for that.
const INTRODUCTION: Duration = Duration::from_secs(5);
/// Most bytes that wait to be sent to a peer, which does not read then: all messages are short.
const MOST_QUEUED: usize = 1 << 20;

/// What main thread gives the thread.
pub enum ToStandby {
    /// An agent's answer.
    Answer(ReplicationAnswer),
    /// A primary's connection.
    Connected(Descriptors),
    /// The second path.
    Beside(Socket),
    /// A client's command.
    Command(Input),
    /// The monitor ends.
    End,
}

/// What the thread tells the main thread.
pub enum Tell {
    /// Ask the agent.
    Ask(Query, Lineage),
    /// The state has changed.
    State {
        /// The state before.
        previous: ReplicationStatus,
        /// Why, or what else is to be told.
        told: Told,
        /// As it is then.
        info: Box<ReplicationInfo>,
    },
}

/// A failover: the guest runs here from now on.
pub struct Promotion {
    /// This process.
    pub me: Identity,
    /// The first term that it may be protected in.
    pub term: Term,
    /// What is to be settled at the witness.
    pub promoted: Option<Incarnation>,
    /// As they were.
    pub settings: Settings,
    /// Its disks were replicated.
    pub disks: bool,
    /// The epoch that it runs from.
    pub epoch: Epoch,
    /// When that had arrived: the guest's clocks continue from there.
    pub ended: Moment,
    /// What the outside may not have seen of it.
    pub outside: Outside,
    /// How long it took until the decision.
    pub times: FailoverTimes,
    /// When it was decided.
    pub decided: Instant,
}

/// How the thread has the incoming thread build the machine, which it must not do itself. Each call
/// begins it; the answer is reported by waking the thread.
pub trait Builder {
    /// The disks of this machine that its guest can write to, with the images that they have here.
    ///
    /// # Errors
    /// When the command line does not fit.
    fn disks(&self, description: &Description) -> Result<Vec<Wanted>, String>;
    /// Memory for this machine, if it can run here: with the CPU and the TSC that its guest has, if
    /// they have not been looked at before. Waits for the answer.
    ///
    /// # Errors
    /// Why it cannot.
    fn room(
        &mut self,
        description: Description,
        guest: Option<(Option<Cpu>, Tsc)>,
    ) -> Result<Memory, String>;
    /// Build the machine.
    fn build(&mut self, received: Received);
    /// Drop the machine, and restore the memory that building it has changed.
    fn forget(&mut self);
    /// Take its disks and taps.
    fn take(&mut self);
    /// The answer to the first of these, but for `room`, that was not answered yet.
    fn answer(&mut self) -> Option<Result<(), String>>;
}

/// What the thread is given.
pub struct Task {
    /// Where primaries connect.
    pub listener: OwnedFd,
    /// How their connections are protected.
    pub security: Security,
    /// Who decides.
    pub arbiter: Arbiter,
    /// This process.
    pub incarnation: Incarnation,
    /// The same, as the host knows it.
    pub process: Option<Process>,
    /// From the main thread.
    pub orders: Receiver<ToStandby>,
    /// Woken by it, and by the builder.
    pub wake: Wake,
    /// What it shows to clients.
    pub status: Arc<Mutex<ReplicationInfo>>,
}

/// What the builder does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Building {
    Nothing,
    /// It builds the machine.
    Machine,
    /// It takes disks and taps.
    Taking(Mark),
    /// It puts memory back, which nobody may read or write before. With true, the machine is wanted
    /// again afterwards.
    Forgetting(bool),
}

/// What waits until memory is put back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Postponed {
    Fill(Option<Epoch>),
    Hold(Epoch),
}

/// The thread.
pub struct Standby<B, T> {
    task: Task,
    builder: B,
    tell: T,
    kept: Kept,
    began: Instant,
    backup: Option<Backup>,
    lineage: Lineage,
    settings: Option<Settings>,
    peers: Vec<Peer>,
    connections: u64,
    /// For what is read.
    buffer: Vec<u8>,
    accepted: Option<Accepted>,
    /// The connection that was accepted last.
    current: Option<Number>,
    /// The process at its other end, if that is on this host.
    primary: Option<Watched>,
    /// The second path.
    beside: Beside,
    /// The machine that memory is for.
    offered: Option<Config>,
    /// What its guest writes to its disks comes, too.
    disks: bool,
    memory: Option<Memory>,
    /// Memory may not be zero.
    filled: bool,
    /// What arrives.
    coming: Arriving,
    /// The last whole epoch.
    whole: Option<Whole>,
    /// When the `End` came that came last.
    ended: Moment,
    building: Building,
    /// There is a machine.
    built: bool,
    /// The next answer is about something that is not wanted any more.
    unwanted: bool,
    /// Nothing more is read from the primary meanwhile.
    postponed: Option<Postponed>,
    /// Why the state is what it is.
    why: Why,
    /// When the machine is built, if its primary has not connected again by then.
    builds_at: Option<Instant>,
    query: Option<Query>,
    inputs: VecDeque<Input>,
    told: ReplicationStatus,
    heard: Instant,
    suspected: Instant,
    decided: Instant,
    applied: Duration,
    over: Option<Result<Promotion, String>>,
}

/// A whole epoch, but for its memory.
struct Whole {
    /// The state of the machine.
    machine: Vec<u8>,
    outside: Outside,
    /// When its `End` came.
    ended: Moment,
}

/// A connection that was accepted, and whose reader has to be told.
struct Accepted {
    number: Number,
    term: Term,
    last: Epoch,
    filling: bool,
}

struct Peer {
    number: Number,
    connection: Link,
    /// What has come before the offer was complete, and what is not to be read yet.
    bytes: Vec<u8>,
    reader: Option<Reader>,
    /// As its offer has them.
    settings: Option<Settings>,
    /// The primary's process.
    process: Option<Watched>,
    /// When it was accepted.
    came: Instant,
    /// What its offer has of signs of life.
    beats: Beats,
}

impl Peer {
    /// When it is closed, unless its offer has come by then.
    fn stays_until(&self) -> Option<Instant> {
        self.settings.is_none().then(|| self.came + INTRODUCTION)
    }
}

/// How a primary wants signs of life.
#[derive(Default)]
struct Beats {
    heartbeat: Option<Duration>,
    key: Option<Key>,
}

impl<B: Builder, T: Fn(Tell)> Standby<B, T> {
    /// A thread with this task.
    pub fn new(task: Task, builder: B, keeper: Keeper, tell: T) -> Self {
        let now = Instant::now();
        let beside = Beside::new(task.incarnation);
        Self {
            task,
            builder,
            tell,
            kept: Kept::new(keeper),
            began: now,
            backup: None,
            lineage: Lineage(0),
            settings: None,
            peers: Vec::new(),
            connections: 0,
            buffer: Vec::with_capacity(MOST_AT_ONCE),
            accepted: None,
            current: None,
            primary: None,
            beside,
            offered: None,
            disks: true,
            memory: None,
            filled: false,
            coming: Arriving::default(),
            whole: None,
            ended: Moment::now(),
            building: Building::Nothing,
            built: false,
            unwanted: false,
            postponed: None,
            why: Why::Paired,
            builds_at: None,
            query: None,
            inputs: VecDeque::new(),
            told: ReplicationStatus::Listening,
            heard: now,
            suspected: now,
            decided: now,
            applied: Duration::ZERO,
            over: None,
        }
    }

    /// Run until the guest runs here, or never will.
    ///
    /// # Errors
    /// Why it never will.
    pub fn run(mut self) -> Result<Promotion, ReceiveError> {
        loop {
            self.take_inputs();
            self.flush();
            self.show();
            if let Some(over) = self.over.take() {
                return over.map_err(ReceiveError::Replica);
            }
            let ready = self.wait().map_err(ReceiveError::Write)?;
            if ready {
                self.accept();
            }
            self.take_orders();
            self.take_built();
            self.take_done();
            self.read();
            self.close_strangers();
            self.look_for_primary();
            self.listen_beside();
            if self.builds_at.take_if(|at| *at <= Instant::now()).is_some() {
                self.build();
            }
            self.inputs.push_back(Input::Tick);
        }
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Wait for an event; whether a primary may want to connect.
    fn wait(&mut self) -> io::Result<bool> {
        let deadline = self.backup.as_ref().and_then(Backup::deadline);
        let left = deadline.map(|at| at.saturating_sub(self.now()));
        let builds = self.builds_at.map(|at| at.saturating_duration_since(Instant::now()));
        let reading = || self.peers.iter().filter(|peer| self.reads(peer.number));
        let handshakes = reading().filter_map(|peer| peer.connection.deadline());
        let strangers = self.peers.iter().filter_map(Peer::stays_until);
        let handshakes = handshakes.chain(strangers);
        let handshakes = handshakes.map(|at| at.saturating_duration_since(Instant::now()));
        let left = left.into_iter().chain(builds).chain(handshakes).min();
        let left = left.map(Timespec::try_from).transpose().map_err(io::Error::other)?;
        let mut fds = vec![
            PollFd::new(&self.task.wake, PollFlags::IN),
            PollFd::new(&self.task.listener, PollFlags::IN),
        ];
        reading().for_each(|peer| fds.extend(peer.connection.interest()));
        fds.extend(self.primary.as_ref().and_then(Watched::interest));
        fds.extend(self.beside.interest());
        match poll(&mut fds, left.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(false),
            Err(e) => return Err(e.into()),
        }
        let ready = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
        self.task.wake.clear();
        Ok(ready)
    }

    fn take_inputs(&mut self) {
        while let Some(input) = self.inputs.pop_front() {
            let now = self.now();
            let Some(backup) = &mut self.backup else { continue };
            for output in backup.step(now, input) {
                self.carry_out(output);
            }
        }
    }

    fn carry_out(&mut self, output: Output) {
        match output {
            Output::Send(number, frame) => {
                if let Message::Accept(_) = frame.message {
                    self.accepted(number, frame.term, frame.epoch);
                }
                let Some(peer) = self.peer(number) else { return };
                peer.connection.send(wire::encode(&frame));
                if peer.connection.queued() > MOST_QUEUED {
                    self.close(Some(number));
                    self.inputs.push_back(Input::Closed(number));
                }
            }
            Output::Close(number) => {
                self.push();
                self.close(Some(number));
            }
            Output::Ask { nonce, question } => {
                let query = Query { nonce, question };
                self.query = Some(query);
                (self.tell)(Tell::Ask(query, self.lineage));
            }
            Output::Mark(mark @ Mark::Running { .. }) => {
                self.decided = Instant::now();
                match self.kept.is_some() {
                    true => self.kept.ask(Work::Release(mark)),
                    false => self.take_backends(mark),
                }
            }
            Output::Mark(mark) if self.kept.is_some() => self.kept.ask(Work::Mark(mark)),
            Output::Mark(mark) => self.inputs.push_back(Input::Marked(mark)),
            Output::Fill { base } => self.once_put_back(Postponed::Fill(base)),
            Output::Hold(epoch) => {
                self.ended = Moment::now();
                self.once_put_back(Postponed::Hold(epoch));
            }
            Output::DropAfter(epoch) => {
                self.coming.clear();
                self.postponed = None;
                self.kept.drop_after(epoch);
            }
            Output::Prepare(_) => self.prepare(),
            Output::Unprepare => self.unprepare(),
            Output::Run { term, from, promoted } => self.runs(term, from, promoted),
            Output::Tell(told) => {
                if let Told::State(why) = told {
                    self.why = why;
                }
                let state = self.status();
                let previous = std::mem::replace(&mut self.told, state);
                if self.told == ReplicationStatus::Suspecting {
                    self.suspected = Instant::now();
                }
                self.show();
                let info = Box::new(self.task.status.lock().clone());
                (self.tell)(Tell::State { previous, told, info });
            }
            Output::Exit(exit) => {
                let why = match exit {
                    Exit::Refused(denial) => denial.to_string(),
                    _ => "the machine is still at its primary, which has left this backup".into(),
                };
                self.over.get_or_insert(Err(why));
            }
            Output::BeatBeside => {
                let term = self.backup.as_ref().map(Backup::term);
                term.into_iter().for_each(|term| self.beside.send(term));
            }
            // A primary's.
            Output::Dial
            | Output::Sync { .. }
            | Output::Track { .. }
            | Output::Untrack
            | Output::Throttle(_)
            | Output::Harvest
            | Output::Capture { .. }
            | Output::ReleaseThrough(_)
            | Output::OpenGates
            | Output::CloseTaps
            | Output::Park
            | Output::Unpark => {}
        }
    }

    fn take_orders(&mut self) {
        while let Ok(order) = self.task.orders.try_recv() {
            match order {
                ToStandby::Answer(given) => self.answered(&given),
                ToStandby::Connected(descriptors) => self.add(descriptors),
                ToStandby::Beside(socket) => self.beside.set_socket(socket),
                ToStandby::Command(input) => self.inputs.push_back(input),
                ToStandby::End => {
                    self.over.get_or_insert(Err("as it was told to".into()));
                    self.inputs.push_back(Input::Command(Command::Quit));
                    self.take_inputs();
                }
            }
        }
    }

    fn answered(&mut self, given: &ReplicationAnswer) {
        if let Some(query) = self.query
            && let Ok(Some(answer)) = query.answer(given)
        {
            if answer == Answer::Down
                && !process::may_be_down(&self.task.arbiter, &mut self.primary)
            {
                return;
            }
            self.query = None;
            let Query { nonce, question } = query;
            self.inputs.push_back(Input::Answered { nonce, question, answer });
        }
    }

    fn status(&self) -> ReplicationStatus {
        match self.backup.as_ref().map_or(State::Listening, Backup::state) {
            State::Listening => ReplicationStatus::Listening,
            State::Syncing => ReplicationStatus::Syncing,
            State::Ready => ReplicationStatus::Ready,
            State::Standby => ReplicationStatus::Standby,
            State::Suspecting => ReplicationStatus::Suspecting,
            State::Promoting => ReplicationStatus::Promoting,
            State::Unfit => ReplicationStatus::Unfit,
            State::Abandoned => ReplicationStatus::Abandoned,
            State::Promoted => ReplicationStatus::Degraded,
            State::Over => ReplicationStatus::Over,
        }
    }

    fn show(&self) {
        let mut shown = self.task.status.lock();
        shown.state = self.status();
        shown.second_path_beats = self.beside.heard();
        if let Some(backup) = &self.backup {
            let status = backup.status();
            show(&mut shown, &status);
            shown.epoch = status.epoch.0;
        }
    }
}
