//! A save under way: the thread that copies and writes, and its exchange with the main thread.
//!
//! ```text
//!   main thread                              checkpoint thread
//!                            ---save---->    open the destination
//!                            <--Opened---
//!   log dirty pages          ---Copy---->    copy all memory once
//!                            <--Round----
//!   what has changed         --Changed-->    copy the changes; repeat while they get fewer
//!                            <--Ready----    with preallocated room for the rest
//!   stop, capture, run again ---Epoch--->    write the copy
//!                                            complete the save
//!                            <--Done-----
//! ```
//! Where the stream has a return path, `HandOver` and `Go` come before `Done`: see
//! [dialogue](super::dialogue).
//!
//! A guest that is stopped already, or is to stay stopped, is captured at once. Its memory is then
//! written directly instead of being copied aside first. So is the memory of a running guest that
//! has changed too much of it for a copy: the thread reports `Copied` when the guest may run again.
mod rounds;

use std::{
    io,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    time::{Duration, Instant},
};

use machine::{
    Epoch, Memory, Pages,
    memory::{
        image,
        staging::{self, Staging},
    },
    random,
};

use state::Config;

use self::rounds::{Next, Round, Rounds};
pub use super::memory_file::Progress;
use super::{
    save::{Finished, SaveError, Saved, Sink, Source},
    send::Cancel,
};

/// How long a running guest may be stopped, unless the client sets `downtime-limit`.
pub const DOWNTIME_LIMIT: Duration = Duration::from_millis(30);

/// What the thread reports.
pub enum Step {
    /// The destination is open.
    Opened,
    /// A round is copied; the thread needs to know what has changed meanwhile.
    Round,
    /// The rest has to be copied with the machine stopped.
    Ready(Left),
    /// Guest memory is no longer needed.
    Copied,
    /// The receiver has everything, and waits for this machine to release disks and taps.
    HandOver,
    /// The save is over. On success, with what a later save may build on.
    Done(Result<Option<Saved>, SaveError>),
}

/// What is left to be copied when the guest has to be stopped.
#[derive(Default)]
pub struct Left {
    /// Memory that has changed and has not been copied since.
    pub ranges: Vec<Range<u64>>,
    /// Room for copies of memory, if the guest is to run again at once.
    pub staging: Option<Staging>,
}

/// What the thread is instructed to do.
enum Instruction {
    Copy(First),
    Changed(Vec<Range<u64>>),
    Epoch(Box<(Config, Epoch)>),
    Go,
}

/// What is copied first while the guest runs.
pub enum First {
    /// All memory that is not zero. With ranges that may hold data although the guest has not
    /// touched them.
    All(Arc<[Range<u64>]>),
    /// These ranges.
    These(Vec<Range<u64>>),
}

/// Something for the thread to do.
pub type Task = Box<dyn FnOnce() + Send>;
/// Opens the destination of a save.
pub type Open = Box<dyn FnOnce(&Progress) -> Result<Box<dyn Sink>, SaveError> + Send>;

/// The handle of the thread. The thread is started at the beginning, because none can be started
/// behind the system-call filter.
pub struct Checkpointer {
    tasks: Sender<Task>,
    notify: Arc<dyn Fn() + Send + Sync>,
    downtime_limit: Arc<AtomicU64>,
}

/// What is saved, and how.
pub struct Order {
    /// Opens the destination. It may wait without a limit if `cancel` ends that.
    pub open: Open,
    /// Memory of the machine.
    pub memory: Memory,
    /// Ends the waiting of `open`, and of the destination that it opens.
    pub cancel: Option<Cancel>,
    /// Name of the destination, for messages.
    pub place: String,
    /// The guest is to run again as soon as it has been captured, so its memory is copied aside.
    /// Otherwise it stays stopped until everything has been written.
    pub resume: bool,
    /// The guest may keep running for as long as it changes memory more quickly than it can be
    /// sent.
    pub patient: bool,
}

impl Checkpointer {
    /// The handle, and the body of the thread. `notify` is called after each step; it must not
    /// block.
    pub fn new(notify: Arc<dyn Fn() + Send + Sync>) -> (Self, impl FnOnce() + Send + 'static) {
        let (tasks, inbox) = channel::<Task>();
        let this = Self { tasks, notify, downtime_limit: Arc::default() };
        this.limit_downtime(DOWNTIME_LIMIT);
        (this, move || inbox.iter().for_each(|task| task()))
    }

    /// Called by the thread when it has something to report.
    pub fn notify(&self) -> Arc<dyn Fn() + Send + Sync> {
        self.notify.clone()
    }

    /// Have the thread do something else than a save.
    ///
    /// # Errors
    /// When the thread has gone.
    pub fn run(&self, task: Task) -> Result<(), SaveError> {
        self.tasks.send(task).map_err(|_| SaveError::Cancelled)
    }

    /// Set how long a running guest may be stopped. Also applies to a save under way.
    pub fn limit_downtime(&self, limit: Duration) {
        let limit = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX);
        self.downtime_limit.store(limit, Ordering::Relaxed);
    }

    /// The limit set by [`Checkpointer::limit_downtime`].
    pub fn downtime_limit(&self) -> Duration {
        Duration::from_nanos(self.downtime_limit.load(Ordering::Relaxed))
    }

    /// Start a save.
    ///
    /// # Errors
    /// When the thread has gone.
    pub fn save(&self, order: Order) -> Result<Job, SaveError> {
        let progress = Arc::new(Progress::default());
        let (instructions, inbox) = channel::<Instruction>();
        let (report, steps) = channel();
        let (notify, shared) = (self.notify.clone(), progress.clone());
        let report = move |step| {
            // If the main thread no longer receives, the process is ending.
            let _ = report.send(step);
            notify();
        };
        let (cancel, place) = (order.cancel.clone(), order.place.clone());
        let limit = self.downtime_limit.clone();
        // Everything that the save holds is dropped before this is reported: the client may then
        // check the destination.
        let task = move || report(Step::Done(run(order, &limit, &shared, &inbox, &report)));
        self.tasks.send(Box::new(task)).map_err(|_| SaveError::Cancelled)?;
        let started = Instant::now();
        Ok(Job {
            progress,
            steps,
            instructions: Some(instructions),
            cancel,
            place,
            started,
            took: None,
        })
    }
}

fn run(
    order: Order,
    limit: &AtomicU64,
    progress: &Progress,
    inbox: &Receiver<Instruction>,
    report: &impl Fn(Step),
) -> Result<Option<Saved>, SaveError> {
    let mut sink = (order.open)(progress)?;
    sink.before_capture()?;
    progress.check().map_err(|_| SaveError::Cancelled)?;
    report(Step::Opened);
    let mut instruction = inbox.recv();
    if let Ok(Instruction::Copy(first)) = instruction {
        let mut ranges = match first {
            First::All(filled) => image::used(&order.memory, &filled).map_err(SaveError::Memory)?,
            First::These(ranges) => ranges,
        };
        let mut rounds = Rounds { resume: order.resume, patient: order.patient, made: 0 };
        loop {
            let (began, copied) = (Instant::now(), staging::bytes(&ranges));
            copy(&mut *sink, &Source::Guest(&ranges), copied, progress)?;
            let took = began.elapsed();
            report(Step::Round);
            let Ok(Instruction::Changed(changed)) = inbox.recv() else {
                return Err(SaveError::Cancelled);
            };
            ranges = changed;
            let round = Round { copied, took, left: staging::bytes(&ranges) };
            let next = rounds.after(&round, Duration::from_nanos(limit.load(Ordering::Relaxed)));
            progress.diverges.store(next == Next::RoundInVain, Ordering::Relaxed);
            if next == Next::Stop {
                break;
            }
        }
        sink.before_capture()?;
        // Without room for a copy, memory is written while the guest is stopped.
        let room = || Staging::touched(staging::room_for(staging::bytes(&ranges))).ok();
        let staging = order.resume.then(room).flatten();
        report(Step::Ready(Left { ranges, staging }));
        instruction = inbox.recv();
    }
    let Ok(Instruction::Epoch(last)) = instruction else { return Err(SaveError::Cancelled) };
    let (config, Epoch { mut state, pages, spot_checks }) = *last;
    match pages {
        Pages::Staged(staging) => {
            // This comes first, as the guest runs already and its writes may wait for it.
            spot_checks.add_to(&mut state).map_err(SaveError::SpotCheck)?;
            sink.copy_disks(progress)?;
            copy(&mut *sink, &Source::Staged(&staging), staging.bytes(), progress)?;
        }
        Pages::InPlace(ranges) => {
            copy(&mut *sink, &Source::Guest(&ranges), staging::bytes(&ranges), progress)?;
            report(Step::Copied);
            spot_checks.add_to(&mut state).map_err(SaveError::SpotCheck)?;
            sink.copy_disks(progress)?;
        }
    }
    match sink.finish(config, state, progress)? {
        Finished::Over(saved) => Ok(saved),
        Finished::HandOver(to) => {
            // From here on the save cannot be cancelled: the main thread may have released the
            // backends.
            progress.commit().map_err(|_| SaveError::Cancelled)?;
            report(Step::HandOver);
            let Ok(Instruction::Go) = inbox.recv() else { return Err(SaveError::Cancelled) };
            to.go().map(|()| None)
        }
    }
}

fn copy(
    sink: &mut dyn Sink,
    source: &Source<'_>,
    bytes: u64,
    progress: &Progress,
) -> Result<(), SaveError> {
    progress.total.fetch_add(bytes, Ordering::Relaxed);
    sink.copy(source, progress)
}

/// A save that is under way, or over.
pub struct Job {
    progress: Arc<Progress>,
    steps: Receiver<Step>,
    instructions: Option<Sender<Instruction>>,
    cancel: Option<Cancel>,
    place: String,
    started: Instant,
    took: Option<Duration>,
}

impl Job {
    /// Its progress.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Name of the destination, for messages.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// How long the save has taken so far, or took.
    pub fn time(&self) -> Duration {
        self.took.unwrap_or_else(|| self.started.elapsed())
    }

    /// Make the save stop as soon as possible; [`Step::Done`] still comes. False if it is too late,
    /// and the save may count.
    pub fn cancel(&self) -> bool {
        let cancelled = self.progress.cancel();
        if let Some(cancel) = self.cancel.as_ref().filter(|_| cancelled) {
            cancel.cancel();
        }
        cancelled
    }

    /// Make the save end, because the main thread cannot do its part.
    pub fn give_up(&mut self) {
        self.cancel();
        self.instructions = None;
    }

    /// The next step, if it has been made.
    pub fn step(&mut self) -> Option<Step> {
        let step = self.steps.try_recv().ok();
        self.note(step)
    }

    /// Wait for the next step.
    pub fn wait(&mut self, at_most: Duration) -> Option<Step> {
        let step = self.steps.recv_timeout(at_most).ok();
        self.note(step)
    }

    fn note(&mut self, step: Option<Step>) -> Option<Step> {
        if let Some(Step::Done(_)) = step {
            self.took = Some(self.started.elapsed());
        }
        step
    }

    /// Answer [`Step::Opened`], if the guest runs meanwhile.
    pub fn copy(&self, first: First) {
        self.instruct(Instruction::Copy(first));
    }

    /// Answer [`Step::Round`], with what has changed since the last time.
    pub fn changed(&self, ranges: Vec<Range<u64>>) {
        self.instruct(Instruction::Changed(ranges));
    }

    /// Answer [`Step::Ready`] or [`Step::Opened`], with the state of the machine.
    pub fn epoch(&self, config: Config, epoch: Epoch) {
        self.instruct(Instruction::Epoch(Box::new((config, epoch))));
    }

    /// Answer [`Step::HandOver`]: this machine has released disks and taps.
    pub fn go(&self) {
        self.instruct(Instruction::Go);
    }

    fn instruct(&self, instruction: Instruction) {
        // A thread that has given up reports the reason in its last step.
        if let Some(to) = &self.instructions {
            let _ = to.send(instruction);
        }
    }
}

/// A random number, different from that of any other save.
///
/// # Errors
/// When the host cannot provide random numbers.
pub fn new_id() -> io::Result<u128> {
    random::bytes().map(u128::from_be_bytes)
}
