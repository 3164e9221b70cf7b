//! The thread of a backup: it has the connections, fills memory, and drives [`Backup`].
use std::{
    collections::VecDeque,
    io,
    os::fd::OwnedFd,
    sync::{Arc, mpsc::Receiver},
    time::{Duration, Instant},
};

use config::{Description, incoming::Arbiter};
use machine::Memory;
use parking_lot::Mutex;
use qmp::schema::{
    FailoverTimes, ReplicationAnswer, ReplicationInfo, ReplicationSide, ReplicationStatus,
};
use replication::{
    Backup, Connection as Number, Epoch, Event as Told, Exit, Fault, Frame, From, Identity,
    Incarnation, Input, Lineage, Mark, Message, Output, Rules, Settings, Term, Why,
    backup::State,
    contents::{Bounds, Event, Reader},
    wire,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{SocketFlags, accept_with},
};
use state::{Config, Frames, Sections};

use super::{
    connection::Connection,
    offer::Offer,
    outgoing::MACHINE,
    questions::{Query, uuid},
    received::Received as Arriving,
    settings,
    wake::Wake,
};
use crate::checkpoint::{ReceiveError, Received};

/// Most bytes of an epoch that is kept aside.
const LONGEST_EPOCH: u64 = 512 << 20;
/// Connections at a time: the one in use, and one that may take its place.
const PEERS: usize = 2;
/// Most bytes that wait to be sent to a peer, which does not read then: all messages are short.
const MOST_QUEUED: usize = 1 << 20;
/// Most pieces that are read from one of them at a time.
const READS: usize = 16;

/// What main thread gives the thread.
pub enum ToStandby {
    /// An agent's answer.
    Answer(ReplicationAnswer),
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
    /// The epoch that it runs from.
    pub epoch: Epoch,
    /// How long it took until the decision.
    pub times: FailoverTimes,
    /// When it was decided.
    pub decided: Instant,
}

/// How the thread has the incoming thread build the machine, which it must not do itself. Each call
/// begins it; the answer is reported by waking the thread.
pub trait Builder {
    /// Memory for this machine, if it can run here. Waits for the answer.
    ///
    /// # Errors
    /// Why it cannot.
    fn room(&mut self, description: Description) -> Result<Memory, String>;
    /// Build the machine.
    fn build(&mut self, received: Received);
    /// Drop the machine.
    fn forget(&mut self);
    /// Take its disks and taps.
    fn take(&mut self);
    /// The answer to the last of these but the first, once there is one.
    fn answer(&mut self) -> Option<Result<(), String>>;
}

/// What the thread is given.
pub struct Task {
    /// Where primaries connect.
    pub listener: OwnedFd,
    /// Who decides.
    pub arbiter: Arbiter,
    /// This process.
    pub incarnation: Incarnation,
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
    /// It builds the machine. With true, that is not wanted any more.
    Machine(bool),
    /// It takes disks and taps.
    Taking(Mark),
}

/// The thread.
pub struct Standby<B, T> {
    task: Task,
    builder: B,
    tell: T,
    began: Instant,
    backup: Option<Backup>,
    lineage: Lineage,
    settings: Option<Settings>,
    peers: Vec<Peer>,
    connections: u64,
    accepted: Option<Accepted>,
    /// The connection that was accepted last.
    current: Option<Number>,
    /// The machine that memory is for.
    offered: Option<Config>,
    memory: Option<Memory>,
    /// Memory may not be zero.
    filled: bool,
    /// What arrives.
    coming: Arriving,
    /// The state of the machine in the last whole epoch, and when that was whole.
    machine: Option<(Vec<u8>, Instant)>,
    building: Building,
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

/// A connection that was accepted, and whose reader has to be told.
struct Accepted {
    number: Number,
    term: Term,
    last: Epoch,
    filling: bool,
}

struct Peer {
    number: Number,
    connection: Connection,
    /// What has come before the offer was complete.
    bytes: Vec<u8>,
    reader: Option<Reader>,
    /// As its offer has them.
    settings: Option<Settings>,
}

impl<B: Builder, T: Fn(Tell)> Standby<B, T> {
    /// A thread with this task.
    pub fn new(task: Task, builder: B, tell: T) -> Self {
        let now = Instant::now();
        Self {
            task,
            builder,
            tell,
            began: now,
            backup: None,
            lineage: Lineage(0),
            settings: None,
            peers: Vec::new(),
            connections: 0,
            accepted: None,
            current: None,
            offered: None,
            memory: None,
            filled: false,
            coming: Arriving::default(),
            machine: None,
            building: Building::Nothing,
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
            self.read();
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
        let left = left.into_iter().chain(builds).min();
        let left = left.map(Timespec::try_from).transpose().map_err(io::Error::other)?;
        let mut fds = vec![
            PollFd::new(&self.task.wake, PollFlags::IN),
            PollFd::new(&self.task.listener, PollFlags::IN),
        ];
        for peer in self.peers.iter().filter(|peer| self.reads(peer.number)) {
            fds.push(PollFd::new(&peer.connection, peer.connection.interest()));
        }
        match poll(&mut fds, left.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(false),
            Err(e) => return Err(e.into()),
        }
        let ready = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
        self.task.wake.clear();
        Ok(ready)
    }

    fn accept(&mut self) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let Ok(fd) = accept_with(&self.task.listener, flags) else { return };
        self.connections += 1;
        let number = Number(self.connections);
        // The one that has waited longest in vain makes room.
        if self.peers.len() >= PEERS {
            let waits = self.peers.iter().find(|peer| Some(peer.number) != self.current);
            self.close(waits.map(|peer| peer.number));
        }
        let (connection, bytes) = (Connection::accepted(fd), Vec::new());
        self.peers.push(Peer { number, connection, bytes, reader: None, settings: None });
    }

    fn close(&mut self, number: Option<Number>) {
        self.peers.retain(|peer| Some(peer.number) != number);
        self.current = self.current.filter(|current| Some(*current) != number);
    }

    /// Whether this connection is read. While the machine is being built in memory, nobody else may
    /// begin to fill that.
    fn reads(&self, number: Number) -> bool {
        self.building == Building::Nothing || self.current == Some(number)
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
                self.flush();
                self.close(Some(number));
            }
            Output::Ask { nonce, question } => {
                let query = Query { nonce, question };
                self.query = Some(query);
                (self.tell)(Tell::Ask(query, self.lineage));
            }
            Output::Mark(mark @ Mark::Running { .. }) => {
                self.decided = Instant::now();
                self.building = Building::Taking(mark);
                self.builder.take();
            }
            // No disk is replicated, so there is nothing to be marked.
            Output::Mark(mark) => self.inputs.push_back(Input::Marked(mark)),
            Output::Fill { .. } => self.fill(),
            Output::Hold(epoch) => self.hold(epoch),
            Output::DropAfter(_) => self.coming.clear(),
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
            // A primary's.
            Output::BeatBeside
            | Output::Dial
            | Output::Sync { .. }
            | Output::Track { .. }
            | Output::Untrack
            | Output::Throttle(_)
            | Output::Capture { .. }
            | Output::ReleaseThrough(_)
            | Output::OpenGates
            | Output::CloseTaps
            | Output::Park
            | Output::Unpark => {}
        }
    }

    /// The primary of this connection may send epochs.
    fn accepted(&mut self, number: Number, term: Term, last: Epoch) {
        let filling = self.backup.as_ref().is_some_and(|b| b.state() == State::Syncing);
        self.accepted = Some(Accepted { number, term, last, filling });
        self.current = Some(number);
        self.coming.clear();
    }

    /// Memory is filled from here on: what it held is forgotten.
    fn fill(&mut self) {
        self.coming.clear();
        self.machine = None;
        if !std::mem::replace(&mut self.filled, true) {
            return;
        }
        // This thread may not find out which pages are not zero.
        self.memory = None;
        let description = self.offered.as_ref().map(Description::try_from);
        match description.and_then(Result::ok).map(|machine| self.builder.room(machine)) {
            Some(Ok(memory)) => self.memory = Some(memory),
            other => {
                let why = other.and_then(Result::err).unwrap_or_default();
                log::error!("replication: there is no room for the machine any more: {why}");
                let current = self.current;
                self.close(current);
                self.inputs.extend(current.map(Input::Closed));
            }
        }
    }

    /// The epoch is whole: it counts from here on.
    fn hold(&mut self, epoch: Epoch) {
        let Some(memory) = &self.memory else { return };
        if let Err(why) = self.read_state(self.coming.state()) {
            log::error!("replication: the state of the machine: {why}");
            self.coming.clear();
            return self.inputs.push_back(Input::NotHeld(epoch, Fault::Frame));
        }
        match self.coming.apply(memory) {
            Ok(machine) => {
                self.machine = Some((machine, Instant::now()));
                self.inputs.push_back(Input::Held(epoch));
            }
            Err(e) => {
                log::error!("replication: cannot write guest memory: {e}");
                self.inputs.push_back(Input::NotApplied);
            }
        }
    }

    /// Building the machine writes to its memory, and then its primary cannot come back. One whose
    /// connection has ended usually connects again at once.
    fn prepare(&mut self) {
        match (self.why, self.settings) {
            (Why::Closed | Why::BadFrame | Why::Nack, Some(settings)) => {
                self.builds_at = Some(Instant::now() + settings.timeout / 4);
            }
            _ => self.build(),
        }
    }

    fn build(&mut self) {
        match self.building {
            Building::Nothing => match self.received() {
                Ok(received) => {
                    self.applied = self.now();
                    self.building = Building::Machine(false);
                    self.builder.build(received);
                }
                Err(why) => {
                    log::error!("replication: {why}");
                    self.inputs.push_back(Input::CannotRun);
                }
            },
            // Another machine is being built, from an older epoch.
            Building::Machine(_) | Building::Taking(_) => self.inputs.push_back(Input::CannotRun),
        }
    }

    /// The machine of the last whole epoch.
    fn received(&self) -> Result<Received, String> {
        let (Some((bytes, whole)), Some(memory)) = (&self.machine, &self.memory) else {
            return Err("there is no whole epoch".into());
        };
        let (config, mut sections) = self.read_state(bytes)?;
        // The guest's clock has advanced by this host's clock since.
        let passed = u64::try_from(whole.elapsed().as_nanos()).unwrap_or(0);
        let now = sections.clock.nanoseconds.saturating_add(passed);
        sections.clock.nanoseconds = now;
        Ok(Received { config, sections, memory: memory.clone() })
    }

    /// The configuration and the state of the machine that memory is for.
    fn read_state(&self, bytes: &[u8]) -> Result<(Config, Sections), String> {
        let read = || {
            let mut frames = Frames::begin(bytes).map_err(state::FileError::from)?;
            let (config, sections) = (frames.config()?, frames.sections()?);
            frames.end()?;
            Ok((config, sections))
        };
        let read = read().map_err(|e: state::FileError| qmp::Error::generic(&e).to_string());
        read.and_then(|(config, sections)| match self.is_offered(&config) {
            true => Ok((config, sections)),
            false => Err("it is of another machine than the one that was offered".into()),
        })
    }

    fn is_offered(&self, config: &Config) -> bool {
        self.offered.as_ref().is_some_and(|offered| offered.machine == config.machine)
    }

    /// The primary is back: this machine must not run. Building it has written to its memory, which
    /// is not that of the primary any more.
    fn unprepare(&mut self) {
        if self.builds_at.take().is_some() {
            return;
        }
        match &mut self.building {
            Building::Machine(unwanted) => *unwanted = true,
            Building::Nothing | Building::Taking(_) => self.builder.forget(),
        }
        self.inputs.push_back(Input::NotApplied);
    }

    fn take_built(&mut self) {
        let Some(answer) = self.builder.answer() else { return };
        let input = match (std::mem::replace(&mut self.building, Building::Nothing), &answer) {
            (Building::Machine(true), _) => {
                self.builder.forget();
                return;
            }
            (Building::Machine(false), Ok(())) => {
                self.applied = self.now().saturating_sub(self.applied);
                Input::Prepared
            }
            (Building::Taking(mark), Ok(())) => Input::Marked(mark),
            (Building::Nothing, _) => return,
            (_, Err(why)) => {
                log::error!("replication: the machine cannot run here: {why}");
                Input::CannotRun
            }
        };
        self.inputs.push_back(input);
    }

    fn runs(&mut self, term: Term, from: From, promoted: Option<Incarnation>) {
        let (Some(settings), From::Epoch(epoch)) = (self.settings, from) else { return };
        let me = Identity { lineage: self.lineage, incarnation: self.task.incarnation };
        let since = |later: Instant, earlier| micros(later.saturating_duration_since(earlier));
        let times = FailoverTimes {
            detect_us: since(self.suspected, self.heard),
            decide_us: since(self.decided, self.suspected),
            apply_us: micros(self.applied),
            run_us: 0,
        };
        let decided = self.decided;
        let promotion = Promotion { me, term, promoted, settings, epoch, times, decided };
        // Unless the monitor ends.
        self.over.get_or_insert(Ok(promotion));
    }

    fn take_orders(&mut self) {
        while let Ok(order) = self.task.orders.try_recv() {
            match order {
                ToStandby::Answer(given) => self.answered(&given),
                ToStandby::Command(input) => self.inputs.push_back(input),
                ToStandby::End => drop(self.over.get_or_insert(Err("as it was told to".into()))),
            }
        }
    }

    fn answered(&mut self, given: &ReplicationAnswer) {
        if let Some(query) = self.query
            && let Ok(Some(answer)) = query.answer(given)
        {
            self.query = None;
            let Query { nonce, question } = query;
            self.inputs.push_back(Input::Answered { nonce, question, answer });
        }
    }

    fn read(&mut self) {
        for number in self.peers.iter().map(|peer| peer.number).collect::<Vec<_>>() {
            // Timers must not wait for a peer that never stops sending.
            (0..READS).all(|_| self.reads(number) && self.read_some(number));
        }
    }

    fn peer(&mut self, number: Number) -> Option<&mut Peer> {
        self.peers.iter_mut().find(|peer| peer.number == number)
    }

    /// Read some of what a peer has sent; whether there may be more.
    fn read_some(&mut self, number: Number) -> bool {
        let Some(peer) = self.peer(number) else { return false };
        let bytes = match peer.connection.receive() {
            Ok([]) => return false,
            Ok(bytes) => bytes.to_vec(),
            Err(e) => {
                self.lost(number, &format!("the connection has ended: {e}"));
                return false;
            }
        };
        self.heard = Instant::now();
        let read = self.take_bytes(number, bytes);
        read.map_err(|why| self.lost(number, &why)).is_ok()
    }

    /// A connection has ended, or carries nonsense.
    fn lost(&mut self, number: Number, why: &str) {
        log::info!("replication: {why}");
        self.close(Some(number));
        self.inputs.push_back(Input::Closed(number));
        self.take_inputs();
    }

    fn take_bytes(&mut self, number: Number, bytes: Vec<u8>) -> Result<(), String> {
        let Some(peer) = self.peer(number) else { return Ok(()) };
        let (mut reader, bytes) = match peer.reader.take() {
            Some(reader) => (reader, bytes),
            None => {
                peer.bytes.extend_from_slice(&bytes);
                let offer = Offer::decode(&peer.bytes);
                match offer.map_err(|e| qmp::Error::generic(&e).to_string())? {
                    None => return Ok(()),
                    Some((offer, length)) => {
                        let rest = peer.bytes.split_off(length);
                        peer.bytes = Vec::new();
                        let (reader, settings) = self.offered(offer)?;
                        if let Some(peer) = self.peer(number) {
                            peer.settings = Some(settings);
                        }
                        (reader, rest)
                    }
                }
            }
        };
        let read = self.read_frames(number, &mut reader, &bytes);
        if let Some(peer) = self.peer(number) {
            peer.reader = Some(reader);
        }
        read
    }

    /// A primary offers a machine.
    fn offered(&mut self, offer: Offer) -> Result<(Reader, Settings), String> {
        let Offer { timeout, config } = offer;
        let description =
            Description::try_from(&config).map_err(|e| qmp::Error::generic(&e).to_string())?;
        let size = description.config.memory.size.bytes();
        if !self.is_offered(&config) {
            if !self.listens() {
                return Err("another machine is offered than the one that is here".into());
            }
            (self.offered, self.memory, self.filled) = (None, None, false);
            match self.builder.room(description) {
                Ok(memory) => (self.offered, self.memory) = (Some(config), Some(memory)),
                Err(why) => log::error!("replication: the machine cannot run here: {why}"),
            }
        }
        let runs_here = self.memory.is_some();
        let settings = settings::of_backup(&self.task.arbiter, timeout, runs_here);
        let bounds = Bounds {
            ram: self.memory.iter().map(|_| 0..size).collect(),
            disks: Vec::new(),
            sections: vec![MACHINE.to_owned()],
            max_epoch: LONGEST_EPOCH,
        };
        Ok((Reader::new(bounds), settings))
    }

    /// Whether no primary was accepted yet.
    fn listens(&self) -> bool {
        self.backup.as_ref().is_none_or(|backup| backup.state() == State::Listening)
    }

    fn read_frames(
        &mut self,
        number: Number,
        reader: &mut Reader,
        mut bytes: &[u8],
    ) -> Result<(), String> {
        self.inputs.push_back(Input::Heard(number));
        while let Some(event) = reader.next(&mut bytes).map_err(|e| e.to_string())? {
            if let Event::Message(frame) = event {
                self.greet(number, frame);
                self.inputs.push_back(Input::Received(number, frame));
                // What follows may depend on it.
                self.take_inputs();
                if let Some(Accepted { term, last, filling, .. }) =
                    self.accepted.take_if(|accepted| accepted.number == number)
                {
                    reader.accept(term, last, filling);
                }
                if let Message::End { .. } = frame.message {
                    // What was not to be held.
                    self.coming.clear();
                }
                if self.peer(number).is_none() {
                    return Ok(());
                }
                continue;
            }
            let filling = self.backup.as_ref().is_some_and(|b| b.state() == State::Syncing);
            let memory = self.memory.as_ref().filter(|_| filling);
            self.coming.take(&event, memory).map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    /// The first greeting that is accepted says which domain this is the backup of.
    fn greet(&mut self, number: Number, frame: Frame) {
        let settings = self.peer(number).and_then(|peer| peer.settings);
        let (Message::Hello(hello), Some(settings)) = (frame.message, settings) else { return };
        if !self.listens() {
            return;
        }
        self.settings = Some(settings);
        self.lineage = hello.lineage;
        let me = Identity { lineage: hello.lineage, incarnation: self.task.incarnation };
        let word = Mark::Free { term: Term(0) };
        let (backup, outputs) = Backup::new(me, word, settings, Rules::ALL);
        self.backup = Some(backup);
        outputs.into_iter().for_each(|output| self.carry_out(output));
    }

    fn flush(&mut self) {
        let mut ended = Vec::new();
        for Peer { number, connection, .. } in &mut self.peers {
            if connection.flush().is_err() {
                ended.push(*number);
            }
        }
        for number in ended {
            self.close(Some(number));
            self.inputs.push_back(Input::Closed(number));
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
        shown.role = Some(ReplicationSide::Backup);
        shown.incarnation = Some(uuid(self.task.incarnation.0));
        if let Some(backup) = &self.backup {
            shown.lineage = Some(uuid(self.lineage.0));
            let status = backup.status();
            (shown.term, shown.epoch, shown.acked) =
                (status.term.0, status.epoch.0, status.acked.0);
            shown.peer = status.peer.map(|peer| uuid(peer.0));
            (shown.armed, shown.claimed) = (status.armed, status.claimed);
            shown.waiting_for = status.waiting.map(|waiting| waiting.name().to_owned());
            (shown.stalls, shown.missed_beats) = (status.stalls, status.missed_beats);
            shown.largest_gap = micros(status.largest_gap) / 1000;
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
