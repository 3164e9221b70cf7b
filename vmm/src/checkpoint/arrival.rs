//! A machine that comes in: the thread that reads it, and what it agrees on with the main thread.
//!
//! ```text
//!   main thread                              incoming thread
//!                            ---start--->    wait for a peer; confine itself
//!                            <-Described-    the configuration, which is bounded
//!   look for disks, allocate ---Memory-->    fill it; then the state, to the end
//!                            <--Done-----
//!   build the machine
//! ```
//! A thread that reads what a peer sends may do nothing but read, fill that memory and report: its
//! filter is stricter than that of the monitor. What came is dropped whole when anything is wrong.
//! Saved files of this host are read by the same thread without that filter, since their memory may
//! need threads that go on to fill it.
use std::{
    io::{self, BufReader},
    process::Child,
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    thread::{Builder, JoinHandle},
    time::{Duration, Instant},
};

use machine::{Description, Memory, Report};
use state::{
    Config, Frames, Sections,
    frame::{Kind, StreamError},
};

use super::{
    AdaptError, RestoreError, adapt,
    dialogue::{Voice, greeted},
    image::Progress,
    incoming::{Door, IncomingError},
    load::{Loaded, load},
    receive::{ReceiveError, Received, receive_frames},
    send::Cancel,
};
use crate::{
    cli::{Incoming, Source},
    seccomp,
};

/// How long a thread that was told to end may take.
const HANG_LIMIT: Duration = Duration::from_secs(1);

/// What the thread reports.
pub enum Step {
    /// This is what is coming, as it is wanted here; it needs memory.
    Described(Box<Description>),
    /// It is over.
    Done(Result<Box<Arrived>, RestoreError>),
}

/// A machine that came whole and has yet to be built.
pub struct Arrived {
    /// What it was made of.
    pub config: Config,
    /// Its state.
    pub sections: Sections,
    /// Its memory, filled, or filled while the guest runs.
    pub memory: Memory,
    /// Ranges of it that are not zero although the guest may not have touched them.
    pub filled: Vec<std::ops::Range<u64>>,
    /// For the source, which may wait to hear that it is here.
    pub answer: Voice,
}

/// A machine on its way in.
pub struct Arrival {
    steps: Receiver<Step>,
    memory: Option<Sender<Result<Memory, String>>>,
    cancel: Cancel,
    progress: Arc<Progress>,
    thread: Option<JoinHandle<()>>,
    /// Where it comes from, when that is a command of its own.
    child: Option<Child>,
}

impl Arrival {
    /// Begin to take the machine in that `incoming` names, with the disks, NICs and character devices
    /// of `flags` in place of its own. `notify` is called after each step; with `confined`, what a
    /// peer sends is read behind a filter.
    ///
    /// # Errors
    /// When there is nothing to read from.
    pub fn begin(
        incoming: &Incoming,
        flags: &machine::config::MachineConfig,
        report: Report,
        notify: Arc<dyn Fn() + Send + Sync>,
        confined: bool,
    ) -> Result<Self, IncomingError> {
        let (report_step, steps) = channel();
        let (give, memory) = channel();
        let cancel = Cancel::new()?;
        let progress = Arc::new(Progress::default());
        let (asked, flags) = (incoming.asked.clone(), flags.clone());
        let overrides = move |to: &mut Description| adapt::adapt(to, &asked, &flags);
        let tell = move |step| {
            // The process ends when the main thread does not listen any more.
            let _ = report_step.send(step);
            notify();
        };
        let mut child = None;
        let task: Box<dyn FnOnce() + Send> = match &incoming.source {
            Source::Directory { path, mapped } => {
                let (path, mapped) = (path.clone(), *mapped);
                Box::new(move || {
                    let read = || {
                        let Loaded { state, mut description, layers } = load(&path)?;
                        overrides(&mut description)?;
                        adapt::check_disks(&description)?;
                        description
                            .check_spots(state.config.id.into(), &state.sections.devices)
                            .map_err(AdaptError::from)?;
                        let wanted = &description.config.memory;
                        let (memory, filled) = layers.memory(wanted, mapped, &report)?;
                        let (config, sections) = (state.config, state.sections);
                        let answer = Voice::silent();
                        Ok(Box::new(Arrived { config, sections, memory, filled, answer }))
                    };
                    tell(Step::Done(read()));
                })
            }
            Source::Stream(stream) => {
                let door;
                (door, child) = Door::open(stream)?;
                let (cancel, shared) = (cancel.clone(), progress.clone());
                Box::new(move || {
                    let result =
                        read_stream(door, &cancel, confined, &overrides, &memory, &shared, &tell);
                    tell(Step::Done(result));
                })
            }
        };
        let thread = Builder::new().name("incoming".into()).spawn(task)?;
        let (memory, thread) = (Some(give), Some(thread));
        Ok(Self { steps, memory, cancel, progress, thread, child })
    }

    /// How far it is.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// The next step, if it has been made.
    pub fn step(&mut self) -> Option<Step> {
        self.steps.try_recv().ok()
    }

    /// Answer [`Step::Described`]: memory, or why there is none for this machine.
    pub fn fill(&mut self, memory: Result<Memory, String>) {
        // A thread that has given up says why in its last step.
        let _ = self.memory.take().map(|to| to.send(memory));
    }

    /// Make it end as soon as it can: [`Step::Done`] comes, unless files hang.
    pub fn cancel(&mut self) {
        self.progress.cancel();
        self.memory = None;
        self.cancel.cancel();
    }

    /// It is over: wait until the thread has let go of what it has, unless it hangs.
    pub fn finish(mut self) {
        let deadline = Instant::now() + HANG_LIMIT;
        let left = || deadline.saturating_duration_since(Instant::now());
        let ends = |thread: &JoinHandle<()>| loop {
            if thread.is_finished() || self.steps.recv_timeout(left()).is_err() {
                break thread.is_finished() || left() > Duration::ZERO;
            }
        };
        if let Some(thread) = self.thread.take().filter(ends) {
            let _ = thread.join();
        }
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // It has said all, or it is of no use.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Read a machine that a peer sends.
fn read_stream(
    door: Door,
    cancel: &Cancel,
    confined: bool,
    overrides: &impl Fn(&mut Description) -> Result<(), AdaptError>,
    memory: &Receiver<Result<Memory, String>>,
    progress: &Progress,
    tell: &impl Fn(Step),
) -> Result<Box<Arrived>, RestoreError> {
    let cancelled = |e: RestoreError| match progress.is_cancelled() {
        true => RestoreError::Cancelled,
        false => e,
    };
    let from = door.wait(cancel).map_err(|e| cancelled(e.into()))?;
    let back = from.way_back().map_err(IncomingError::Wait)?;
    if confined {
        seccomp::confine_reader().map_err(|e| IncomingError::Wait(io::Error::other(e)))?;
    }
    let mut answer = Voice::silent();
    let read = || {
        let mut frames = Frames::begin(BufReader::with_capacity(64 << 10, from))?;
        if greeted(&mut frames)? {
            answer = Voice::new(back).map_err(ReceiveError::Deaf)?;
        }
        let allocate = |description: &Description| {
            tell(Step::Described(Box::new(description.clone())));
            match memory.recv() {
                Ok(Ok(memory)) => {
                    answer.say(Kind::Accept, "").map_err(ReceiveError::Deaf)?;
                    Ok(memory)
                }
                Ok(Err(why)) => {
                    answer.say(Kind::Refuse, &why).map_err(ReceiveError::Deaf)?;
                    Err(ReceiveError::NoRoom(why))
                }
                Err(_) => Err(ReceiveError::NoRoom("it was given up".into())),
            }
        };
        let received = receive_frames(&mut frames, overrides, allocate, progress)?;
        if answer.is_heard() {
            answer.say(Kind::Ready, "").map_err(ReceiveError::Deaf)?;
            let kind = frames.take(&mut Vec::new()).map_err(|e| match e {
                StreamError::Truncated { .. } => ReceiveError::NotHandedOver { said: "nothing" },
                other => other.into(),
            })?;
            if kind != Kind::Go {
                return Err(ReceiveError::NotHandedOver { said: kind.name() });
            }
        }
        Ok(received)
    };
    match read() {
        Ok(Received { config, sections, memory }) => {
            Ok(Box::new(Arrived { config, sections, memory, filled: Vec::new(), answer }))
        }
        Err(e) => {
            let e = cancelled(e.into());
            answer.fail(Kind::Failed, &qmp::Error::generic(&e).to_string());
            Err(e)
        }
    }
}
