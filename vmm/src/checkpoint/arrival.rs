//! An incoming machine: the thread that takes it in, and the thread that reads it where a peer
//! sends it.
//!
//! ```text
//!   main thread              incoming thread                          stream thread
//!               ---start---> wait for a peer       ------start------> confine itself
//!               <-Described- CPU? disks? taps?     <-----Room-------- bounded configuration
//!                            allocate              -----memory------> fill it; then read the state
//!                            build the machine     <----Machine------
//!                                                  ------built------> Ready; wait for Go
//!               <---Done---- take disks and taps   <----the end------
//! ```
//! The thread that reads what a peer sends may only read, fill that memory, answer and report: its
//! filter is stricter than those of the other threads. If anything is wrong, everything that was
//! received is dropped. Saved files of this host are read by the incoming thread itself, which has
//! no filter and waits for storage in place of the main thread. It has to end before the guest
//! runs.
use std::{
    io::{self, BufReader},
    process::Child,
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    thread::{self, Builder},
    time::Duration,
};

use config::{
    Description,
    incoming::{Incoming, Replica, Source},
};
use machine::{Helpers, Machine, Memory, Pending, Refused, Report, kvm::opening::Opening};
use state::{
    Frames,
    cpu::Cpu,
    frame::{Kind, StreamError},
};

use super::{
    OverrideError, RestoreError,
    assembly::{Arrived, Assembly, Taking, take},
    dialogue::{GO_LIMIT, Voice, greeted},
    incoming::{Door, IncomingError, Peer},
    memory_file::Progress,
    receive::{ReceiveError, Received, receive_frames},
    send::Cancel,
};
use crate::{
    lifecycle::Halt,
    replication::{
        entrance,
        host::{Host as BackupHost, Shared, incarnation},
        process::Process,
        standby::{Task, Tell, ToStandby},
    },
    seccomp::{Confinement, Kind as Thread},
};

/// How long a cancelled thread may take to end.
const HANG_LIMIT: Duration = Duration::from_secs(1);

/// What the incoming thread reports.
pub enum Step {
    /// A peer has sent the description of its machine.
    Described,
    /// What a backup tells.
    Replica(Tell),
    /// It is over.
    Done(Result<Box<Arrived>, RestoreError>),
}

/// An incoming machine.
pub struct Arrival {
    steps: Receiver<Step>,
    cancel: Cancel,
    progress: Arc<Progress>,
    /// Its thread has released what it holds.
    over: Option<Pending<()>>,
    /// Where it is a backup.
    replica: Option<Shared>,
    /// The command that the stream comes from, if one was started.
    child: Option<Child>,
}

impl Arrival {
    /// Begin to take in the machine that `incoming` names, with the disks, NICs and character
    /// devices of `flags` in place of its own, on one of the `helpers`. `notify` is called after each
    /// step; the machine's threads are confined by `confinement`.
    ///
    /// # Errors
    /// When there is no stream or directory to read from.
    pub fn begin(
        incoming: &Incoming,
        flags: &config::MachineConfig,
        report: Report,
        notify: Arc<dyn Fn() + Send + Sync>,
        confinement: &Confinement,
        helpers: Helpers,
    ) -> Result<Self, IncomingError> {
        let (report_step, steps) = channel();
        let cancel = Cancel::new()?;
        let progress = Arc::new(Progress::default());
        let assembly = Assembly::new(incoming, flags, report, confinement.clone(), helpers.clone());
        let tell = move |step| {
            // If the main thread no longer receives, the process is ending.
            let _ = report_step.send(step);
            notify();
        };
        let passing = confinement.passing("incoming");
        let end = move |result: Result<Arrived, RestoreError>, tell: &dyn Fn(Step)| {
            tell(Step::Done(result.map(Box::new)));
            drop(passing);
        };
        let (mut child, mut replica) = (None, None);
        let task: Box<dyn FnOnce() + Send> = match &incoming.source {
            Source::Directory { path, mapping, disks } => {
                let opening = assembly.open_kvm();
                let (path, mapping, place) = (path.clone(), *mapping, disks.clone());
                let progress = progress.clone();
                Box::new(move || {
                    let place = place.as_deref();
                    let machine = assembly.saved_into(&path, mapping, place, opening, &progress);
                    end(machine, &tell);
                })
            }
            Source::Replica(Replica { place, arbiter, tls }) => {
                let security = entrance::security(tls)?;
                let (listener, file) = entrance::listen(place, tls)?;
                let incarnation = incarnation()?;
                let (shared, orders) = Shared::new(incarnation)?;
                let task = Task {
                    listener,
                    security,
                    arbiter: arbiter.clone(),
                    incarnation,
                    process: Process::own(),
                    orders,
                    wake: shared.wake.clone(),
                    status: shared.status.clone(),
                };
                replica = Some(shared);
                let host = BackupHost { assembly, task, confinement: confinement.clone() };
                Box::new(move || {
                    let _file = file;
                    let result = host.serve(|told| tell(Step::Replica(told)));
                    end(result, &tell);
                })
            }
            Source::Stream(stream) => {
                let opening = assembly.open_kvm();
                let door;
                (door, child) = Door::open(stream)?;
                let (cancel, progress) = (cancel.clone(), progress.clone());
                let confinement = confinement.clone();
                Box::new(move || {
                    let host = Host {
                        assembly: &assembly,
                        progress: &progress,
                        tell: &tell,
                        confinement: &confinement,
                    };
                    let result = host.take_in(door, &cancel, opening);
                    end(result, &tell);
                })
            }
        };
        let over = Some(helpers.run(task));
        Ok(Self { steps, cancel, progress, over, replica, child })
    }

    /// Its progress.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// The backup, if it is one.
    pub fn replica(&self) -> Option<&Shared> {
        self.replica.as_ref()
    }

    /// The next step, if it has been made.
    pub fn step(&mut self) -> Option<Step> {
        self.steps.try_recv().ok()
    }

    /// Make it end as soon as possible: [`Step::Done`] still comes, unless a file hangs.
    pub fn cancel(&mut self) {
        self.progress.cancel();
        self.cancel.cancel();
        self.replica.iter().for_each(|replica| replica.give(ToStandby::End));
    }

    /// Wait, once it is over, until the thread has released what it holds, unless it hangs.
    pub fn finish(mut self) {
        if let Some(over) = self.over.take() {
            over.wait_for_end(HANG_LIMIT);
        }
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // The command has sent everything, or is no longer needed.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What the thread that reads a stream requests of the incoming thread.
enum Ask {
    /// Memory for this machine, if it can run here; and the CPU that its guest was promised, if
    /// that is known yet.
    Room(Box<Description>, Option<Cpu>),
    /// The machine, and when its disks and taps are taken: at once where no dialogue follows.
    Machine(Box<Received>, Taking),
}

/// Sends requests, and receives the answers, each of which may be the reason for a refusal.
struct Asking {
    ask: Sender<Ask>,
    memory: Receiver<Result<Memory, String>>,
    built: Receiver<Result<(), String>>,
}

/// The incoming thread, where a peer sends the machine.
struct Host<'a, T> {
    assembly: &'a Assembly,
    progress: &'a Progress,
    tell: &'a T,
    confinement: &'a Confinement,
}

impl<T: Fn(Step) + Sync> Host<'_, T> {
    fn take_in(
        &self,
        door: Door,
        cancel: &Cancel,
        opening: Opening,
    ) -> Result<Arrived, RestoreError> {
        let from = door.wait(cancel).map_err(|e| self.cancelled(e.into()))?;
        let (ask, asked) = channel();
        let (give, memory) = channel();
        let (verdict, built) = channel();
        let asking = Asking { ask, memory, built };
        thread::scope(|scope| {
            let (assembly, progress) = (self.assembly, self.progress);
            let overrides = |to: &mut Description| assembly.apply_overrides(to);
            let confinement = self.confinement;
            let first_step = confinement.first_step(Thread::Stream, "stream");
            let confine =
                || first_step().or_else(|Refused| confinement.check().map_err(io::Error::other));
            let task = move || Reader { asking, overrides, progress }.read(from, confine);
            let reader = Builder::new().name("stream".into()).spawn_scoped(scope, task);
            let reader = reader.map_err(IncomingError::Wait)?;
            let (mut opening, mut machine, mut refused) = (Some(opening), None, None);
            for ask in asked {
                match ask {
                    Ask::Room(description, cpu) => {
                        (self.tell)(Step::Described);
                        let room = assembly.make_room(&description, cpu.as_ref());
                        let _ = give.send(for_source(room, &mut refused));
                    }
                    Ask::Machine(received, taking) => {
                        let Some(opening) = opening.take() else { break };
                        let new = assembly.received(*received, opening, taking);
                        let new = for_source(new, &mut refused).map(|new| machine = Some(new));
                        let _ = verdict.send(new);
                    }
                }
            }
            let ended = reader.join().unwrap_or_else(|_| {
                Err(IncomingError::Wait(io::Error::other("its reader thread has panicked")).into())
            });
            match (refused, ended, machine) {
                (Some(why), _, _) | (None, Err(why), _) => Err(self.cancelled(why)),
                (None, Ok(answer), Some(machine)) => self.end(machine, answer),
                (None, Ok(_), None) => Err(ReceiveError::NotHandedOver { said: "nothing" }.into()),
            }
        })
    }

    /// The machine belongs to this process now: take its disks and taps.
    fn end(
        &self,
        (mut machine, halted): (Machine, Option<Halt>),
        answer: Voice,
    ) -> Result<Arrived, RestoreError> {
        match take(&mut machine) {
            Ok(()) if !self.progress.is_cancelled() => {
                Ok(Arrived { machine, halted, answer, promotion: None })
            }
            other => {
                // The machine is dropped first, as the source takes its disks and taps back.
                drop(machine);
                let why = self.cancelled(other.err().unwrap_or(RestoreError::Cancelled));
                answer.fail(Kind::Failed, &qmp::Error::generic(&why).to_string());
                Err(why)
            }
        }
    }

    fn cancelled(&self, why: RestoreError) -> RestoreError {
        if self.progress.is_cancelled() { RestoreError::Cancelled } else { why }
    }
}

/// A result in the form in which it is sent to the source; the error itself is kept here.
fn for_source<V>(
    result: Result<V, RestoreError>,
    error: &mut Option<RestoreError>,
) -> Result<V, String> {
    result.map_err(|e| {
        let text = qmp::Error::generic(&e).to_string();
        *error = Some(e);
        text
    })
}

/// The thread that reads what a peer sends.
struct Reader<'a, O> {
    asking: Asking,
    overrides: O,
    progress: &'a Progress,
}

impl<O: Fn(&mut Description) -> Result<(), OverrideError>> Reader<'_, O> {
    /// `confine` the thread, and read to the end of the dialogue, if there is one: after that the
    /// machine belongs to this process.
    fn read(
        self,
        from: Peer,
        confine: impl FnOnce() -> io::Result<()>,
    ) -> Result<Voice, RestoreError> {
        let back = from.way_back().map_err(IncomingError::Wait)?;
        confine().map_err(IncomingError::Wait)?;
        let mut answer = Voice::silent();
        match self.dialogue(from, back, &mut answer) {
            Ok(()) => Ok(answer),
            Err(e) => {
                answer.fail(Kind::Failed, &qmp::Error::generic(&e).to_string());
                Err(e.into())
            }
        }
    }

    fn dialogue(
        &self,
        from: Peer,
        back: std::os::fd::OwnedFd,
        answer: &mut Voice,
    ) -> Result<(), ReceiveError> {
        let Self { asking, overrides, progress } = self;
        let gone = || ReceiveError::NoRoom("it was abandoned".into());
        let deadline = from.deadline();
        let mut frames = Frames::begin(BufReader::with_capacity(64 << 10, from))?;
        let mut cpu = None;
        if let Some(greeted) = greeted(&mut frames)? {
            *answer = Voice::new(back).map_err(ReceiveError::Deaf)?;
            cpu = greeted.cpu;
        }
        let mut allocate = |description: &Description| {
            let ask = Ask::Room(Box::new(description.clone()), cpu.take());
            asking.ask.send(ask).map_err(|_| gone())?;
            match asking.memory.recv().map_err(|_| gone())? {
                Ok(memory) => {
                    answer.say(Kind::Accept, "").map_err(ReceiveError::Deaf)?;
                    Ok(memory)
                }
                Err(why) => {
                    answer.say(Kind::Refuse, &why).map_err(ReceiveError::Deaf)?;
                    Err(ReceiveError::NoRoom(why))
                }
            }
        };
        let received = receive_frames(&mut frames, overrides, &mut allocate, progress)?;
        let dialogue = answer.is_heard();
        let taking = if dialogue { Taking::Later } else { Taking::AtOnce };
        asking.ask.send(Ask::Machine(Box::new(received), taking)).map_err(|_| gone())?;
        asking.built.recv().map_err(|_| gone())?.map_err(ReceiveError::NoRoom)?;
        if dialogue {
            answer.say(Kind::Ready, "").map_err(ReceiveError::Deaf)?;
            deadline.set(GO_LIMIT);
            let kind = frames.take(&mut Vec::new()).map_err(|e| match e {
                StreamError::Truncated { .. } => ReceiveError::NotHandedOver { said: "nothing" },
                StreamError::Io(e) if e.kind() == io::ErrorKind::TimedOut => ReceiveError::NoGo,
                other => other.into(),
            })?;
            if kind != Kind::Go {
                return Err(ReceiveError::NotHandedOver { said: kind.name() });
            }
        }
        Ok(())
    }
}
